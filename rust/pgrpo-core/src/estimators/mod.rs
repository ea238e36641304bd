//! The rules that turn raw rewards into advantages, one file each.
//!
//! A rule gives each cell (a cluster, or the rollouts of a group that belong to one cluster) an
//! affine map of its rewards, out of running sums alone: no rule looks at single rewards.
//!
//! Its file has its formula, and its [`Rule`]: what else is to know of it. [`RULES`] lists them.
//!
//! What holds for all of them: order of entries and sizes of groups are free; weights are fractional
//! counts; a non-finite reward enters nothing, and its own advantage is set by
//! [`NanPolicy`](crate::NanPolicy); equal rewards give an advantage of exactly 0, except under
//! [`rae`], whose baseline starts at 0.

pub mod auto;
pub mod batch;
pub mod dr_grpo;
pub mod gdpo_multi;
pub mod grpo;
pub mod lite;
pub mod max_rl;
pub mod opo;
pub mod pgrpo;
pub mod rae;
pub mod rloo;
pub mod shrinkage;
pub mod two_way;

use std::fmt;

use crate::elements::Affine;
use crate::error::{Error, choose};
use crate::moments::Moments;
use crate::table::Triple;

/// How a spread becomes a divisor: `sigma + eps`; eps is never put under the root.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scale {
    /// Degrees of freedom taken off a count: 0 or 1.
    pub ddof: u8,
    /// Added to deviations.
    pub eps: f64,
    /// Deviations of histories are read as this at least.
    pub sigma_floor: f64,
    /// Histories of fewer samples give an advantage of 0.
    pub min_count: f64,
}

impl Scale {
    /// Deviation of a history, as it is read.
    #[must_use]
    pub fn sigma(&self, history: &Moments) -> f64 {
        history.sigma(self.ddof).max(self.sigma_floor)
    }

    /// Whether there is enough of a history to compare with.
    #[must_use]
    pub fn is_known(&self, history: &Moments) -> bool {
        history.count > 0.0 && history.count >= self.min_count
    }

    /// Rewards against the mean of `moments`, in units of their own deviation.
    #[must_use]
    pub fn standardize(&self, moments: &Moments) -> Affine {
        if moments.count > 0.0 {
            centered(moments, 1.0 / (moments.sigma(self.ddof) + self.eps))
        } else {
            Affine::default()
        }
    }
}

/// Rewards less the mean of `moments`, times `scale`.
fn centered(moments: &Moments, scale: f64) -> Affine {
    Affine { origin: moments.origin, offset: moments.offset, scale }
}

/// The moments of the advantages that a map makes of rewards, about 0.
pub(crate) fn advantages_of(rewards: &Moments, map: &Affine) -> Moments {
    let &Moments { count, origin, offset, m2 } = rewards;
    let mean = ((origin - map.origin) + (offset - map.offset)) * map.scale;
    Moments { count, origin: 0.0, offset: mean, m2: m2 * map.scale * map.scale }
}

/// A batch by cells, with what is remembered of their clusters.
#[derive(Clone, Debug, Default)]
pub(crate) struct Folded {
    /// By cell: its rewards in this batch.
    pub moments: Vec<Moments>,
    /// By cell: place of its cluster in the lists below. Empty where cells are clusters.
    pub cluster_of: Vec<u32>,
    /// By cell: place of its group. Empty where there are no groups.
    pub group_of: Vec<u32>,
    /// By cell: mean weight of a sample, weighted. Empty without weights.
    pub weights: Vec<f64>,
    /// By group: moments of its rewards in this batch.
    pub groups: Vec<Moments>,
    /// By group: the same with weights multiplied by the lengths of completions. Empty unless the rule
    /// needs lengths.
    pub by_length: Vec<Moments>,
    /// By cluster: history as it is read, the prior included.
    pub histories: Vec<Moments>,
    /// By cluster: history of its own samples alone. Empty unless sums of parts are kept.
    pub own: Vec<Moments>,
    /// By cluster: number of parts, sum of their squared sizes, sum of squares within them. A part
    /// is what one call holds of a group and a cluster. Empty as above.
    pub parts: Vec<Triple>,
    /// By cluster: what the rule's [`Baseline`] is made from. Empty unless it has one.
    pub baselines: Vec<Triple>,
}

/// What an estimator treats alike.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell<'a> {
    /// Place of the cluster.
    pub cluster: usize,
    /// Place of the group.
    pub group: usize,
    /// The cell's rewards in this batch.
    pub moments: &'a Moments,
    /// Mean weight of a sample, weighted: the sum of squared weights over that of weights; 1 without
    /// weights, 0 where all are 0.
    pub weight: f64,
}

