//! Magnitude selection against PyTorch's goldens and a plain sort; the algebra of masks against words.

use dilt::device::{Device, HostOptions, Policy};
use dilt::ops::prune::*;
use proptest::prelude::*;

use crate::support::{Arena, Golden, as_floats, bit, bits_of, devices, on_devices, read};

/// Weights, and how many of them are removed.
type Case = (Vec<f32>, usize);
/// The mask that must be left, and the report.
type Want = (Vec<u32>, PruneReport);

/// Prunes on a device; the mask starts as `mask`. Returns the mask and the report.
fn prune(
    device: &Device,
    weights: &[f32],
    live: &[u32],
    mask: &[u32],
    remove: usize,
) -> (Vec<u32>, dilt::Result<PruneReport>) {
    let (weights, live) = (device.upload(weights).unwrap(), device.upload(live).unwrap());
    let mut mask = device.upload(mask).unwrap();
    // What was in the scratch before does not matter.
    let mut scratch = device.upload(&vec![0xdead_beef; prune_scratch_len(weights.len())]).unwrap();
    let selection = Selection { weights: weights.view(), live: live.view(), remove };
    prune_smallest(device, selection, scratch.view_mut(), mask.view_mut()).unwrap();
    (device.read(mask.view()).unwrap(), prune_report(device, scratch.view()))
}

/// The same by a stable sort.
fn prune_by_sorting(weights: &[f32], live: &[u32], mask: &[u32], remove: usize) -> (Vec<u32>, PruneReport) {
    let mut candidates: Vec<usize> = (0..weights.len()).filter(|&i| bit(live, i)).collect();
    let live = candidates.len();
    candidates.sort_by(|&i, &j| weights[i].abs().total_cmp(&weights[j].abs()));
    let mut mask = mask.to_vec();
    candidates[..remove].iter().for_each(|&i| mask[i / 32] &= !(1 << (i % 32)));
    let threshold = candidates[..remove].last().map(|&i| weights[i].abs());
    (mask, PruneReport { removed: remove, threshold, live })
}

#[test]
fn masks_and_thresholds_agree_with_pytorch() {
    let golden = Golden::open("prune");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let label = format!("{label}: {case}");
            let fraction = golden.number(&case, "fraction");
            let tensors = |name: &str| [0, 1, 2].map(|i| golden.get(&case, &format!("{name}{i}")).f32());
            let (weights, before, after) = (tensors("w"), tensors("mask_in"), tensors("mask_out"));
            let arena = Arena::new(weights.iter().map(Vec::len));
            let (values, live, want) = (arena.lay(&weights), arena.bits(&before), arena.bits(&after));
            let count = |words: &[u32]| words.iter().map(|word| word.count_ones() as usize).sum::<usize>();
            let threshold = |name: &str, report: PruneReport| match report.threshold {
                Some(value) => assert_eq!(f64::from(value), golden.number(&case, name), "{label}: {name}"),
                None => assert!(golden.number(&case, name).is_nan(), "{label}: {name}"),
            };
            let got = if golden.text(&case, "scope") == "global" {
                let remove = round_half_even(fraction, count(&live));
                let (mask, report) = prune(device, &values, &live, &live, remove);
                threshold("threshold", report.unwrap());
                mask
            } else {
                // Each layer by itself, through slices of the arena.
                let (values, old) = (device.upload(&values).unwrap(), device.upload(&live).unwrap());
                let mut mask = device.upload(&live).unwrap();
                let mut scratch = device.alloc::<u32>(prune_scratch_len(arena.len)).unwrap();
                for (layer, piece) in arena.pieces.iter().enumerate() {
                    let words = piece.start / 32..piece.end.div_ceil(32);
                    let remove = round_half_even(fraction, count(&live[words.clone()]));
                    let weights = values.slice(piece.clone());
                    let selection = Selection { weights, live: old.slice(words.clone()), remove };
                    prune_smallest(device, selection, scratch.view_mut(), mask.slice_mut(words)).unwrap();
                    threshold(&format!("threshold{layer}"), prune_report(device, scratch.view()).unwrap());
                }
                device.read(mask.view()).unwrap()
            };
            assert_eq!(got, want, "{label}");
            results.push(as_floats(&got));
        }
        results
    });
}

fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }
}

