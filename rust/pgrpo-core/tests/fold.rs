//! Large batches: every way of summing rewards up and of applying maps, against two passes.

#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]

use std::collections::HashMap;
use std::process::Command;

mod usual;

use pgrpo_core::estimators::{dr_grpo, grpo, rloo};
use pgrpo_core::internals::{Level, level};
use pgrpo_core::{
    Batch, ClusterId, Error, Ids, Moments, NanPolicy, Normalizer, Options, RULES, Real, Snapshot,
};
use usual::usual;

const EPS: f64 = 1e-4;
/// Rewards that are summed up together before anything is merged.
const CHUNK: usize = 1 << 18;
/// Rewards that are looked at before the rest is summed up in one of two ways.
const PROBED: usize = 2 * 2048;

/// Numbers without pattern (xorshift).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In [-1, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / 2.0_f64.powi(52) - 1.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }
}

/// How ids follow each other.
#[derive(Clone, Copy, Debug)]
enum Runs {
    /// Of so many equal ones.
    Of(usize),
    /// Of 1 to 20 equal ones.
    Ragged,
}

/// Where the rewards of clusters lie: they are those of the unit interval about a mean.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Means {
    /// All at 0.5: the first reward serves all as the shift.
    Common,
    /// One in 16 far away: they are summed up again.
    FewAway,
    /// All far from each other: each is summed up about its own first reward.
    Apart,
    /// Common as far as is probed, apart from there on.
    LateApart,
    /// Common, and rewards that are equal in each cluster.
    Equal,
}

const MEANS: [Means; 5] =
    [Means::Common, Means::FewAway, Means::Apart, Means::LateApart, Means::Equal];

#[derive(Clone, Debug)]
struct Data {
    rewards: Vec<f64>,
    ids: Vec<i32>,
}

fn data(size: usize, clusters: usize, runs: Runs, means: Means, seed: u64) -> Data {
    let mut noise = Noise(seed * 0x9E37_79B9 + 1);
    let mut ids = Vec::with_capacity(size);
    while ids.len() < size {
        let id = noise.below(clusters);
        let run = match runs {
            Runs::Of(run) => run,
            Runs::Ragged => 1 + noise.below(20),
        };
        for _ in 0..run.min(size - ids.len()) {
            ids.push(i32::try_from(id).unwrap());
        }
    }
    let reward = |(at, &id): (usize, &i32)| {
        let x = noise.unit();
        let far = 1e5 * (1.0 + f64::from(id));
        match means {
            Means::Common => 0.5 + x,
            Means::FewAway => x + if id % 16 == 3 { far } else { 0.5 },
            Means::Apart => x + far,
            Means::LateApart => x + if at < PROBED { 0.5 } else { 0.5 + 3e3 * f64::from(id % 5) },
            Means::Equal => 0.1 + f64::from(id) / 3.0,
        }
    };
    let rewards = ids.iter().enumerate().map(reward).collect();
    Data { rewards, ids }
}

fn make(options: &Options) -> Normalizer {
    Normalizer::new(Options { eps: EPS, ..options.clone() }).unwrap()
}

fn batch<'a, R>(rewards: &'a [R], ids: &'a [i32]) -> Batch<'a, R> {
    Batch {
        rewards,
        clusters: Ids::I32(ids),
        groups: None,
        parents: None,
        weights: None,
        score_norms: None,
        lengths: None,
    }
}

fn advantages<R: Real>(normalizer: &Normalizer, batch: &Batch<'_, R>) -> Vec<R> {
    let mut out = vec![R::from_f64(f64::NAN); batch.rewards.len()];
    normalizer.advantages(batch, &mut out).unwrap();
    out
}

