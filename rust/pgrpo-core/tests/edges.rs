//! Numbers at the edges: beyond what fits, next to nothing, and in the last of many rewards.
#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]

use pgrpo_core::{Batch, Error, Ids, Moments, NanPolicy, Normalizer, Options, Order, Real, Rule};

fn make(rule: &str, change: impl FnOnce(&mut Options)) -> Normalizer {
    let mut options = Options::new(Rule::named(rule).unwrap());
    change(&mut options);
    Normalizer::new(options).unwrap()
}

fn advantages<R: Real>(normalizer: &Normalizer, batch: &Batch<'_, R>) -> Result<Vec<R>, Error> {
    let mut out = vec![R::from_f64(f64::NAN); batch.rewards.len()];
    normalizer.advantages(batch, &mut out).map(|()| out)
}

/// Maps of few cells are applied in f32 where that is wide enough: here 1 / eps is not.
#[test]
fn a_scale_beyond_f32_gives_equal_rewards_no_advantage() {
    let normalizer = make("pgrpo", |options| options.eps = 1e-60);
    let (rewards, ids) = ([0.5_f32; 1024], [3; 1024]);
    let found = advantages(&normalizer, &Batch::new(&rewards, Ids::I32(&ids))).unwrap();
    assert!(found.iter().all(|&advantage| advantage == 0.0), "{}", found[0]);
}

#[test]
fn only_what_is_folded_counts_as_left_out() {
    let normalizer = make("pgrpo", |options| options.nan_policy = NanPolicy::Zero);
    let (rewards, ids) = ([1.0, f64::NAN, 2.0], [0; 3]);
    let batch = Batch::new(&rewards, Ids::I32(&ids));
    normalizer.update(&batch).unwrap();
    assert_eq!(normalizer.num_nonfinite(), 1);
    normalizer.normalize(&batch, &mut [0.0; 3]).unwrap();
    assert_eq!(normalizer.num_nonfinite(), 1, "normalizing folds nothing");
    advantages(&normalizer, &batch).unwrap();
    assert_eq!(normalizer.num_nonfinite(), 2);
}

/// One rollout has all the weight of its group, so that there are no others; by rounding, w * w / w is
/// not always w.
#[test]
fn rounding_makes_no_others_in_a_group() {
    let normalizer = make("rloo", |_| {});
    let mut is_rounded = false;
    for step in 1..400 {
        let weight = f64::from(step) / 100.0;
        is_rounded |= weight * weight / weight < weight;
        let batch = Batch {
            groups: Some(Ids::I32(&[0; 2])),
            weights: Some(&[weight, 0.0]),
            ..Batch::new(&[1.0, 4.0], Ids::I32(&[0; 2]))
        };
        assert_eq!(advantages(&normalizer, &batch).unwrap(), [0.0; 2], "weight {weight}");
    }
    assert!(is_rounded);
}

#[test]
fn sums_of_advantages_stay_numbers() {
    let normalizer = make("pgrpo", |options| {
        (options.eps, options.order) = (1e-100, Order::NormalizeThenUpdate);
        options.track_diagnostics = true;
    });
    let ids = [0; 2];
    let of = |normalizer: &Normalizer| normalizer.snapshot().clusters[0].advantages;
    for rewards in [[1.0; 2], [1.0; 2]] {
        advantages(&normalizer, &Batch::new(&rewards, Ids::I32(&ids))).unwrap();
    }
    let before = of(&normalizer);
    assert_eq!(before, [4.0, 0.0, 0.0]);
    // An advantage of 1e160, the square of which is no number.
    let found = advantages(&normalizer, &Batch::new(&[1e60, 1.0], Ids::I32(&ids))).unwrap();
    assert!((1e159..f64::INFINITY).contains(&found[0]));
    assert_eq!(of(&normalizer), before);
    normalizer.snapshot().check().unwrap();
}

/// What is left of equal rewards has no spread, and by rounding might have less than none.
#[test]
fn retracting_leaves_no_negative_spread() {
    let (mut state, mut is_rounded) = (1_u64, false);
    let mut unit = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / 2.0_f64.powi(53)
    };
    for _ in 0..2000 {
        let equal: Moments = [unit(); 3].into_iter().collect();
        let others: Moments = (0..5).map(|_| unit()).collect();
        let all = equal.merge(others);
        let left = all.retract(others).unwrap();
        assert!(left.m2 >= 0.0, "{left:?}");
        let (share, delta) = (others.count / left.count, others.mean() - all.mean());
        is_rounded |= all.m2 - others.m2 - delta * delta * all.count * share < 0.0;
    }
    assert!(is_rounded, "no case would have been below 0");
}

/// Large batches are folded in chunks; here a later one meets ids that the first has not.
#[test]
fn clusters_that_come_late_in_a_batch_are_folded() {
    const CHUNK: usize = 1 << 18;
    for num_threads in [1, 2] {
        let normalizer = make("pgrpo", |options| options.num_threads = num_threads);
        let mut ids = vec![1_i32; 2 * CHUNK + 10];
        for id in &mut ids[2 * CHUNK..] {
            *id = 1000;
        }
        let rewards: Vec<f64> = (0..ids.len()).map(|at| (at % 7) as f64).collect();
        normalizer.update(&Batch::new(&rewards, Ids::I32(&ids))).unwrap();
        let counts: Vec<f64> =
            normalizer.snapshot().clusters.iter().map(|entry| entry.rewards.count).collect();
        assert_eq!(counts, [2.0 * CHUNK as f64, 10.0]);
    }
}
