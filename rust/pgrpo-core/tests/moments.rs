//! The laws of push and merge, against two passes over the samples.

#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]

use pgrpo_core::Moments;
use proptest::prelude::*;

fn samples(sizes: std::ops::Range<usize>) -> impl Strategy<Value = Vec<f64>> {
    (-1e3..1e3, 1e-2..1e2, prop::collection::vec(-1.0..1.0, sizes)).prop_map(
        |(offset, spread, shape): (f64, f64, Vec<f64>)| {
            shape.iter().map(|x| offset + spread * x).collect()
        },
    )
}

/// Mean and m2 by two passes.
fn two_pass(samples: &[f64]) -> (f64, f64) {
    let mean = samples.iter().sum::<f64>() / samples.len() as f64;
    (mean, samples.iter().map(|r| (r - mean).powi(2)).sum())
}

fn fold(samples: &[f64]) -> Moments {
    samples.iter().copied().collect()
}

/// Equal counts, and means and m2 equal to rounding; `size` is the largest sample's magnitude.
fn assert_close(a: Moments, b: Moments, size: f64) -> Result<(), TestCaseError> {
    prop_assert_eq!(a.count, b.count);
    let n = a.count as f64;
    prop_assert!((a.mean - b.mean).abs() <= 1e-13 * size, "{:?} {:?}", a, b);
    prop_assert!((a.m2 - b.m2).abs() <= 1e-10 * (a.m2 + 1e-6 * n * size), "{:?} {:?}", a, b);
    Ok(())
}

proptest! {
    #[test]
    fn pushing_equals_two_passes(samples in samples(1..200)) {
        let (mean, m2) = two_pass(&samples);
        let oracle = Moments { count: samples.len() as u64, mean, m2 };
        assert_close(fold(&samples), oracle, 2e3)?;
    }

    #[test]
    fn merging_equals_pushing_on(a in samples(0..100), b in samples(0..100)) {
        let together: Vec<f64> = a.iter().chain(&b).copied().collect();
        assert_close(fold(&a).merge(fold(&b)), fold(&together), 2e3)?;
    }

    #[test]
    fn merging_commutes_and_associates(a in samples(0..50), b in samples(0..50), c in samples(0..50)) {
        let (a, b, c) = (fold(&a), fold(&b), fold(&c));
        assert_close(a.merge(b), b.merge(a), 2e3)?;
        assert_close(a.merge(b).merge(c), a.merge(b.merge(c)), 2e3)?;
    }

    #[test]
    fn the_empty_history_is_neutral(a in samples(0..50)) {
        let a = fold(&a);
        prop_assert_eq!(a.merge(Moments::default()), a);
        prop_assert_eq!(Moments::default().merge(a), a);
    }

    #[test]
    fn equal_samples_have_no_spread(reward in prop::num::f64::NORMAL, a in 1_usize..60, b in 1_usize..60) {
        prop_assume!(reward.abs() < 1e140);
        let (a, b) = (vec![reward; a], vec![reward; b]);
        let both = fold(&a).merge(fold(&b));
        prop_assert_eq!((both.mean, both.m2), (reward, 0.0));
    }

    #[test]
    fn sigma_is_the_root_mean_square_deviation(samples in samples(2..100)) {
        let (_, m2) = two_pass(&samples);
        for ddof in [0_u8, 1] {
            let oracle = (m2 / (samples.len() as f64 - f64::from(ddof))).sqrt();
            prop_assert!((fold(&samples).sigma(ddof) - oracle).abs() <= 1e-9 * (oracle + 1e-3));
        }
    }
}

#[test]
fn too_few_samples_have_no_sigma() {
    assert_eq!(Moments::default().sigma(0).to_bits(), 0);
    assert_eq!(fold(&[3.0]).sigma(1).to_bits(), 0);
}
