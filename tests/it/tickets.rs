//! What `dilt find` writes is what the definitions say, computed again here in the plainest way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::weights::Weights;
use serde_json::Value;

use crate::command::{SMALL, fails, json};

/// Whether each weight is kept, by layer.
type Kept = BTreeMap<String, Vec<bool>>;

/// A finished `find`, and where its files are.
struct Found {
    folder: tempfile::TempDir,
    result: Value,
}

fn find(args: &[&str]) -> Found {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("groups"), "9 1 5 # odd\n0, 2 4\n").unwrap();
    let command = [&["find"], SMALL, &["--levels", "2", "--seeds", "1", "--no-similarity"], args].concat();
    let result = json(folder.path(), &command);
    assert_eq!(json(folder.path(), &command), result, "a finished run is shown again");
    Found { folder, result }
}

impl Found {
    fn run(&self) -> PathBuf {
        self.folder.path().join(self.result["run"].as_str().unwrap())
    }

    fn rows(&self) -> &[Value] {
        self.result["tickets"].as_array().unwrap()
    }

    fn row(&self, name: &str, matched: Option<&str>) -> &Value {
        let is = |row: &&Value| row["name"] == name && row["matched"].as_str() == matched;
        self.rows().iter().find(is).unwrap_or_else(|| panic!("no row {name} at {matched:?}"))
    }

    fn file(&self, row: &Value, which: &str) -> Weights {
        Weights::load(&self.run().join(row["files"][0][which].as_str().unwrap())).unwrap()
    }

    fn kept(&self, name: &str, matched: Option<&str>) -> Kept {
        masks(&self.file(self.row(name, matched), "ticket"))
    }

    fn searched(&self, stage: &str) -> Weights {
        let path = self.run().join("seed_0/search").join(stage).join("weights.safetensors");
        Weights::load(&path).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The starting point: θ_k.
    fn start(&self) -> Weights {
        let path = self.run().join("seed_0/search/rewind/weights.safetensors");
        if path.exists() {
            return Weights::load(&path).unwrap();
        }
        let config = ModelConfig::load("resnet8", &["widths=[4,8,16]".into()]).unwrap();
        init::draw(&config.build().unwrap(), 0)
    }
}

fn masks(weights: &Weights) -> Kept {
    weights.masks.iter().map(|(name, mask)| (name.clone(), mask.iter().collect())).collect()
}

fn count(kept: &Kept) -> usize {
    kept.values().flatten().filter(|keep| **keep).count()
}

fn total(kept: &Kept) -> usize {
    kept.values().map(Vec::len).sum()
}

/// What `keep` says of how many of the sets keep a weight.
fn votes(sets: &[Kept], keep: impl Fn(usize) -> bool) -> Kept {
    let layer = |(name, first): (&String, &Vec<bool>)| {
        let of = |i: usize| sets.iter().filter(|set| set[name][i]).count();
        (name.clone(), (0..first.len()).map(|i| keep(of(i))).collect())
    };
    sets[0].iter().map(layer).collect()
}

fn minus(a: &Kept, b: &Kept) -> Kept {
    let layer = |(name, keep): (&String, &Vec<bool>)| {
        (name.clone(), keep.iter().zip(&b[name]).map(|(a, b)| *a && !b).collect())
    };
    a.iter().map(layer).collect()
}

fn or(a: &Kept, b: &Kept) -> Kept {
    votes(&[a.clone(), b.clone()], |n| n > 0)
}

/// Clears the `remove` smallest of what is kept, ties by lowest index, layers in the model's order (the classifier is
/// its last, and the last by name too where it is called `linear`).
fn prune(values: &BTreeMap<String, Vec<f32>>, from: &Kept, remove: usize) -> Kept {
    let mut all: Vec<(f32, &String, usize)> = Vec::new();
    for (name, keep) in from {
        all.extend((0..keep.len()).filter(|&i| keep[i]).map(|i| (values[name][i].abs(), name, i)));
    }
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut kept = from.clone();
    all.iter().take(remove).for_each(|(_, name, i)| kept.get_mut(*name).unwrap()[*i] = false);
    kept
}

fn values(weights: &Weights) -> BTreeMap<String, Vec<f32>> {
    weights.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.iter().copied().collect())).collect()
}

