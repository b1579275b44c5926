//! Images that are decoded while a network trains, beside the same images in memory.

use std::fs::File;
use std::path::Path;

use dilt::data::{DataSet, Examples, Files, Pixels};
use dilt::device::Device;
use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::model::Model;
use dilt::nn::network::Network;
use dilt::nn::plan::{OptimizerKind, Use};
use dilt::nn::weights::Weights;
use dilt::train::{
    Augmentation, Checkpoint, Chunk, Images, Labelled, Observer, Recipe, TicketArray, Training, evaluate,
};

use crate::command::{dilt, failed};
use crate::support::devices;

const EXAMPLES: usize = 37;
const CLASSES: usize = 3;
/// Five steps an epoch, the last of five examples.
const BATCH: usize = 8;
const STORED: [usize; 3] = [3, 12, 14];

fn file_name(example: usize) -> String {
    format!("{example:02}.png")
}

/// A noisy picture of its own for each example, of another size than it is stored in.
fn write_png(folder: &Path, example: usize) {
    let (width, height) = (20 + example % 3, 24);
    let file = File::create(folder.join(file_name(example))).unwrap();
    let mut encoder = png::Encoder::new(file, width as u32, height);
    encoder.set_color(png::ColorType::Rgb);
    let noise = |i: usize| ((i + 1000 * example).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u8;
    let pixels: Vec<u8> = (0..width * height as usize * 3).map(noise).collect();
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
}

/// The files in a folder, as a data set that decodes them when they are needed.
fn in_files(folder: &Path) -> DataSet {
    (0..EXAMPLES).for_each(|example| write_png(folder, example));
    let files = (0..EXAMPLES).map(|example| (file_name(example), 1)).collect();
    let train = Examples {
        images: Pixels::Files(Files { root: folder.into(), files }),
        labels: (0..EXAMPLES).map(|i| (i * 5 % 7 % CLASSES) as u32).collect(),
    };
    DataSet {
        name: "noise".into(),
        shape: [3, 8, 8],
        stored: STORED,
        classes: CLASSES,
        scale: 255.0,
        mean: vec![0.5, 0.4, 0.6],
        std: vec![0.2, 0.3, 0.25],
        train,
        val: Examples::default(),
        test: Examples::default(),
    }
}

/// The same, decoded once.
fn in_memory(data: &DataSet) -> DataSet {
    let Pixels::Files(files) = &data.train.images else { panic!("expected files") };
    let len: usize = data.stored.iter().product();
    let mut bytes = vec![0; EXAMPLES * len];
    for (example, image) in bytes.chunks_exact_mut(len).enumerate() {
        files.decode(example, data.stored, image).unwrap();
    }
    let train = Examples { images: Pixels::Bytes(bytes), labels: data.train.labels.clone() };
    DataSet { train, ..data.clone() }
}

fn recipe(augment: Augmentation, jitter: f32) -> Recipe {
    Recipe { epochs: 3, batch: BATCH, lr: 0.05, augment, jitter, ..Recipe::default() }
}

fn model() -> Model {
    let set = ["classes=3", "image=[3,8,8]", "widths=[3,5,8]"].map(String::from);
    ModelConfig::load("resnet8", &set).unwrap().build().unwrap()
}

/// A network, and the steps that it has done.
struct Trained {
    network: Network,
    loss: Vec<f32>,
}

/// The loss of each step.
struct Losses(Vec<f32>);

impl Observer for Losses {
    fn chunk(&mut self, chunk: &Chunk, _: &Network, _: usize, _: usize) -> dilt::Result<()> {
        self.0.extend(&chunk.loss);
        Ok(())
    }
}

fn labelled<'a>(device: &Device, images: &'a Images, data: &DataSet) -> Labelled<'a> {
    Labelled::all(device, images, &data.train, CLASSES).unwrap()
}

/// Trains to the end, or to a step.
fn train(device: &Device, data: &DataSet, workers: usize, recipe: &Recipe, stop: usize) -> dilt::Result<Trained> {
    train_in(None, device, data, workers, recipe, stop)
}

