//! What `dilt transfer` trains: which weights each row starts from, and how many it keeps.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::weights::Weights;
use serde_json::Value;

use crate::command::{SMALL, assert_same_files, dilt, fails, json, keys, run_folder};
use crate::resume::kill_after;

/// A folder in which `find` has made tickets on the digits; random parts share a classifier, which has a mask then.
struct Source {
    folder: tempfile::TempDir,
    tickets: PathBuf,
}

impl Source {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let find = ["find", "--levels", "2", "--seeds", "1", "--partition", "random", "--runs", "source"];
        let found = json(folder.path(), &[&find, SMALL].concat());
        let tickets = Path::new(found["run"].as_str().unwrap()).join("seed_0/tickets");
        Source { tickets, folder }
    }

    /// Path of a file of a ticket, from the folder.
    fn file(&self, ticket: &str, which: &str) -> String {
        self.tickets.join(ticket).join(format!("{which}.safetensors")).to_str().unwrap().to_owned()
    }

    fn load(&self, file: &str) -> Weights {
        Weights::load(&self.folder.path().join(file)).unwrap_or_else(|error| panic!("{error}"))
    }

    fn transfer(&self, ticket: &str, more: &[&str]) -> Transferred<'_> {
        let levels: &[&str] = if more.contains(&"--lth") { &[] } else { &["--levels", "2"] };
        let args = [&["transfer", "--ticket", ticket], levels, SMALL, more].concat();
        let result = json(self.folder.path(), &args);
        assert_eq!(json(self.folder.path(), &args), result, "a finished run is shown again");
        Transferred { source: self, result }
    }
}

/// A finished `transfer`.
struct Transferred<'a> {
    source: &'a Source,
    result: Value,
}

impl Transferred<'_> {
    fn rows(&self) -> &[Value] {
        self.result["tickets"].as_array().unwrap()
    }

    /// Names of the rows and what they are matched to.
    fn names(&self) -> Vec<(&str, Option<&str>)> {
        self.rows().iter().map(|row| (row["name"].as_str().unwrap(), row["matched"].as_str())).collect()
    }

    fn row(&self, name: &str) -> &Value {
        self.rows().iter().find(|row| row["name"] == name).unwrap()
    }

    /// A file of a row in the repetition `seed`, counted from 0.
    fn file(&self, name: &str, seed: usize, which: &str) -> Weights {
        let file = self.row(name)["files"][seed][which].as_str().unwrap();
        self.source.load(&format!("{}/{file}", self.result["run"].as_str().unwrap()))
    }

    fn ticket(&self, name: &str) -> Weights {
        self.file(name, 0, "ticket")
    }
}

fn count(weights: &Weights) -> usize {
    weights.masks.values().map(|mask| mask.count()).sum()
}

/// Masks without the classifier's.
fn body_masks(weights: &Weights) -> Weights {
    let mut weights = weights.clone();
    weights.masks.retain(|name, _| !name.starts_with("linear"));
    weights
}

/// Whether two files start from the same weights, the classifier apart.
fn same_body(a: &Weights, b: &Weights) -> bool {
    a.tensors.iter().filter(|(name, _)| !name.starts_with("linear")).all(|(name, tensor)| *tensor == b.tensors[name])
}

/// What a network of the digits' shape is drawn as.
fn drawn(seed: u64) -> Weights {
    let config = ModelConfig::load("resnet8", &["widths=[4,8,16]".into()]).unwrap();
    init::draw(&config.build().unwrap(), seed)
}

const MATCHED: Option<&str> = Some("ticket");

