//! Several rewards of each rollout: one history of their weighted sum, or one of each.

use crate::batch::Batch;
use crate::call::Halves;
use crate::elements::Real;
use crate::error::Error;
use crate::estimators::gdpo_multi::whiten;
use crate::moments::is_finite_reward;
use crate::normalizer::{Normalizer, Visit};
use crate::options::{NanPolicy, Options};

/// How R rewards of a rollout make one advantage.
///
/// A reward that is not finite is missing. Under [`NanPolicy::Raise`] it is refused; under
/// [`NanPolicy::Zero`] the others are summed up, and a rollout without any has advantage 0; under
/// [`NanPolicy::Propagate`] the advantage is NaN.
#[derive(Debug)]
pub struct Combination {
    /// Those of the whole: its `nan_policy`, its `clip`, and whether its estimator whitens.
    pub options: Options,
    /// By reward: its name.
    pub names: Vec<String>,
    /// By reward: what it is multiplied by, or its advantage is.
    pub weights: Vec<f64>,
    /// Whether it is the weighted sum of the rewards that is normalized, with one history per cluster;
    /// or each reward for itself, of which the weighted sum is taken then.
    pub sums_first: bool,
}

/// The right to use the histories of several rewards, as others do at the same time.
#[derive(Debug)]
pub struct Several<'a> {
    combination: &'a Combination,
    visits: Vec<Visit<'a>>,
}

impl Combination {
    /// Number of normalizers it needs: one if rewards are summed up first, and one for each otherwise.
    /// Those have neither a `clip` nor an estimator that whitens: both are of the whole.
    #[must_use]
    pub fn num_histories(&self) -> usize {
        if self.sums_first { 1 } else { self.names.len() }
    }

    /// Enters [`num_histories`](Self::num_histories) normalizers, beside others.
    pub fn visit<'a>(&'a self, normalizers: impl Iterator<Item = &'a Normalizer>) -> Several<'a> {
        Several { combination: self, visits: normalizers.map(Normalizer::visit).collect() }
    }
}