/// Removes a share of all, or of each layer.
fn prune_share(weights: &Weights, from: &Kept, share: f64, by_layer: bool) -> Kept {
    let remove = |kept: &Kept| (share * count(kept) as f64).round_ties_even() as usize;
    let values = values(weights);
    if !by_layer {
        return prune(&values, from, remove(from));
    }
    let layers = from.iter().map(|(name, keep)| BTreeMap::from([(name.clone(), keep.clone())]));
    layers.flat_map(|layer| prune(&values, &layer, remove(&layer))).collect()
}

/// A search on parts, replayed from the weights that it trained: parts, core, specialists, union.
fn replay(
    found: &Found,
    name: &str,
    parts: usize,
    at_least: usize,
    each: bool,
    share: f64,
    by_layer: bool,
) -> [Vec<Kept>; 4] {
    let first = found.kept(if name == "colt" { "colt" } else { "core" }, None);
    let all: Kept = first.iter().map(|(name, keep)| (name.clone(), vec![true; keep.len()])).collect();
    let mut kept = vec![all.clone(); parts];
    let mut alone = vec![minus(&all, &all); parts];
    for level in 1..=2 {
        for (part, kept) in kept.iter_mut().enumerate() {
            let stage = if level == 1 { "parts" } else { name };
            let weights = found.searched(&format!("{stage}/part-{}/level-{level}", part + 1));
            let zero = weights.masks.iter().all(|(name, mask)| {
                weights.tensors[name].iter().zip(mask.iter()).all(|(w, keep)| keep || w.to_bits() == 0)
            });
            assert!(zero, "pruned weights are zero while masks are searched");
            *kept = prune_share(&weights, kept, share, by_layer);
        }
        if each {
            let consensus = votes(&kept, |n| n >= at_least);
            for (kept, alone) in kept.iter_mut().zip(&mut alone) {
                *alone = or(alone, &minus(kept, &consensus));
                *kept = consensus.clone();
            }
        }
    }
    let core = votes(&kept, |n| n >= at_least);
    let parts: Vec<Kept> = kept.iter().zip(&alone).map(|(kept, alone)| or(kept, alone)).collect();
    let specialists: Vec<Kept> = parts.iter().map(|part| minus(part, &core)).collect();
    let union = specialists.iter().fold(core.clone(), |union, specialist| or(&union, specialist));
    [parts, vec![core], specialists, vec![union]]
}

/// What holds for every row of every run.
fn check_rows(found: &Found) {
    let start = found.start();
    for row in found.rows() {
        let name = row["name"].as_str().unwrap();
        let weights = found.file(row, "weights");
        assert_eq!(row["seeds"][0]["top1"], row["top1"], "one seed is the mean");
        assert_eq!(row["top1_std"], 0.0);
        if name == "dense" {
            assert_eq!(row["files"][0].get("ticket"), None);
            assert!(weights.masks.is_empty() && row["density"] == 1.0);
            continue;
        }
        let ticket = found.file(row, "ticket");
        let by_level = !["magnitude", "random"].contains(&name);
        assert_eq!(ticket.metadata.contains_key("level"), by_level, "{name}: found level by level or not");
        let kept = masks(&ticket);
        assert_eq!(row["density"].as_f64().unwrap(), count(&kept) as f64 / total(&kept) as f64, "{name}");
        assert_eq!(masks(&weights), kept, "{name}: the retrained weights know their masks");
        for (layer, keep) in &kept {
            let zero = weights.tensors[layer].iter().zip(keep).all(|(w, keep)| *keep || w.to_bits() == 0);
            assert!(zero, "{name}: {layer}: a pruned weight is not exactly zero");
        }
        let same = |layer: &&String| ticket.tensors[*layer] == start.tensors[*layer];
        let body: Vec<_> = start.tensors.keys().filter(|layer| !layer.starts_with("linear")).collect();
        match name {
            "redrawn" => assert!(kept.keys().filter(|l| !l.starts_with("linear")).all(|layer| !same(&layer))),
            _ => assert!(body.iter().all(same), "{name}: a ticket starts from the rewound weights and statistics"),
        }
        let empty: Vec<_> =
            kept.iter().filter(|(_, keep)| !keep.contains(&true)).map(|(name, _)| name.as_str()).collect();
        assert_eq!(row["seeds"][0]["empty_layers"].as_array().unwrap().len(), empty.len());
    }
}

