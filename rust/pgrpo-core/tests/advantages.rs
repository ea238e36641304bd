//! Every estimator against a slow two-pass oracle, and what holds of the advantages.

#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]

use std::collections::HashMap;
use std::hash::Hash;

use pgrpo_core::{Error, Estimator, NanPolicy, Normalizer, Order, Scale};
use proptest::prelude::*;

const EPS: f64 = 1e-4;

/// One reward with its cluster (dense) and group (any integer).
type Row = (f64, u32, i64);

fn rows(sizes: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Row>> {
    // Binary rewards make groups and clusters without spread; the others have three scales.
    let reward = prop_oneof![Just(0.0), Just(1.0), -1.0..1.0, 500.0..501.0, -0.01..0.01];
    let group = prop_oneof![-3_i64..4, Just(i64::MIN), Just(i64::MAX)];
    prop::collection::vec((reward, 0_u32..5, group), sizes)
}

fn columns(rows: &[Row]) -> (Vec<f64>, Vec<u32>, Vec<i64>) {
    let (rewards, ids): (Vec<_>, Vec<_>) = rows.iter().map(|&(r, p, g)| (r, (p, g))).unzip();
    let (clusters, groups) = ids.into_iter().unzip();
    (rewards, clusters, groups)
}

fn make(estimator: Estimator, ddof: i64, order: Order, nan_policy: NanPolicy) -> Normalizer {
    Normalizer::new(estimator, Scale::new(ddof, EPS).unwrap(), order, nan_policy)
}

/// Count, mean and sigma by two passes.
fn statistics(rewards: &[f64], ddof: i64) -> (f64, f64, f64) {
    let n = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / n;
    let m2: f64 = rewards.iter().map(|r| (r - mean).powi(2)).sum();
    let degrees = n - ddof as f64;
    (n, mean, if degrees > 0.0 { (m2 / degrees).sqrt() } else { 0.0 })
}

fn split<I: Copy + Eq + Hash>(rewards: &[f64], ids: &[I]) -> HashMap<I, Vec<f64>> {
    let mut split: HashMap<I, Vec<f64>> = HashMap::new();
    for (&reward, &id) in rewards.iter().zip(ids) {
        split.entry(id).or_default().push(reward);
    }
    split
}

/// (advantage, divisor) of the last `size` rows, every row before them being history.
fn oracle(
    estimator: Estimator,
    rows: &[Row],
    size: usize,
    ddof: i64,
    order: Order,
) -> Vec<(f64, f64)> {
    let (rewards, clusters, _) = columns(rows);
    let seen = match order {
        Order::UpdateThenNormalize => rows.len(),
        Order::NormalizeThenUpdate => rows.len() - size,
    };
    let histories = split(&rewards[..seen], &clusters[..seen]);
    let (rewards, clusters, groups) = columns(&rows[rows.len() - size..]);
    let by_group = split(&rewards, &groups);
    let advantage = |i: usize| {
        let reward = rewards[i];
        let standardize = |among: &[f64]| {
            let (_, mean, sigma) = statistics(among, ddof);
            ((reward - mean) / (sigma + EPS), sigma + EPS)
        };
        let group = &by_group[&groups[i]];
        let (n, mean, _) = statistics(group, ddof);
        match estimator {
            Estimator::Pgrpo => {
                histories.get(&clusters[i]).map_or((0.0, 1.0), |history| standardize(history))
            }
            Estimator::Grpo => standardize(group),
            Estimator::DrGrpo => (reward - mean, 1.0),
            Estimator::Rloo if n < 2.0 => (0.0, 1.0),
            Estimator::Rloo => {
                let others = (group.iter().sum::<f64>() - reward) / (n - 1.0);
                (reward - others, 1.0)
            }
            Estimator::Batch => standardize(&rewards),
        }
    };
    (0..size).map(advantage).collect()
}

fn orders() -> impl Strategy<Value = Order> {
    prop_oneof![Just(Order::UpdateThenNormalize), Just(Order::NormalizeThenUpdate)]
}

proptest! {
    #[test]
    fn every_estimator_equals_its_oracle(
        past in rows(0..60), now in rows(0..60), ddof in 0_i64..2, order in orders(),
    ) {
        for estimator in Estimator::ALL {
            let normalizer = make(estimator, ddof, order, NanPolicy::Raise);
            let (rewards, clusters, _) = columns(&past);
            normalizer.update(&rewards, &clusters).unwrap();
            let (rewards, clusters, groups) = columns(&now);
            let advantages = normalizer.advantages(&rewards, &clusters, Some(&groups)).unwrap();
            let rows: Vec<Row> = past.iter().chain(&now).copied().collect();
            let expected = oracle(estimator, &rows, now.len(), ddof, order);
            for (got, (expected, divisor)) in advantages.iter().zip(&expected) {
                // Means near 500 are off by their rounding, deviations by a relative error.
                let tolerance = 5e-10 / divisor + 1e-10 * expected.abs();
                let off = (got - expected).abs();
                prop_assert!(off <= tolerance, "{estimator:?}: {got} for {expected}");
            }
            prop_assert_eq!(advantages.len(), expected.len());
        }
    }

    #[test]
    fn non_finite_rewards_are_as_good_as_absent(
        rows in rows(1..60),
        holes in prop::collection::vec((0_usize..60, prop::sample::select(
            vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e200])), 1..10),
        order in orders(),
    ) {
        let mut holed = rows.clone();
        for (index, hole) in holes {
            let index = index % holed.len();
            holed[index].0 = hole;
        }
        let is_hole = |row: &Row| row.0.is_nan() || row.0.abs() > 1e100;
        let left: Vec<Row> = holed.iter().copied().filter(|row| !is_hole(row)).collect();
        let num_holes = (holed.len() - left.len()) as u64;
        let (rewards, clusters, groups) = columns(&holed);
        let (left_rewards, left_clusters, left_groups) = columns(&left);
        for estimator in Estimator::ALL {
            let plain = make(estimator, 0, order, NanPolicy::Raise);
            let mut expected =
                plain.advantages(&left_rewards, &left_clusters, Some(&left_groups)).unwrap().into_iter();
            let zero = make(estimator, 0, order, NanPolicy::Zero);
            let zeroed = zero.advantages(&rewards, &clusters, Some(&groups)).unwrap();
            let propagate = make(estimator, 0, order, NanPolicy::Propagate);
            let propagated = propagate.advantages(&rewards, &clusters, Some(&groups)).unwrap();
            for (row, (zeroed, propagated)) in holed.iter().zip(zeroed.iter().zip(&propagated)) {
                if is_hole(row) {
                    prop_assert_eq!(*zeroed, 0.0);
                    prop_assert!(propagated.is_nan());
                } else {
                    let expected = expected.next().unwrap();
                    prop_assert_eq!((*zeroed, *propagated), (expected, expected));
                }
            }
            prop_assert_eq!(zero.num_nonfinite(), num_holes);
            let (with, without) = (zero.snapshot(), plain.snapshot());
            for (cluster, &history) in with.iter().enumerate() {
                prop_assert_eq!(history, without.get(cluster).copied().unwrap_or_default());
            }
        }
    }

    /// (r - mean_p)/(sigma_p + eps) = scale ratio * grpo + bias term, for every ddof and group.
    #[test]
    fn corollary_3_1(past in rows(0..40), now in rows(1..40), ddof in 0_i64..2, order in orders()) {
        let pgrpo = make(Estimator::Pgrpo, ddof, order, NanPolicy::Raise);
        let grpo = make(Estimator::Grpo, ddof, order, NanPolicy::Raise);
        let (rewards, clusters, _) = columns(&past);
        pgrpo.update(&rewards, &clusters).unwrap();
        let before = pgrpo.snapshot();
        let (rewards, clusters, groups) = columns(&now);
        let left = pgrpo.advantages(&rewards, &clusters, Some(&groups)).unwrap();
        let right = grpo.advantages(&rewards, &clusters, Some(&groups)).unwrap();
        let read = match order {
            Order::UpdateThenNormalize => pgrpo.snapshot(),
            Order::NormalizeThenUpdate => before,
        };
        let (by_group, ddof8) = (split(&rewards, &groups), u8::try_from(ddof).unwrap());
        for i in 0..now.len() {
            let Some(history) = read.get(clusters[i] as usize).filter(|h| h.count > 0) else {
                prop_assert_eq!(left[i], 0.0);
                continue;
            };
            let (_, group_mean, group_sigma) = statistics(&by_group[&groups[i]], ddof);
            let divisor = history.sigma(ddof8) + EPS;
            let ratio = (group_sigma + EPS) / divisor;
            let bias = (group_mean - history.mean) / divisor;
            prop_assert!((left[i] - (ratio * right[i] + bias)).abs() <= 1e-12 * (1.0 + 500.0 / divisor));
        }
    }

    #[test]
    fn advantages_are_bounded_by_the_count(batches in prop::collection::vec(rows(1..30), 1..6)) {
        for ddof in [0, 1] {
            let normalizer =
                make(Estimator::Pgrpo, ddof, Order::UpdateThenNormalize, NanPolicy::Raise);
            for batch in &batches {
                let (rewards, clusters, _) = columns(batch);
                let advantages = normalizer.advantages(&rewards, &clusters, None).unwrap();
                let histories = normalizer.snapshot();
                for (advantage, &cluster) in advantages.iter().zip(&clusters) {
                    let bound = ((histories[cluster as usize].count - 1) as f64).sqrt();
                    prop_assert!(advantage.abs() <= bound * (1.0 + 1e-9), "{advantage} {bound}");
                }
            }
        }
    }

    #[test]
    fn equal_rewards_give_exactly_zero(
        reward in prop_oneof![Just(0.1), Just(1e8 + 0.1), Just(-1e15 / 3.0), -1e9..1e9],
        ids in prop::collection::vec((0_u32..3, 0_i64..4), 1..40),
        ddof in 0_i64..2, order in orders(), calls in 1..5,
    ) {
        let (clusters, groups): (Vec<u32>, Vec<i64>) = ids.into_iter().unzip();
        let rewards = vec![reward; clusters.len()];
        for estimator in Estimator::ALL {
            let normalizer = make(estimator, ddof, order, NanPolicy::Raise);
            for _ in 0..calls {
                let advantages = normalizer.advantages(&rewards, &clusters, Some(&groups)).unwrap();
                prop_assert!(advantages.iter().all(|&a| a == 0.0), "{estimator:?} {advantages:?}");
            }
        }
    }

    #[test]
    fn a_refused_batch_changes_nothing(rows in rows(1..30), at in 0_usize..30) {
        let (mut rewards, clusters, groups) = columns(&rows);
        let normalizer =
            make(Estimator::Rloo, 0, Order::UpdateThenNormalize, NanPolicy::Raise);
        normalizer.advantages(&rewards, &clusters, Some(&groups)).unwrap();
        let before = normalizer.snapshot();
        prop_assert_eq!(
            normalizer.advantages(&rewards, &clusters, None),
            Err(Error::GroupsRequired { estimator: "rloo" })
        );
        prop_assert_eq!(
            normalizer.update(&rewards, &clusters[1..]),
            Err(Error::Length { rewards: rows.len(), name: "clusters", length: rows.len() - 1 })
        );
        let index = at % rows.len();
        rewards[index] = f64::INFINITY;
        let refused = Err(Error::NonFinite { index, value: f64::INFINITY });
        prop_assert_eq!(normalizer.advantages(&rewards, &clusters, Some(&groups)), refused);
        prop_assert_eq!((normalizer.snapshot(), normalizer.num_nonfinite()), (before, 0));
    }
}