/// The same, its steps together with those of others.
fn train_in(
    array: Option<&TicketArray>,
    device: &Device,
    data: &DataSet,
    workers: usize,
    recipe: &Recipe,
    stop: usize,
) -> dilt::Result<Trained> {
    let images = Images::new(device, data, &data.train)?.with_workers(workers);
    let examples = labelled(device, &images, data);
    let mut network = Network::new(device, &model(), BATCH, Use::Train(OptimizerKind::Sgd))?;
    network.load(&init::draw(&model(), 0))?;
    let mut training = Training::new(&mut network, &examples, recipe, 7)?;
    training.stop_after(stop);
    training.join(array);
    let mut losses = Losses(Vec::new());
    training.run(&mut network, 0, &mut losses)?;
    Ok(Trained { network, loss: losses.0 })
}

fn same(a: &Weights, b: &Weights) -> bool {
    let bits = |weights: &Weights| -> Vec<u32> { weights.tensors.values().flatten().map(|v| v.to_bits()).collect() };
    bits(a) == bits(b)
}

/// The host as it is, and the GPU where there is one: what differs between the host's forms is tested elsewhere.
fn host_and_gpu() -> Vec<Device> {
    devices().into_iter().filter(|case| ["host", "cuda"].contains(&&*case.label)).map(|case| case.device).collect()
}

#[test]
fn files_are_decoded_for_each_step_of_trainings_together() {
    let folder = tempfile::tempdir().unwrap();
    let (data, recipe) = (in_files(folder.path()), recipe(Augmentation::Crop, 0.0));
    for device in host_and_gpu() {
        let array = TicketArray::new(device.with_policy(device.policy()).unwrap());
        let expected = train(&device, &data, 2, &recipe, usize::MAX).unwrap().network.weights().unwrap();
        let one = || {
            let device = device.with_policy(device.policy()).unwrap();
            let trained = train_in(Some(&array), &device, &data, 2, &recipe, usize::MAX).unwrap();
            trained.network.weights().unwrap()
        };
        let weights =
            std::thread::scope(|scope| [(); 2].map(|()| scope.spawn(one)).map(|thread| thread.join().unwrap()));
        assert!(weights.iter().all(|weights| same(weights, &expected)));
    }
}

#[test]
fn files_and_images_in_memory_train_and_evaluate_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let files = in_files(folder.path());
    let memory = in_memory(&files);
    for device in host_and_gpu() {
        let mut seen = Vec::new();
        for (augment, jitter) in [
            (Augmentation::None, 0.0),
            (Augmentation::Crop, 0.3),
            (Augmentation::Standard, 0.0),
            (Augmentation::ResizedCrop, 0.4),
        ] {
            let recipe = recipe(augment, jitter);
            let mut resident = train(&device, &memory, 1, &recipe, 15).unwrap();
            assert_eq!(resident.loss.len(), 15);
            let weights = resident.network.weights().unwrap();
            let images = Images::new(&device, &memory, &memory.train).unwrap();
            let score = evaluate(&mut resident.network, &labelled(&device, &images, &memory), BATCH, true).unwrap();
            for workers in [1, 2, 7] {
                let mut streamed = train(&device, &files, workers, &recipe, 15).unwrap();
                assert_eq!(streamed.loss, resident.loss, "{augment:?}, {workers} workers");
                assert!(same(&streamed.network.weights().unwrap(), &weights), "{augment:?}, {workers} workers");
                let images = Images::new(&device, &files, &files.train).unwrap().with_workers(workers);
                let again = evaluate(&mut streamed.network, &labelled(&device, &images, &files), BATCH, true).unwrap();
                assert_eq!((again.logits, again.loss, again.top1), (score.logits.clone(), score.loss, score.top1));
            }
            seen.push(resident.loss);
        }
        seen.dedup();
        assert_eq!(seen.len(), 4, "each augmentation trains on images of its own");
    }
}

