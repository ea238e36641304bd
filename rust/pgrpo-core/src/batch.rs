//! What a call is given.

use std::collections::HashMap;

use crate::elements::Real;
use crate::error::Error;
use crate::ids::{AnyId, ClusterId};
use crate::moments::is_finite_reward;
use crate::slots::{Seed, Slots};

/// Ids of a batch as they lie in memory.
#[derive(Clone, Copy, Debug)]
pub enum Ids<'a> {
    /// 32-bit integers.
    I32(&'a [i32]),
    /// 64-bit integers.
    I64(&'a [i64]),
    /// Integers and strings.
    Any(&'a [AnyId<'a>]),
}

impl<'a> Ids<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::I32(ids) => ids.len(),
            Self::I64(ids) => ids.len(),
            Self::Any(ids) => ids.len(),
        }
    }

    pub(crate) fn value(&self, entry: usize) -> i64 {
        match self {
            Self::I32(ids) => i64::from(ids[entry]),
            Self::I64(ids) => ids[entry],
            Self::Any(_) => unreachable!("ids of any kind are numbered first"),
        }
    }

    /// The id at a position.
    pub(crate) fn id(&self, entry: usize) -> AnyId<'a> {
        match self {
            Self::Any(ids) => ids[entry],
            ints => AnyId::Int(ints.value(entry)),
        }
    }

    /// Every id in its turn.
    pub fn iter(self) -> impl Iterator<Item = AnyId<'a>> {
        (0..self.len()).map(move |entry| self.id(entry))
    }

    fn only(self, kept: &[usize]) -> OwnedIds<'a> {
        match self {
            Self::Any(ids) => OwnedIds::Any(kept.iter().map(|&entry| ids[entry]).collect()),
            ints => OwnedIds::I64(kept.iter().map(|&entry| ints.value(entry)).collect()),
        }
    }
}

enum OwnedIds<'a> {
    I64(Vec<i64>),
    Any(Vec<AnyId<'a>>),
}

impl OwnedIds<'_> {
    fn borrow(&self) -> Ids<'_> {
        match self {
            Self::I64(ids) => Ids::I64(ids),
            Self::Any(ids) => Ids::Any(ids),
        }
    }
}

/// What a call is given: arrays of N entries each.
///
/// ```
/// use pgrpo_core::{AnyId, Batch, Ids};
///
/// let clusters = ["novice", "expert", "novice"].map(AnyId::Name);
/// let batch = Batch {
///     weights: Some(&[1.0, 0.5, 1.0]),
///     ..Batch::new(&[0.0, 1.0, 0.5], Ids::Any(&clusters))
/// };
/// # assert_eq!(batch.rewards.len(), 3);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a, R> {
    /// Raw rewards.
    pub rewards: &'a [R],
    /// Clusters.
    pub clusters: Ids<'a>,
    /// Groups: any ids.
    pub groups: Option<Ids<'a>>,
    /// Parents of the clusters, one for each cluster of a batch: it reads its prior from theirs, and
    /// its rewards are theirs too. A parent may be called as a cluster is.
    pub parents: Option<Ids<'a>>,
    /// Fractional counts, at least 0.
    pub weights: Option<&'a [f64]>,
    /// Squared norms of the scores of the completions, at least 0; read by `auto` alone.
    pub score_norms: Option<&'a [f64]>,
    /// Lengths of the completions, at least 0; read by `opo` alone.
    pub lengths: Option<&'a [f64]>,
}

impl<'a, R: Real> Batch<'a, R> {
    /// Rewards and their clusters, and nothing else.
    #[must_use]
    pub fn new(rewards: &'a [R], clusters: Ids<'a>) -> Self {
        Self {
            rewards,
            clusters,
            groups: None,
            parents: None,
            weights: None,
            score_norms: None,
            lengths: None,
        }
    }

