//! Rewards in, advantages out: the one way through all the parts.

use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;
use crate::estimators::{Estimator, Scale};
use crate::fold::Fold;
use crate::histories::Histories;
use crate::moments::{Moments, is_finite_reward};

/// Counts are exact in `f64` up to here, and sums of two of them far from overflowing.
const MAX_COUNT: u64 = 1 << 53;

/// Whether a batch's rewards are normalised by histories that already hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Merge the batch, then read: |advantage| of `pgrpo` is at most sqrt(n - 1).
    UpdateThenNormalize,
    /// Read what came before the batch, then merge it: unbiased, but unbounded while n is small.
    NormalizeThenUpdate,
}

impl FromStr for Order {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "update_then_normalize" => Ok(Self::UpdateThenNormalize),
            "normalize_then_update" => Ok(Self::NormalizeThenUpdate),
            _ => Err(Error::Option {
                name: "order",
                value: format!("{name:?}"),
                expected: "update_then_normalize or normalize_then_update",
            }),
        }
    }
}

/// What becomes of a reward that is not a finite number (or too large to be squared). It never
/// enters a mean or a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NanPolicy {
    /// The whole batch is refused.
    Raise,
    /// Its advantage is 0.
    Zero,
    /// Its advantage is NaN.
    Propagate,
}

impl FromStr for NanPolicy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "raise" => Ok(Self::Raise),
            "zero" => Ok(Self::Zero),
            "propagate" => Ok(Self::Propagate),
            _ => Err(Error::Option {
                name: "nan_policy",
                value: format!("{name:?}"),
                expected: "raise, zero or propagate",
            }),
        }
    }
}

/// An estimator with its options and the histories of its clusters.
///
/// Histories are kept under every estimator, so that clusters can be watched and compared; only
/// `pgrpo` reads them. All methods may be called by many threads at once. Clusters are dense ids.
/// A call checks its batch before the first merge, and then merges once per cluster it touches.
#[derive(Debug)]
pub struct Normalizer {
    estimator: Estimator,
    scale: Scale,
    order: Order,
    nan_policy: NanPolicy,
    histories: Histories,
    num_nonfinite: AtomicU64,
}

impl Normalizer {
    /// A normalizer that has seen nothing.
    #[must_use]
    pub fn new(estimator: Estimator, scale: Scale, order: Order, nan_policy: NanPolicy) -> Self {
        let (histories, num_nonfinite) = (Histories::default(), AtomicU64::new(0));
        Self { estimator, scale, order, nan_policy, histories, num_nonfinite }
    }

    /// Folds a batch into the histories and returns its advantages \[N\].
    ///
    /// `rewards: [N]`, raw; `clusters: [N]`, dense ids; `groups: [N]`, any integers.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::GroupsRequired`] or [`Error::NonFinite`]; nothing was merged then.
    pub fn advantages(
        &self,
        rewards: &[f64],
        clusters: &[u32],
        groups: Option<&[i64]>,
    ) -> Result<Vec<f64>, Error> {
        self.check(rewards, clusters, groups, self.estimator.needs_groups())?;
        let folded = Fold::new(rewards, clusters);
        let histories = match self.order {
            Order::UpdateThenNormalize => self.merge(&folded),
            Order::NormalizeThenUpdate => {
                let before = self.read(&folded);
                self.merge(&folded);
                before
            }
        };
        self.count_nonfinite(rewards);
        self.estimate(rewards, &folded, &histories, groups)
    }

    /// The first half: folds a batch into the histories.
    ///
    /// # Errors
    /// [`Error::Length`] or [`Error::NonFinite`]; nothing was merged then.
    pub fn update(&self, rewards: &[f64], clusters: &[u32]) -> Result<(), Error> {
        self.check(rewards, clusters, None, false)?;
        self.merge(&Fold::new(rewards, clusters));
        self.count_nonfinite(rewards);
        Ok(())
    }

    /// The other half: advantages \[N\] by the histories as they are.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::GroupsRequired`] or [`Error::NonFinite`].
    pub fn normalize(
        &self,
        rewards: &[f64],
        clusters: &[u32],
        groups: Option<&[i64]>,
    ) -> Result<Vec<f64>, Error> {
        self.check(rewards, clusters, groups, self.estimator.needs_groups())?;
        let folded = Fold::new(rewards, clusters);
        self.estimate(rewards, &folded, &self.read(&folded), groups)
    }