#[test]
fn a_rewound_ticket_stands_beside_controls_of_its_count_that_start_where_it_does() {
    let source = Source::new();
    let file = source.file("core", "ticket");
    let core = source.load(&file);
    assert!(core.masks.contains_key("linear.weight"));
    let core_body = body_masks(&core);
    let done = source.transfer(&file, &["--val-split", "0.3", "--seeds", "2"]);
    let names = [("dense", None), ("ticket", None), ("lth", MATCHED), ("random", MATCHED), ("redrawn", MATCHED)];
    assert_eq!(done.names(), names);
    assert_eq!(keys(&done.result), ["matrix", "overlap", "run", "tickets"]);
    assert_eq!((&done.result["overlap"], &done.result["matrix"]["parts"]), (&Value::Null, &serde_json::json!([])));
    for row in done.result["matrix"]["rows"].as_array().unwrap() {
        assert_eq!((&row["all"], &row["restricted"]), (&serde_json::json!([]), &serde_json::json!([])));
    }
    assert_eq!(done.row("dense")["density"], 1.0);
    assert_eq!(done.row("dense")["files"][0].get("ticket"), None);
    let total: usize = core_body.masks.values().map(|mask| mask.len()).sum();
    for (name, _) in &names[1..] {
        let ticket = done.ticket(name);
        assert_eq!(count(&ticket), count(&core_body), "{name}");
        assert_eq!(done.row(name)["density"], count(&core_body) as f64 / total as f64, "{name}: convolutions alone");
        assert!(!ticket.masks.contains_key("linear.weight"), "{name}: a new classifier has no mask");
        assert_eq!(ticket.tensors["linear.weight"], drawn(0).tensors["linear.weight"], "{name}: drawn by the seed");
        assert!(!ticket.metadata.contains_key("partition"), "{name}");
        let other = done.file(name, 1, "ticket");
        assert_eq!(other.tensors["linear.weight"], drawn(1).tensors["linear.weight"], "{name}: by each seed");
        let weights = done.file(name, 0, "weights");
        assert_eq!(weights.masks, ticket.masks);
        assert_ne!(weights.tensors["linear.weight"], ticket.tensors["linear.weight"], "{name}: is trained");
        let from_start = same_body(&ticket, &core);
        assert_eq!(from_start, *name != "redrawn", "{name} starts from the rewound weights");
    }
    let (ticket, random, lth) = (done.ticket("ticket"), done.ticket("random"), done.ticket("lth"));
    assert_eq!(ticket.masks, core_body.masks);
    assert_eq!(ticket.metadata["parent"], core.identity());
    assert_eq!(done.ticket("redrawn").masks, core_body.masks);
    let counts = |weights: &Weights| weights.masks.values().map(|mask| mask.count()).collect::<Vec<_>>();
    assert_eq!(counts(&random), counts(&core_body), "as many of each layer");
    assert_ne!(random.masks, core_body.masks);
    assert_ne!(lth.masks, core_body.masks, "found on the other data");
    assert_eq!((lth.metadata.get("level").map(String::as_str), ticket.metadata.get("level")), (Some("2"), None));
}

#[test]
fn trained_weights_start_from_what_they_were_trained_to_and_dense_from_what_there_is() {
    let source = Source::new();
    let file = source.file("core", "weights");
    let trained = source.load(&file);
    let once = ["--seeds", "1"];
    let done = source.transfer(&file, &once);
    assert!(same_body(&done.ticket("ticket"), &trained));
    assert!(!same_body(&trained, &source.load(&source.file("core", "ticket"))));
    for name in ["lth", "random"] {
        assert!(same_body(&done.ticket(name), &drawn(0)), "{name}: where masks remove, a trained network has zeros");
    }
    let dense = source.file("dense", "weights");
    let with_dense = source.transfer(&file, &[&once[..], &["--dense", &dense]].concat());
    assert_ne!(with_dense.result["run"], done.result["run"], "another start is another run");
    for name in ["lth", "random"] {
        assert!(same_body(&with_dense.ticket(name), &source.load(&dense)), "{name} starts from --dense");
    }
    assert!(same_body(&with_dense.ticket("ticket"), &trained));
    assert_ne!(with_dense.row("dense")["seeds"], done.row("dense")["seeds"]);
    assert_eq!(with_dense.row("ticket")["seeds"], done.row("ticket")["seeds"]);

    let stderr = |more: &[&str]| {
        let args = [&["transfer", "--ticket", &file, "--seeds", "1", "--levels", "2"], &SMALL[..8], more].concat();
        String::from_utf8(dilt(source.folder.path(), &args).output().unwrap().stderr).unwrap()
    };
    assert!(stderr(&[]).contains("dense and random start from newly drawn weights"), "{}", stderr(&[]));
    assert!(stderr(&["--dense", &dense]).contains("start from the weights of --dense"));
}

