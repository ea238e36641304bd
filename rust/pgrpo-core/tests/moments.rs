//! The laws of push, merge, retract and about, against two passes over the samples.

#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]

use pgrpo_core::Moments;
use proptest::prelude::*;

/// Samples less `offset`, of this `spread` about 0.
#[derive(Clone, Debug)]
struct Samples {
    offset: f64,
    spread: f64,
    shape: Vec<f64>,
}

impl Samples {
    fn values(&self) -> impl Iterator<Item = f64> {
        self.shape.iter().map(|x| self.offset + self.spread * x)
    }

    fn moments(&self) -> Moments {
        self.values().collect()
    }
}

/// Sets of samples about a common offset, which may be 1e12 times their spread.
fn samples<const SETS: usize>(
    sizes: std::ops::Range<usize>,
) -> impl Strategy<Value = [Samples; SETS]> {
    let place = prop::sample::select(vec![(0.0, 1.0), (1e3, 1e-2), (-7e8, 1e-3), (1e9, 1e-3)]);
    (place, prop::collection::vec(prop::collection::vec(-1.0..1.0, sizes), SETS)).prop_map(
        |((offset, spread), shapes)| {
            let sets = shapes.into_iter().map(|shape| Samples { offset, spread, shape });
            sets.collect::<Vec<_>>().try_into().unwrap()
        },
    )
}

/// Count, mean less the offset, and m2 by two passes.
fn two_pass(sets: &[&Samples]) -> (f64, f64, f64) {
    // The differences are exact: samples lie within a factor of 2 of the offset, or it is 0.
    let values: Vec<f64> =
        sets.iter().flat_map(|set| set.values().map(|value| value - set.offset)).collect();
    let n = values.len() as f64;
    let mean = if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / n };
    (n, mean, values.iter().map(|value| (value - mean).powi(2)).sum())
}

/// Counts exact, means and m2 to 1e-12 of the spread.
fn assert_close(
    got: Moments,
    (count, mean, m2): (f64, f64, f64),
    set: &Samples,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(got.count, count);
    let from = got.about(set.offset).offset;
    prop_assert!(count == 0.0 || (from - mean).abs() <= 1e-12 * set.spread, "{:?} {}", got, mean);
    let unit = count * set.spread * set.spread;
    prop_assert!((got.m2 - m2).abs() <= 1e-12 * unit, "{:?} {}", got, m2);
    Ok(())
}