/// How many times larger a deviation from the mean of the others is than one from the mean of all:
/// `W / (W - w)`, of a sample of weight w among samples of weight W. None if there are no others.
fn leave_one_out(moments: &Moments, weight: f64) -> Option<f64> {
    let others = moments.count - weight;
    // Sums of equal weights may differ from their multiple by rounding.
    (others > 1e-9 * moments.count).then(|| moments.count / others)
}

impl Folded {
    /// Empties all lists.
    pub fn clear(&mut self) {
        let Self {
            moments,
            cluster_of,
            group_of,
            weights,
            groups,
            by_length,
            histories,
            own,
            parts,
            baselines,
        } = self;
        for list in [cluster_of, group_of] {
            list.clear();
        }
        for list in [moments, groups, by_length, histories, own] {
            list.clear();
        }
        for list in [parts, baselines] {
            list.clear();
        }
        weights.clear();
    }

    /// Every cell.
    pub fn cells(&self) -> impl Iterator<Item = Cell<'_>> {
        self.moments.iter().enumerate().map(|(cell, moments)| Cell {
            cluster: self.cluster_of.get(cell).map_or(cell, |&cluster| cluster as usize),
            group: self.group_of.get(cell).map_or(0, |&group| group as usize),
            moments,
            weight: self.weights.get(cell).copied().unwrap_or(1.0),
        })
    }

    fn history(&self, cell: &Cell<'_>) -> &Moments {
        &self.histories[cell.cluster]
    }

    fn group(&self, cell: &Cell<'_>) -> &Moments {
        &self.groups[cell.group]
    }

    /// Appends the maps `(own d + between m) / (s + eps)` of all cells, of d = r - mean of the part and
    /// m = mean of the part - `mean_p`. `slopes` gives own and between of a cell; with 1 and 1 for all
    /// of them this is [`pgrpo`].
    ///
    /// The numerator has the mean square `e² sigma_p²` over the history, had all its parts been like
    /// this one: `e² = own² q + between² (1 - q)`, where q is the share of the history's squared
    /// deviations that lies within parts. With f and `f_p`, the root mean squares of e over the rollouts
    /// of the call and over those of the cluster,
    ///
    /// `s = max(sigma_p e f / f_p, sigma_floor)`.
    ///
    /// So the surer parts of a cluster weigh more, and clusters weigh alike: were it `sigma_p e`, a
    /// cluster whose answers are nearly settled, of whose squares hardly any lie within parts, would
    /// make the few that are left as large as all of another's.
    fn blend(
        &self,
        scale: &Scale,
        maps: &mut Vec<Affine>,
        slopes: impl Fn(&Cell<'_>) -> (f64, f64),
    ) {
        let slopes = |cell: &Cell<'_>| {
            if cell.moments.count > 0.0 { slopes(cell) } else { (1.0, 1.0) }
        };
        let square = |cell: &Cell<'_>| {
            let (own, between) = slopes(cell);
            let (m2, [_, _, within]) = (self.own[cell.cluster].m2, self.parts[cell.cluster]);
            let share = if m2 > 0.0 { (within / m2).min(1.0) } else { 1.0 };
            // Exactly 1, without any rounding, where both slopes are 1.
            between * between + (own * own - between * between) * share
        };
        let mut of_clusters = vec![Mean::default(); self.histories.len()];
        let mut of_all = Mean::default();
        for cell in self.cells().filter(|cell| scale.is_known(self.history(cell))) {
            let (value, count) = (square(&cell), cell.moments.count);
            of_clusters[cell.cluster].add(value, count);
            of_all.add(value, count);
        }
        maps.extend(self.cells().map(|cell| {
            let (history, part) = (self.history(&cell), cell.moments);
            if !scale.is_known(history) {
                return Affine::default();
            }
            let of_cluster = of_clusters[cell.cluster].value();
            let spread = if of_cluster > 0.0 {
                (square(&cell) / of_cluster * of_all.value()).sqrt()
            } else {
                of_all.value().sqrt()
            };
            let sigma = (history.sigma(scale.ddof) * spread).max(scale.sigma_floor);
            if part.count == 0.0 {
                return centered(history, 1.0 / (sigma + scale.eps));
            }
            let (own, between) = slopes(&cell);
            let gap = (part.origin - history.origin) + (part.offset - history.offset);
            Affine {
                origin: part.origin,
                offset: part.offset - between / own * gap,
                scale: own / (sigma + scale.eps),
            }
        }));
    }
}

/// A weighted mean; 1 of nothing.
#[derive(Clone, Copy, Default)]
struct Mean {
    sum: f64,
    count: f64,
}

