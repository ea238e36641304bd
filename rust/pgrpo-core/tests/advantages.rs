//! Every estimator against a slow oracle that keeps all samples, and what holds of the advantages.

#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]
#![allow(clippy::many_single_char_names, reason = "formulas are written as they are published")]

use std::collections::BTreeMap;

mod usual;

use pgrpo_core::estimators::{auto, batch, gdpo_multi, grpo, opo, rae};
use pgrpo_core::{
    AnyId, Batch, ClusterId, Entry, Error, Ids, Moments, NanPolicy, Normalizer, Options, Order,
    RULES, Rule, Snapshot,
};
use proptest::prelude::*;
use usual::usual;

/// One rollout; cluster and group are labels from which ids of any kind are made.
#[derive(Clone, Copy, Debug)]
struct Rollout {
    reward: f64,
    weight: f64,
    norm: f64,
    length: f64,
    cluster: usize,
    group: usize,
}

const CLUSTERS: usize = 5;
const GROUPS: usize = 7;
const STRINGS: [&str; CLUSTERS] = ["", "0", "-3", "novice", "Prüfer"];

/// Ids that stand for the same labels.
#[derive(Clone, Copy, Debug)]
enum Kind {
    SmallI32,
    SmallI64,
    HugeI64,
    NegativeI32,
    Strings,
    Mixed,
}

const KINDS: [Kind; 6] =
    [Kind::SmallI32, Kind::SmallI64, Kind::HugeI64, Kind::NegativeI32, Kind::Strings, Kind::Mixed];

impl Kind {
    fn id(self, label: usize) -> ClusterId {
        let int = i64::try_from(label).unwrap();
        match self {
            Self::SmallI32 | Self::SmallI64 => ClusterId::Int(int),
            Self::HugeI64 => ClusterId::Int(i64::MAX - int * (1 << 40)),
            Self::NegativeI32 => ClusterId::Int(i64::from(i32::MIN) + int),
            Self::Mixed if label.is_multiple_of(2) => ClusterId::Int(int - 2),
            Self::Strings | Self::Mixed => ClusterId::Name(STRINGS[label].to_owned()),
        }
    }
}

enum Column {
    I32(Vec<i32>),
    I64(Vec<i64>),
    Any(Vec<ClusterId>),
}

impl Column {
    fn new(kind: Kind, labels: impl Iterator<Item = usize>) -> Self {
        let ids: Vec<ClusterId> = labels.map(|label| kind.id(label)).collect();
        let int = |id: &ClusterId| match id {
            ClusterId::Int(id) => *id,
            _ => unreachable!(),
        };
        match kind {
            Kind::SmallI32 | Kind::NegativeI32 => {
                Self::I32(ids.iter().map(|id| int(id).try_into().unwrap()).collect())
            }
            Kind::SmallI64 | Kind::HugeI64 => Self::I64(ids.iter().map(int).collect()),
            Kind::Strings | Kind::Mixed => Self::Any(ids),
        }
    }