#[test]
fn a_cold_cluster_has_no_opinion() {
    let normalizer = make(Estimator::Pgrpo, 0, Order::NormalizeThenUpdate, NanPolicy::Raise);
    let first = normalizer.advantages(&[1.0, 1.0], &[7, 7], None).unwrap();
    assert_eq!(first, [0.0, 0.0]);
    // One sample of spread 0 has an opinion, and a strong one.
    let second = normalizer.advantages(&[2.0], &[7], None).unwrap();
    assert_eq!(second, [1.0 / EPS]);
}

#[test]
fn options_out_of_range_are_named() {
    assert_eq!(Scale::new(2, EPS).unwrap_err().to_string(), "ddof is 2; expected 0 or 1");
    for eps in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let message = Scale::new(0, eps).unwrap_err().to_string();
        assert_eq!(message, format!("eps is {eps:?}; expected a positive number"));
    }
    let message = "grop".parse::<Estimator>().unwrap_err().to_string();
    assert_eq!(message, "estimator is \"grop\"; expected pgrpo, grpo, dr_grpo, rloo or batch");
    for estimator in Estimator::ALL {
        assert_eq!(estimator.name().parse(), Ok(estimator));
    }
}

#[test]
fn kept_histories_are_copied_exactly_or_refused() {
    let source = make(Estimator::Pgrpo, 0, Order::UpdateThenNormalize, NanPolicy::Raise);
    source.update(&[0.1, 0.2, 0.7, 1e8 / 3.0], &[0, 0, 0, 2]).unwrap();
    let parts: Vec<_> = (0..).zip(source.snapshot()).collect();
    let copy = make(Estimator::Grpo, 0, Order::UpdateThenNormalize, NanPolicy::Raise);
    copy.absorb(&parts, 3).unwrap();
    assert_eq!((copy.snapshot(), copy.num_nonfinite()), (source.snapshot(), 3));
    for (count, mean, m2) in
        [(2, f64::NAN, 0.0), (2, 0.0, -1.0), (2, 0.0, f64::INFINITY), (u64::MAX, 0.0, 0.0)]
    {
        let broken = pgrpo_core::Moments { count, mean, m2 };
        let refused = copy.absorb(&[parts[0], (9, broken)], 1);
        assert!(matches!(refused, Err(Error::History { cluster: 9, .. })), "{refused:?}");
    }
    assert_eq!((copy.snapshot(), copy.num_nonfinite()), (source.snapshot(), 3));
}