/// Weights with many ties: a few magnitudes of both signs, 0 and -0, subnormals, infinities.
fn tied(seed: u64, len: usize, magnitudes: u64) -> Vec<f32> {
    let mut next = random(seed);
    let value = |which: u64| match which {
        0 => 0.0,
        1 => f32::INFINITY,
        2 => f32::from_bits(1),
        3 => f32::from_bits(2),
        _ => f32::from_bits(0x3f00_0000 + (which as u32) * 0x81),
    };
    (0..len).map(|_| value(next() % magnitudes) * [1.0, -1.0][next() as usize % 2]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn exactly_the_smallest_go_and_ties_by_lowest_index(
        len in prop_oneof![Just(0usize), Just(1), Just(31), Just(64), Just(65), 1usize..20_000, Just(100_003)],
        magnitudes in prop_oneof![Just(1u64), Just(5), Just(60), Just(1 << 20)],
        seed: u64,
        density in 1u64..=4,
        share in prop_oneof![Just(0.0f64), Just(1.0), 0.0f64..1.0],
    ) {
        let weights = tied(seed, len, magnitudes);
        let mut next = random(seed ^ 99);
        // Bits of live past the last weight are set: they must not count. The mask has bits that are not live.
        let live = bits_of((0..len.next_multiple_of(32)).map(|i| i >= len || next() % 4 < density));
        let mask = bits_of((0..len.next_multiple_of(32)).map(|i| i >= len || !next().is_multiple_of(8)));
        let candidates = (0..len).filter(|&i| bit(&live, i)).count();
        let remove = round_half_even(share, candidates);
        let want = prune_by_sorting(&weights, &live, &mask, remove);
        let staged = HostOptions { policy: Policy::Staged, schedule: Some(seed), ..HostOptions::default() };
        for options in [HostOptions::default(), staged] {
            let (mask, report) = prune(&Device::host(options).unwrap(), &weights, &live, &mask, remove);
            prop_assert_eq!(report.unwrap(), want.1);
            prop_assert!(mask == want.0);
        }
    }
}

#[test]
fn a_million_weights_are_pruned_exactly_in_many_blocks() {
    const LEN: usize = 1_000_003;
    let live = bits_of((0..LEN).map(|i| i % 3 != 1));
    let candidates = (0..LEN).filter(|&i| bit(&live, i)).count();
    // Many ties around the threshold, so that the last of them lies in the middle of a block; and hardly any.
    let cases = [(tied(1, LEN, 9), candidates / 2), (tied(2, LEN, 1 << 22), candidates / 5), (tied(3, LEN, 1), 7777)];
    let wants: Vec<_> =
        cases.iter().map(|(weights, remove)| prune_by_sorting(weights, &live, &live, *remove)).collect();
    on_devices(|device, label| {
        let check = |(case, want): (&Case, &Want)| {
            let (weights, remove) = case;
            let (mask, report) = prune(device, weights, &live, &live, *remove);
            assert_eq!(report.unwrap(), want.1, "{label}");
            assert!(mask == want.0, "{label}: mask");
            as_floats(&mask)
        };
        cases.iter().zip(&wants).map(check).collect()
    });
}

#[test]
fn nan_and_too_few_live_weights_are_errors_that_leave_the_mask_alone() {
    on_devices(|device, label| {
        let mut weights = tied(5, 300, 60);
        weights[200] = f32::from_bits(0xff80_0001);
        let all = vec![!0u32; 10];
        let (mask, report) = prune(device, &weights, &all, &all, 20);
        let error = report.unwrap_err();
        assert!(error.exit_code() == 1 && error.to_string().contains("NaN"), "{label}: {error}");
        assert_eq!(mask, all, "{label}");
        // A NaN that is not live does not matter.
        let mut live = all.clone();
        live[200 / 32] &= !(1 << (200 % 32));
        let (mask, report) = prune(device, &weights, &live, &live, 299);
        assert_eq!((report.unwrap().live, mask[..9].to_vec()), (299, vec![0; 9]), "{label}");

        let (mask, report) = prune(device, &weights, &live, &live, 300);
        let error = report.unwrap_err();
        assert!(error.exit_code() == 2, "{label}: {error}");
        assert!(error.to_string().contains("at most 299") && error.to_string().contains("got 300"), "{label}: {error}");
        assert_eq!(mask, live, "{label}");
        Vec::new()
    });
}

#[test]
fn pruned_values_become_exactly_plus_zero() {
    for len in [1, 31, 64, 65, 100_003] {
        let mask = bits_of((0..len).map(|i| i % 7 != 3 && i % 5 != 0));
        on_devices(|device, label| {
            let bits = device.upload(&mask).unwrap();
            let poison = |i: usize| if bit(&mask, i) { -1.5 } else { f32::NAN };
            let mut values = device.upload(&(0..len).map(poison).collect::<Vec<f32>>()).unwrap();
            apply_mask(device, bits.view(), values.view_mut()).unwrap();
            let got = read(device, values.view());
            let want = |i: usize| if bit(&mask, i) { (-1.5f32).to_bits() } else { 0 };
            assert_eq!((0..len).find(|&i| got[i].to_bits() != want(i)), None, "{label}: {len} values");
            vec![got]
        });
    }
}

#[test]
fn mask_algebra_is_that_of_sets() {
    const WORDS: usize = 1003;
    let mut next = random(3);
    let stack: Vec<u32> = (0..5 * WORDS).map(|_| next() as u32).collect();
    let (a, b) = (&stack[..WORDS], &stack[WORDS..2 * WORDS]);
    on_devices(|device, label| {
        let masks = device.upload(&stack).unwrap();
        let mut out = device.upload(&[0xdead_beefu32; WORDS]).unwrap();
        let mut results = Vec::new();
        type Formula = fn(u32, u32) -> u32;
        let ops: [(MaskOp, Formula); 4] = [
            (MaskOp::And, |a, b| a & b),
            (MaskOp::Or, |a, b| a | b),
            (MaskOp::AndNot, |a, b| a & !b),
            (MaskOp::Xor, |a, b| a ^ b),
        ];
        for (op, want) in ops {
            mask_combine(device, op, masks.slice(0..WORDS), masks.slice(WORDS..2 * WORDS), out.view_mut()).unwrap();
            let want: Vec<u32> = a.iter().zip(b).map(|(&a, &b)| want(a, b)).collect();
            results.push(device.read(out.view()).unwrap());
            assert_eq!(results.last(), Some(&want), "{label}: {op:?}");
        }
        for (k, at_least) in [(1, 1), (2, 1), (2, 2), (5, 1), (5, 3), (5, 5)] {
            mask_consensus(device, masks.slice(0..k * WORDS), k, at_least, out.view_mut()).unwrap();
            let votes = |i: usize| (0..k).filter(|mask| bit(&stack[mask * WORDS..], i)).count();
            let want = bits_of((0..WORDS * 32).map(|i| votes(i) >= at_least));
            results.push(device.read(out.view()).unwrap());
            assert_eq!(results.last(), Some(&want), "{label}: {at_least} of {k}");
        }
        let ranges = [(0, 1), (1, 0), (1, 640), (641, 362), (1000, 4), (u32::MAX, 1)];
        let list: Vec<u32> = ranges.iter().flat_map(|&(first, words)| [first, words]).collect();
        let list = device.upload(&list).unwrap();
        let mut counts = device.upload(&[77u32; 6]).unwrap();
        mask_counts(device, masks.slice(0..WORDS), list.view(), counts.view_mut()).unwrap();
        let ones = |first: usize, words: usize| a[first..first + words].iter().map(|word| word.count_ones()).sum();
        let want = [ones(0, 1), 0, ones(1, 640), ones(641, 362), u32::MAX, u32::MAX];
        results.push(device.read(counts.view()).unwrap());
        assert_eq!(results.last().unwrap()[..], want, "{label}: a range outside the mask counts as impossible");
        results.iter().map(|words| as_floats(words)).collect()
    });
}

#[test]
fn rounding_is_half_to_even() {
    let halves = [(0.5, 5), (0.5, 7), (0.25, 10), (0.2, 0), (1.0, 9), (0.29, 50)];
    assert_eq!(halves.map(|(fraction, n)| round_half_even(fraction, n)), [2, 4, 2, 0, 9, 14]);
}

#[test]
fn masks_of_the_wrong_size_are_refused_by_name() {
    for case in devices() {
        let device = case.device;
        let (weights, live) = (device.alloc::<f32>(65).unwrap(), device.alloc::<u32>(3).unwrap());
        let (mut mask, mut scratch) = (device.alloc::<u32>(2).unwrap(), device.alloc(prune_scratch_len(65)).unwrap());
        let selection = Selection { weights: weights.view(), live: live.view(), remove: 1 };
        let error = prune_smallest(&device, selection, scratch.view_mut(), mask.view_mut()).unwrap_err().to_string();
        assert!(error.contains("elements of mask: expected 3, got 2"), "{error}");
        let mut mask = device.alloc::<u32>(3).unwrap();
        let short = scratch.slice_mut(0..prune_scratch_len(65) - 1);
        let error = prune_smallest(&device, selection, short, mask.view_mut()).unwrap_err().to_string();
        assert!(error.contains("elements of scratch: expected"), "{error}");
        let error = mask_consensus(&device, live.view(), 3, 4, mask.slice_mut(0..1)).unwrap_err().to_string();
        assert!(error.contains("at_least: expected from 1 to 3") && error.contains("got 4"), "{error}");
        let error = mask_counts(&device, live.view(), live.view(), mask.view_mut()).unwrap_err().to_string();
        assert!(error.contains("elements of ranges: expected 6, got 3"), "{error}");
    }
}
