//! Folders of image files: classes, splits, limits, and what is in the way.

use std::path::Path;

use dilt::Result;
use dilt::data::{self, DataSet, Pixels, Reading};
use dilt::report::progress::{Progress, Verbosity};

use crate::command::{dilt, fails};
use crate::data::bytes;

/// A grey PNG of one value.
fn write(path: &Path, value: u8, [height, width]: [u32; 2]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut encoder = png::Encoder::new(std::fs::File::create(path).unwrap(), width, height);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.write_header().unwrap().write_image_data(&vec![value; (height * width) as usize]).unwrap();
}

/// Three classes with 4, 2 and 3 images to train on, and one each in the other splits.
fn pictures(splits: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (class, count) in [("ant", 4), ("bee", 2), ("cat", 3)] {
        for split in ["train"].iter().chain(splits) {
            for i in 0..if *split == "train" { count } else { 1 } {
                let path = folder.path().join(split).join(class).join(format!("{i}.png"));
                write(&path, class.as_bytes()[0] + i, [8, 8]);
            }
        }
    }
    folder
}

fn reading() -> Reading {
    Reading { input: [1, 8, 8], resident_bytes: 1 << 20, ..Reading::default() }
}

fn open(folder: &Path, reading: &Reading) -> Result<DataSet> {
    data::load(&format!("folder={}", folder.display()), reading, &Progress::new(Verbosity::Quiet))
}

/// The value of each image in memory.
fn values(examples: &data::Examples) -> Vec<u8> {
    bytes(examples).chunks(64).map(|image| image[0]).collect()
}

fn refused(folder: &Path, reading: &Reading, code: i32, says: &[&str]) {
    let error = open(folder, reading).unwrap_err();
    assert_eq!(error.exit_code(), code, "{error}");
    let error = error.to_string();
    assert!(says.iter().all(|part| error.contains(part)), "{error}: not {says:?}");
}

#[test]
fn classes_are_the_sorted_folders_of_train() {
    let folder = pictures(&["test"]);
    for extra in [".hidden", "train/.DS_Store", "train/bee/Thumbs.db", "train/bee/.keep"] {
        std::fs::write(folder.path().join(extra), "x").unwrap();
    }
    std::fs::rename(folder.path().join("train/cat/0.png"), folder.path().join("train/cat/0.PNG")).unwrap();
    let data = open(folder.path(), &reading()).unwrap();
    assert_eq!((data.name.as_str(), data.shape, data.stored, data.classes), ("folder", [1, 8, 8], [1, 8, 8], 3));
    assert_eq!(data.train.labels, [0, 0, 0, 0, 1, 1, 2, 2, 2]);
    assert_eq!(values(&data.train), [97, 98, 99, 100, 98, 99, 99, 100, 101]);
    assert_eq!((data.test.labels.as_slice(), values(&data.test)), (&[0, 1, 2][..], vec![97, 98, 99]));
    assert!(data.val.is_empty());
    assert_eq!((data.scale, data.mean, data.std), (255.0, vec![0.449], vec![0.226]));
    let colour = open(folder.path(), &Reading { input: [3, 4, 4], ..reading() }).unwrap();
    assert_eq!((colour.mean, colour.std), (vec![0.485, 0.456, 0.406], vec![0.229, 0.224, 0.225]));
    assert_eq!(bytes(&colour.test)[..48], [97; 48]);
}

#[test]
fn val_is_for_testing_where_there_is_no_test() {
    let folder = pictures(&["val"]);
    let data = open(folder.path(), &reading()).unwrap();
    assert_eq!((data.val.len(), data.test.len()), (0, 3));
    let both = pictures(&["val", "test"]);
    let data = open(both.path(), &reading()).unwrap();
    assert_eq!((data.val.len(), data.test.len()), (3, 3));
    refused(
        both.path(),
        &Reading { val_split: Some(0.5), ..reading() },
        2,
        &["--val-split", "has a split val already"],
    );
    refused(pictures(&[]).path(), &reading(), 1, &["test: cannot be read", "No such file"]);
    refused(tempfile::tempdir().unwrap().path(), &reading(), 1, &["train: cannot be read", "No such file"]);
}

