//! Rewards in, advantages out: the one way through all the parts.
#![allow(unsafe_code, reason = "the state is replaced while other threads read the old one")]

use std::sync::{Mutex, PoisonError};

use crate::batch::Batch;
use crate::call::{Call, Halves, with_scratch};
use crate::elements::Real;
use crate::error::Error;
use crate::estimators::{RULES, Scale};
use crate::moments::is_finite_reward;
use crate::options::{NanPolicy, Options};
use crate::shared::Region;
use crate::snapshot::Snapshot;
use crate::state::{Entry, State};
use crate::sync::{AtomicPtr, Ordering};
use crate::table::Table;

/// An estimator with its options and everything it remembers.
///
/// Histories are kept under every estimator, so that clusters can be watched and compared. All
/// methods may be called by many threads at once. A call checks its batch before the first merge,
/// and then merges once per cluster it touches.
///
/// # Progress
/// That of [`Table`](crate::table::Table), once the ids of the clusters are interned.
#[derive(Debug)]
pub struct Normalizer {
    options: Options,
    scale: Scale,
    state: AtomicPtr<State>,
    /// States that were replaced, which threads may still be reading.
    retired: Mutex<Vec<*mut State>>,
}

// SAFETY: a State may be used and dropped by any thread; the pointers are to boxes owned by self.
unsafe impl Send for Normalizer {}
// SAFETY: as above.
unsafe impl Sync for Normalizer {}

impl Drop for Normalizer {
    fn drop(&mut self) {
        let mut states =
            std::mem::take(self.retired.get_mut().unwrap_or_else(PoisonError::into_inner));
        states.push(self.state.load(Ordering::Acquire));
        for state in states {
            // SAFETY: it came from `Box::into_raw` and is in one of the two places only.
            drop(unsafe { Box::from_raw(state) });
        }
    }
}

impl Normalizer {
    /// A normalizer that has seen nothing.
    ///
    /// # Errors
    /// [`Error::Option`] names the option out of range.
    pub fn new(options: Options) -> Result<Self, Error> {
        options.check()?;
        let state = State::new(options.kept(), options.track_delta);
        Ok(Self::with_state(options, state))
    }

    /// A normalizer that remembers in tables of a region, of which there must be
    /// [`Kept::num_streams`](crate::state::Kept::num_streams).
    ///
    /// # Errors
    /// [`Error::Option`] names the option out of range.
    pub fn shared(options: Options, region: Region, tables: Vec<Table>) -> Result<Self, Error> {
        options.check()?;
        let state = State::shared(options.kept(), options.track_delta, region, tables);
        Ok(Self::with_state(options, state))
    }

    fn with_state(options: Options, state: State) -> Self {
        let state = AtomicPtr::new(Box::into_raw(Box::new(state)));
        Self { scale: options.scale(), options, state, retired: Mutex::default() }
    }

    fn state(&self) -> &State {
        // pairs with: the swap in `restore`.
        // SAFETY: states are dropped with self only.
        unsafe { &*self.state.load(Ordering::Acquire) }
    }