/// By two passes: (r - mean) / (sigma + eps) of the rewards of the same id, and 1 / (sigma + eps).
fn standardized(data: &Data, weights: Option<&[f64]>, ddof: f64) -> Vec<(f64, f64)> {
    #[derive(Default)]
    struct Sums {
        first: f64,
        weight: f64,
        sum: f64,
        squares: f64,
    }
    let mut sums: HashMap<i32, Sums> = HashMap::new();
    let weight = |at: usize| weights.map_or(1.0, |weights| weights[at]);
    for (at, (&reward, &id)) in data.rewards.iter().zip(&data.ids).enumerate() {
        let sums = sums.entry(id).or_insert(Sums { first: reward, ..Sums::default() });
        sums.weight += weight(at);
        sums.sum += weight(at) * (reward - sums.first);
    }
    let deviation = |sums: &Sums, reward: f64| (reward - sums.first) - sums.sum / sums.weight;
    for (at, (&reward, id)) in data.rewards.iter().zip(&data.ids).enumerate() {
        let sums = sums.get_mut(id).unwrap();
        sums.squares += weight(at) * deviation(sums, reward).powi(2);
    }
    let advantage = |(&reward, id): (&f64, &i32)| {
        let sums = &sums[id];
        let degrees = sums.weight - ddof;
        let sigma = if degrees > 0.0 { (sums.squares / degrees).sqrt() } else { 0.0 };
        let unit = 1.0 / (sigma + EPS);
        (deviation(sums, reward) * unit, unit)
    };
    data.rewards.iter().zip(&data.ids).map(advantage).collect()
}

/// The largest error, relative to that of a reward of size 1.
fn worst(got: &[f64], expected: &[(f64, f64)]) -> f64 {
    let errors = got.iter().zip(expected).map(|(got, (expected, unit))| {
        let error = (got - expected).abs() / (1.0 + unit + expected.abs());
        // NaN is no maximum, but must be the worst of all.
        if error.is_nan() { f64::INFINITY } else { error }
    });
    errors.fold(0.0, f64::max)
}

