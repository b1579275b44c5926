//! Partitions: disjoint, complete, the same every time; and what they refuse.
use std::path::Path;

use dilt::data::partition::{Part, Partition};
use proptest::prelude::*;

fn classes_of(parts: &[Part]) -> Vec<Vec<u32>> {
    parts.iter().map(|part| part.classes.clone()).collect()
}

fn refused<T: std::fmt::Debug>(result: dilt::Result<T>, says: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

fn file(folder: &Path, text: impl AsRef<[u8]>) -> String {
    let path = folder.join("parts.txt");
    std::fs::write(&path, text).unwrap();
    format!("file={}", path.display())
}

#[test]
fn class_parts_are_contiguous_ranges_with_labels_from_zero() {
    let parts = Partition::Classes { parts: 3 }.split(&[9, 0, 5, 3, 7, 4], 10).unwrap();
    assert_eq!(classes_of(&parts), [vec![0, 1, 2, 3], vec![4, 5, 6], vec![7, 8, 9]]);
    assert_eq!(parts.iter().map(|p| p.examples.clone()).collect::<Vec<_>>(), [[1, 3], [2, 5], [0, 4]]);
    assert_eq!(parts[1].name, "part-2");
    assert_eq!([3, 4, 6, 7].map(|label| parts[1].relabel(label)), [None, Some(0), Some(2), None]);
}

#[test]
fn a_file_groups_classes_in_its_own_order_and_may_leave_some_out() {
    let folder = tempfile::tempdir().unwrap();
    let text = "# animals\n6, 2 4\r\n\n1\t7 # vehicles; 8 is left out\n";
    let partition = Partition::parse(&file(folder.path(), text), 2, 0).unwrap();
    assert_eq!(partition, Partition::File { groups: vec![vec![6, 2, 4], vec![1, 7]] });
    let parts = partition.split(&[8, 7, 6, 4], 9).unwrap();
    assert_eq!((&parts[0].examples[..], &parts[1].examples[..]), (&[2, 3][..], &[1][..]));
    assert_eq!(parts[0].relabel(6), Some(0));
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let labels: Vec<u32> = (0..10).collect();
    let group = |groups: &[&[u32]]| Partition::File { groups: groups.iter().map(|g| g.to_vec()).collect() };
    refused(Partition::parse("halves", 2, 0), "expected classes, random or file=FILE");
    refused(Partition::parse("classes", 1, 0), "at least 2");
    refused(Partition::Random { parts: 0, seed: 0 }.split(&labels, 10), "at least 2");
    refused(Partition::Classes { parts: 11 }.split(&labels, 10), "at most 5");
    refused(Partition::Classes { parts: 6 }.split(&labels, 10), "at least two classes");
    refused(Partition::Classes { parts: 2 }.split(&labels[..5], 10), "part-2 has no examples");
    refused(Partition::Classes { parts: 2 }.split(&[0, 10], 10), "example 1 has label 10");
    refused(Partition::Classes { parts: usize::MAX }.split(&labels, 10), "at most 5");
    refused(Partition::Random { parts: usize::MAX, seed: 0 }.split(&labels, 10), "fewer --parts");
    refused(Partition::Random { parts: 2, seed: 0 }.split(&[], 10), "fewer --parts");
    refused(group(&[&[0, 1]]).split(&labels, 10), "at least 2");
    refused(group(&[&[0, 1], &[]]).split(&labels, 10), "part-2 has 0 classes");
    refused(group(&[&[0, 1], &[2]]).split(&labels, 10), "part-2 has 1 classes");
    refused(group(&[&[0, 1], &[2, 1]]).split(&labels, 10), "label 1 is in part-1 and in part-2");
    refused(group(&[&[0, 1], &[2, 2]]).split(&labels, 10), "label 2 is in part-2 and in part-2");
    refused(group(&[&[0, 1], &[2, 10]]).split(&labels, 10), "label 10: expected labels below 10");
}

#[test]
fn files_that_cannot_be_understood_are_refused_with_the_line() {
    let folder = tempfile::tempdir().unwrap();
    let parse = |text: &[u8]| Partition::parse(&file(folder.path(), text), 2, 0);
    refused(Partition::parse("file=/nowhere/parts", 2, 0), "/nowhere/parts: cannot read it");
    refused(Partition::parse(&format!("file={}", folder.path().display()), 2, 0), "got a folder");
    refused(Partition::parse("file=/dev/zero", 2, 0), "got a folder or device");
    refused(parse(b"0 1\n2 cat\n"), "line 2: expected labels (whole numbers from 0), got \"cat\"");
    refused(parse(b"0 -1\n"), "line 1");
    refused(parse(b"0 99999999999\n"), "line 1");
    refused(parse(b"\xff\xfe"), "as text");
    refused(parse(&[b' '; (1 << 20) + 1]), "at most 1048576 bytes");
    refused(parse(b"0 1\n2 3\n4 5\n"), "expected 2 parts, a line of labels each, got 3");
    refused(parse(b"# nothing\n , \n"), "got 0");
}

#[test]
fn random_parts_never_change() {
    let parts = Partition::Random { parts: 2, seed: 7 }.split(&[0; 9], 3).unwrap();
    assert_eq!((&parts[0].examples[..], &parts[1].examples[..]), (&[1, 2, 3, 4, 7][..], &[0, 5, 6, 8][..]));
    assert_eq!(classes_of(&parts), [[0, 1, 2], [0, 1, 2]]);
    assert_eq!(parts[1].relabel(2), Some(2));
}

/// Each example in exactly one part, in ascending order.
fn disjoint_and_complete(parts: &[Part], n: usize) -> bool {
    let mut all: Vec<u32> = parts.iter().flat_map(|part| part.examples.iter().copied()).collect();
    all.sort_unstable();
    all == (0..n as u32).collect::<Vec<_>>() && parts.iter().all(|part| part.examples.is_sorted())
}

proptest! {
    #[test]
    fn random_parts_are_disjoint_complete_even_and_the_same_again(
        (parts, n) in (2usize..20).prop_flat_map(|parts| (Just(parts), parts..300)), seed in any::<u64>()
    ) {
        let labels: Vec<u32> = (0..n as u32).map(|i| i % 5).collect();
        let partition = Partition::parse("random", parts, seed).unwrap();
        let split = partition.split(&labels, 5).unwrap();
        prop_assert_eq!(split.len(), parts);
        prop_assert!(disjoint_and_complete(&split, n));
        let sizes: Vec<usize> = split.iter().map(|part| part.examples.len()).collect();
        prop_assert!(sizes.is_sorted_by(|a, b| a >= b) && sizes[0] - sizes[parts - 1] <= 1);
        prop_assert_eq!(split, partition.split(&labels, 5).unwrap());
    }

    #[test]
    fn class_parts_are_disjoint_complete_and_hold_their_own_labels(
        (parts, classes) in (2usize..20).prop_flat_map(|parts| (Just(parts), 2 * parts..50)),
        extra in prop::collection::vec(any::<u32>(), 0..200)
    ) {
        let labels: Vec<u32> =
            extra.into_iter().map(|label| label % classes as u32).chain(0..classes as u32).collect();
        let split = Partition::Classes { parts }.split(&labels, classes).unwrap();
        prop_assert!(disjoint_and_complete(&split, labels.len()));
        prop_assert_eq!(classes_of(&split).concat(), (0..classes as u32).collect::<Vec<_>>());
        for part in &split {
            for &i in &part.examples {
                let relabelled = part.relabel(labels[i as usize]).unwrap();
                prop_assert_eq!(part.classes[relabelled as usize], labels[i as usize]);
            }
        }
    }

    #[test]
    fn no_text_file_and_no_groups_panic(
        text in prop::collection::vec(any::<u8>(), 0..60), parts in 0usize..4,
        groups in prop::collection::vec(prop::collection::vec(0u32..12, 0..4), 0..4),
        labels in prop::collection::vec(0u32..12, 0..20), classes in 0usize..12
    ) {
        let folder = tempfile::tempdir().unwrap();
        let _ = Partition::parse(&file(folder.path(), &text), parts, 0);
        let _ = Partition::parse(&String::from_utf8_lossy(&text), parts, 0);
        let _ = Partition::Classes { parts }.split(&labels, classes);
        let _ = Partition::File { groups }.split(&labels, classes);
    }
}