/// Controls with a ticket's number of weights.
fn check_controls(found: &Found, ticket: &str, lth: bool) {
    let kept = found.kept(ticket, None);
    for name in ["lth", "magnitude", "random", "redrawn"].iter().skip(usize::from(!lth)) {
        assert_eq!(count(&found.kept(name, Some(ticket))), count(&kept), "{name} at {ticket}");
    }
    assert_eq!(found.kept("redrawn", Some(ticket)), kept);
    let random = found.kept("random", Some(ticket));
    let of = |kept: &Kept| kept.values().map(|keep| keep.iter().filter(|k| **k).count()).collect::<Vec<_>>();
    assert_eq!(of(&random), of(&kept), "random keeps as many of each layer");
    let all: Kept = kept.iter().map(|(name, keep)| (name.clone(), vec![true; keep.len()])).collect();
    let weights = values(&found.searched("magnitude"));
    assert_eq!(found.kept("magnitude", Some(ticket)), prune(&weights, &all, total(&kept) - count(&kept)));
    if lth {
        let (all_count, keep) = (total(&kept) as f64, count(&kept) as f64);
        let half = (all_count * (keep / all_count).sqrt()).round() as usize;
        let level = prune(&values(&found.searched("lth/level-1")), &all, total(&kept) - half);
        let last = values(&found.searched(&format!("lth-{ticket}/level-2")));
        assert_eq!(found.kept("lth", Some(ticket)), prune(&last, &level, half - count(&kept)));
    }
}

fn check_overlap(found: &Found, parts: &[Kept]) {
    let (mut both, mut either, mut all, mut any) = (0.0, 0.0, 0, 0);
    for (name, first) in &parts[0] {
        let n = first.len() as f64;
        let densities: Vec<f64> = parts.iter().map(|p| p[name].iter().filter(|k| **k).count() as f64 / n).collect();
        both += n * densities.iter().product::<f64>();
        either += n * (1.0 - densities.iter().map(|d| 1.0 - d).product::<f64>());
        all += (0..first.len()).filter(|&i| parts.iter().all(|p| p[name][i])).count();
        any += (0..first.len()).filter(|&i| parts.iter().any(|p| p[name][i])).count();
    }
    let overlap = &found.result["overlap"];
    assert!((overlap["jaccard"].as_f64().unwrap() - all as f64 / any as f64).abs() < 1e-12);
    assert!((overlap["chance"].as_f64().unwrap() - both / either).abs() < 1e-12);
}

/// A DiLT run against its replay.
fn check_dilt(args: &[&str], parts: usize, at_least: usize, each: bool, share: f64, by_layer: bool) -> Found {
    let found = find(args);
    check_rows(&found);
    let stage = if each && at_least == parts { "colt" } else { "dilt" };
    let [part, core, specialist, union] = replay(&found, stage, parts, at_least, each, share, by_layer);
    for i in 0..parts {
        assert_eq!(found.kept(&format!("part-{}", i + 1), None), part[i], "part {i}");
        assert_eq!(found.kept(&format!("specialist-{}", i + 1), None), specialist[i], "specialist {i}");
        assert_eq!(count(&votes(&[specialist[i].clone(), core[0].clone()], |n| n == 2)), 0, "disjoint");
    }
    assert_eq!(found.kept("core", None), core[0]);
    assert_eq!(found.kept("union", None), union[0]);
    assert_eq!(found.kept("colt", None), replay(&found, "colt", parts, parts, true, share, by_layer)[1][0]);
    check_controls(&found, "core", true);
    check_controls(&found, "union", true);
    check_overlap(&found, &part);

    let trained = |level: usize, i: usize| {
        let folder = if level == 1 { "parts" } else { stage };
        values(&found.searched(&format!("{folder}/part-{}/level-{level}", i + 1)))
    };
    let over = |level: usize, fold: &dyn Fn(f32, f32) -> f32| {
        let layer = |(name, keep): (&String, &Vec<bool>)| {
            let all: Vec<_> = (0..parts).map(|i| trained(level, i)[name].clone()).collect();
            (name.clone(), (0..keep.len()).map(|w| all.iter().fold(0.0, |sum, v| fold(sum, v[w].abs()))).collect())
        };
        core[0].iter().map(layer).collect::<BTreeMap<String, Vec<f32>>>()
    };
    let largest = prune(&over(2, &f32::max), &union[0], count(&union[0]) - count(&core[0]));
    assert_eq!(found.kept("union-pruned", Some("core")), largest);
    let all: Kept = core[0].iter().map(|(name, keep)| (name.clone(), vec![true; keep.len()])).collect();
    let outside = minus(&all, &core[0]);
    let mean = over(1, &|sum, w| sum + w / parts as f32);
    let grown = or(&core[0], &prune(&mean, &outside, total(&all) - count(&union[0])));
    assert_eq!(found.kept("core-grown", Some("union")), grown);
    found
}

