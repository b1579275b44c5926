//! Names of files and of models: aliases, a full list of what does not fit, and loading what fits.

use dilt::mask::Mask;
use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::weights::Weights;
use ndarray::ArrayD;

use crate::command::{dilt, fails, json};

type Expected = Vec<(String, Vec<usize>)>;

fn expected(names: &[&str], shape: &[usize]) -> Expected {
    names.iter().map(|name| (name.to_string(), shape.to_vec())).collect()
}

/// Weights with these names, each of another value, and a mask for the first.
fn named(names: &[&str]) -> Weights {
    let tensors = names.iter().enumerate();
    Weights {
        tensors: tensors.map(|(i, name)| (name.to_string(), ArrayD::from_elem(vec![2, 3], i as f32))).collect(),
        masks: [(names[0].to_string(), Mask::from_fn(&[2, 3], |i| i == 1))].into(),
        ..Weights::default()
    }
}

#[test]
fn a_model_takes_the_names_of_others_with_their_masks() {
    let cases: [(&[&str], &[&str]); 6] = [
        (&["module.fc.weight", "module.bn1.bias"], &["fc.weight", "bn1.bias"]),
        (&["fc.weight", "fc.bias"], &["linear.weight", "linear.bias"]),
        (&["linear.weight", "linear.bias"], &["fc.weight", "fc.bias"]),
        (
            &["layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.running_var"],
            &["layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_var"],
        ),
        (&["module.layer2.0.shortcut.0.weight", "module.linear.bias"], &["layer2.0.downsample.0.weight", "fc.bias"]),
        // The model's own names win.
        (&["layer1.fc.weight", "shortcut.0.weight"], &["layer1.fc.weight", "shortcut.0.weight"]),
    ];
    for (theirs, ours) in cases {
        let fitted = named(theirs).for_model(&expected(ours, &[2, 3])).unwrap();
        assert_eq!(fitted, named(ours), "{theirs:?}");
    }
    for (theirs, ours) in [
        (["module.conv1.weight", "fc.bias"], ["conv1.weight", "fc.bias"]), // on all tensors, or it is no prefix
        (["conv1.weight", "my_fc.bias"], ["conv1.weight", "my_linear.bias"]),
        (["conv1.weight", "layer1.shortcut.2.weight"], ["conv1.weight", "layer1.downsample.2.weight"]),
    ] {
        named(&theirs).for_model(&expected(&ours, &[2, 3])).unwrap_err();
    }
    let error = named(&["fc.weight", "linear.weight"]).for_model(&expected(&["linear.weight"], &[2, 3])).unwrap_err();
    let says = "tensors \"fc.weight\" and \"linear.weight\" are both the model's \"linear.weight\"";
    assert!(error.exit_code() == 2 && error.to_string().contains(says), "{error}");
}

#[test]
fn a_model_takes_its_own_tensors_only_and_all_differences_are_listed() {
    let tensors = ["conv1.weight", "layer1.0.bn1.wieght", "module.fc.bias", "zzz"];
    let weights = Weights {
        tensors: tensors.map(|name| (name.to_string(), ArrayD::zeros(vec![2, 3]))).into(),
        ..Weights::default()
    };
    weights.check_against(&expected(&tensors, &[2, 3])).unwrap();
    let names = ["conv1.weight", "layer1.0.bn1.weight", "fc.bias", "another"];
    let error = weights.check_against(&expected(&names, &[3, 2])).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    for line in [
        "missing     \"another\", expected [3, 2]",
        "missing     \"fc.bias\", expected [3, 2]",
        "unexpected  \"layer1.0.bn1.wieght\", got [2, 3]; is it \"layer1.0.bn1.weight\"?",
        "unexpected  \"module.fc.bias\", got [2, 3]; is it \"fc.bias\"?",
        "unexpected  \"zzz\", got [2, 3]\n",
        "wrong shape \"conv1.weight\", expected [3, 2], got [2, 3]",
    ] {
        assert!(format!("{error}\n").contains(line), "{error}\nlacks {line}");
    }
}