#[test]
fn a_limit_takes_the_first_of_each_class_in_turn_and_no_other_file_is_opened() {
    let folder = pictures(&["test"]);
    for unused in ["train/ant/2.png", "train/cat/2.png"] {
        std::fs::write(folder.path().join(unused), "no image").unwrap();
    }
    let data = open(folder.path(), &Reading { limit: Some(5), ..reading() }).unwrap();
    assert_eq!((data.train.labels.as_slice(), values(&data.train)), (&[0, 0, 1, 1, 2][..], vec![97, 98, 98, 99, 99]));
    assert_eq!(data.test.len(), 3);
}

#[test]
fn a_validation_split_is_the_same_in_memory_and_in_files() {
    let folder = pictures(&["test"]);
    let held = Reading { val_split: Some(0.5), ..reading() };
    let in_memory = open(folder.path(), &held).unwrap();
    assert_eq!(
        (in_memory.train.labels.as_slice(), in_memory.val.labels.as_slice()),
        (&[0, 0, 1, 2][..], &[0, 0, 1, 2, 2][..])
    );
    let in_files = open(folder.path(), &Reading { resident_bytes: 0, ..held }).unwrap();
    for (files, memory) in [(&in_files.train, &in_memory.train), (&in_files.val, &in_memory.val)] {
        let Pixels::Files(found) = &files.images else { panic!("expected files") };
        let mut decoded = vec![0; bytes(memory).len()];
        let images = decoded.chunks_mut(64).enumerate();
        images.for_each(|(i, image)| found.decode(i, in_files.stored, image).unwrap());
        assert_eq!((&files.labels, decoded.as_slice()), (&memory.labels, bytes(memory)));
    }
    assert_ne!(in_files.identity(), in_memory.identity());
}

#[test]
fn images_are_stored_larger_than_the_input_that_is_cut_out_of_them() {
    let folder = pictures(&["test"]);
    let stored = |input, resize| open(folder.path(), &Reading { input, resize, ..reading() }).unwrap().stored;
    assert_eq!(stored([1, 224, 224], None), [1, 256, 256]);
    assert_eq!(stored([3, 128, 192], None), [3, 146, 219]);
    assert_eq!(stored([1, 127, 64], None), [1, 127, 64]);
    assert_eq!(stored([1, 8, 12], Some(10)), [1, 10, 15]);
    let resized = |resize| Reading { resize: Some(resize), ..reading() };
    refused(folder.path(), &resized(7), 2, &["--resize", "at least the input's height, 8, got 7"]);
    refused(folder.path(), &resized(1 << 20), 2, &["at most 134217728 pixels"]);
    refused(folder.path(), &resized(usize::MAX), 2, &["at most"]);
    refused(folder.path(), &Reading { input: [2, 8, 8], ..reading() }, 2, &["images of 2 channels"]);
}

#[test]
fn what_is_no_image_of_a_class_is_named() {
    let folder = pictures(&["test"]);
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("train/labels.csv"), "x").unwrap();
    std::fs::write(at("train/ant/notes.txt"), "x").unwrap();
    std::fs::create_dir(at("test/bee/more")).unwrap();
    let says = [
        "cannot be used: 3",
        "labels.csv: is in no class folder",
        "notes.txt: is no image",
        "more: is a folder",
        "--skip",
    ];
    refused(folder.path(), &reading(), 1, &says);
    assert_eq!(open(folder.path(), &Reading { skip_broken: true, ..reading() }).unwrap().train.len(), 9);
    let missing = pictures(&["test"]);
    std::fs::create_dir(missing.path().join("train/dog")).unwrap();
    refused(missing.path(), &reading(), 1, &["dog", "has no images"]);
    let strange = pictures(&["test"]);
    write(&strange.path().join("test/dog/0.png"), 0, [8, 8]);
    refused(strange.path(), &reading(), 1, &["test/dog", "expected a class of train"]);
    let single = tempfile::tempdir().unwrap();
    write(&single.path().join("train/ant/0.png"), 0, [8, 8]);
    refused(single.path(), &reading(), 1, &["at least 2 classes", "ant"]);
}