#[test]
fn two_parts_by_class_meet_once_at_the_end() {
    let found = check_dilt(&[], 2, 2, false, 0.6, false);
    let [core, part, own] = ["core", "part-1", "specialist-1"].map(|name| found.kept(name, None));
    assert_eq!(or(&core, &own), part, "with two parts, core and specialist are the part's ticket again");
    assert!(!core.contains_key("linear.weight"), "own heads belong to no mask");
}

#[test]
fn three_random_parts_meet_at_each_level_in_two_of_three_from_a_rewound_start() {
    let args = ["--parts", "3", "--partition", "random", "--at-least", "2", "--algebra", "each-level", "--rewind", "2"];
    let found = check_dilt(&args, 3, 2, true, 0.6, false);
    assert!(found.kept("core", None).contains_key("linear.weight"), "a shared head is pruned");
    assert_eq!(found.searched("rewind").tensors.len(), found.start().tensors.len());
    assert_eq!(
        std::fs::read_to_string(found.run().join("seed_0/search/rewind/metrics.csv")).unwrap().lines().count(),
        3
    );
}

#[test]
fn parts_from_a_file_are_pruned_layer_by_layer_but_for_the_first_at_each_level() {
    let args = ["--partition", "file=groups", "--scope", "layer", "--exclude", "conv1.*", "--algebra", "each-level"];
    let found = check_dilt(&[&args[..], &["--prune", "0.35"]].concat(), 2, 2, true, 0.35, true);
    assert!(!found.kept("union", None).contains_key("conv1.weight"));
}

#[test]
fn a_core_of_what_any_part_keeps_leaves_specialists_nothing() {
    let found = check_dilt(&["--at-least", "1"], 2, 1, false, 0.6, false);
    let row = found.row("specialist-1", None);
    assert_eq!(row["density"], 0.0);
    assert_eq!(row["seeds"][0]["empty_layers"].as_array().unwrap().len(), 7, "legal, and flagged");
}

#[test]
fn colt_and_lth_stand_beside_their_controls() {
    let found = find(&["--method", "colt", "--density", "0.25"]);
    check_rows(&found);
    assert_eq!(found.kept("colt", None), replay(&found, "colt", 2, 2, true, 0.5, false)[1][0]);
    check_controls(&found, "colt", true);
    assert_eq!(found.result["overlap"], Value::Null);

    let found = find(&["--method", "lth", "--density", "0.09", "--seed", "0"]);
    check_rows(&found);
    let kept = found.kept("lth", None);
    let all: Kept = kept.iter().map(|(name, keep)| (name.clone(), vec![true; keep.len()])).collect();
    let share = 1.0 - 0.09f64.sqrt();
    let level = prune_share(&found.searched("lth/level-1"), &all, share, false);
    assert_eq!(kept, prune_share(&found.searched("lth/level-2"), &level, share, false));
    assert!((found.row("lth", None)["density"].as_f64().unwrap() - 0.09).abs() < 1.0 / total(&kept) as f64);
    check_controls(&found, "lth", false);
}