impl Mean {
    fn add(&mut self, value: f64, count: f64) {
        self.sum += value * count;
        self.count += count;
    }

    fn value(self) -> f64 {
        if self.count > 0.0 { self.sum / self.count } else { 1.0 }
    }
}

/// All that is to know of an estimator: its entry in [`RULES`]. What is refused, documented and tested
/// of the estimators follows from these.
#[expect(clippy::struct_excessive_bools, reason = "they are facts, not states")]
pub struct Rule {
    /// The name users write.
    pub name: &'static str,
    /// The advantage of a reward r, in one line.
    pub formula: &'static str,
    /// Where it was published.
    pub source: &'static str,
    /// Whether advantages depend on the histories of clusters.
    pub reads_histories: bool,
    /// Whether rewards are compared within groups, which a batch must have then.
    pub needs_groups: bool,
    /// Whether a group of one always gives 0: nothing is learned from such groups alone.
    pub zero_alone: bool,
    /// Options of a [`Scale`] that have no effect, beside those of histories where it reads none.
    pub(crate) idle: &'static [&'static str],
    /// Whether it keeps running sums of a cluster's parts.
    pub keeps_parts: bool,
    /// Whether rewards are weighed by lengths of completions, which a batch must have then.
    pub needs_lengths: bool,
    /// Whether it standardises the advantages of the whole call; those of several rewards once they are
    /// summed up, by [`whiten`](gdpo_multi::whiten).
    pub whitens: bool,
    /// What it keeps of a cluster for its baseline, beside the history.
    pub(crate) baseline: Option<Baseline>,
    /// Appends the map of each cell, in their order.
    pub(crate) maps: fn(&Folded, &Scale, &mut Vec<Affine>),
}

/// Three running numbers of each cluster that a rule's baseline is made from.
#[derive(Clone, Copy)]
pub(crate) enum Baseline {
    /// Sums of x², xy and y² of a regression. This is what a cell adds to them: of the cell, its
    /// rewards weighted by their score norms too, and the history before the batch. It alone reads
    /// score norms.
    Regression(fn(&Cell<'_>, &Moments, &Moments) -> Triple),
    /// `[0, b, 0]`, of an exponential mean b that starts at 0: a reward of weight w leaves this number
    /// to the power of w of it. It follows the order of rewards, so it can be neither merged nor
    /// taken apart.
    ExponentialMean(f64),
}

impl Baseline {
    /// What processes that share a table call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Regression(_) => "regression",
            Self::ExponentialMean(_) => "exponential_mean",
        }
    }

    /// Whether these numbers are of this kind: no regression has xy where x and y are all 0.
    pub(crate) fn is_kind_of(self, [xx, xy, yy]: Triple) -> bool {
        let is_mean = xy != 0.0 && xx == 0.0 && yy == 0.0;
        is_mean == matches!(self, Self::ExponentialMean(_))
    }
}

/// Every estimator.
pub static RULES: [&Rule; 13] = [
    &pgrpo::RULE,
    &grpo::RULE,
    &dr_grpo::RULE,
    &rloo::RULE,
    &batch::RULE,
    &two_way::RULE,
    &shrinkage::RULE,
    &auto::RULE,
    &lite::RULE,
    &max_rl::RULE,
    &opo::RULE,
    &rae::RULE,
    &gdpo_multi::RULE,
];

impl Rule {
    /// The rule of a name.
    ///
    /// # Errors
    /// [`Error::Option`] tells the names there are.
    pub fn named(name: &str) -> Result<&'static Self, Error> {
        choose("estimator", name, &RULES.map(|rule| (rule.name, rule)))
    }

    /// What it keeps of a cluster for its baseline, beside the history, by the name of its kind.
    #[must_use]
    pub fn baseline(&self) -> Option<&'static str> {
        self.baseline.map(Baseline::name)
    }

    /// Whether score norms have an effect.
    #[must_use]
    pub fn reads_score_norms(&self) -> bool {
        matches!(self.baseline, Some(Baseline::Regression(_)))
    }

    /// Options that have no effect on advantages with this `frequency_weight`, which reads the counts
    /// of histories under every estimator.
    #[must_use]
    pub fn without_effect(&self, frequency_weight: f64) -> Vec<&'static str> {
        let mut names = self.idle.to_vec();
        if !self.reads_histories {
            names.extend(["prior_count", "sigma_floor", "min_count", "order", "forgetting"]);
        }
        if frequency_weight != 0.0 {
            names.retain(|name| !["order", "forgetting"].contains(name));
        }
        names
    }
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl fmt::Debug for Rule {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name)
    }
}