#[test]
fn an_lth_ticket_of_the_source_brings_its_own_weights_and_is_matched_if_it_keeps_as_many() {
    let source = Source::new();
    let core = source.file("core", "ticket");
    // The classifier has a mask in both: their counts agree over all layers, not over the convolutions.
    let lth = source.file("lth-at-core", "weights");
    let done = source.transfer(&core, &["--lth", &lth, "--seeds", "1"]);
    let given = body_masks(&source.load(&lth));
    let equal = count(&given) == count(&body_masks(&source.load(&core)));
    assert_eq!(done.row("lth")["matched"].as_str(), equal.then_some("ticket"));
    assert_eq!(done.ticket("lth").masks, given.masks);
    assert!(same_body(&done.ticket("lth"), &given));
    assert_eq!(done.ticket("lth").metadata["parent"], source.load(&lth).identity());

    let redrawn = source.file("redrawn-at-core", "ticket");
    let same_count = source.transfer(&core, &["--lth", &redrawn, "--seeds", "1"]);
    assert_eq!(same_count.row("lth")["matched"], "ticket");
    let union = source.file("union", "ticket");
    let more = source.transfer(&core, &["--lth", &union, "--seeds", "1"]);
    assert_eq!(more.row("lth")["matched"], Value::Null);
    let args = [&["transfer", "--ticket", &core, "--lth", &union, "--seeds", "1"], &SMALL[..8]].concat();
    let stderr = String::from_utf8(dilt(source.folder.path(), &args).output().unwrap().stderr).unwrap();
    assert!(stderr.contains("warning: --lth keeps") && stderr.contains("not matched"), "{stderr}");
}

#[test]
fn what_does_not_fit_is_refused_before_a_run_folder_is_made() {
    let source = Source::new();
    let [core, dense, lth] = [("core", "ticket"), ("dense", "weights"), ("lth-at-core", "ticket")]
        .map(|(name, which)| source.file(name, which));
    let folder = source.folder.path();
    let mut masks = source.load(&core);
    masks.masks.retain(|name, _| name.starts_with("linear"));
    masks.save(&folder.join("head.safetensors")).unwrap();
    let mut fewer = source.load(&lth);
    fewer.masks.remove("conv1.weight");
    fewer.save(&folder.join("fewer.safetensors")).unwrap();
    let mut colour = source.load(&core);
    let filter = ndarray::ArrayD::zeros(vec![4, 3, 3, 3]);
    colour.masks.insert("conv1.weight".into(), dilt::mask::Mask::ones(filter.shape()));
    colour.tensors.insert("conv1.weight".into(), filter);
    colour.save(&folder.join("colour.safetensors")).unwrap();
    let refused: &[(&[&str], i32, &[&str])] = &[
        (&["--ticket", &dense], 1, &[&dense, "has no masks", "expected a ticket"]),
        (&["--ticket", "none.safetensors"], 1, &["none.safetensors", "No such file"]),
        (&["--ticket", &core, "--lth", "none.safetensors"], 1, &["none.safetensors", "No such file"]),
        (&["--ticket", &core, "--lth", &dense], 1, &[&dense, "has no masks"]),
        (&["--ticket", &core, "--dense", &core], 2, &["--dense", "without masks"]),
        (&["--ticket", "head.safetensors"], 2, &["masks of convolutions", "classifier alone"]),
        (&["--ticket", &core, "--lth", "fewer.safetensors"], 2, &["--lth", "no mask of 'conv1.weight'"]),
        (&["--ticket", "colour.safetensors"], 2, &["images with 3 channels", "[4, 3, 3, 3]", "got 1", "--data"]),
        (&["--ticket", &core, "--lth", "colour.safetensors"], 2, &["colour.safetensors", "images with 3 channels"]),
        (
            &["--ticket", &core, "--set", "stages=[1,2,1]"],
            2,
            &[&core, "layer2.1.conv1.weight", "layer2.1.bn2.running_var", "missing", "--model"],
        ),
        (&["--ticket", &core, "--set", "family=torchvision"], 2, &["missing", "layer2.0.downsample.0.weight"]),
        (&["--ticket", &core, "--levels", "0"], 2, &["--levels", "at least 1"]),
        (&["--ticket", &core, "--levels", "3", "--lth", &lth], 2, &["--levels", "--lth"]),
        (&["--ticket", &core, "--seeds", "0"], 2, &["--seeds", "at least 1"]),
        (&["--ticket", &core, "--data", "fruit"], 2, &["fruit", "digits"]),
    ];
    for (args, code, says) in refused {
        fails(folder, &[&["transfer"], *args, SMALL].concat(), *code, says);
    }
    fails(folder, &["transfer"], 2, &["--ticket"]);
    assert!(!folder.join("runs").exists());
}