#[test]
fn a_training_on_files_that_stops_within_an_epoch_goes_on_as_if_it_had_not() {
    let folder = tempfile::tempdir().unwrap();
    let files = in_files(folder.path());
    let recipe = recipe(Augmentation::Standard, 0.2);
    for device in host_and_gpu() {
        let whole = train(&device, &files, 2, &recipe, 15).unwrap();
        let part = train(&device, &files, 2, &recipe, 7).unwrap();
        let images = Images::new(&device, &files, &files.train).unwrap().with_workers(2);
        let examples = labelled(&device, &images, &files);
        let mut network = Network::new(&device, &model(), BATCH, Use::Train(OptimizerKind::Sgd)).unwrap();
        Checkpoint::take(&part.network, 7, "").unwrap().restore(&mut network).unwrap();
        let mut training = Training::new(&mut network, &examples, &recipe, 7).unwrap();
        let mut losses = Losses(part.loss);
        training.run(&mut network, 7, &mut losses).unwrap();
        assert_eq!(losses.0, whole.loss);
        assert!(same(&network.weights().unwrap(), &whole.network.weights().unwrap()));
    }
}

#[test]
fn a_file_that_cannot_be_decoded_stops_the_training_and_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let data = in_files(folder.path());
    for broken in [11, 30] {
        let path = folder.path().join(file_name(broken));
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    }
    let device = Device::open("host").unwrap();
    let still = Recipe { shuffle: false, ..recipe(Augmentation::Crop, 0.0) };
    for workers in [1, 2, 9] {
        let error = train(&device, &data, workers, &still, 15).err().expect("two files are broken");
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("11.png: broken image"), "the first one of the order: {error}");
        let images = Images::new(&device, &data, &data.train).unwrap().with_workers(workers);
        let mut network = Network::new(&device, &model(), BATCH, Use::Evaluate).unwrap();
        let error = evaluate(&mut network, &labelled(&device, &images, &data), BATCH, false).unwrap_err();
        assert!(error.to_string().contains("11.png: broken image"), "{error}");
    }
    std::fs::remove_file(folder.path().join(file_name(2))).unwrap();
    let error = train(&device, &data, 3, &still, 15).err().expect("a file is gone").to_string();
    assert!(error.contains("02.png: cannot be read"), "{error}");
}

/// Stops at the first chunk.
struct Stop;

impl Observer for Stop {
    fn chunk(&mut self, _: &Chunk, _: &Network, _: usize, _: usize) -> dilt::Result<()> {
        Err(dilt::Error::Run("enough".into()))
    }
}

#[test]
fn a_training_that_ends_early_leaves_its_decoding_threads_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let data = in_files(folder.path());
    let device = Device::open("host").unwrap();
    for workers in [1, 4, 60] {
        let images = Images::new(&device, &data, &data.train).unwrap().with_workers(workers);
        let examples = labelled(&device, &images, &data);
        let mut network = Network::new(&device, &model(), BATCH, Use::Train(OptimizerKind::Sgd)).unwrap();
        network.load(&init::draw(&model(), 0)).unwrap();
        let recipe = Recipe { steps: Some(1 << 30), ..recipe(Augmentation::None, 0.0) };
        let mut training = Training::new(&mut network, &examples, &recipe, 0).unwrap();
        let stopped = training.run(&mut network, 0, &mut Stop).unwrap_err();
        assert_eq!(stopped.to_string(), "enough");
        let begun = std::time::Instant::now();
        drop(training);
        assert!(begun.elapsed().as_secs() < 5, "{workers} threads took {:?} to end", begun.elapsed());
    }
}

#[test]
fn a_diverging_training_on_files_names_the_same_step_and_layer() {
    let folder = tempfile::tempdir().unwrap();
    let files = in_files(folder.path());
    let recipe = Recipe { lr: 1e30, ..recipe(Augmentation::Standard, 0.0) };
    let device = Device::open("host").unwrap();
    let [resident, decoded] = [in_memory(&files), files].map(|data| {
        let error = train(&device, &data, 2, &recipe, 15).err().expect("the loss is not finite");
        error.to_string()
    });
    assert!(resident.contains("training diverged"), "{resident}");
    assert_eq!(resident, decoded);
}

#[test]
fn a_number_of_decoding_threads_that_is_none_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for wrong in ["0", "-1", "many", "99999999999"] {
        let mut command = dilt(folder.path(), &["train", "--out", "out", "--steps", "1", "-q"]);
        command.env("DILT_WORKERS", wrong);
        failed(command, wrong, 2, &["DILT_WORKERS", "from 1 to 1024", wrong]);
    }
}
