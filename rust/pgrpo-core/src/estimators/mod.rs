//! The rules that turn raw rewards into advantages, one file each.
//!
//! A rule gives each cell (a cluster, or the rollouts of a group that belong to one cluster) an
//! [`Affine`] map of its rewards, out of running sums alone: no rule looks at single rewards.
//!
//! What holds for all of them: order of entries and sizes of groups are free; weights are fractional
//! counts; a non-finite reward enters nothing, and its own advantage is set by
//! [`NanPolicy`](crate::NanPolicy); equal rewards give an advantage of exactly 0.

pub mod auto;
pub mod batch;
pub mod dr_grpo;
pub mod grpo;
pub mod pgrpo;
pub mod rloo;
pub mod shrinkage;
pub mod two_way;

use std::str::FromStr;

use crate::elements::Affine;
use crate::error::Error;
use crate::moments::Moments;
use crate::table::Triple;

/// How a spread becomes a divisor: `sigma + eps`; eps is never put under the root.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
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

/// A batch by cells, with what is remembered of their clusters.
#[derive(Clone, Debug, Default)]
pub struct Folded {
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
    /// By cluster: history as it is read, the prior included.
    pub histories: Vec<Moments>,
    /// By cluster: history of its own samples alone. Empty unless sums of parts are kept.
    pub own: Vec<Moments>,
    /// By cluster: number of parts, sum of their squared sizes, sum of squares within them. A part
    /// is what one call holds of a group and a cluster. Empty as above.
    pub parts: Vec<Triple>,
    /// By cluster: sums of x², xy and y² of the regression of [`auto`]. Empty unless the rule is
    /// that.
    pub regressions: Vec<Triple>,
}

/// What an estimator treats alike.
#[derive(Clone, Copy, Debug)]
pub struct Cell<'a> {
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
            histories,
            own,
            parts,
            regressions,
        } = self;
        for list in [cluster_of, group_of] {
            list.clear();
        }
        for list in [moments, groups, histories, own] {
            list.clear();
        }
        for list in [parts, regressions] {
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

    /// `(own * d + between * m) / (s + eps)`, of d = r - mean of the part and m = mean of the part -
    /// `mean_p`; s is the root mean square of the numerator over the history, if its parts were like
    /// this one: `s² = sigma_p² (own² q + between² (1 - q))`, where q is the share of the history's
    /// squared deviations that lies within parts. With 1 and 1 this is [`pgrpo`].
    fn blend(&self, cell: &Cell<'_>, own: f64, between: f64, scale: &Scale) -> Affine {
        let history = self.history(cell);
        if !scale.is_known(history) {
            return Affine::default();
        }
        let part = cell.moments;
        if part.count == 0.0 {
            return centered(history, 1.0 / (scale.sigma(history) + scale.eps));
        }
        let (m2, [_, _, within]) = (self.own[cell.cluster].m2, self.parts[cell.cluster]);
        let share = if m2 > 0.0 { (within / m2).min(1.0) } else { 1.0 };
        let square = own * own * share + between * between * (1.0 - share);
        let sigma = (history.sigma(scale.ddof) * square.sqrt()).max(scale.sigma_floor);
        let gap = (part.origin - history.origin) + (part.offset - history.offset);
        Affine {
            origin: part.origin,
            offset: part.offset - between / own * gap,
            scale: own / (sigma + scale.eps),
        }
    }
}

/// Which rule to apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Estimator {
    /// [`pgrpo`]
    Pgrpo,
    /// [`grpo`]
    Grpo,
    /// [`dr_grpo`]
    DrGrpo,
    /// [`rloo`]
    Rloo,
    /// [`batch`]
    Batch,
    /// [`two_way`]
    TwoWay,
    /// [`shrinkage`]
    Shrinkage,
    /// [`auto`]
    Auto,
}

impl Estimator {
    /// Every estimator.
    pub const ALL: [Self; 8] = [
        Self::Pgrpo,
        Self::Grpo,
        Self::DrGrpo,
        Self::Rloo,
        Self::Batch,
        Self::TwoWay,
        Self::Shrinkage,
        Self::Auto,
    ];

    /// The name users write.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pgrpo => "pgrpo",
            Self::Grpo => "grpo",
            Self::DrGrpo => "dr_grpo",
            Self::Rloo => "rloo",
            Self::Batch => "batch",
            Self::TwoWay => "two_way",
            Self::Shrinkage => "shrinkage",
            Self::Auto => "auto",
        }
    }

    /// Whether rewards are compared within groups.
    #[must_use]
    pub fn needs_groups(self) -> bool {
        !matches!(self, Self::Pgrpo | Self::Batch)
    }

    /// Whether it keeps running sums of a cluster's parts.
    #[must_use]
    pub fn needs_parts(self) -> bool {
        matches!(self, Self::Shrinkage | Self::Auto)
    }

    /// The map of each cell, in their order.
    pub fn maps(self, folded: &Folded, scale: &Scale, maps: &mut Vec<Affine>) {
        let cells = folded.cells();
        match self {
            Self::Pgrpo => maps.extend(cells.map(|cell| pgrpo::map(folded, &cell, scale))),
            Self::Grpo => maps.extend(cells.map(|cell| grpo::map(folded, &cell, scale))),
            Self::DrGrpo => maps.extend(cells.map(|cell| dr_grpo::map(folded, &cell))),
            Self::Rloo => maps.extend(cells.map(|cell| rloo::map(folded, &cell))),
            Self::Batch => maps.extend(batch::maps(folded, scale)),
            Self::TwoWay => maps.extend(two_way::maps(folded, scale)),
            Self::Shrinkage => maps.extend(cells.map(|cell| shrinkage::map(folded, &cell, scale))),
            Self::Auto => maps.extend(cells.map(|cell| auto::map(folded, &cell, scale))),
        }
    }
}

impl FromStr for Estimator {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|estimator| estimator.name() == name);
        found.ok_or_else(|| Error::Option {
            name: "estimator",
            value: format!("{name:?}"),
            expected: "pgrpo, grpo, dr_grpo, rloo, batch, two_way, shrinkage or auto",
        })
    }
}