#[test]
fn other_classes_and_another_image_size_change_the_classifier_alone() {
    let source = Source::new();
    let (file, core) = (source.file("core", "ticket"), source.load(&source.file("core", "ticket")));
    let idx = |name: &str, sizes: &[u32], value: &dyn Fn(usize) -> u8| {
        let header = [0, 0, 8, sizes.len() as u8].into_iter().chain(sizes.iter().flat_map(|size| size.to_be_bytes()));
        let values = (0..sizes.iter().product::<u32>() as usize).map(value);
        std::fs::write(source.folder.path().join("idx").join(name), header.chain(values).collect::<Vec<u8>>()).unwrap();
    };
    std::fs::create_dir(source.folder.path().join("idx")).unwrap();
    // Three classes: of image i, class i % 3, the rows of that third are bright.
    for (split, n) in [("train", 120), ("t10k", 30)] {
        let bright = |at: usize| if at % 784 * 3 / 784 == at / 784 % 3 { 200 } else { (at * 37 % 50) as u8 };
        idx(&format!("{split}-images-idx3-ubyte"), &[n, 28, 28], &bright);
        idx(&format!("{split}-labels-idx1-ubyte"), &[n], &|i| (i % 3) as u8);
    }
    let done = source.transfer(&file, &["--data", "idx=idx", "--seeds", "1"]);
    for row in done.rows() {
        let weights = done.file(row["name"].as_str().unwrap(), 0, "weights");
        assert_eq!(weights.tensors["linear.weight"].shape(), [3, 16]);
        assert_eq!(weights.tensors["linear.bias"].shape(), [3]);
    }
    let ticket = done.ticket("ticket");
    assert!(same_body(&ticket, &core));
    assert_eq!(ticket.masks, body_masks(&core).masks);
    assert_eq!(ticket.tensors.keys().collect::<Vec<_>>(), core.tensors.keys().collect::<Vec<_>>());
    assert!(done.result["run"].as_str().unwrap().starts_with("runs/transfer-resnet8-idx-"));
}

#[test]
fn a_transfer_killed_at_any_moment_ends_with_the_same_bits() {
    let [whole, broken] = [Source::new(), Source::new()];
    let file = whole.file("core", "weights");
    let mut args = vec!["transfer", "--ticket", &file, "--set", "widths=[4,8,16]", "--limit", "160", "--epochs", "3"];
    args.extend(["--levels", "2", "--batch", "32", "--seeds", "1", "-q"]);
    let expected = json(whole.folder.path(), &args);
    for moment in [1, 15, 30, 40, 60, 80, 25, 50] {
        kill_after(broken.folder.path(), &args, Duration::from_millis(moment));
    }
    assert_eq!(json(broken.folder.path(), &args), expected);
    assert_same_files(&run_folder(broken.folder.path()), &run_folder(whole.folder.path()));
}

#[test]
fn a_ticket_may_have_the_names_of_a_parallel_module_but_names_no_file_to_read() {
    let source = Source::new();
    let core = source.load(&source.file("core", "ticket"));
    let renamed = |name: &String| format!("module.{}", name.replace("linear.", "fc."));
    let mut parallel = Weights {
        tensors: core.tensors.iter().map(|(name, tensor)| (renamed(name), tensor.clone())).collect(),
        masks: core.masks.iter().map(|(name, mask)| (renamed(name), mask.clone())).collect(),
        metadata: core.metadata.clone(),
    };
    parallel.save(&source.folder.path().join("parallel.safetensors")).unwrap();
    let done = source.transfer("parallel.safetensors", &["--seeds", "1"]);
    assert!(same_body(&done.ticket("ticket"), &core));
    assert_eq!(done.ticket("ticket").masks, body_masks(&core).masks);
    parallel.metadata.insert("model".into(), "/etc/some.toml".into());
    parallel.save(&source.folder.path().join("other.safetensors")).unwrap();
    let says = ["/etc/some.toml", "not part of dilt", "--model"];
    fails(source.folder.path(), &["transfer", "--ticket", "other.safetensors"], 2, &says);
}