#[test]
fn what_fits_is_loaded_and_the_rest_is_drawn_and_named() {
    let model = |classes: &str| {
        let config = ModelConfig::load("resnet8", &[format!("classes={classes}")]).unwrap();
        config.build().unwrap()
    };
    let mut file = init::draw(&model("10"), 1);
    let masks =
        ["conv1.weight", "linear.weight"].map(|name| (name.to_string(), Mask::zeros(file.tensors[name].shape())));
    file.masks = masks.into();
    file.tensors.remove("bn1.bias");
    file.tensors.insert("fc2.weight".into(), ArrayD::zeros(vec![3]));
    let drawn = init::draw(&model("5"), 2);
    let (weights, lines) = file.clone().partly_for(drawn.clone()).unwrap();
    assert_eq!(
        lines,
        [
            "another shape, so drawn from --seed: linear.bias ([5] in the model, [10] in the file), linear.weight \
             ([5, 64] in the model, [10, 64] in the file, its mask left out)",
            "not in the file, so drawn from --seed: bn1.bias",
            "not in the model, so left out: fc2.weight",
        ]
    );
    assert_eq!(weights.tensors.keys().collect::<Vec<_>>(), drawn.tensors.keys().collect::<Vec<_>>());
    for (name, tensor) in &weights.tensors {
        let from_file = !["linear.bias", "linear.weight", "bn1.bias"].contains(&name.as_str());
        assert_eq!(tensor, if from_file { &file.tensors[name] } else { &drawn.tensors[name] }, "{name}");
    }
    assert_eq!(weights.masks.keys().collect::<Vec<_>>(), ["conv1.weight"]);
    let (whole, lines) = drawn.clone().partly_for(init::draw(&model("5"), 3)).unwrap();
    assert!(whole == drawn && lines.is_empty());
    let error = named(&["a", "b"]).partly_for(drawn).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("no tensor fits") && error.to_string().contains("left out: a, b"), "{error}");
}

#[test]
fn commands_take_other_names_and_only_training_takes_a_part() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let net = ["--set", "widths=[4,8,16]", "--limit", "100", "--batch", "50"];
    let with = |args: &[&'static str], more: &[&'static str]| [args, &net, more].concat();
    json(folder.path(), &with(&["train", "--out", "w", "--epochs", "1"], &["-q"]));
    let own = Weights::load(&at("w/weights.safetensors")).unwrap();
    let renamed =
        own.tensors.iter().map(|(name, tensor)| (format!("module.{name}").replace("linear", "fc"), tensor.clone()));
    Weights { tensors: renamed.collect(), ..Weights::default() }.save(&at("other.safetensors")).unwrap();
    let eval = |file| json(folder.path(), &with(&["eval", "--weights", file], &[]));
    assert_eq!(eval("other.safetensors"), eval("w/weights.safetensors"));

    let part = ["--set", "classes=12"];
    let train = with(&["train", "--weights", "other.safetensors", "--epochs", "1", "--out", "p"], &part);
    fails(
        folder.path(),
        &train,
        2,
        &["other.safetensors", "linear.weight", "expected [12, 16], got [10, 16]", "--partial"],
    );
    let output = dilt(folder.path(), &[&train[..], &["--partial"]].concat()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("linear.weight ([12, 16] in the model, [10, 16] in the file)"), "{stderr}");
    assert_eq!(Weights::load(&at("p/weights.safetensors")).unwrap().tensors["linear.bias"].shape(), [12]);
    fails(folder.path(), &with(&["train", "--partial", "--out", "p"], &[]), 2, &["--weights"]);
    let none = ["--set", "widths=[5,9,17]", "--set", "image=[2,8,8]", "--set", "classes=11"];
    let dry = [&["train", "--weights", "w/weights.safetensors", "--partial", "--dry-run"][..], &none].concat();
    fails(folder.path(), &dry, 2, &["w/weights.safetensors", "no tensor fits"]);
}