    /// Non-finite rewards that [`advantages`](Self::advantages) and [`update`](Self::update) left out
    /// of the histories.
    #[must_use]
    pub fn num_nonfinite(&self) -> u64 {
        self.num_nonfinite.load(Ordering::SeqCst)
    }

    /// \[K\] moments by dense cluster id.
    #[must_use]
    pub fn snapshot(&self) -> Vec<Moments> {
        self.histories.snapshot()
    }

    /// Merges histories kept elsewhere, each with its dense cluster id, and their number of
    /// non-finite rewards. Into an empty history this is an exact copy.
    ///
    /// # Errors
    /// [`Error::History`] where one cannot be the history of any rewards; nothing was merged then.
    pub fn absorb(&self, parts: &[(u32, Moments)], num_nonfinite: u64) -> Result<(), Error> {
        for &(cluster, part) in parts {
            if part.count > MAX_COUNT {
                return Err(Error::History { cluster, reason: "has a count above 2^53" });
            }
            if !is_finite_reward(part.mean) {
                let reason = "has a mean that is not a finite reward";
                return Err(Error::History { cluster, reason });
            }
            if !(part.m2 >= 0.0 && part.m2.is_finite()) {
                let reason = "has a negative or non-finite m2";
                return Err(Error::History { cluster, reason });
            }
        }
        for &(cluster, part) in parts {
            self.histories.merge(cluster, part);
        }
        self.num_nonfinite.fetch_add(num_nonfinite, Ordering::SeqCst);
        Ok(())
    }

    fn check(
        &self,
        rewards: &[f64],
        clusters: &[u32],
        groups: Option<&[i64]>,
        needs_groups: bool,
    ) -> Result<(), Error> {
        let groups_length = groups.map_or(rewards.len(), <[i64]>::len);
        for (name, length) in [("clusters", clusters.len()), ("groups", groups_length)] {
            if length != rewards.len() {
                return Err(Error::Length { rewards: rewards.len(), name, length });
            }
        }
        if needs_groups && groups.is_none() {
            return Err(Error::GroupsRequired { estimator: self.estimator.name() });
        }
        if self.nan_policy == NanPolicy::Raise
            && let Some(index) = rewards.iter().position(|&reward| !is_finite_reward(reward))
        {
            return Err(Error::NonFinite { index, value: rewards[index] });
        }
        Ok(())
    }

    fn read(&self, folded: &Fold<u32>) -> Vec<Moments> {
        folded.ids.iter().map(|&cluster| self.histories.read(cluster)).collect()
    }

    fn merge(&self, folded: &Fold<u32>) -> Vec<Moments> {
        let parts = folded.ids.iter().zip(&folded.moments);
        parts.map(|(&cluster, &batch)| self.histories.merge(cluster, batch)).collect()
    }

    fn count_nonfinite(&self, rewards: &[f64]) {
        let found = rewards.iter().filter(|&&reward| !is_finite_reward(reward)).count();
        self.num_nonfinite.fetch_add(found as u64, Ordering::SeqCst);
    }

    fn estimate(
        &self,
        rewards: &[f64],
        clusters: &Fold<u32>,
        histories: &[Moments],
        groups: Option<&[i64]>,
    ) -> Result<Vec<f64>, Error> {
        let needed = groups.filter(|_| self.estimator.needs_groups());
        let groups = needed.map(|groups| Fold::new(rewards, groups));
        let mut advantages =
            self.estimator.advantages(rewards, clusters, histories, groups.as_ref(), self.scale)?;
        let replacement = match self.nan_policy {
            // The batch was checked: every reward is finite.
            NanPolicy::Raise => return Ok(advantages),
            NanPolicy::Zero => 0.0,
            NanPolicy::Propagate => f64::NAN,
        };
        for (advantage, &reward) in advantages.iter_mut().zip(rewards) {
            if !is_finite_reward(reward) {
                *advantage = replacement;
            }
        }
        Ok(advantages)
    }
}