#[test]
fn structured_tickets_stand_beside_unstructured_ones_of_as_many_weights() {
    let found = find(&["--method", "lth", "--density", "0.3", "--structure", "refill"]);
    let row = found.row("lth-refill", None);
    assert_eq!(row["method"], "refill");
    let (ticket, trained) = (found.file(row, "ticket"), found.file(row, "weights"));
    assert_eq!(ticket.masks.keys().collect::<Vec<_>>(), trained.masks.keys().collect::<Vec<_>>());
    let fixed = &ticket.masks["layer1.0.bn1.weight"];
    let gone: Vec<usize> = (0..fixed.len()).filter(|i| !fixed.get(*i)).collect();
    assert_eq!(gone.len(), 3, "of four channels one is full at 30 %");
    for name in ["layer1.0.bn1.weight", "layer1.0.bn1.bias", "layer1.0.conv1.weight"] {
        let tensor = trained.tensors[name].as_slice().unwrap();
        let row = tensor.len() / 4;
        assert!(gone.iter().all(|i| tensor[i * row..(i + 1) * row].iter().all(|w| *w == 0.0)), "{name}");
    }
    let weights = |masks: &dilt::nn::weights::Weights| dilt::mask::set::MaskSet::of_weights(&masks.masks).kept();
    let beside = found.file(found.row("lth", Some("lth-refill")), "ticket");
    assert_eq!(weights(&ticket), weights(&beside));
    let density = row["density"].as_f64().unwrap();
    assert!(
        density < 0.3 && (density - found.row("lth", Some("lth-refill"))["density"].as_f64().unwrap()).abs() < 1e-12
    );

    // What is fixed goes with the ticket.
    let file = row["files"][0]["ticket"].as_str().unwrap();
    let file = found.run().join(file);
    let args = ["--ticket", file.to_str().unwrap(), "--levels", "1", "--seeds", "1"];
    let transferred = json(found.folder.path(), &[&["transfer"], SMALL, &args].concat());
    let row = &transferred["tickets"][1];
    assert_eq!(row["name"], "ticket");
    let run = found.folder.path().join(transferred["run"].as_str().unwrap());
    let weights = Weights::load(&run.join(row["files"][0]["weights"].as_str().unwrap())).unwrap();
    assert_eq!(&weights.masks["layer1.0.bn1.weight"], fixed);
}

#[test]
fn means_and_deviations_are_those_of_the_seeds() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["--levels", "1", "--seeds", "3", "--seed", "5", "--no-similarity"];
    let args = [&["find", "--method", "lth"], SMALL, &args].concat();
    let result = json(folder.path(), &args);
    for row in result["tickets"].as_array().unwrap() {
        let seeds = row["seeds"].as_array().unwrap();
        assert_eq!(seeds.iter().map(|s| s["seed"].as_u64().unwrap()).collect::<Vec<_>>(), [5, 6, 7]);
        let top1: Vec<f64> = seeds.iter().map(|s| s["top1"].as_f64().unwrap()).collect();
        let mean = top1.iter().sum::<f64>() / 3.0;
        let std = (top1.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 2.0).sqrt();
        assert!((row["top1"].as_f64().unwrap() - mean).abs() < 1e-12);
        assert!((row["top1_std"].as_f64().unwrap() - std).abs() < 1e-12);
        for file in row["files"].as_array().unwrap() {
            assert!(Path::new(file["weights"].as_str().unwrap()).is_relative());
        }
    }
}

#[test]
fn what_is_refused_leaves_no_run_folder() {
    let folder = tempfile::tempdir().unwrap();
    let found = find(&[]);
    let file = |name| found.run().join(found.row(name, None)["files"][0]["ticket"].as_str().unwrap());
    let (core, specialist) = (file("core"), file("specialist-1"));
    let assemble = |part: usize, more: &[&str]| {
        let given = format!("assemble --core {} --specialist {part}={}", core.display(), specialist.display());
        given.split(' ').chain(more.iter().copied()).map(String::from).collect::<Vec<_>>()
    };
    let find = |more: &[&str]| [&["find"], more, SMALL].concat().into_iter().map(String::from).collect::<Vec<_>>();
    let refused: &[(Vec<String>, &[&str])] = &[
        (assemble(3, SMALL), &["--specialist", "from 1 to 2", "got 3"]),
        (
            assemble(1, &["--limit", "200", "--model", "resnet8"]),
            &["--core", "conv1.weight", "[16, 1, 3, 3]", "[4, 1, 3, 3]"],
        ),
        (assemble(1, &[SMALL, &["--parts", "6"]].concat()), &["at most 5"]),
        (assemble(1, &[SMALL, &["--seeds", "0"]].concat()), &["--seeds", "at least 1"]),
        (find(&["--rewind", "5"]), &["--rewind", "at most 4"]),
        (find(&["--exclude", "*"]), &["leaves no weights"]),
        (find(&["--method", "lth", "--algebra", "final"]), &["--algebra", "--method dilt"]),
        (find(&["--method", "colt", "--at-least", "2"]), &["--at-least", "--method dilt"]),
    ];
    for (args, says) in refused {
        fails(folder.path(), &args.iter().map(String::as_str).collect::<Vec<_>>(), 2, says);
    }
    assert!(!folder.path().join("runs").exists());
}