/// A digest of the bits (FNV-1a, by words).
fn digest<R: Real>(values: &[R]) -> u64 {
    values.iter().fold(0xCBF2_9CE4_8422_2325, |hash, value| {
        (hash ^ value.to_f64().to_bits()).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

#[test]
fn every_way_of_summing_equals_two_passes() {
    let shapes = [
        (2047, 5, Runs::Of(1)),
        (2048, 16, Runs::Of(8)),
        (2049, 1, Runs::Of(3)),
        (PROBED, 64, Runs::Of(8)),
        (PROBED + 8, 16, Runs::Of(16)),
        (20_003, 33, Runs::Ragged),
        (20_003, 65, Runs::Of(1)),
        (30_001, 20_000, Runs::Of(4)),
        (CHUNK + 1, 32, Runs::Of(8)),
        (CHUNK + 4321, 100, Runs::Ragged),
        (3 * CHUNK + 5, 70, Runs::Of(8)),
    ];
    let mut seed = 0;
    for (size, clusters, runs) in shapes {
        for means in MEANS {
            seed += 1;
            // Further chunks are summed up as the first one is.
            let few = if size > 2 * CHUNK {
                [Means::FewAway; 3]
            } else {
                [Means::FewAway, Means::Apart, Means::LateApart]
            };
            if size > CHUNK + 1 && !few.contains(&means) {
                continue;
            }
            let data = data(size, clusters, runs, means, seed);
            let got = advantages(&make(&usual()), &batch(&data.rewards, &data.ids));
            let off = worst(&got, &standardized(&data, None, 0.0));
            println!("{size} {clusters} {runs:?} {means:?}: {off:e}");
            // 32 deviations away the shift may be, and rewards far off have their rounding.
            assert!(off <= 2e-12, "{size} {clusters} {runs:?} {means:?}: {off:e}");
            if means == Means::Equal {
                assert!(got.iter().all(|&advantage| advantage == 0.0), "{size} {clusters}");
            }
        }
    }
}

/// Groups of few, by the tens of thousands; none of them at a multiple of 8.
#[test]
fn groups_equal_two_passes() {
    for means in MEANS {
        for (estimator, ddof) in [(&grpo::RULE, 1), (&rloo::RULE, 0), (&dr_grpo::RULE, 0)] {
            let rewards = data(30_011, 1, Runs::Of(1), means, 7).rewards;
            let mut noise = Noise(3);
            let mut groups: Vec<i32> = Vec::new();
            while groups.len() < rewards.len() {
                let id = i32::try_from(groups.len()).unwrap() * 7 - 60_000;
                let run = 1 + noise.below(9);
                groups.extend(std::iter::repeat_n(id, run.min(rewards.len() - groups.len())));
            }
            let clusters = vec![2; rewards.len()];
            let normalizer = make(&Options { estimator, ddof, ..usual() });
            let batch = Batch { groups: Some(Ids::I32(&groups)), ..batch(&rewards, &clusters) };
            let got = advantages(&normalizer, &batch);
            let mut sizes: HashMap<i32, f64> = HashMap::new();
            for &group in &groups {
                *sizes.entry(group).or_default() += 1.0;
            }
            let data = Data { rewards, ids: groups };
            let mut expected = standardized(&data, None, f64::from(ddof));
            for ((advantage, unit), id) in expected.iter_mut().zip(&data.ids) {
                let others = sizes[id] - 1.0;
                let factor = match estimator.name {
                    "rloo" if others == 0.0 => 0.0,
                    "rloo" => sizes[id] / others,
                    _ => 1.0,
                };
                if estimator != &grpo::RULE {
                    (*advantage, *unit) = (*advantage / *unit * factor, 1.0);
                }
            }
            let off = worst(&got, &expected);
            println!("{means:?} {estimator:?}: {off:e}");
            assert!(off <= 2e-12, "{means:?} {estimator:?}: {off:e}");
            for (advantage, id) in got.iter().zip(&data.ids) {
                assert!(sizes[id] > 1.0 || *advantage == 0.0, "a group of one: {advantage:e}");
            }
        }
    }
}

#[test]
fn many_clusters_equal_two_passes() {
    for (size, clusters) in [(300_007, 100_000), (60_001, 100_000)] {
        for means in [Means::Common, Means::Apart] {
            let data = data(size, clusters, Runs::Ragged, means, 11);
            let normalizer = make(&Options { num_threads: 2, ..usual() });
            let got = advantages(&normalizer, &batch(&data.rewards, &data.ids));
            let off = worst(&got, &standardized(&data, None, 0.0));
            println!("{size} {means:?}: {off:e}");
            assert!(off <= 2e-12, "{means:?}: {off:e}");
            let counted: f64 =
                normalizer.snapshot().clusters.iter().map(|entry| entry.rewards.count).sum();
            assert_eq!(counted, size as f64);
        }
    }
}

#[test]
fn weights_equal_two_passes() {
    let data = data(CHUNK + 99, 40, Runs::Ragged, Means::FewAway, 5);
    let weights: Vec<f64> = data.ids.iter().map(|&id| 0.25 * f64::from(1 + id % 5)).collect();
    let weighted = Batch { weights: Some(&weights), ..batch(&data.rewards, &data.ids) };
    let got = advantages(&make(&usual()), &weighted);
    let off = worst(&got, &standardized(&data, Some(&weights), 0.0));
    assert!(off <= 2e-12, "{off:e}");
    let ones = vec![1.0; weights.len()];
    let weighted = Batch { weights: Some(&ones), ..weighted };
    let got = advantages(&make(&usual()), &weighted);
    let off = worst(&got, &standardized(&data, None, 0.0));
    assert!(off <= 2e-12, "{off:e}");
}

/// One after the other, calls of all sizes are one stream.
#[test]
fn calls_of_any_size_are_one_stream() {
    let whole = data(CHUNK / 2, 9, Runs::Ragged, Means::FewAway, 21);
    let normalizer = make(&usual());
    let (mut at, mut size) = (0, 1);
    let mut got = Vec::new();
    while at < whole.rewards.len() {
        let to = (at + size).min(whole.rewards.len());
        let part = batch(&whole.rewards[at..to], &whole.ids[at..to]);
        normalizer.update(&part).unwrap();
        (at, size) = (to, size * 7 % 9001);
    }
    got.resize(whole.rewards.len(), 0.0);
    normalizer.normalize(&batch(&whole.rewards, &whole.ids), &mut got).unwrap();
    let off = worst(&got, &standardized(&whole, None, 0.0));
    assert!(off <= 2e-12, "{off:e}");
}

#[test]
fn threads_change_not_a_bit() {
    for (clusters, means) in [(32, Means::FewAway), (70, Means::Apart), (4_000, Means::LateApart)] {
        let data = data(2 * CHUNK + 777, clusters, Runs::Ragged, means, 9);
        #[expect(clippy::cast_possible_truncation, reason = "single precision is the point")]
        let single: Vec<f32> = data.rewards.iter().map(|&reward| reward as f32).collect();
        let run = |num_threads: usize| -> (u64, u64, Snapshot) {
            let clip = (means == Means::Apart).then_some(1.25);
            let normalizer = make(&Options { num_threads, clip, ..usual() });
            let wide = digest(&advantages(&normalizer, &batch(&data.rewards, &data.ids)));
            let narrow = digest(&advantages(&normalizer, &batch(&single, &data.ids)));
            (wide, narrow, normalizer.snapshot())
        };
        let one = run(1);
        for num_threads in [2, 4] {
            assert_eq!(run(num_threads), one, "{clusters} {means:?} {num_threads} threads");
        }
    }
}

#[test]
fn single_precision_is_rounded_only() {
    // 64 maps fit into the registers of AVX-512, 65 do not; 2^20 rewards go past the caches.
    for (size, clusters) in [
        (40, 5),
        (64, 64),
        (79, 2),
        (9_001, 1),
        (9_001, 33),
        (9_001, 64),
        (9_001, 65),
        (20_003, 4_000),
        ((1 << 20) + 13, 48),
    ] {
        for means in [Means::Common, Means::FewAway, Means::Apart, Means::Equal] {
            if size > CHUNK && means != Means::FewAway {
                continue;
            }
            let data = data(size, clusters, Runs::Ragged, means, 13);
            #[expect(clippy::cast_possible_truncation, reason = "single precision is the point")]
            let single: Vec<f32> = data.rewards.iter().map(|&reward| reward as f32).collect();
            let wide: Vec<f64> = single.iter().map(|&reward| f64::from(reward)).collect();
            let far: Vec<i64> = data.ids.iter().map(|&id| i64::from(id) << 33).collect();
            let one = make(&usual());
            let expected = advantages(&one, &batch(&wide, &data.ids));
            let fast = make(&usual());
            // Wherever the result begins in memory.
            let mut place = vec![f32::NAN; size + 16];
            let start = clusters % 16;
            let out = &mut place[start..start + size];
            fast.advantages(&batch(&single, &data.ids), out).unwrap();
            let other = make(&usual());
            let far = Batch { clusters: Ids::I64(&far), ..batch(&single, &data.ids) };
            let slow = advantages(&other, &far);
            let mut worst = [0.0_f64; 2];
            for ((fast, slow), expected) in out.iter().zip(&slow).zip(&expected) {
                for (worst, got) in worst.iter_mut().zip([fast, slow]) {
                    let off = (f64::from(*got) - expected).abs() / (1.0 + expected.abs());
                    assert!(off <= 2e-7, "{got} for {expected}: {size} {clusters} {means:?}");
                    *worst = worst.max(off);
                }
                assert!(means != Means::Equal || (*fast, *slow) == (0.0, 0.0), "{fast} {slow}");
            }
            println!("{size} {clusters} {means:?}: {worst:?}");
            assert_eq!(fast.snapshot(), one.snapshot());
            assert!(
                place[..start].iter().chain(&place[start + size..]).all(|beyond| beyond.is_nan())
            );
        }
    }
}

/// Rewards on the coarsest grid their size allows, where a mean in `f32` is farthest from the mean.
#[test]
fn single_precision_is_rounded_only_far_from_zero() {
    for grid in [1.0_f32, 8.0, 1024.0] {
        let base = grid * 8_388_608.0;
        let mut noise = Noise(17);
        for share in [2, 3, 10, 100, 1000] {
            let size = 3_000;
            let single: Vec<f32> = (0..size)
                .map(|_| base + if noise.below(share) == 0 { grid } else { 0.0 })
                .collect();
            let wide: Vec<f64> = single.iter().map(|&reward| f64::from(reward)).collect();
            let ids = vec![0; size];
            let expected = advantages(&make(&usual()), &batch(&wide, &ids));
            let got = advantages(&make(&usual()), &batch(&single, &ids));
            let mut worst = 0.0_f64;
            for (got, expected) in got.iter().zip(&expected) {
                let off = (f64::from(*got) - expected).abs() / (1.0 + expected.abs());
                assert!(off <= 2e-7, "{got} for {expected}: {off:e}, 1 in {share}");
                worst = worst.max(off);
            }
            println!("grid {grid}, 1 in {share}: {worst:e}");
        }
    }
}

/// Mean 1e8, deviation 1e-3, a million samples: against whole numbers.
#[test]
fn far_from_zero_advantages_keep_their_digits() {
    let unit = 2.0_f64.powi(-26);
    let clusters = 3_usize;
    let mut noise = Noise(99);
    let normalizer = make(&Options { num_threads: 2, ..usual() });
    let mut exact = vec![(0_i128, 0_i128, 0_i128); clusters];
    let mut last = (Vec::new(), Vec::new());
    for size in [7, 1, 5_000, 400_000, 100, 300_000, 294_892] {
        let (mut steps, mut ids) = (Vec::new(), Vec::new());
        for _ in 0..size {
            // A sum of four has most of the tails that matter; its deviation is 1e-3 or so.
            let step: i64 = (0..4).map(|_| (noise.next() >> 47).cast_signed() - (1 << 16)).sum();
            let id = noise.below(clusters);
            let (count, sum, squares) = &mut exact[id];
            *count += 1;
            *sum += i128::from(step);
            *squares += i128::from(step) * i128::from(step);
            steps.push(step);
            ids.push(i32::try_from(id).unwrap());
        }
        let rewards: Vec<f64> = steps.iter().map(|&step| 1e8 + step as f64 * unit).collect();
        last =
            (steps, advantages(&normalizer, &batch(&rewards, &ids)).into_iter().zip(ids).collect());
    }
    let mut worst = 0.0_f64;
    for (step, (got, id)) in last.0.into_iter().zip(last.1) {
        let (count, sum, squares) = exact[usize::try_from(id).unwrap()];
        let deviation = (i128::from(step) * count - sum) as f64 / count as f64;
        let sigma = ((count * squares - sum * sum) as f64).sqrt() / count as f64;
        let expected = deviation * unit / (sigma * unit + EPS);
        worst = worst.max((got - expected).abs());
    }
    println!("mean 1e8: off by {worst:e}");
    assert!(worst <= 1e-10, "{worst:e}");
}

/// A cluster met once among others of another size keeps its own digits.
#[test]
fn a_single_reward_among_many_is_exact() {
    for (others, one) in [(1.0, 0.1), (1e8, 1.0 / 6.0), (-3e15, 0.7)] {
        for estimator in RULES {
            // One compares with other clusters, the other with a mean that starts at 0.
            if ["batch", "rae"].contains(&estimator.name) {
                continue;
            }
            let normalizer = make(&Options { estimator, ..usual() });
            let (mut rewards, lengths) = (vec![others; 5_000], vec![1.0; 5_000]);
            let mut ids = vec![0; 5_000];
            (rewards[4_100], ids[4_100]) = (one, 1);
            let groups = Some(Ids::I32(&ids));
            let batch = Batch { groups, lengths: Some(&lengths), ..batch(&rewards, &ids) };
            let got = advantages(&normalizer, &batch);
            assert!(got.iter().all(|&a| a == 0.0), "{estimator:?} {:e}", got[4_100]);
            let Moments { count, m2, .. } = normalizer.snapshot().clusters[1].rewards;
            assert_eq!((count, m2), (1.0, 0.0));
            assert_eq!(normalizer.snapshot().clusters[1].rewards.mean(), one);
            // And the history goes on with all digits.
            let small = [one + 1e-3, one - 1e-3, one];
            normalizer
                .update(&Batch {
                    rewards: &small,
                    clusters: Ids::I32(&[1; 3]),
                    groups: Some(Ids::I32(&[1; 3])),
                    lengths: Some(&[1.0; 3]),
                    ..batch
                })
                .unwrap();
            let history = normalizer.snapshot().clusters[1].rewards;
            assert!(
                (history.mean() - one).abs() <= 1e-15 && (history.m2 / 2e-6 - 1.0).abs() < 1e-12
            );
        }
    }
}

/// Ids that leave the table of small ones, wherever they come.
#[test]
fn ids_beyond_the_table_are_no_other_ids() {
    let size = CHUNK + 5_000;
    let data = data(size, 6, Runs::Of(8), Means::Common, 4);
    for at in [0, 4_096, CHUNK, size - 1] {
        let limit = 2 * i64::try_from(size).unwrap();
        for far in [
            -1,
            limit - 1,
            limit,
            (1 << 22) - 1,
            1 << 22,
            1 << 32,
            (1 << 32) - 1,
            i64::MIN,
            i64::MAX,
        ] {
            // All of them at every place would take long, and say no more.
            if at != size - 1 && far != 1 << 32 {
                continue;
            }
            let mut ids: Vec<i64> = data.ids.iter().map(|&id| i64::from(id)).collect();
            ids[at] = far;
            let normalizer = make(&usual());
            normalizer
                .update(&Batch { clusters: Ids::I64(&ids), ..batch(&data.rewards, &data.ids) })
                .unwrap();
            let snapshot = normalizer.snapshot();
            assert_eq!(snapshot.clusters.len(), 7, "{far}");
            for entry in snapshot.clusters {
                let ClusterId::Int(id) = entry.id else { unreachable!() };
                let count = ids.iter().filter(|&&other| other == id).count();
                assert_eq!(entry.rewards.count, count as f64, "{id} with {far}");
                assert!(id != far || entry.rewards.mean() == data.rewards[at]);
            }
        }
    }
}

#[test]
fn non_finite_rewards_are_found_wherever_they_are() {
    let size = CHUNK + 5_003;
    for means in [Means::Common, Means::FewAway, Means::Apart] {
        let data = data(size, 32, Runs::Of(8), means, 6);
        for (at, hole) in [
            (0, f64::NAN),
            (1, f64::INFINITY),
            (PROBED + 3, f64::NEG_INFINITY),
            (CHUNK - 1, 1e140),
            (CHUNK, f64::NAN),
            (size - 1, -1e300),
        ] {
            // All places with all means would take long, and say no more.
            if means != Means::Common && at != PROBED + 3 && at != CHUNK {
                continue;
            }
            let mut holed = data.clone();
            holed.rewards[at] = hole;
            let raise = make(&usual());
            let mut out = vec![3.0; size];
            match raise.advantages(&batch(&holed.rewards, &holed.ids), &mut out) {
                Err(Error::NonFinite { index, .. }) => assert_eq!(index, at),
                other => panic!("{other:?} of {hole} at {at}"),
            }
            assert_eq!(raise.snapshot(), Snapshot::default());
            let zero = make(&Options { nan_policy: NanPolicy::Zero, ..usual() });
            let mut got = advantages(&zero, &batch(&holed.rewards, &holed.ids));
            assert_eq!((got.remove(at), zero.num_nonfinite()), (0.0, 1));
            holed.rewards.remove(at);
            holed.ids.remove(at);
            assert_eq!(got, advantages(&raise, &batch(&holed.rewards, &holed.ids)));
        }
    }
}

/// Prints what a process computes: `wide` and `many` have to be the same with all instruction sets,
/// `few` are the bits of advantages in single precision that may be rounded otherwise.
#[test]
#[ignore = "run by every_instruction_set_computes_the_same"]
fn prints_what_it_computes() {
    println!("level {:?}", level());
    for means in MEANS {
        for (size, clusters) in [(9_001, 50), (9_001, 500), (CHUNK + 77, 20)] {
            let data = data(size, clusters, Runs::Ragged, means, 31);
            #[expect(clippy::cast_possible_truncation, reason = "single precision is the point")]
            let single: Vec<f32> = data.rewards.iter().map(|&reward| reward as f32).collect();
            let normalizer = make(&usual());
            let wide = digest(&advantages(&normalizer, &batch(&data.rewards, &data.ids)));
            println!("wide {size} {clusters} {means:?} {wide:x}");
            let narrow = advantages(&normalizer, &batch(&single, &data.ids));
            if clusters > 64 {
                println!("many {size} {clusters} {means:?} {:x}", digest(&narrow));
            } else if size < CHUNK {
                let bits: Vec<String> =
                    narrow.iter().map(|advantage| format!("{:x}", advantage.to_bits())).collect();
                println!("few {}", bits.join(" "));
            }
            println!(
                "wide {:x}",
                digest(
                    &normalizer
                        .snapshot()
                        .clusters
                        .iter()
                        .flat_map(|entry| [
                            entry.rewards.count,
                            entry.rewards.mean(),
                            entry.rewards.m2
                        ])
                        .collect::<Vec<f64>>()
                )
            );
        }
    }
}

#[test]
fn every_instruction_set_computes_the_same() {
    let run = |name: &str| -> Vec<String> {
        let this = std::env::current_exe().unwrap();
        let output = Command::new(this)
            .args(["--exact", "prints_what_it_computes", "--ignored", "--nocapture"])
            .env("PGRPO_SIMD", name)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let lines = String::from_utf8(output.stdout).unwrap();
        let told = |line: &&str| {
            ["level ", "wide ", "many ", "few "].iter().any(|start| line.starts_with(start))
        };
        lines.lines().filter(told).map(str::to_owned).collect()
    };
    let baseline = run("baseline");
    assert_eq!(baseline[0], "level Baseline");
    assert_eq!(baseline.len(), 1 + MEANS.len() * (3 + 1 + 1 + 3));
    let mut narrowed = 0;
    for (name, wanted) in [("avx2", Level::Avx2), ("", Level::Avx512)] {
        let other = run(name);
        // This processor may have less; then there is no more to be compared.
        assert_eq!(other[0], format!("level {:?}", wanted.min(level())));
        assert_eq!(other.len(), baseline.len());
        for (ours, theirs) in other[1..].iter().zip(&baseline[1..]) {
            let (Some(ours), Some(theirs)) =
                (ours.strip_prefix("few "), theirs.strip_prefix("few "))
            else {
                assert_eq!(ours, theirs, "{name}");
                continue;
            };
            let numbers = |line: &str| -> Vec<f32> {
                line.split(' ')
                    .map(|bits| f32::from_bits(u32::from_str_radix(bits, 16).unwrap()))
                    .collect()
            };
            for (ours, theirs) in numbers(ours).into_iter().zip(numbers(theirs)) {
                narrowed += 1;
                let off = (ours - theirs).abs() / (1.0 + theirs.abs());
                assert!(off <= 2.6e-7, "{ours} {theirs} with {name}");
                assert!(wanted == Level::Avx512 || ours == theirs, "{ours} {theirs} with {name}");
            }
        }
    }
    assert_eq!(narrowed, 2 * MEANS.len() * 9_001);
}