/// Batches are those of one reward, but for their rewards \[N, R\], one rollout after another.
impl Several<'_> {
    /// Folds a batch into the histories and writes its advantages \[N\].
    ///
    /// # Errors
    /// Those of one reward; nothing was merged then.
    pub fn advantages<R: Real>(&self, batch: &Batch<'_, R>, out: &mut [R]) -> Result<(), Error> {
        self.run(batch, Halves::Both, Some(out))
    }

    /// The first half: folds a batch into the histories.
    ///
    /// # Errors
    /// Those of [`advantages`](Self::advantages).
    pub fn update<R: Real>(&self, batch: &Batch<'_, R>) -> Result<(), Error> {
        self.run(batch, Halves::Update, None)
    }

    /// The other half: advantages \[N\] by the histories as they are.
    ///
    /// # Errors
    /// Those of [`advantages`](Self::advantages).
    pub fn normalize<R: Real>(&self, batch: &Batch<'_, R>, out: &mut [R]) -> Result<(), Error> {
        self.run(batch, Halves::Normalize, Some(out))
    }

    /// Takes a batch out of the histories again.
    ///
    /// # Errors
    /// Those of one reward; nothing was taken out then, unless another thread took out the same
    /// meanwhile.
    pub fn retract<R: Real>(&self, batch: &Batch<'_, R>) -> Result<(), Error> {
        self.refuse_holes(batch)?;
        if self.combination.sums_first {
            return self.visits[0].retract(&batch.of(&self.sums(batch)));
        }
        let columns = self.columns(batch);
        for (visit, rewards) in self.visits.iter().zip(&columns) {
            visit.check_retract(&batch.of(rewards))?;
        }
        for (visit, rewards) in self.visits.iter().zip(&columns) {
            visit.retract(&batch.of(rewards))?;
        }
        Ok(())
    }

    fn run<R: Real>(
        &self,
        batch: &Batch<'_, R>,
        halves: Halves,
        out: Option<&mut [R]>,
    ) -> Result<(), Error> {
        self.refuse_holes(batch)?;
        let length = out.as_deref().map(<[R]>::len);
        let mut totals = vec![0.0; batch.rewards.len() / self.num_rewards()];
        if self.combination.sums_first {
            let sums = self.sums(batch);
            let batch = batch.of(&sums);
            batch.check(length)?;
            let totals = out.is_some().then_some(&mut totals[..]);
            self.visits[0].run(&batch, halves, totals)?;
        } else {
            let columns = self.columns(batch);
            // What is refused of one reward is refused of the first, before anything is merged.
            batch.of(&columns[0]).check(length)?;
            self.run_each(batch, &columns, halves, out.is_some().then_some(&mut totals))?;
        }
        for (out, total) in out.into_iter().flatten().zip(totals) {
            *out = R::from_f64(total);
        }
        Ok(())
    }

    /// Runs each reward for itself, and adds up the advantages.
    fn run_each<R: Real>(
        &self,
        batch: &Batch<'_, R>,
        columns: &[Vec<R>],
        halves: Halves,
        mut totals: Option<&mut [f64]>,
    ) -> Result<(), Error> {
        let Combination { options, weights, .. } = self.combination;
        let size = columns.first().map_or(0, Vec::len);
        let mut advantages = vec![R::from_f64(0.0); size];
        for (at, (visit, rewards)) in self.visits.iter().zip(columns).enumerate() {
            let out = totals.is_some().then_some(&mut advantages[..]);
            visit.run(&batch.of(rewards), halves, out).map_err(|error| match error {
                // Rewards are copies; of ids that change, the first reward was merged with others.
                Error::Changed { .. } if at > 0 && halves != Halves::Normalize => {
                    Error::Changed { is_merged: true }
                }
                error => error,
            })?;
            for (total, advantage) in totals.iter_mut().flat_map(|t| t.iter_mut()).zip(&advantages)
            {
                *total += weights[at] * advantage.to_f64();
            }
        }
        let Some(totals) = totals else { return Ok(()) };
        if options.estimator.whitens {
            // Rollouts without any reward are no part of what is standardized.
            let rows = batch.rewards.chunks_exact(self.num_rewards());
            let empty: Vec<bool> = rows.map(|row| !row.iter().any(|&r| is_known(r))).collect();
            for (total, _) in totals.iter_mut().zip(&empty).filter(|(_, empty)| **empty) {
                *total = f64::NAN;
            }
            whiten(totals, batch.weights, options);
            if options.nan_policy == NanPolicy::Zero {
                for (total, _) in totals.iter_mut().zip(&empty).filter(|(_, empty)| **empty) {
                    *total = 0.0;
                }
            }
        }
        if let Some(clip) = options.clip {
            for total in totals {
                *total = total.clamp(-clip, clip);
            }
        }
        Ok(())
    }

    fn num_rewards(&self) -> usize {
        self.combination.names.len()
    }

    fn refuse_holes<R: Real>(&self, batch: &Batch<'_, R>) -> Result<(), Error> {
        let Combination { options, names, .. } = self.combination;
        if options.nan_policy != NanPolicy::Raise {
            return Ok(());
        }
        match batch.holes().next() {
            None => Ok(()),
            Some(place) => Err(Error::NonFiniteOf {
                reward: names[place % names.len()].clone(),
                index: place / names.len(),
                value: batch.rewards[place].to_f64(),
            }),
        }
    }

    /// By reward: those of all rollouts.
    fn columns<R: Real>(&self, batch: &Batch<'_, R>) -> Vec<Vec<R>> {
        let num = self.num_rewards();
        let column = |reward| batch.rewards.iter().skip(reward).step_by(num).copied().collect();
        (0..num).map(column).collect()
    }

    /// By rollout: the weighted sum of its rewards; NaN if all are missing, or if one is and that is
    /// to propagate.
    fn sums<R: Real>(&self, batch: &Batch<'_, R>) -> Vec<f64> {
        let Combination { options, weights, .. } = self.combination;
        let sum = |row: &[R]| {
            let known = row.iter().filter(|&&reward| is_known(reward)).count();
            if known == 0 || (known < row.len() && options.nan_policy == NanPolicy::Propagate) {
                return f64::NAN;
            }
            let rewards = row.iter().zip(weights).filter(|(reward, _)| is_known(**reward));
            rewards.map(|(reward, weight)| weight * reward.to_f64()).sum()
        };
        batch.rewards.chunks_exact(self.num_rewards()).map(sum).collect()
    }
}

fn is_known<R: Real>(reward: R) -> bool {
    is_finite_reward(reward.to_f64())
}