    /// The options it was made with.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Folds a batch into the histories and writes its advantages \[N\].
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::GroupsRequired`], [`Error::Weight`] or [`Error::NonFinite`];
    /// nothing was merged then.
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

    /// Takes a batch out of the histories again, which has to be in them.
    ///
    /// # Errors
    /// Those of [`advantages`](Self::advantages), and [`Error::Retract`] where a history has fewer
    /// samples, [`Error::Unsupported`] where more than histories is kept: nothing was changed then.
    pub fn retract<R: Real>(&self, batch: &Batch<'_, R>) -> Result<(), Error> {
        let options = &self.options;
        let tracks = options.track_diagnostics || options.track_delta;
        if options.estimator.keeps_parts || tracks || options.forgetting < 1.0 {
            let kinds = RULES.iter().filter(|rule| rule.keeps_parts).map(|rule| rule.name);
            let others = kinds.collect::<Vec<_>>().join(" and ");
            return Err(Error::Unsupported {
                what: "retract",
                needs: format!(
                    "an estimator other than {others}, forgetting 1, and no tracking of deltas or \
                     diagnostics"
                ),
            });
        }
        batch.check(None)?;
        if let Some(index) = batch.holes().next() {
            if options.nan_policy == NanPolicy::Raise {
                return Err(Error::NonFinite { index, value: batch.rewards[index].to_f64() });
            }
            // They never entered a history.
            let kept: Vec<usize> = (0..batch.rewards.len())
                .filter(|&entry| is_finite_reward(batch.rewards[entry].to_f64()))
                .collect();
            return self.retract(&batch.only(&kept).borrow());
        }
        let state = self.state();
        let batch = Batch { groups: None, ..*batch };
        let call = Call { options, scale: self.scale, state, batch };
        with_scratch(|scratch| {
            call.fold(scratch);
            call.find_keys(false, scratch)?;
            let rewards = &state.streams.rewards;
            let refuse = |key, count| {
                let name = state
                    .id_of(key)
                    .map_or_else(|| "without a history".to_owned(), |id| id.to_string());
                let (cluster, held) = (name, rewards.read(key).count);
                Err(Error::Retract { cluster, count, held })
            };
            let parts = || scratch.parts();
            for (&key, &moments) in parts() {
                if rewards.read(key).retract(moments).is_none() {
                    return refuse(key, moments.count);
                }
            }
            for (at, (&key, &moments)) in parts().enumerate() {
                if !rewards.retract(key, moments) {
                    // Another thread retracted meanwhile: what is done is undone, up to rounding.
                    parts().take(at).for_each(|(&key, &moments)| {
                        rewards.merge(key, moments, 1.0);
                    });
                    return refuse(key, moments.count);
                }
            }
            Ok(())
        })
    }

    /// Non-finite rewards left out of the histories so far.
    #[must_use]
    pub fn num_nonfinite(&self) -> u64 {
        self.state().num_nonfinite()
    }

    /// Everything remembered; each cluster's history as it was at one moment.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let state = self.state();
        let pending = state.pending.iter().flat_map(|pending| {
            let entries = pending.rewards.keys().map(|key| pending.entry(key));
            entries.filter(|entry| !entry.is_empty()).filter_map(|entry| state.named(&entry))
        });
        Snapshot {
            clusters: state.entries(),
            pending: pending.collect(),
            num_nonfinite: state.num_nonfinite(),
        }
    }

    /// What was folded since the last call of this method: every sample is in one delta only.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without the option `track_delta`.
    pub fn delta(&self) -> Result<Snapshot, Error> {
        let state = self.state();
        let Some(pending) = &state.pending else {
            return Err(Error::Unsupported {
                what: "delta",
                needs: "the option track_delta".to_owned(),
            });
        };
        let clusters = pending.take().into_iter().filter_map(|entry| state.named(&entry)).collect();
        Ok(Snapshot { clusters, ..Snapshot::default() })
    }

    /// Folds in what was remembered elsewhere. It does not become part of a later delta.
    ///
    /// # Errors
    /// [`Error::Snapshot`] where an entry cannot be that of any rewards; nothing was merged then.
    pub fn merge(&self, snapshot: &Snapshot) -> Result<(), Error> {
        snapshot.check()?;
        Self::merge_into(self.state(), snapshot)
    }

    fn merge_into(state: &State, snapshot: &Snapshot) -> Result<(), Error> {
        let keys: Result<Vec<u32>, Error> =
            snapshot.clusters.iter().map(|entry| state.key_of(entry.id.borrow())).collect();
        for (entry, id) in snapshot.clusters.iter().zip(keys?) {
            state.streams.merge(&with_key(entry, id));
        }
        state.add_nonfinite(snapshot.num_nonfinite);
        Ok(())
    }

    /// Forgets everything and remembers a snapshot instead, bit for bit. Calls of other threads that
    /// have begun end with what was there before.
    ///
    /// # Errors
    /// [`Error::Snapshot`] as for [`merge`](Self::merge); everything stays as it was then.
    pub fn restore(&self, snapshot: &Snapshot) -> Result<(), Error> {
        snapshot.check()?;
        if self.state().is_shared() {
            if self.state().histories().next().is_some() {
                return Err(Error::Unsupported {
                    what: "restoring into a shared table",
                    needs: "an empty one, for other processes use it too".to_owned(),
                });
            }
            let state = self.state();
            Self::merge_into(state, snapshot)?;
            return Self::restore_pending(state, snapshot);
        }
        let state = State::new(self.options.kept(), self.options.track_delta);
        Self::merge_into(&state, snapshot)?;
        Self::restore_pending(&state, snapshot)?;
        // pairs with: the load in `state`.
        let old = self.state.swap(Box::into_raw(Box::new(state)), Ordering::AcqRel);
        // A thread may be in the middle of a call: what it uses is kept as long as self.
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).push(old);
        Ok(())
    }

    fn restore_pending(state: &State, snapshot: &Snapshot) -> Result<(), Error> {
        let Some(pending) = &state.pending else { return Ok(()) };
        pending.take();
        for entry in &snapshot.pending {
            pending.merge(&with_key(entry, state.key_of(entry.id.borrow())?));
        }
        Ok(())
    }

    fn run<R: Real>(
        &self,
        batch: &Batch<'_, R>,
        halves: Halves,
        mut out: Option<&mut [R]>,
    ) -> Result<(), Error> {
        let Options { estimator, track_diagnostics, .. } = self.options;
        batch.check(out.as_deref().map(<[R]>::len))?;
        let needs_groups = match halves {
            Halves::Update => estimator.keeps_parts,
            Halves::Both | Halves::Normalize => estimator.needs_groups,
        };
        if needs_groups && batch.groups.is_none() {
            return Err(Error::GroupsRequired { estimator: estimator.name });
        }
        let groups = batch.groups.filter(|_| estimator.needs_groups || track_diagnostics);
        let batch = Batch { groups, ..*batch };
        let call = Call { options: &self.options, scale: self.scale, state: self.state(), batch };
        let done = with_scratch(|scratch| {
            call.fold(scratch);
            // A hole of weight 0 does not show in sums.
            if batch.weights.is_some() || scratch.is_suspect() {
                if batch.holes().next().is_some() {
                    return Ok(false);
                }
                if !scratch.is_finite() {
                    return Err(Error::Changed);
                }
            }
            call.find_keys(halves != Halves::Normalize, scratch)?;
            call.remember(halves, scratch);
            if let Some(out) = out.as_deref_mut() {
                call.map(halves, scratch);
                call.write(scratch, out);
            }
            Ok(true)
        })?;
        if done { Ok(()) } else { self.run_without_holes(&batch, halves, out) }
    }

    /// The same for a batch with non-finite rewards: as if they were not there.
    #[cold]
    fn run_without_holes<R: Real>(
        &self,
        batch: &Batch<'_, R>,
        halves: Halves,
        out: Option<&mut [R]>,
    ) -> Result<(), Error> {
        let holes: Vec<usize> = batch.holes().collect();
        let filling = match self.options.nan_policy {
            NanPolicy::Raise => {
                let index = holes.first().copied().unwrap_or_default();
                return Err(Error::NonFinite { index, value: batch.rewards[index].to_f64() });
            }
            NanPolicy::Zero => 0.0,
            NanPolicy::Propagate => f64::NAN,
        };
        let entries = 0..batch.rewards.len();
        let kept: Vec<usize> =
            entries.filter(|entry| holes.binary_search(entry).is_err()).collect();
        let rest = batch.only(&kept);
        if let Some(out) = out {
            let mut advantages = vec![R::from_f64(0.0); kept.len()];
            self.run(&rest.borrow(), halves, Some(&mut advantages))?;
            out.fill(R::from_f64(filling));
            for (&entry, advantage) in kept.iter().zip(advantages) {
                out[entry] = advantage;
            }
        } else {
            self.run(&rest.borrow(), halves, None)?;
        }
        if halves != Halves::Normalize {
            self.state().add_nonfinite(holes.len() as u64);
        }
        Ok(())
    }
}

fn with_key(entry: &Entry, id: u32) -> Entry<u32> {
    let Entry { rewards, parts, regression, advantages, .. } = *entry;
    Entry { id, rewards, parts, regression, advantages }
}