#[test]
fn broken_images_are_counted_and_named_and_left_out_only_on_request() {
    let folder = pictures(&["test"]);
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("train/ant/1.png"), "no image").unwrap();
    let whole = std::fs::read(at("train/cat/0.png")).unwrap();
    std::fs::write(at("train/cat/0.png"), &whole[..whole.len() - 1]).unwrap();
    let says = ["files that cannot be used: 2", "ant/1.png: broken image", "cat/0.png: broken image", "--skip-broken"];
    refused(folder.path(), &reading(), 1, &says);
    let in_files = Reading { resident_bytes: 0, ..reading() };
    assert_eq!(open(folder.path(), &in_files).unwrap().train.len(), 9, "not looked at yet");
    let skipping = Reading { skip_broken: true, ..reading() };
    let data = open(folder.path(), &skipping).unwrap();
    assert_eq!(
        (data.train.labels.as_slice(), values(&data.train)),
        (&[0, 0, 0, 1, 1, 2, 2][..], vec![97, 99, 100, 98, 99, 100, 101])
    );
    let files = open(folder.path(), &Reading { skip_broken: true, ..in_files }).unwrap();
    assert_eq!(files.train.labels, data.train.labels);
    std::fs::write(at("test/bee/0.png"), "").unwrap();
    refused(folder.path(), &skipping, 1, &["test/bee", "every image of this class is broken"]);
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_lead_nowhere_without_end() {
    let folder = pictures(&["test"]);
    let elsewhere = pictures(&["test"]);
    std::os::unix::fs::symlink(elsewhere.path().join("train/ant"), folder.path().join("train/dog")).unwrap();
    assert_eq!(open(folder.path(), &reading()).unwrap().classes, 4);
    std::os::unix::fs::symlink(folder.path(), folder.path().join("train/ant/round")).unwrap();
    refused(folder.path(), &reading(), 1, &["round: is a folder"]);
    std::fs::remove_file(folder.path().join("train/ant/round")).unwrap();
    std::os::unix::fs::symlink("none", folder.path().join("train/ant/5.png")).unwrap();
    refused(folder.path(), &reading(), 1, &["5.png: cannot be read"]);
}

#[cfg(unix)]
#[test]
fn a_file_without_permission_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let folder = pictures(&["test"]);
    let path = folder.path().join("train/ant/0.png");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    if std::fs::read(&path).is_ok() {
        println!("skipped: this user reads files without permission");
        return;
    }
    refused(folder.path(), &reading(), 1, &["ant/0.png: cannot be read", "Permission denied"]);
}

#[test]
fn the_program_trains_on_a_folder_and_names_broken_images() {
    let folder = pictures(&["test"]);
    let spec = format!("folder={}", folder.path().display());
    let net =
        ["--set", "widths=[4,8,16]", "--set", "image=[1,8,8]", "--set", "classes=3", "--batch", "4", "--steps", "2"];
    let args = [&["train", "--out", "w", "--data", &spec][..], &net].concat();
    dilt(folder.path(), &args).assert().success();
    std::fs::write(folder.path().join("train/ant/1.png"), "no image").unwrap();
    fails(folder.path(), &args, 1, &["ant/1.png", "broken image", "--skip-broken"]);
    // Of other images it is another training.
    let args = [&["train", "--out", "v", "--data", &spec][..], &net].concat();
    let skipping = dilt(folder.path(), &[&args[..], &["--skip-broken"]].concat()).assert().success();
    let said = String::from_utf8(skipping.get_output().stderr.clone()).unwrap();
    assert!(said.contains("ant/1.png") && said.contains(": 1\n") && said.contains("12 images"), "{said}");
    // Nothing is left out in silence.
    let quiet = dilt(folder.path(), &[&args[..], &["--skip-broken", "-q"]].concat()).assert().success();
    let said = String::from_utf8(quiet.get_output().stderr.clone()).unwrap();
    assert!(said.contains("ant/1.png") && said.contains(": 1\n") && !said.contains("12 images"), "{said}");
}