    fn with<T>(&self, work: impl FnOnce(Ids<'_>) -> T) -> T {
        match self {
            Self::I32(ids) => work(Ids::I32(ids)),
            Self::I64(ids) => work(Ids::I64(ids)),
            Self::Any(ids) => {
                work(Ids::Any(&ids.iter().map(ClusterId::borrow).collect::<Vec<AnyId<'_>>>()))
            }
        }
    }
}

/// What is passed of the optional columns.
#[derive(Clone, Copy, Debug)]
struct Given {
    weights: bool,
    norms: bool,
    parents: bool,
}

impl Given {
    /// Without parents where they are refused, for there is no prior to be borrowed.
    fn for_options(self, options: &Options) -> Self {
        Self { parents: self.parents && options.prior_count > 0.0, ..self }
    }
}

/// The parent of each cluster. As their labels are those of clusters, so are their ids.
fn parent_of(cluster: usize) -> usize {
    cluster % 2
}

/// Passes a batch on, whichever the types of its ids.
fn with_batch<R: pgrpo_core::Real, T>(
    rollouts: &[Rollout],
    rewards: &[R],
    kind: Kind,
    given: Given,
    work: impl FnOnce(&Batch<'_, R>) -> T,
) -> T {
    let clusters = Column::new(kind, rollouts.iter().map(|rollout| rollout.cluster));
    // Groups are of whatever kind; strings are few.
    let group_kind = if matches!(kind, Kind::Strings) { Kind::Mixed } else { kind };
    let group_label = |rollout: &Rollout| match group_kind {
        Kind::Mixed => (rollout.group * 2) % GROUPS * 2,
        _ => rollout.group,
    };
    let groups = Column::new(group_kind, rollouts.iter().map(group_label));
    let parents = Column::new(kind, rollouts.iter().map(|rollout| parent_of(rollout.cluster)));
    let weights: Vec<f64> = rollouts.iter().map(|rollout| rollout.weight).collect();
    let norms: Vec<f64> = rollouts.iter().map(|rollout| rollout.norm).collect();
    let lengths: Vec<f64> = rollouts.iter().map(|rollout| rollout.length).collect();
    clusters.with(|clusters| {
        groups.with(|groups| {
            parents.with(|parents| {
                work(&Batch {
                    rewards,
                    clusters,
                    groups: Some(groups),
                    parents: given.parents.then_some(parents),
                    weights: given.weights.then_some(&weights),
                    score_norms: given.norms.then_some(&norms),
                    lengths: Some(&lengths),
                })
            })
        })
    })
}

fn rewards(rollouts: &[Rollout]) -> Vec<f64> {
    rollouts.iter().map(|rollout| rollout.reward).collect()
}

fn advantages(
    normalizer: &Normalizer,
    rollouts: &[Rollout],
    kind: Kind,
    given: Given,
) -> Result<Vec<f64>, Error> {
    let mut out = vec![f64::NAN; rollouts.len()];
    let given = given.for_options(normalizer.options());
    with_batch(rollouts, &rewards(rollouts), kind, given, |batch| {
        normalizer.advantages(batch, &mut out)
    })?;
    Ok(out)
}

fn make(options: &Options) -> Normalizer {
    Normalizer::new(options.clone()).unwrap()
}

// ---------------------------------------------------------------------------------------- oracle

/// A sample that was seen: in which call, and how much of it is not forgotten.
#[derive(Clone, Copy, Debug)]
struct Seen {
    rollout: Rollout,
    call: usize,
    kept: f64,
    kept_by_parent: f64,
}

/// Weight, weighted mean and weighted sum of squared deviations.
#[derive(Clone, Copy, Debug, Default)]
struct Stats {
    n: f64,
    mean: f64,
    m2: f64,
}

/// By two passes, about the first value: equal values have no spread.
fn stats(values: &[(f64, f64)]) -> Stats {
    let n: f64 = values.iter().map(|(_, w)| w).sum();
    let Some(&(first, _)) = values.iter().find(|(_, w)| *w > 0.0) else { return Stats::default() };
    let mean = first + values.iter().map(|(r, w)| w * (r - first)).sum::<f64>() / n;
    let m2 = values.iter().map(|(r, w)| w * (r - mean).powi(2)).sum();
    Stats { n, mean, m2 }
}

impl Stats {
    fn sigma(&self, ddof: u8) -> f64 {
        let degrees = self.n - f64::from(ddof);
        if degrees > 0.0 { (self.m2 / degrees).sqrt() } else { 0.0 }
    }
}

/// Everything seen so far, in full.
#[derive(Clone, Debug, Default)]
struct Oracle {
    /// Whether parents are given.
    parents: bool,
    seen: Vec<Seen>,
    calls: usize,
}

/// What was summed up of one cluster.
#[derive(Clone, Copy, Debug, Default)]
struct Summed {
    own: Stats,
    parts: [f64; 3],
    regression: [f64; 3],
    /// The exponential mean of `rae`.
    exponential: f64,
}

impl Oracle {
    fn push(&mut self, batch: &[Rollout], forgetting: f64) {
        for cluster in 0..CLUSTERS {
            let touched = batch.iter().any(|r| r.cluster == cluster && r.weight > 0.0);
            for seen in self.seen.iter_mut().filter(|seen| seen.rollout.cluster == cluster) {
                seen.kept *= if touched { forgetting } else { 1.0 };
            }
        }
        for parent in 0..2 {
            let is_of = |r: &Rollout| parent_of(r.cluster) == parent;
            let touched = batch.iter().any(|r| is_of(r) && r.weight > 0.0);
            for seen in self.seen.iter_mut().filter(|seen| is_of(&seen.rollout)) {
                seen.kept_by_parent *= if touched { forgetting } else { 1.0 };
            }
        }
        let call = self.calls;
        let (kept, kept_by_parent) = (1.0, 1.0);
        let seen = batch.iter().map(|&rollout| Seen { rollout, call, kept, kept_by_parent });
        self.seen.extend(seen);
        self.calls += 1;
    }

    fn values(&self, wanted: impl Fn(&Seen) -> bool) -> Vec<(f64, f64)> {
        let seen = self.seen.iter().filter(|seen| wanted(seen));
        seen.map(|seen| (seen.rollout.reward, seen.rollout.weight * seen.kept)).collect()
    }

    /// What came with a parent.
    fn of_parent(&self, parent: usize) -> Vec<(f64, f64)> {
        let seen = self.seen.iter().filter(|seen| parent_of(seen.rollout.cluster) == parent);
        seen.map(|seen| (seen.rollout.reward, seen.rollout.weight * seen.kept_by_parent)).collect()
    }

    fn summed(&self, cluster: usize) -> Summed {
        let mut parts: BTreeMap<(usize, usize), Vec<Seen>> = BTreeMap::new();
        for seen in self.seen.iter().filter(|seen| seen.rollout.cluster == cluster) {
            parts.entry((seen.call, seen.rollout.group)).or_default().push(*seen);
        }
        let mut summed = Summed {
            own: stats(&self.values(|seen| seen.rollout.cluster == cluster)),
            ..Summed::default()
        };
        for seen in self.seen.iter().filter(|seen| seen.rollout.cluster == cluster) {
            let left = 0.95_f64.powf(seen.rollout.weight);
            summed.exponential = left * summed.exponential + (1.0 - left) * seen.rollout.reward;
        }
        for ((call, _), part) in parts {
            let values: Vec<_> =
                part.iter().map(|s| (s.rollout.reward, s.rollout.weight)).collect();
            let Stats { n: size, mean, m2 } = stats(&values);
            if size == 0.0 {
                continue;
            }
            let kept = part[0].kept;
            let squares: f64 = values.iter().map(|(_, w)| w * w).sum();
            for (sum, value) in summed.parts.iter_mut().zip([squares / size, size * size, m2]) {
                *sum += kept * value;
            }
            let before = stats(&self.values(|s| s.rollout.cluster == cluster && s.call < call));
            for Seen { rollout: Rollout { reward, weight, norm, .. }, .. } in part {
                if before.n > 0.0 && weight > 0.0 && size - weight > 0.0 {
                    let y = (reward - mean) * size / (size - weight);
                    let x = (before.mean - mean) + (y - (reward - mean));
                    for (sum, value) in summed.regression.iter_mut().zip([x * x, x * y, y * y]) {
                        *sum += kept * weight * norm * value;
                    }
                }
            }
        }
        summed
    }

    /// Advantages of a batch by what was seen, each with what a deviation was multiplied with.
    #[expect(clippy::too_many_lines, reason = "a few for each rule")]
    fn read(&self, batch: &[Rollout], options: &Options) -> Vec<(f64, f64)> {
        let &Options { estimator, ddof, eps, sigma_floor, min_count, prior_count, .. } = options;
        let pool = self.values(|_| true);
        let pooled = stats(&pool).n;
        // As many samples as the prior has, spread as those are.
        let prior_of = |values: &[(f64, f64)]| -> Vec<(f64, f64)> {
            let n = stats(values).n;
            let share = if n > 0.0 { prior_count / n } else { 0.0 };
            values.iter().map(|(r, w)| (*r, w * share)).collect()
        };
        let summed: Vec<Summed> = (0..CLUSTERS).map(|cluster| self.summed(cluster)).collect();
        let histories: Vec<Stats> = (0..CLUSTERS)
            .map(|cluster| {
                let mut values = self.values(|seen| seen.rollout.cluster == cluster);
                let mut prior = prior_of(&pool);
                if self.parents {
                    prior.extend(self.of_parent(parent_of(cluster)));
                    prior = prior_of(&prior);
                }
                values.extend(prior);
                stats(&values)
            })
            .collect();
        let known =
            |cluster: usize| histories[cluster].n > 0.0 && histories[cluster].n >= min_count;
        let among = |wanted: &dyn Fn(&Rollout) -> bool| {
            let rollouts = batch.iter().filter(|rollout| wanted(rollout));
            stats(&rollouts.map(|r| (r.reward, r.weight)).collect::<Vec<_>>())
        };
        let standardize = |reward: f64, stats: Stats| {
            let unit = 1.0 / (stats.sigma(ddof) + eps);
            if stats.n > 0.0 { ((reward - stats.mean) * unit, unit) } else { (0.0, 0.0) }
        };
        let by_length = |group: usize| {
            let rollouts = batch.iter().filter(|rollout| rollout.group == group);
            stats(&rollouts.map(|r| (r.reward, r.weight * r.length)).collect::<Vec<_>>())
        };
        let slopes = |&Rollout { weight, cluster, group, .. }: &Rollout| {
            let its = |other: &Rollout| other.group == group && other.cluster == cluster;
            let part = among(&its);
            let squares: f64 =
                batch.iter().filter(|other| its(other)).map(|other| other.weight.powi(2)).sum();
            match estimator.name {
                _ if part.n == 0.0 => (1.0, 1.0),
                "shrinkage" => (1.0, prompts(&summed[cluster], part.n, squares)),
                _ if part.n - weight <= 0.0 => (1.0, 1.0),
                _ => {
                    let lambda = slope(&summed[cluster]);
                    (1.0 + (1.0 - lambda) * weight / (part.n - weight), lambda)
                }
            }
        };
        // How large r - b is in units of sigma_p, squared.
        let square = |rollout: &Rollout| {
            let (c, l) = slopes(rollout);
            let (m2, within) = (summed[rollout.cluster].own.m2, summed[rollout.cluster].parts[2]);
            let q = if m2 > 0.0 { (within / m2).min(1.0) } else { 1.0 };
            c * c * q + l * l * (1.0 - q)
        };
        let mean_square = |wanted: &dyn Fn(&Rollout) -> bool| {
            let rollouts = batch.iter().filter(|r| known(r.cluster) && wanted(r));
            let squares = stats(&rollouts.map(|r| (square(r), r.weight)).collect::<Vec<_>>());
            if squares.n > 0.0 { squares.mean } else { 1.0 }
        };
        let of_one = |rollout: &Rollout| {
            let &Rollout { reward, weight, cluster, group, .. } = rollout;
            let whole = among(&|other| other.group == group);
            let history = histories[cluster];
            let sigma = history.sigma(ddof).max(sigma_floor);
            match estimator.name {
                "pgrpo" | "shrinkage" | "auto" if !known(cluster) => (0.0, 0.0),
                "pgrpo" => ((reward - history.mean) / (sigma + eps), 1.0 / (sigma + eps)),
                "grpo" | "gdpo_multi" => standardize(reward, whole),
                "lite" | "max_rl" | "opo" | "dr_grpo" if whole.n == 0.0 => (0.0, 0.0),
                "lite" => {
                    let unit = 1.0 / (among(&|_| true).sigma(ddof) + eps);
                    ((reward - whole.mean) * unit, unit)
                }
                "max_rl" if whole.mean <= 1e-9 * whole.sigma(0) => (0.0, 0.0),
                "max_rl" => ((reward - whole.mean) / whole.mean, 1.0 / whole.mean),
                "opo" if by_length(group).n == 0.0 => (reward - whole.mean, 1.0),
                "opo" => (reward - by_length(group).mean, 1.0),
                "rae" => (reward - summed[cluster].exponential, 1.0),
                "batch" => standardize(reward, among(&|_| true)),
                "dr_grpo" => (reward - whole.mean, 1.0),
                "rloo" if whole.n - weight <= 0.0 => (0.0, 0.0),
                "rloo" => {
                    let factor = whole.n / (whole.n - weight);
                    ((reward - whole.mean) * factor, factor)
                }
                "two_way" => {
                    let residuals: Vec<(f64, f64)> = batch
                        .iter()
                        .filter(|other| other.group == group && known(other.cluster))
                        .map(|other| (other.reward - histories[other.cluster].mean, other.weight))
                        .collect();
                    let residuals = stats(&residuals);
                    if !known(cluster) || residuals.n == 0.0 {
                        return (0.0, 0.0);
                    }
                    let residual = reward - history.mean - residuals.mean;
                    (residual / (sigma + eps), 1.0 / (sigma + eps))
                }
                "shrinkage" | "auto" => {
                    let part = among(&|other| other.group == group && other.cluster == cluster);
                    let (c, l) = slopes(rollout);
                    let (d, m) = if part.n > 0.0 {
                        (reward - part.mean, part.mean - history.mean)
                    } else {
                        (0.0, reward - history.mean)
                    };
                    let of_cluster = mean_square(&|other| other.cluster == cluster);
                    let relative =
                        if of_cluster > 0.0 { square(rollout) / of_cluster } else { 1.0 };
                    let spread = (relative * mean_square(&|_| true)).sqrt();
                    let scale = (history.sigma(ddof) * spread).max(sigma_floor) + eps;
                    ((c * d + l * m) / scale, c / scale)
                }
                other => unreachable!("the oracle does not know {other}"),
            }
        };
        let clip = options.clip.unwrap_or(f64::INFINITY);
        let of_each: Vec<(f64, f64)> = batch.iter().map(of_one).collect();
        let values = of_each.iter().zip(batch).map(|((a, _), rollout)| (*a, rollout.weight));
        let all = stats(&values.collect::<Vec<_>>());
        let largest = of_each.iter().fold(0.0_f64, |largest, (_, unit)| largest.max(*unit));
        let finish = |(rollout, (advantage, unit)): (&Rollout, (f64, f64))| {
            let (advantage, unit) = if estimator.whitens && unit > 0.0 {
                let (advantage, whole) = standardize(advantage, all);
                (advantage, whole * largest)
            } else {
                (advantage, unit)
            };
            let own = summed[rollout.cluster].own.n;
            let factor =
                if own > 0.0 { (own / pooled).powf(-options.frequency_weight) } else { 1.0 };
            ((advantage * factor).clamp(-clip, clip), unit * factor)
        };
        batch.iter().zip(of_each.iter().copied()).map(finish).collect()
    }

    fn advantages(&mut self, batch: &[Rollout], options: &Options) -> Vec<(f64, f64)> {
        if options.order == Order::UpdateThenNormalize {
            self.push(batch, options.forgetting);
            self.read(batch, options)
        } else {
            let read = self.read(batch, options);
            self.push(batch, options.forgetting);
            read
        }
    }
}

/// Random effects: how much of a part's mean is kept.
fn prompts(summed: &Summed, size: f64, squares: f64) -> f64 {
    let ([parts, sizes, within], n) = (summed.parts, summed.own.n);
    if n - parts <= 1e-12 * n || n * n - sizes <= 1e-12 * n * n {
        return 1.0;
    }
    let mean_within = within / (n - parts);
    let between = (summed.own.m2 - within).max(0.0);
    let tau2 = ((between - parts * mean_within) / (n - sizes / n)).max(0.0);
    if tau2 == 0.0 { 1.0 } else { mean_within / (mean_within + size * size / squares * tau2) }
}

/// The ridge regression that starts at 1.
fn slope(summed: &Summed) -> f64 {
    let [xx, xy, yy] = summed.regression;
    let ridge = 16.0 * yy / summed.own.n;
    if xx + ridge > 0.0 { ((xy + ridge) / (xx + ridge)).clamp(0.0, 1.0) } else { 1.0 }
}

// ------------------------------------------------------------------------------------ strategies

/// Batches about 0; `offset` is added to what the core is given.
fn batches(
    count: impl Into<prop::collection::SizeRange>,
    size: std::ops::Range<usize>,
    given: Given,
) -> impl Strategy<Value = Vec<Vec<Rollout>>> {
    // Binary rewards make groups and clusters without spread.
    let reward = prop_oneof![2 => prop::sample::select(vec![0.0, 1.0]), 3 => -1.0..1.0];
    let norm = prop::sample::select(vec![0.0, 0.3, 1.0, 2.5]);
    let length = prop::sample::select(vec![0.0, 1.0, 7.0, 40.0]);
    let rollout = (reward, norm, length, 0..CLUSTERS, 0..GROUPS);
    // Sums of these are exact: counts meet min_count on the same side. Equal within a part.
    let weight = prop::sample::select(vec![0.0, 0.25, 0.5, 1.0, 1.0, 2.0]);
    let weights = prop::collection::vec(weight, CLUSTERS * GROUPS);
    let batch = (prop::collection::vec(rollout, size), weights).prop_map(move |(rows, weights)| {
        let rollouts = rows.into_iter().map(|(reward, norm, length, cluster, group)| Rollout {
            reward,
            length,
            cluster,
            group,
            weight: if given.weights { weights[cluster * GROUPS + group] } else { 1.0 },
            norm: if given.norms { norm } else { 1.0 },
        });
        rollouts.collect()
    });
    prop::collection::vec(batch, count)
}

fn given() -> impl Strategy<Value = Given> {
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(weights, norms, parents)| Given {
        weights,
        norms,
        parents,
    })
}

fn options() -> impl Strategy<Value = Options> {
    let order = prop::sample::select(vec![Order::UpdateThenNormalize, Order::NormalizeThenUpdate]);
    let scale = (
        0_u8..2,
        prop::sample::select(vec![1e-4, 1e-6, 0.1]),
        prop::sample::select(vec![0.0, 0.0, 0.4]),
        prop::sample::select(vec![1.0, 0.0, 2.55, 6.55]),
    );
    let rest = (
        prop::sample::select(vec![1.0, 1.0, 0.9, 0.5]),
        prop::sample::select(vec![0.0, 0.0, 3.7, 16.0]),
        prop::sample::select(vec![None, None, Some(0.75)]),
        prop::sample::select(vec![0.0, 0.0, 0.5, 1.0]),
        any::<bool>(),
    );
    (order, scale, rest).prop_map(|(order, (ddof, eps, sigma_floor, min_count), rest)| {
        let (forgetting, prior_count, clip, frequency_weight, track_diagnostics) = rest;
        Options {
            order,
            ddof,
            eps,
            sigma_floor,
            min_count,
            forgetting,
            prior_count,
            clip,
            frequency_weight,
            track_diagnostics,
            ..usual()
        }
    })
}

fn offsets() -> impl Strategy<Value = (f64, f64)> {
    prop::sample::select(vec![(0.0, 1.0), (-40.0, 1.0), (1e6, 1.0), (0.0, 1e-3), (0.0, 300.0)])
}

/// A batch as the core sees it, and as the oracle does: less the offset, which no rule depends on.
fn moved(batch: &[Rollout], (offset, spread): (f64, f64)) -> (Vec<Rollout>, Vec<Rollout>) {
    let seen: Vec<Rollout> =
        batch.iter().map(|&r| Rollout { reward: offset + spread * r.reward, ..r }).collect();
    let less = seen.iter().map(|&r| Rollout { reward: r.reward - offset, ..r }).collect();
    (seen, less)
}

/// Where the offset does matter to a rule, there is none.
fn place_for(rule: &Rule, (offset, spread): (f64, f64)) -> (f64, f64) {
    (if ["max_rl", "rae"].contains(&rule.name) { 0.0 } else { offset }, spread)
}

/// Whether the order of rewards matters to what a rule remembers.
fn keeps_order(rule: &Rule) -> bool {
    rule.baseline() == Some("exponential_mean")
}

fn near(got: f64, expected: f64, tolerance: f64) -> bool {
    (got - expected).abs() <= tolerance
}

/// The sums of every cluster.
fn check_sums(
    snapshot: &Snapshot,
    oracle: &Oracle,
    kind: Kind,
    (offset, spread): (f64, f64),
    options: &Options,
) -> Result<(), TestCaseError> {
    let estimator = options.estimator;
    let keeps_parts = estimator.keeps_parts || options.track_diagnostics;
    for cluster in 0..CLUSTERS {
        let summed = oracle.summed(cluster);
        let id = kind.id(cluster);
        let Some(entry) = snapshot.clusters.iter().find(|entry| entry.id == id) else {
            prop_assert_eq!(summed.own.n, 0.0);
            continue;
        };
        let Moments { count, origin, offset: from, m2 } = entry.rewards;
        let (n, size) = (summed.own.n, spread * spread);
        prop_assert!(near(count, n, 1e-14 * n), "{} {}", count, n);
        let mean = (origin - offset) + from;
        prop_assert!(near(mean, summed.own.mean, 1e-13 * spread), "{} {:?}", mean, summed);
        prop_assert!(near(m2, summed.own.m2, 1e-12 * n * size), "{} {:?}", m2, summed);
        let parts = if keeps_parts { summed.parts } else { [0.0; 3] };
        let units = [n, n * n + summed.parts[1], n * size];
        for ((got, expected), unit) in entry.parts.iter().zip(parts).zip(units) {
            prop_assert!(near(*got, expected, 1e-12 * unit), "{:?} {:?}", entry, summed);
        }
        let baseline = match estimator.name {
            "auto" => summed.regression,
            "rae" => [0.0, summed.exponential, 0.0],
            _ => [0.0; 3],
        };
        for (got, expected) in entry.baseline.iter().zip(baseline) {
            let unit = summed.regression[0] + summed.regression[2];
            prop_assert!(
                near(*got, expected, 1e-12 * (unit + n * size)),
                "{:?} {:?}",
                entry,
                summed
            );
        }
    }
    Ok(())
}

/// Number, sum and sum of squares of the advantages of each cluster.
#[derive(Default)]
struct Told([[f64; 3]; CLUSTERS], [f64; CLUSTERS]);

impl Told {
    fn push(&mut self, batch: Vec<Rollout>, expected: Vec<(f64, f64)>, forgetting: f64) {
        let Self(sums, units) = self;
        for (cluster, sums) in sums.iter_mut().enumerate() {
            if batch.iter().any(|r| r.cluster == cluster && r.weight > 0.0) {
                *sums = sums.map(|sum| sum * forgetting);
            }
        }
        for (Rollout { weight, cluster, .. }, (advantage, unit)) in batch.into_iter().zip(expected)
        {
            let added = [1.0, advantage, advantage * advantage];
            for (sum, value) in sums[cluster].iter_mut().zip(added) {
                *sum += weight * value;
            }
            units[cluster] += (unit + advantage.abs()).powi(2) * weight;
        }
    }

    fn check(&self, snapshot: &Snapshot, kind: Kind) -> Result<(), TestCaseError> {
        for cluster in 0..CLUSTERS {
            let entry = snapshot.clusters.iter().find(|entry| entry.id == kind.id(cluster));
            let got = entry.map(|entry| entry.advantages).unwrap_or_default();
            let ([count, sum, squares], unit) = (self.0[cluster], 1e-9 * (1.0 + self.1[cluster]));
            prop_assert!(near(got[0], count, 1e-12 * count), "{} {}", got[0], count);
            prop_assert!(near(got[1], sum, unit * 300.0), "{} {}", got[1], sum);
            prop_assert!(near(got[2], squares, unit * 9e4), "{} {}", got[2], squares);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(160) })]

    #[test]
    fn every_estimator_equals_its_oracle(
        (given, batches) in given().prop_flat_map(|given| (Just(given), batches(1..5, 0..36, given))),
        options in options(), kind in prop::sample::select(KINDS.to_vec()), place in offsets(),
    ) {
        for estimator in RULES {
            let place = place_for(estimator, place);
            let options = Options { estimator, ..options.clone() };
            let normalizer = make(&options);
            let mut told = Told::default();
            let parents = given.for_options(&options).parents;
            let mut oracle = Oracle { parents, ..Oracle::default() };
            for batch in &batches {
                let (batch, less) = moved(batch, place);
                let got = advantages(&normalizer, &batch, kind, given).unwrap();
                let expected = oracle.advantages(&less, &options);
                for (got, (expected, unit)) in got.iter().zip(&expected) {
                    let tolerance = 1e-10 * (unit * place.1 + expected.abs());
                    prop_assert!(
                        near(*got, *expected, tolerance), "{estimator:?}: {got} for {expected}"
                    );
                }
                let snapshot = normalizer.snapshot();
                check_sums(&snapshot, &oracle, kind, place, &options)?;
                if options.track_diagnostics && options.clip.is_none() {
                    told.push(batch.clone(), expected, options.forgetting);
                    told.check(&snapshot, kind)?;
                }
            }
        }
    }

    /// i32, i64, far and negative integers, strings and both together: the same advantages.
    #[test]
    fn ids_are_only_names(
        batches in batches(1..4, 1..40, Given { weights: false, norms: true, parents: true }),
        options in options(),
    ) {
        let given = Given { weights: false, norms: true, parents: true };
        for estimator in RULES {
            let options = Options { estimator, ..options.clone() };
            let made: Vec<(Kind, Normalizer)> =
                KINDS.into_iter().map(|kind| (kind, make(&options))).collect();
            // Clusters are summed up in the order of their keys, if they are.
            let summed_up = estimator == &batch::RULE
                || options.prior_count > 0.0 || options.frequency_weight > 0.0;
            for batch in &batches {
                let mut first: Option<Vec<f64>> = None;
                for (kind, normalizer) in &made {
                    let got = advantages(normalizer, batch, *kind, given).unwrap();
                    let Some(expected) = &first else {
                        first = Some(got);
                        continue;
                    };
                    if summed_up {
                        for (got, expected) in got.iter().zip(expected) {
                            let tolerance = 1e-12 * (1.0 / options.eps + expected.abs());
                            prop_assert!(near(*got, *expected, tolerance), "{:?}", kind);
                        }
                    } else {
                        prop_assert_eq!(&got, expected, "{:?} {:?}", estimator, kind);
                    }
                }
            }
        }
    }

    /// A call is its two halves, to the bit.
    #[test]
    fn halves_make_a_whole(
        (given, batches) in given().prop_flat_map(|given| (Just(given), batches(1..4, 0..30, given))),
        options in options(), kind in prop::sample::select(KINDS.to_vec()),
    ) {
        for estimator in RULES {
            // Sums of advantages are those of whole calls.
            let options = Options { estimator, track_diagnostics: false, ..options.clone() };
            let (whole, halves) = (make(&options), make(&options));
            for batch in &batches {
                let expected = advantages(&whole, batch, kind, given).unwrap();
                let mut got = vec![0.0; batch.len()];
                with_batch(batch, &rewards(batch), kind, given.for_options(&options), |batch| {
                    if options.order == Order::UpdateThenNormalize {
                        halves.update(batch).unwrap();
                        halves.normalize(batch, &mut got).unwrap();
                    } else {
                        halves.normalize(batch, &mut got).unwrap();
                        halves.update(batch).unwrap();
                    }
                });
                prop_assert_eq!(got, expected);
                prop_assert_eq!(halves.snapshot(), whole.snapshot());
            }
        }
    }

    /// `f32` is `f64` rounded: nothing is computed in it.
    #[test]
    fn single_precision_only_rounds(
        (given, batches) in given().prop_flat_map(|given| (Just(given), batches(1..4, 0..36, given))),
        options in options(), kind in prop::sample::select(KINDS.to_vec()), place in offsets(),
    ) {
        for estimator in RULES {
            let options = Options { estimator, ..options.clone() };
            let (single, double) = (make(&options), make(&options));
            for batch in &batches {
                #[expect(clippy::cast_possible_truncation, reason = "rounding is what is tested")]
                let rewards: Vec<f32> =
                    moved(batch, place).0.iter().map(|r| r.reward as f32).collect();
                let rounded: Vec<Rollout> = batch.iter().zip(&rewards)
                    .map(|(&r, &reward)| Rollout { reward: f64::from(reward), ..r }).collect();
                let mut got = vec![f32::NAN; rewards.len()];
                with_batch(batch, &rewards, kind, given.for_options(&options), |batch| {
                    single.advantages(batch, &mut got)
                }).unwrap();
                let expected = advantages(&double, &rounded, kind, given).unwrap();
                prop_assert_eq!(single.snapshot(), double.snapshot());
                for (got, expected) in got.iter().zip(&expected) {
                    let tolerance = 2e-9 + 6e-8 * expected.abs();
                    prop_assert!(
                        near(f64::from(*got), *expected, tolerance), "{estimator:?}: {got} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn non_finite_rewards_are_as_good_as_absent(
        (given, batches) in given().prop_flat_map(|given| (Just(given), batches(1..3, 1..30, given))),
        holes in prop::collection::vec((0_usize..30, prop::sample::select(
            vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e140, -1e200])), 1..10),
        options in options(), kind in prop::sample::select(KINDS.to_vec()),
    ) {
        for estimator in RULES {
            let options = Options { estimator, ..options.clone() };
            let raise = make(&options);
            let zero = make(&Options { nan_policy: NanPolicy::Zero, ..options.clone() });
            let propagate = make(&Options { nan_policy: NanPolicy::Propagate, ..options.clone() });
            let mut num_holes = 0;
            for batch in &batches {
                let mut holed = batch.clone();
                for &(index, hole) in &holes {
                    let index = index % holed.len();
                    holed[index].reward = hole;
                }
                let is_hole = |rollout: &Rollout| rollout.reward.is_nan() || rollout.reward.abs() >= 1e140;
                let left: Vec<Rollout> = holed.iter().filter(|r| !is_hole(r)).copied().collect();
                let first = holed.iter().position(is_hole).unwrap();
                let before = raise.snapshot();
                match advantages(&raise, &holed, kind, given) {
                    Err(Error::NonFinite { index, .. }) => prop_assert_eq!(index, first),
                    other => prop_assert!(false, "{:?}", other),
                }
                prop_assert_eq!(raise.snapshot(), before);
                let mut expected = advantages(&raise, &left, kind, given).unwrap().into_iter();
                let zeroed = advantages(&zero, &holed, kind, given).unwrap();
                let propagated = advantages(&propagate, &holed, kind, given).unwrap();
                for (rollout, (zeroed, propagated)) in
                    holed.iter().zip(zeroed.into_iter().zip(propagated))
                {
                    if is_hole(rollout) {
                        num_holes += 1;
                        prop_assert_eq!(zeroed, 0.0);
                        prop_assert!(propagated.is_nan());
                    } else {
                        let expected = expected.next().unwrap();
                        prop_assert_eq!((zeroed, propagated), (expected, expected));
                    }
                }
                prop_assert_eq!(zero.num_nonfinite(), num_holes);
                prop_assert_eq!(zero.snapshot().clusters, raise.snapshot().clusters);
                prop_assert_eq!(propagate.snapshot(), zero.snapshot());
            }
        }
    }

    /// (r - mean_p)/(sigma_p + eps) = scale ratio * grpo + bias term, for every ddof and group.
    #[test]
    fn corollary_3_1(
        past in batches(0..3, 0..20, Given { weights: false, norms: false, parents: false }),
        now in batches(1, 1..40, Given { weights: false, norms: false, parents: false }),
        ddof in 0_u8..2, eps in prop::sample::select(vec![1e-4, 1e-8, 0.1]),
        order in prop::sample::select(vec![Order::UpdateThenNormalize, Order::NormalizeThenUpdate]),
    ) {
        let given = Given { weights: false, norms: false, parents: false };
        let plain = Options { ddof, eps, order, ..usual() };
        let pgrpo = make(&plain);
        let grpo = make(&Options { estimator: &grpo::RULE, ..plain });
        let mut oracle = Oracle::default();
        for batch in &past {
            advantages(&pgrpo, batch, Kind::SmallI64, given).unwrap();
            oracle.push(batch, 1.0);
        }
        let now = &now[0];
        let left = advantages(&pgrpo, now, Kind::SmallI64, given).unwrap();
        let right = advantages(&grpo, now, Kind::SmallI64, given).unwrap();
        if order == Order::UpdateThenNormalize {
            oracle.push(now, 1.0);
        }
        for (i, rollout) in now.iter().enumerate() {
            let history = stats(&oracle.values(|seen| seen.rollout.cluster == rollout.cluster));
            if history.n == 0.0 {
                prop_assert_eq!(left[i], 0.0);
                continue;
            }
            let group: Vec<(f64, f64)> = now.iter().filter(|other| other.group == rollout.group)
                .map(|other| (other.reward, 1.0)).collect();
            let group = stats(&group);
            let divisor = history.sigma(ddof) + eps;
            let ratio = (group.sigma(ddof) + eps) / divisor;
            let bias = (group.mean - history.mean) / divisor;
            let whole = ratio * right[i] + bias;
            prop_assert!(near(left[i], whole, 1e-13 * (1.0 + 1.0 / divisor)), "{} {whole}", left[i]);
        }
    }

    #[test]
    fn advantages_are_bounded_by_the_count(
        batches in batches(1..6, 1..30, Given { weights: false, norms: false, parents: false }),
        ddof in 0_u8..2, eps in prop::sample::select(vec![1e-4, 1e-100]), place in offsets(),
    ) {
        let normalizer = make(&Options { ddof, eps, ..usual() });
        let given = Given { weights: false, norms: false, parents: false };
        for batch in &batches {
            let (batch, _) = moved(batch, place);
            let got = advantages(&normalizer, &batch, Kind::SmallI32, given).unwrap();
            let snapshot = normalizer.snapshot();
            for (advantage, rollout) in got.iter().zip(&batch) {
                let id = Kind::SmallI32.id(rollout.cluster);
                let entry = snapshot.clusters.iter().find(|entry| entry.id == id).unwrap();
                let bound = (entry.rewards.count - 1.0).sqrt();
                prop_assert!(advantage.abs() <= bound * (1.0 + 1e-12), "{advantage} {bound}");
            }
        }
    }

    #[test]
    fn equal_rewards_give_exactly_zero(
        reward in prop_oneof![
            Just(0.1), Just(1e8 + 0.1), Just(-1e15 / 3.0), Just(1e15 / 3.0), Just(1e-300), -1e9..1e9
        ],
        (given, batches) in given().prop_flat_map(|given| (Just(given), batches(1..5, 1..40, given))),
        options in options(), kind in prop::sample::select(KINDS.to_vec()),
    ) {
        for estimator in RULES {
            let normalizer = make(&Options { estimator, ..options.clone() });
            for batch in &batches {
                let equal: Vec<Rollout> = batch.iter().map(|&r| Rollout { reward, ..r }).collect();
                let got = advantages(&normalizer, &equal, kind, given).unwrap();
                let all = got.iter().all(|&a| a == 0.0);
                prop_assert!(all || estimator == &rae::RULE, "{estimator:?} {got:?}");
            }
            for entry in normalizer.snapshot().clusters {
                prop_assert_eq!((entry.rewards.mean(), entry.rewards.m2), (reward, 0.0));
            }
        }
    }

    #[test]
    fn a_refused_batch_changes_nothing(
        batches in batches(1, 2..30, Given { weights: true, norms: true, parents: false }), at in 0_usize..30,
        wrong in prop::sample::select(vec![-1.0, f64::NAN, f64::INFINITY, 1e100]),
        kind in prop::sample::select(KINDS.to_vec()),
    ) {
        let given = Given { weights: true, norms: true, parents: false };
        let rollouts = &batches[0];
        let rewards = rewards(rollouts);
        let index = at % rollouts.len();
        for estimator in RULES {
            let track_delta = !keeps_order(estimator);
            let normalizer = make(&Options { estimator, track_delta, ..usual() });
            advantages(&normalizer, rollouts, kind, given).unwrap();
            let before = normalizer.snapshot();
            let mut out = vec![7.0; rollouts.len()];
            with_batch(rollouts, &rewards, kind, given, |batch| {
                let refused = normalizer.advantages(&Batch { groups: None, ..*batch }, &mut out);
                if estimator.needs_groups {
                    let estimator = estimator.name;
                    assert_eq!(refused, Err(Error::GroupsRequired { estimator }));
                } else {
                    // Not refused: taken back by another way than the one under test.
                    assert_eq!(refused, Ok(()));
                    normalizer.restore(&before).unwrap();
                    out.fill(7.0);
                }
                if estimator == &opo::RULE {
                    let refused = normalizer.advantages(&Batch { lengths: None, ..*batch }, &mut out);
                    assert_eq!(refused, Err(Error::LengthsRequired { estimator: "opo" }));
                }
                let (whole, length) = (rewards.len(), rewards.len() - 1);
                let wrong_length = |name| Err(Error::Length { rewards: whole, name, length });
                let short = &batch.weights.unwrap()[1..];
                let few = Batch { weights: Some(short), ..*batch };
                assert_eq!(normalizer.advantages(&few, &mut out), wrong_length("weights"));
                let few = Batch { score_norms: Some(short), ..*batch };
                assert_eq!(normalizer.update(&few), wrong_length("score_norms"));
                let few = Batch { lengths: Some(short), ..*batch };
                assert_eq!(normalizer.update(&few), wrong_length("lengths"));
                let few = Batch { clusters: Ids::I64(&[3][..1]), ..*batch };
                assert!(matches!(
                    normalizer.normalize(&few, &mut out),
                    Err(Error::Length { name: "clusters", length: 1, .. })
                ));
                assert_eq!(normalizer.advantages(batch, &mut out[1..]), wrong_length("out"));
                let mut weights = batch.weights.unwrap().to_vec();
                weights[index] = wrong;
                let bad = Batch { weights: Some(&weights), ..*batch };
                let bad_norms = Batch { score_norms: Some(&weights), ..*batch };
                let bad_lengths = Batch { lengths: Some(&weights), ..*batch };
                let bad =
                    [("weights", bad), ("score_norms", bad_norms), ("lengths", bad_lengths)];
                for (name, bad) in bad {
                    match normalizer.advantages(&bad, &mut out) {
                        Err(Error::Weight { name: met, index: at, .. }) => {
                            assert_eq!((met, at), (name, index));
                        }
                        other => panic!("{other:?}"),
                    }
                }
            });
            let mut holed = rollouts.clone();
            holed[index].reward = f64::NEG_INFINITY;
            let refused = Err(Error::NonFinite { index, value: f64::NEG_INFINITY });
            prop_assert_eq!(advantages(&normalizer, &holed, kind, given), refused);
            prop_assert_eq!(normalizer.snapshot(), before);
            prop_assert!(out.iter().all(|&untouched| untouched == 7.0));
        }
    }

    #[test]
    fn a_restored_snapshot_is_exact(
        (given, batches) in given().prop_flat_map(|given| (Just(given), batches(2..5, 1..30, given))),
        options in options(), kind in prop::sample::select(KINDS.to_vec()), place in offsets(),
    ) {
        for estimator in RULES {
            let track_delta = options.forgetting == 1.0 && !keeps_order(estimator);
            let nan_policy = NanPolicy::Zero;
            let options = Options { estimator, track_delta, nan_policy, ..options.clone() };
            let (source, copy) = (make(&options), make(&options));
            let (last, rest) = batches.split_last().unwrap();
            for batch in rest {
                let (mut batch, _) = moved(batch, place);
                batch[0].reward = f64::NAN;
                advantages(&source, &batch, kind, given).unwrap();
            }
            // What the copy knew before is forgotten.
            advantages(&copy, last, Kind::HugeI64, given).unwrap();
            let snapshot = source.snapshot();
            copy.restore(&snapshot).unwrap();
            prop_assert_eq!(&copy.snapshot(), &snapshot);
            let (last, _) = moved(last, place);
            let went_on = advantages(&source, &last, kind, given).unwrap();
            let resumed = advantages(&copy, &last, kind, given).unwrap();
            // Ids that came with no reward of use have a place in the order of the source's clusters
            // only, which a pool is summed up in.
            let pooled = options.prior_count > 0.0 || options.frequency_weight > 0.0;
            for (a, b) in went_on.iter().zip(&resumed) {
                let off = 1e-9 * (1.0 + a.abs());
                prop_assert!(a.to_bits() == b.to_bits() || pooled && near(*a, *b, off), "{a} {b}");
            }
            let sorted = |mut snapshot: Snapshot| {
                if pooled {
                    // Sums of advantages, then, are as near as the advantages are.
                    snapshot.clusters.iter_mut().for_each(|entry| entry.advantages = [0.0; 3]);
                }
                snapshot.clusters.sort_by(|a, b| a.id.cmp(&b.id));
                snapshot.pending.sort_by(|a, b| a.id.cmp(&b.id));
                snapshot
            };
            prop_assert_eq!(sorted(copy.snapshot()), sorted(source.snapshot()));
        }
    }

    /// Ranks that exchange deltas end with what one process would have seen.
    #[test]
    fn shards_merge_to_one_stream(
        (given, batches) in given().prop_flat_map(|given| (Just(given), batches(1..7, 0..25, given))),
        when in prop::collection::vec(any::<bool>(), 7), kind in prop::sample::select(KINDS.to_vec()),
        place in offsets(),
    ) {
        for estimator in RULES.into_iter().filter(|rule| !keeps_order(rule)) {
            let prior_count = if given.parents { 4.0 } else { 0.0 };
            let options = Options { estimator, prior_count, ..usual() };
            let tracked = Options { track_delta: true, ..options.clone() };
            let (whole, gathered) = (make(&options), make(&options));
            let shards = [make(&tracked), make(&tracked)];
            for (at, batch) in batches.iter().enumerate() {
                let (batch, _) = moved(batch, place);
                advantages(&whole, &batch, kind, given).unwrap();
                let shard = &shards[at % 2];
                advantages(shard, &batch, kind, given).unwrap();
                if when[at] {
                    gathered.merge(&shard.delta().unwrap()).unwrap();
                    prop_assert!(shard.delta().unwrap().clusters.is_empty());
                    prop_assert!(shard.snapshot().pending.is_empty());
                }
            }
            let merged = make(&options);
            for shard in &shards {
                gathered.merge(&shard.delta().unwrap()).unwrap();
                // What is merged in is nobody's news.
                let other = make(&tracked);
                other.merge(&shard.snapshot()).unwrap();
                prop_assert!(other.delta().unwrap().clusters.is_empty());
                let whole_shard = Snapshot { pending: Vec::new(), ..shard.snapshot() };
                merged.merge(&whole_shard).unwrap();
            }
            let unit = place.1 * place.1;
            for got in [gathered.snapshot(), merged.snapshot()] {
                prop_assert_eq!(got.clusters.len(), whole.snapshot().clusters.len());
                for expected in whole.snapshot().clusters {
                    let entry = got.clusters.iter().find(|entry| entry.id == expected.id).unwrap();
                    let (a, b) = (entry.rewards, expected.rewards);
                    prop_assert_eq!(a.count, b.count);
                    let mean = a.about(b.origin).offset;
                    prop_assert!(near(mean, b.offset, 1e-12 * place.1), "{:?} {:?}", a, b);
                    prop_assert!(near(a.m2, b.m2, 1e-12 * a.count * unit), "{:?} {:?}", a, b);
                    for (x, y) in entry.parts.iter().zip(expected.parts) {
                        prop_assert!(near(*x, y, 1e-12 * (y + unit)), "{x} {y}");
                    }
                }
            }
        }
    }

    #[test]
    fn retracting_undoes_an_update(
        (given, batches) in given().prop_flat_map(|given| (Just(given), batches(2, 1..30, given))),
        kind in prop::sample::select(KINDS.to_vec()), place in offsets(),
    ) {
        for estimator in RULES {
            let prior_count = if given.parents { 4.0 } else { 0.0 };
            let normalizer = make(&Options { estimator, prior_count, ..usual() });
            let [first, second] = [&batches[0], &batches[1]].map(|batch| moved(batch, place).0);
            advantages(&normalizer, &first, kind, given).unwrap();
            let before = normalizer.snapshot();
            advantages(&normalizer, &second, kind, given).unwrap();
            let retract = |batch: &[Rollout]| {
                with_batch(batch, &rewards(batch), kind, given, |batch| normalizer.retract(batch))
            };
            if estimator.keeps_parts || estimator.baseline().is_some() {
                prop_assert!(matches!(retract(&second), Err(Error::Unsupported { .. })), "refused");
                continue;
            }
            retract(&second).unwrap();
            let after = normalizer.snapshot();
            prop_assert_eq!(after.clusters.len(), before.clusters.len());
            for (a, b) in after.clusters.iter().zip(&before.clusters) {
                prop_assert_eq!((&a.id, a.rewards.count), (&b.id, b.rewards.count));
                prop_assert!(near(a.rewards.about(b.rewards.origin).offset, b.rewards.offset, 1e-12 * place.1));
                prop_assert!(near(a.rewards.m2, b.rewards.m2, 1e-11 * place.1 * place.1));
            }
            // More than there is: refused, and nothing changed.
            let kept = normalizer.snapshot();
            let twice: Vec<Rollout> = [&first[..], &first, &second].concat();
            if twice.iter().any(|rollout| rollout.weight > 0.0) && !kept.clusters.is_empty() {
                prop_assert!(matches!(retract(&twice), Err(Error::Retract { .. })), "refused");
                prop_assert_eq!(normalizer.snapshot(), kept);
            }
            retract(&first).unwrap();
            prop_assert!(normalizer.snapshot().clusters.is_empty());
        }
    }
}

// ------------------------------------------------------------------------------------ examples

fn plain<'a>(rewards: &'a [f64], clusters: &'a [i64]) -> Batch<'a, f64> {
    Batch {
        rewards,
        clusters: Ids::I64(clusters),
        groups: None,
        parents: None,
        weights: None,
        score_norms: None,
        lengths: None,
    }
}

/// Persons 1 and 2 in cluster 7, person 3 in cluster 8.
fn told(rewards: &[f64; 3]) -> Batch<'_, f64> {
    Batch { parents: Some(Ids::I64(&[7, 7, 8])), ..plain(rewards, &[1, 2, 3]) }
}

#[test]
fn a_history_borrows_from_its_parent_and_that_one_from_all() {
    let options = Options { prior_count: 2.0, ..usual() };
    let (normalizer, mut out) = (make(&options), [0.0; 3]);
    normalizer.advantages(&told(&[0.0, 1.0, 5.0]), &mut out).unwrap();
    // All: mean 2, squares 14. Cluster 7: mean 1/2 of 2, with 2 of all mean 5/4 of 4, squares
    // 1/2 + 28/3 + 9/4 = 145/12. Person 1: 0, with 2 of those mean 5/6 of 3.
    let m2 = 145.0 / 12.0 / 2.0 + (5.0_f64 / 4.0).powi(2) * 2.0 / 3.0;
    let expected = -5.0 / 6.0 / ((m2 / 3.0).sqrt() + options.eps);
    assert!(near(out[0], expected, 1e-15), "{} {expected}", out[0]);
    // Who is new reads its parent's, who has a new parent all of them.
    let newcomers = Batch { parents: Some(Ids::I64(&[7, 9])), ..plain(&[1.25, 2.0], &[4, 5]) };
    normalizer.normalize(&newcomers, &mut out[..2]).unwrap();
    assert_eq!(out[..2], [0.0, 0.0]);
    assert_eq!(normalizer.snapshot().clusters.len(), 5);
}

#[test]
fn parents_that_cannot_be_meant_are_refused() {
    let normalizer = make(&Options { prior_count: 2.0, ..usual() });
    let batch = Batch { parents: Some(Ids::I32(&[7, 8, 9])), ..plain(&[0.0; 3], &[1, 2, 1]) };
    let refused = normalizer.update(&batch).unwrap_err().to_string();
    assert_eq!(refused, "parents[2] is 9; expected 7, which cluster 1 has earlier in the call");
    let few = Batch { parents: Some(Ids::I32(&[7])), ..batch };
    assert!(matches!(
        normalizer.update(&few),
        Err(Error::Length { name: "parents", length: 1, .. })
    ));
    assert!(normalizer.snapshot().clusters.is_empty());
    let without = make(&usual());
    let refused = without.update(&told(&[0.0; 3]));
    assert!(matches!(refused, Err(Error::Unsupported { what: "borrowing from parents", .. })));
}

#[test]
fn clusters_of_parents_are_dropped_together() {
    let normalizer = make(&Options { prior_count: 2.0, ..usual() });
    normalizer.update(&told(&[0.0, 1.0, 5.0])).unwrap();
    let before = normalizer.snapshot();
    // The parent of that name is another than the cluster.
    for refused in [
        normalizer.alone().forget([AnyId::Int(1)]),
        normalizer.alone().keep([1, 7].map(AnyId::Int)),
    ] {
        assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
    }
    assert_eq!(normalizer.alone().forget([AnyId::Int(7)]), Ok(0));
    assert_eq!(normalizer.snapshot(), before);
    assert_eq!(normalizer.alone().forget([1, 2, 3].map(AnyId::Int)), Ok(3));
    assert_eq!(normalizer.snapshot(), Snapshot::default());
}

/// Every reward of a call is in one history of a person and in one of a cluster. Each call adds 4 and 6
/// to every history it touches, so that these have mean 5 and m2 == count in every valid state.
#[test]
fn parents_are_merged_whole_by_threads_at_once() {
    const CALLS: usize = 2_000;
    let normalizer = make(&Options { prior_count: 2.0, ..usual() });
    let work = |number: i64| {
        for call in 0..CALLS {
            let person = number * 2 + i64::from(call % 2 == 0);
            let (persons, clusters) = ([person; 2], [number % 2; 2]);
            let batch =
                Batch { parents: Some(Ids::I64(&clusters)), ..plain(&[4.0, 6.0], &persons) };
            normalizer.advantages(&batch, &mut [0.0; 2]).unwrap();
            if call % 64 == 0 {
                for Entry { rewards, .. } in normalizer.snapshot().clusters {
                    assert_eq!((rewards.mean(), rewards.m2), (5.0, rewards.count));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let work = &work;
        for number in 0..4 {
            scope.spawn(move || work(number));
        }
    });
    let snapshot = normalizer.snapshot();
    let (parents, persons): (Vec<_>, Vec<_>) =
        snapshot.clusters.iter().partition(|entry| entry.id.is_parent());
    assert_eq!((parents.len(), persons.len()), (2, 8));
    assert!(persons.iter().all(|entry| entry.rewards.count == CALLS as f64));
    assert!(parents.iter().all(|entry| entry.rewards.count == 4.0 * CALLS as f64));
    assert_eq!(snapshot.pool.count, 8.0 * CALLS as f64);
}

#[test]
fn a_cold_cluster_has_no_opinion() {
    let options = Options { order: Order::NormalizeThenUpdate, ..usual() };
    let (normalizer, mut out) = (make(&options), [9.0; 2]);
    normalizer.advantages(&plain(&[1.0, 1.0], &[7, 7]), &mut out).unwrap();
    assert_eq!(out, [0.0, 0.0]);
    // One sample of spread 0 has an opinion, and a strong one.
    normalizer.advantages(&plain(&[2.0], &[7]), &mut out[..1]).unwrap();
    assert_eq!(out[0], 1.0 / options.eps);
}

/// However the pool's count divides, a prior of one sample is enough for a `min_count` of one.
#[test]
fn a_prior_counts_as_many_samples_as_it_says() {
    for seen in 1..200 {
        let normalizer =
            make(&Options { order: Order::NormalizeThenUpdate, prior_count: 1.0, ..usual() });
        let rewards: Vec<f64> = (0..seen).map(f64::from).collect();
        normalizer.update(&plain(&rewards, &vec![0; rewards.len()])).unwrap();
        let mut out = [0.0];
        normalizer.advantages(&plain(&[-1.0], &[1]), &mut out).unwrap();
        assert!(out[0] < 0.0, "after {seen} rewards: {out:?}");
    }
}

/// A history that was emptied, or was never there, says nothing.
#[test]
fn a_pool_of_nothing_is_no_pool() {
    for (prior_count, frequency_weight) in [(4.0, 0.0), (0.0, 1.0), (4.0, 1.0)] {
        let order = Order::NormalizeThenUpdate;
        let options = Options { order, prior_count, frequency_weight, ..usual() };
        let (normalizer, mut out) = (make(&options), [9.0; 2]);
        normalizer.normalize(&plain(&[1.0, 3.0], &[0, 1]), &mut out).unwrap();
        assert_eq!(out, [0.0; 2]);
        normalizer.update(&plain(&[1.0, 3.0], &[0, 1])).unwrap();
        normalizer.retract(&plain(&[1.0, 3.0], &[0, 1])).unwrap();
        out = [9.0; 2];
        normalizer.normalize(&plain(&[1.0, 3.0], &[0, 1]), &mut out).unwrap();
        assert_eq!(out, [0.0; 2]);
    }
}

/// A weight of 0 makes no reward finite.
#[test]
fn non_finite_rewards_without_weight_are_found() {
    for (rewards, weights) in [
        ([f64::NAN, 1.0], [0.0, 0.0]),
        ([1.0, 1e200], [1.0, 0.0]),
        ([1.0, f64::INFINITY], [1.0, 0.0]),
    ] {
        for nan_policy in [NanPolicy::Raise, NanPolicy::Zero] {
            let normalizer = make(&Options { nan_policy, ..usual() });
            let batch = Batch { weights: Some(&weights), ..plain(&rewards, &[0, 0]) };
            let mut out = [9.0; 2];
            let result = normalizer.advantages(&batch, &mut out);
            if nan_policy == NanPolicy::Raise {
                assert!(matches!(result, Err(Error::NonFinite { .. })), "{rewards:?} {weights:?}");
            } else {
                assert_eq!((result, out, normalizer.num_nonfinite()), (Ok(()), [0.0; 2], 1));
            }
        }
    }
}

/// Sums of weights depend on their order by a rounding, which is no sample.
#[test]
fn weights_are_retracted_in_any_order() {
    let (rewards, weights) = ([1.0, 2.0, 3.0], [0.1, 0.2, 0.3]);
    let backwards = ([3.0, 2.0, 1.0], [0.3, 0.2, 0.1]);
    for ((first, with), (then, as_well)) in
        [((rewards, weights), backwards), (backwards, (rewards, weights))]
    {
        let normalizer = make(&usual());
        let batch = Batch { weights: Some(&with), ..plain(&first, &[0; 3]) };
        normalizer.update(&batch).unwrap();
        let batch = Batch { weights: Some(&as_well), ..plain(&then, &[0; 3]) };
        assert_eq!(normalizer.retract(&batch), Ok(()));
        assert_eq!(normalizer.snapshot(), Snapshot::default());
    }
}

#[test]
fn a_refused_retraction_changes_not_a_bit() {
    let normalizer = make(&usual());
    let rewards: Vec<f64> = (0..40).map(|k| (f64::from(k) * 0.7).sin()).collect();
    let clusters: Vec<i64> = (0..40).map(|k| i64::from(k == 39)).collect();
    normalizer.update(&plain(&rewards, &clusters)).unwrap();
    let before = normalizer.snapshot();
    for taken in 1..38 {
        let (mut some, mut of) = (rewards[..taken].to_vec(), clusters[..taken].to_vec());
        some.extend([1.0, 2.0]);
        of.extend([1, 1]);
        assert!(matches!(normalizer.retract(&plain(&some, &of)), Err(Error::Retract { .. })));
        assert_eq!(normalizer.snapshot(), before, "after {taken}");
    }
}

#[test]
fn options_out_of_range_are_named() {
    let refused = |options: Options| Normalizer::new(options).unwrap_err().to_string();
    let d = usual;
    assert_eq!(refused(Options { ddof: 2, ..d() }), "ddof is 2; expected 0 or 1");
    for eps in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let message = refused(Options { eps, ..d() });
        assert_eq!(message, format!("eps is {eps:?}; expected a number from 1e-100 on"));
    }
    for wrong in [f64::NAN, f64::INFINITY, -0.5] {
        for (name, options) in [
            ("forgetting", Options { forgetting: wrong, ..d() }),
            ("prior_count", Options { prior_count: wrong, ..d() }),
            ("sigma_floor", Options { sigma_floor: wrong, ..d() }),
            ("clip", Options { clip: Some(wrong), ..d() }),
            ("min_count", Options { min_count: wrong, ..d() }),
        ] {
            assert!(refused(options).starts_with(&format!("{name} is {wrong:?}; expected ")));
        }
    }
    assert!(refused(Options { forgetting: 0.0, ..d() }).starts_with("forgetting is 0.0; "));
    assert!(refused(Options { clip: Some(0.0), ..d() }).starts_with("clip is 0.0; "));
    assert!(refused(Options { num_threads: 0, ..d() }).starts_with("num_threads is 0; "));
    let weight = Options { frequency_weight: f64::NAN, ..d() };
    assert!(refused(weight).starts_with("frequency_weight is NaN; "));
    let tracked = Options { track_delta: true, forgetting: 0.9, ..d() };
    assert!(refused(tracked).starts_with("forgetting is 0.9; expected 1 with track_delta"));
    let tracked = Options { track_delta: true, estimator: &rae::RULE, ..d() };
    assert!(refused(tracked).starts_with("track_delta is True; expected False under rae"));
    let message = Rule::named("grop").unwrap_err().to_string();
    assert!(message.starts_with("estimator is \"grop\"; expected pgrpo, grpo, "), "{message}");
    let last = RULES.last().map(|rule| rule.name).unwrap();
    assert!(message.ends_with(&format!(" or {last}")), "{message}");
    for estimator in RULES {
        assert_eq!(Rule::named(estimator.name), Ok(estimator));
    }
}

#[test]
fn deltas_need_their_option() {
    let normalizer = make(&usual());
    assert!(matches!(normalizer.delta(), Err(Error::Unsupported { what: "delta", .. })));
}

/// The exponential mean follows the order of rewards, so only what has seen nothing can take it over.
#[test]
fn exponential_means_are_merged_into_nothing_only() {
    let made = || make(&Options { estimator: &rae::RULE, ..usual() });
    let (source, copy) = (made(), made());
    let mut out = [0.0; 3];
    source.advantages(&plain(&[1.0, 0.0, 3.0], &[5, 5, 6]), &mut out).unwrap();
    assert_eq!(out, [1.0 - 0.95 * (1.0 - 0.95), -0.95 * (1.0 - 0.95), 3.0 - (1.0 - 0.95) * 3.0]);
    copy.merge(&source.snapshot()).unwrap();
    assert_eq!(copy.snapshot(), source.snapshot());
    let refused = copy.merge(&source.snapshot());
    assert!(matches!(refused, Err(Error::Unsupported { what: "merging exponential means", .. })));
    assert_eq!(copy.snapshot(), source.snapshot());
    // Histories alone, as other rules keep them, change no mean.
    let other = make(&usual());
    other.update(&plain(&[7.0], &[5])).unwrap();
    let before = copy.snapshot().clusters[0].baseline;
    copy.merge(&other.snapshot()).unwrap();
    assert_eq!(copy.snapshot().clusters[0].baseline, before);
    assert_eq!(copy.snapshot().clusters[0].rewards.count, 3.0);
}

/// Three numbers of one rule's baseline are not taken for those of another's.
#[test]
fn a_baseline_is_its_own_rules() {
    let auto = make(&Options { estimator: &auto::RULE, ..usual() });
    let rae = make(&Options { estimator: &rae::RULE, ..usual() });
    for rewards in [[1.0, 0.0, 0.5], [0.0, 0.25, 1.0]] {
        let clusters = [5; 3];
        let batch = plain(&rewards, &clusters);
        auto.update(&Batch { groups: Some(Ids::I64(&clusters)), ..batch }).unwrap();
        rae.update(&batch).unwrap();
    }
    let (regression, mean) = (auto.snapshot(), rae.snapshot());
    assert!(regression.clusters[0].baseline.iter().all(|&sum| sum > 0.0));
    assert!(mean.clusters[0].baseline[1] > 0.0);
    for (normalizer, other) in [(&auto, &mean), (&rae, &regression)] {
        normalizer.restore(other).unwrap();
        assert_eq!(normalizer.snapshot().clusters[0].baseline, [0.0; 3]);
        assert_eq!(normalizer.snapshot().clusters[0].rewards, other.clusters[0].rewards);
    }
}

/// One reward is standardised as the sum of several is.
#[test]
fn whitening_values_is_whitening_maps() {
    let (rewards, groups) = ([0.5, 2.0, -1.0, 4.0, 4.5, 3.0], [0, 0, 0, 1, 1, 1]);
    let weights = [1.0, 2.0, 0.5, 0.0, 1.0, 3.0];
    let batch = Batch { groups: Some(Ids::I64(&groups)), ..plain(&rewards, &groups) };
    for (weights, ddof) in [(None, 0), (None, 1), (Some(&weights[..]), 1)] {
        let batch = Batch { weights, ..batch };
        let (mut summed, mut expected) = ([0.0; 6], [0.0; 6]);
        let options = Options { ddof, ..usual() };
        let make = |estimator| make(&Options { estimator, ..options.clone() });
        make(&grpo::RULE).advantages(&batch, &mut summed).unwrap();
        make(&gdpo_multi::RULE).advantages(&batch, &mut expected).unwrap();
        gdpo_multi::whiten(&mut summed, weights, &options);
        for (got, expected) in summed.iter().zip(expected) {
            assert!(near(*got, expected, 1e-12), "{got} {expected}");
        }
        assert!(summed.iter().any(|advantage| advantage.abs() > 1.0));
        // What is NaN stays so, and the others do as if it were not there.
        let mut holed: Vec<f64> = vec![f64::NAN];
        holed.extend(summed);
        let with_hole: Option<Vec<f64>> = weights.map(|weights| [&[9.0], weights].concat());
        gdpo_multi::whiten(&mut holed, with_hole.as_deref(), &options);
        gdpo_multi::whiten(&mut summed, weights, &options);
        assert!(holed[0].is_nan());
        assert_eq!(holed[1..], summed);
    }
}