fn assert_same(a: Moments, b: Moments, set: &Samples) -> Result<(), TestCaseError> {
    assert_close(a, (b.count, b.about(set.offset).offset, b.m2), set)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pushing_equals_two_passes([a] in samples(0..300)) {
        assert_close(a.moments(), two_pass(&[&a]), &a)?;
    }

    #[test]
    fn merging_equals_two_passes([a, b] in samples(0..150)) {
        assert_close(a.moments().merge(b.moments()), two_pass(&[&a, &b]), &a)?;
    }

    #[test]
    fn merging_commutes_and_associates([a, b, c] in samples(0..60)) {
        let (x, y, z) = (a.moments(), b.moments(), c.moments());
        assert_same(x.merge(y), y.merge(x), &a)?;
        assert_same(x.merge(y).merge(z), x.merge(y.merge(z)), &a)?;
        assert_same(z.merge(x).merge(y), x.merge(y.merge(z)), &a)?;
    }

    #[test]
    fn retracting_inverts_merging([a, b] in samples(0..100)) {
        let (x, y) = (a.moments(), b.moments());
        let left = x.merge(y).retract(y).unwrap();
        let unit = a.spread * a.spread * (x.count + y.count);
        prop_assert_eq!(left.count, x.count);
        prop_assert!((left.m2 - x.m2).abs() <= 1e-12 * unit, "{:?} {:?}", left, x);
        if x.count > 0.0 {
            let off = left.about(a.offset).offset - x.about(a.offset).offset;
            // What few samples are left of many has the rounding of the many.
            let many = (x.count + y.count) / x.count;
            prop_assert!(off.abs() <= 1e-12 * a.spread * many, "{:?} {:?}", left, x);
        } else {
            prop_assert_eq!((left.offset, left.m2), (0.0, 0.0));
        }
        if x.count > 0.0 {
            prop_assert_eq!(y.retract(x.merge(y)), None);
        }
    }

    #[test]
    fn the_empty_history_is_neutral([a] in samples(0..50), origin in -1e9..1e9) {
        let a = a.moments();
        let empty = Moments { origin, ..Moments::default() };
        prop_assert_eq!(a.merge(empty), a);
        prop_assert_eq!(a.retract(empty), Some(a));
        prop_assert_eq!(Moments::default().merge(a), a);
    }

    /// Another origin moves nothing: back again is the same to the bit, where nothing is rounded.
    #[test]
    fn about_is_exact(
        samples in prop::collection::vec(-1000_i32..1000, 1..50), origin in -1000_i32..1000,
    ) {
        // Dyadic offsets: two values, four or eight of them.
        let size = 1 << samples.len().ilog2().min(3);
        let moments: Moments = samples[..size].iter().copied().map(f64::from).collect();
        let exact = Moments {
            offset: samples[..size].iter().map(|&x| f64::from(x - samples[0])).sum::<f64>()
                / size as f64,
            ..moments
        };
        let moved = exact.about(f64::from(origin));
        prop_assert_eq!((moved.count, moved.m2), (exact.count, exact.m2));
        prop_assert_eq!(moved.origin, f64::from(origin));
        prop_assert_eq!(moved.mean(), exact.mean());
        prop_assert_eq!(moved.about(exact.origin), exact);
    }

    #[test]
    fn equal_samples_have_no_spread(
        reward in prop::num::f64::NORMAL, a in 1_usize..60, b in 1_usize..60,
        kept in prop::sample::select(vec![1.0, 0.9, 1e-9]),
    ) {
        prop_assume!(reward.abs() < 1e140);
        let [a, b] = [a, b].map(|n| std::iter::repeat_n(reward, n).collect::<Moments>());
        let both = a.decayed(kept).merge(b);
        prop_assert_eq!((both.mean(), both.offset, both.m2), (reward, 0.0, 0.0));
        prop_assert_eq!((both.sigma(0), both.sigma(1)), (0.0, 0.0));
    }

    #[test]
    fn sigma_is_the_root_mean_square_deviation([a] in samples(2..100)) {
        let (n, _, m2) = two_pass(&[&a]);
        for ddof in [0_u8, 1] {
            let oracle = (m2 / (n - f64::from(ddof))).sqrt();
            let got = a.moments().sigma(ddof);
            prop_assert!((got - oracle).abs() <= 1e-11 * a.spread, "{got} {oracle}");
        }
    }

    /// Forgetting scales counts and spreads, and nothing else.
    #[test]
    fn decaying_keeps_mean_and_sigma([a] in samples(1..50), kept in 0.01..1.0) {
        let (whole, left) = (a.moments(), a.moments().decayed(kept));
        prop_assert_eq!(left.mean(), whole.mean());
        prop_assert_eq!((left.count, left.m2), (whole.count * kept, whole.m2 * kept));
        prop_assert!((left.sigma(0) - whole.sigma(0)).abs() <= 1e-15 * whole.sigma(0));
    }
}

#[test]
fn too_few_samples_have_no_sigma() {
    assert_eq!(Moments::default().sigma(0).to_bits(), 0);
    let one: Moments = std::iter::once(3.0).collect();
    assert_eq!(one.sigma(1).to_bits(), 0);
}

/// Merged batch by batch, 1e8 with a spread of 1e-3 loses nothing that can be seen.
#[test]
fn means_far_from_zero_keep_their_digits() {
    // Multiples of the distance of numbers near 1e8: sums of the whole numbers k are exact.
    let unit = 2.0_f64.powi(-26);
    let (mut state, mut total) = (1_u64, Moments::default());
    let (mut sum, mut squares, mut count) = (0_i128, 0_i128, 0_i128);
    for _ in 0..2000 {
        let mut batch = Moments::default();
        for _ in 0..100 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let k = i64::try_from(state >> 47).unwrap() - (1 << 16);
            batch.push(1e8 + k as f64 * unit);
            sum += i128::from(k);
            squares += i128::from(k * k);
            count += 1;
        }
        total = total.merge(batch);
    }
    let m2 = (count * squares - sum * sum) as f64 / count as f64;
    let mean = sum as f64 / count as f64;
    let sigma = (m2 / count as f64).sqrt();
    let off = (total.about(1e8).offset / unit - mean) / sigma;
    assert!(off.abs() <= 1e-13, "mean off by {off:e} sigma");
    let off = total.m2 / (unit * unit) / m2 - 1.0;
    assert!(off.abs() <= 1e-12, "m2 off by {off:e}");
}