    /// Checks everything but the rewards' values.
    pub(crate) fn check(&self, out: Option<usize>) -> Result<(), Error> {
        let rewards = self.rewards.len();
        if u32::try_from(rewards).is_err() {
            return Err(Error::Size { rewards });
        }
        let sizes = [
            ("clusters", Some(self.clusters.len())),
            ("groups", self.groups.map(|groups| groups.len())),
            ("parents", self.parents.map(|parents| parents.len())),
            ("weights", self.weights.map(<[f64]>::len)),
            ("score_norms", self.score_norms.map(<[f64]>::len)),
            ("lengths", self.lengths.map(<[f64]>::len)),
            ("out", out),
        ];
        for (name, length) in sizes {
            if let Some(length) = length
                && length != rewards
            {
                return Err(Error::Length { rewards, name, length });
            }
        }
        let columns = [
            ("weights", self.weights),
            ("score_norms", self.score_norms),
            ("lengths", self.lengths),
        ];
        for (name, values) in columns {
            let Some(values) = values else { continue };
            if let Some(index) = values.iter().position(|&w| !(0.0..MAX_WEIGHT).contains(&w)) {
                return Err(Error::Weight { name, index, value: values[index] });
            }
        }
        self.parents.map_or(Ok(()), |parents| self.check_parents(parents))
    }

    /// Refuses a cluster that has two parents.
    fn check_parents(&self, parents: Ids<'_>) -> Result<(), Error> {
        let numbers: Vec<i64>;
        let mut clusters = self.clusters;
        if let Ids::Any(ids) = clusters {
            numbers = number(ids);
            clusters = Ids::I64(&numbers);
        }
        let mut slots = Slots::default();
        slots.assign(self.rewards.len(), |entry| clusters.value(entry), Seed::one);
        for (index, &slot) in slots.of.iter().enumerate() {
            let (met, first) = (parents.id(index), slots.first[slot as usize] as usize);
            if met != parents.id(first) {
                let [cluster, met, expected] = [self.clusters.id(index), met, parents.id(first)]
                    .map(|id| ClusterId::from(id).to_string());
                return Err(Error::Parents { index, cluster, met, expected });
            }
        }
        Ok(())
    }

    /// The same with other rewards.
    pub(crate) fn of<S: Real>(&self, rewards: &'a [S]) -> Batch<'a, S> {
        let Self { clusters, groups, parents, weights, score_norms, lengths, .. } = *self;
        Batch { rewards, clusters, groups, parents, weights, score_norms, lengths }
    }

    /// Positions of non-finite rewards.
    pub(crate) fn holes(&self) -> impl Iterator<Item = usize> {
        let rewards = self.rewards.iter().enumerate();
        rewards.filter(|(_, reward)| !is_finite_reward(reward.to_f64())).map(|(index, _)| index)
    }

    /// The entries at some positions.
    pub(crate) fn only(&self, kept: &[usize]) -> OwnedBatch<'a, R> {
        let only = |values: &[f64]| kept.iter().map(|&entry| values[entry]).collect();
        OwnedBatch {
            rewards: kept.iter().map(|&entry| self.rewards[entry]).collect(),
            clusters: self.clusters.only(kept),
            groups: self.groups.map(|groups| groups.only(kept)),
            parents: self.parents.map(|parents| parents.only(kept)),
            weights: self.weights.map(only),
            score_norms: self.score_norms.map(only),
            lengths: self.lengths.map(only),
        }
    }
}

/// A batch with arrays of its own.
pub(crate) struct OwnedBatch<'a, R> {
    rewards: Vec<R>,
    clusters: OwnedIds<'a>,
    groups: Option<OwnedIds<'a>>,
    parents: Option<OwnedIds<'a>>,
    weights: Option<Vec<f64>>,
    score_norms: Option<Vec<f64>>,
    lengths: Option<Vec<f64>>,
}

impl<R> OwnedBatch<'_, R> {
    pub(crate) fn borrow(&self) -> Batch<'_, R> {
        Batch {
            rewards: &self.rewards,
            clusters: self.clusters.borrow(),
            groups: self.groups.as_ref().map(OwnedIds::borrow),
            parents: self.parents.as_ref().map(OwnedIds::borrow),
            weights: self.weights.as_deref(),
            score_norms: self.score_norms.as_deref(),
            lengths: self.lengths.as_deref(),
        }
    }
}

/// Weights stay below this, so that their sums stay far below 2^53.
const MAX_WEIGHT: f64 = 1_048_576.0;

/// Equal ids get equal numbers.
pub(crate) fn number(ids: &[AnyId<'_>]) -> Vec<i64> {
    let mut numbers = HashMap::new();
    let mut number = |id| {
        let next = i64::try_from(numbers.len()).expect("lengths are below 2^63");
        *numbers.entry(id).or_insert(next)
    };
    ids.iter().map(|&id| number(id)).collect()
}
