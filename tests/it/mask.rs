//! Masks: bits in, the same bits out, whatever the shape.
use dilt::mask::Mask;
use proptest::prelude::*;

#[test]
fn ones_keep_everything_and_zeros_nothing_without_bits_past_the_end() {
    for len in [0, 1, 31, 32, 33, 64, 65] {
        let (ones, zeros) = (Mask::ones(&[len]), Mask::zeros(&[len]));
        assert_eq!((ones.len(), ones.count(), zeros.count()), (len, len, 0));
        assert_eq!(ones.words().len(), len.div_ceil(32));
        assert_eq!(ones.words().iter().map(|w| w.count_ones() as usize).sum::<usize>(), len);
        assert!(!ones.get(len) && !ones.get(usize::MAX));
    }
}

#[test]
fn a_tensor_without_dimensions_has_one_weight_and_one_without_weights_is_dense() {
    assert_eq!(Mask::ones(&[]).to_bytes(), [1]);
    assert!(Mask::zeros(&[3, 0]).is_empty());
    assert_eq!(Mask::zeros(&[3, 0]).density(), 1.0);
    assert!(!Mask::zeros(&[2]).is_empty());
    assert_eq!(Mask::zeros(&[2]).density(), 0.0);
}

#[test]
fn a_wrong_number_of_words_is_an_error() {
    for words in [0, 1, 3] {
        let error = Mask::from_words(&[5, 7], vec![0; words]).unwrap_err().to_string();
        assert!(error.contains("expected 2 words") && error.contains(&format!("got {words}")), "{error}");
    }
}

#[test]
fn bit_i_is_bit_i_mod_32_of_word_i_div_32() {
    let mask = Mask::from_fn(&[2, 20], |i| i == 1 || i == 33);
    assert_eq!(mask.words(), [2, 2]);
}

proptest! {
    #[test]
    fn bits_round_trip_through_every_view(shape in prop::collection::vec(0usize..7, 0..5), random in any::<u64>()) {
        let keep = |i: usize| (random.rotate_left((i * 7) as u32 % 64) ^ i as u64).count_ones() % 2 == 1;
        let mask = Mask::from_fn(&shape, keep);
        let n = shape.iter().product::<usize>();
        let expected: Vec<bool> = (0..n).map(keep).collect();
        prop_assert_eq!(mask.shape(), &shape[..]);
        prop_assert_eq!(mask.iter().len(), n);
        prop_assert_eq!(mask.iter().collect::<Vec<_>>(), expected.clone());
        prop_assert_eq!((0..n).map(|i| mask.get(i)).collect::<Vec<_>>(), expected.clone());
        prop_assert_eq!(mask.to_bytes(), expected.iter().map(|&b| b as u8).collect::<Vec<_>>());
        prop_assert_eq!(mask.count(), expected.iter().filter(|&&b| b).count());
        let bytes = mask.to_bytes();
        prop_assert_eq!(&Mask::from_fn(&shape, |i| bytes[i] == 1), &mask);
        prop_assert_eq!(Mask::from_words(&shape, mask.words().to_vec()).unwrap(), mask);
    }

    #[test]
    fn words_past_the_end_are_cleared(len in 0usize..200, filler in any::<u32>()) {
        let mask = Mask::from_words(&[len], vec![filler; len.div_ceil(32)]).unwrap();
        prop_assert_eq!(mask.count(), mask.iter().filter(|&b| b).count());
        for i in 0..len {
            prop_assert_eq!(mask.get(i), filler >> (i % 32) & 1 == 1);
        }
    }
}
