//! Rewards in, advantages out: the one way through all the parts.
#![allow(unsafe_code, reason = "the state is replaced while other threads read the old one")]

use std::borrow::Cow;
use std::cell::UnsafeCell;
use std::collections::HashSet;

use crate::batch::Batch;
use crate::call::{Call, Halves, with_scratch};
use crate::elements::Real;
use crate::error::Error;
use crate::estimators::{Baseline, RULES, Rule, Scale};
use crate::gate::Gate;
use crate::ids::AnyId;
use crate::kernels::unless_changed;
use crate::moments::{Moments, is_finite_reward};
use crate::options::{NanPolicy, Options};
use crate::shared::Region;
use crate::snapshot::Snapshot;
use crate::state::{Entry, State};
use crate::table::{Refused, Triple};

/// An estimator with its options and everything it remembers.
///
/// ```
/// use pgrpo_core::{Batch, Ids, Normalizer, Options, Rule};
///
/// let normalizer = Normalizer::new(Options::new(Rule::named("pgrpo")?))?;
/// let mut advantages = [0.0_f32; 2];
/// normalizer.advantages(&Batch::new(&[0.0, 1.0], Ids::I32(&[7, 7])), &mut advantages)?;
/// // The history of cluster 7 has mean 0.5 and deviation 0.5 now; eps is 1e-4.
/// assert_eq!(advantages, [-0.9998, 0.9998]);
/// // A reward of 1 is as good for another batch as it was for the first one.
/// normalizer.normalize(&Batch::new(&[1.0, 0.5], Ids::I32(&[7, 7])), &mut advantages)?;
/// assert_eq!(advantages, [0.9998, 0.0]);
/// # Ok::<(), pgrpo_core::Error>(())
/// ```
///
/// Histories are kept under every estimator, so that clusters can be watched and compared. All
/// methods may be called by many threads at once. A call checks its batch before the first merge,
/// and then merges once per cluster it touches.
///
/// # Progress
/// Every call is a [`Visit`], and visits are lock-free: they wait for none another. What replaces all
/// that is remembered, an [`Alone`], waits for the visits that have begun, and those that come
/// meanwhile wait for it.
#[derive(Debug)]
pub struct Normalizer {
    options: Options,
    scale: Scale,
    gate: Gate,
    state: Box<UnsafeCell<State>>,
}

// SAFETY: the state is changed through atomics by whoever visits, and otherwise by whoever is alone.
unsafe impl Sync for Normalizer {}

/// The right to use what a [`Normalizer`] remembers, as others do at the same time. As long as a thread
/// holds one, it must not ask for an [`Alone`], for which it would wait for ever.
#[derive(Debug)]
pub struct Visit<'a> {
    normalizer: &'a Normalizer,
    /// Whether no other visit is going on.
    is_only: bool,
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        if !self.is_only {
            self.normalizer.gate.leave();
        }
    }
}

/// The right to replace what a [`Normalizer`] remembers: nobody enters as long as it lasts.
///
/// ```
/// use pgrpo_core::{AnyId, Batch, Ids, Normalizer, Options, Rule};
///
/// let normalizer = Normalizer::new(Options::new(Rule::named("pgrpo")?))?;
/// normalizer.update(&Batch::new(&[0.0, 1.0], Ids::I64(&[1, 2])))?;
/// assert_eq!(normalizer.alone().forget([AnyId::Int(1)])?, 1);
/// assert_eq!(normalizer.snapshot().clusters.len(), 1);
/// # Ok::<(), pgrpo_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Alone<'a> {
    normalizer: &'a Normalizer,
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.normalizer.gate.open();
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

    /// A normalizer that remembers in a region, which must have
    /// [`Kept::num_streams`](crate::Kept::num_streams) streams.
    ///
    /// # Errors
    /// [`Error::Option`] names the option out of range, or `num_streams`.
    pub fn shared(options: Options, region: Region) -> Result<Self, Error> {
        options.check()?;
        let (found, expected) = (region.num_streams(), options.kept().num_streams());
        if found != expected as usize {
            return Err(Error::Option {
                name: "num_streams",
                value: found.to_string(),
                expected: format!("{expected}, which these options keep"),
            });
        }
        let state = State::shared(options.kept(), options.track_delta, region);
        Ok(Self::with_state(options, state))
    }

    fn with_state(options: Options, state: State) -> Self {
        let (scale, state) = (options.scale(), Box::new(UnsafeCell::new(state)));
        Self { options, scale, gate: Gate::default(), state }
    }

    /// The options it was made with.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Enters, beside others.
    pub fn visit(&self) -> Visit<'_> {
        self.gate.enter();
        Visit { normalizer: self, is_only: false }
    }

    /// Enters as the only one if nobody is inside, which spares a commit its two atomic exchanges, and
    /// as by [`visit`](Self::visit) if somebody is.
    ///
    /// # Safety
    /// Until the visit ends no other thread may enter or ask to be alone, and what a thread did before
    /// must be seen by those who come later: all threads hold one lock when they do either, and this
    /// one holds it as long as the visit lasts.
    pub unsafe fn visit_under_lock(&self) -> Visit<'_> {
        if self.gate.is_empty() {
            return Visit { normalizer: self, is_only: true };
        }
        self.visit()
    }

    /// Lets nobody in any more. [`Alone`] waits for those who are inside.
    pub fn alone(&self) -> Alone<'_> {
        self.gate.close();
        Alone { normalizer: self }
    }

    /// [`Visit::advantages`].
    ///
    /// # Errors
    /// As there.
    pub fn advantages<R: Real>(&self, batch: &Batch<'_, R>, out: &mut [R]) -> Result<(), Error> {
        self.visit().advantages(batch, out)
    }

    /// [`Visit::update`].
    ///
    /// # Errors
    /// As there.
    pub fn update<R: Real>(&self, batch: &Batch<'_, R>) -> Result<(), Error> {
        self.visit().update(batch)
    }

    /// [`Visit::normalize`].
    ///
    /// # Errors
    /// As there.
    pub fn normalize<R: Real>(&self, batch: &Batch<'_, R>, out: &mut [R]) -> Result<(), Error> {
        self.visit().normalize(batch, out)
    }

    /// [`Visit::retract`].
    ///
    /// # Errors
    /// As there.
    pub fn retract<R: Real>(&self, batch: &Batch<'_, R>) -> Result<(), Error> {
        self.visit().retract(batch)
    }

    /// [`Visit::num_nonfinite`].
    #[must_use]
    pub fn num_nonfinite(&self) -> u64 {
        self.visit().num_nonfinite()
    }

    /// [`Visit::snapshot`].
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.visit().snapshot()
    }

    /// [`Visit::delta`].
    ///
    /// # Errors
    /// As there.
    pub fn delta(&self) -> Result<Snapshot, Error> {
        self.visit().delta()
    }

    /// [`Visit::merge`].
    ///
    /// # Errors
    /// As there.
    pub fn merge(&self, snapshot: &Snapshot) -> Result<(), Error> {
        self.visit().merge(snapshot)
    }

    /// [`Alone::restore`].
    ///
    /// # Errors
    /// As there.
    pub fn restore(&self, snapshot: &Snapshot) -> Result<(), Error> {
        self.alone().restore(snapshot)
    }
}

impl Visit<'_> {
    fn state(&self) -> &State {
        // SAFETY: whoever is alone waits for the end of this visit.
        unsafe { &*self.normalizer.state.get() }
    }

    /// Folds a batch into the histories and writes its advantages \[N\].
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::GroupsRequired`], [`Error::LengthsRequired`], [`Error::Weight`] or
    /// [`Error::NonFinite`]; nothing was merged then.
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
        self.retract_if(batch, true)
    }

    /// Whether a batch could be taken out of the histories.
    pub(crate) fn check_retract<R: Real>(&self, batch: &Batch<'_, R>) -> Result<(), Error> {
        self.retract_if(batch, false)
    }

    fn retract_if<R: Real>(&self, batch: &Batch<'_, R>, is_meant: bool) -> Result<(), Error> {
        let options = &self.normalizer.options;
        let tracks = options.track_diagnostics || options.track_delta;
        let keeps_more = |rule: &Rule| rule.keeps_parts || rule.baseline.is_some();
        if keeps_more(options.estimator) || tracks || options.forgetting < 1.0 {
            let kinds = RULES.iter().filter(|rule| keeps_more(rule)).map(|rule| rule.name);
            let others = kinds.collect::<Vec<_>>().join(", ");
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
            return self.retract_if(&batch.only(&kept).borrow(), is_meant);
        }
        let state = self.state();
        let batch = Batch { groups: None, ..*batch };
        let scale = self.normalizer.scale;
        let call = Call { options, scale, state, is_only: false, batch };
        with_scratch(|scratch| {
            unless_changed(|| call.fold(scratch)).ok_or(Error::Changed { is_merged: false })?;
            call.find_keys(false, scratch)?;
            call.find_parents(false, scratch)?;
            let rewards = &state.streams.rewards;
            let refuse = |key, count| {
                let name = state
                    .id_of(key)
                    .map_or_else(|| "without a history".to_owned(), |id| id.to_string());
                let (cluster, held) = (name, rewards.read(key).count);
                Err(Error::Retract { cluster, count, held })
            };
            let parts = || scratch.parts().chain(scratch.parent_parts());
            for (&key, &moments) in parts() {
                if rewards.read(key).retract(moments).is_none() {
                    return refuse(key, moments.count);
                }
            }
            if !is_meant {
                return Ok(());
            }
            for (at, (&key, &moments)) in parts().enumerate() {
                if let Err(refused) = rewards.retract(key, moments) {
                    // Another thread retracted meanwhile: what is done is undone, up to rounding.
                    for (&key, &moments) in parts().take(at) {
                        rewards.merge(key, moments, 1.0, false)?;
                    }
                    return match refused {
                        Refused::Unchanged(_) => refuse(key, moments.count),
                        Refused::NoBuffer => Err(refused.into()),
                    };
                }
            }
            state.retract_from_pool(scratch.parts().map(|(_, &moments)| moments));
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
        self.state().snapshot()
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
        let taken = pending.take_all()?;
        let clusters = taken.iter().filter_map(|entry| state.named(entry)).collect();
        Ok(Snapshot { clusters, ..Snapshot::default() })
    }

    /// Folds in what was remembered elsewhere. It does not become part of a later delta.
    ///
    /// # Errors
    /// [`Error::Snapshot`] where an entry cannot be that of any rewards; nothing was merged then.
    pub fn merge(&self, snapshot: &Snapshot) -> Result<(), Error> {
        snapshot.check()?;
        let (state, rule) = (self.state(), self.normalizer.options.estimator);
        if let Some(kind @ Baseline::ExponentialMean(_)) = rule.baseline
            && snapshot.clusters.iter().any(|entry| kind.is_kind_of(entry.baseline))
            && state.histories().next().is_some()
        {
            return Err(Error::Unsupported {
                what: "merging exponential means",
                needs: "a normalizer that has seen nothing".to_owned(),
            });
        }
        let snapshot = read_by(rule, snapshot);
        state.merge(&snapshot, snapshot.pooled())
    }

    /// Refuses all that can be refused of a batch but its rewards' values.
    fn check<R: Real>(
        &self,
        batch: &Batch<'_, R>,
        halves: Halves,
        out: Option<usize>,
    ) -> Result<(), Error> {
        let Options { estimator, prior_count, .. } = self.normalizer.options;
        if batch.parents.is_some() && prior_count == 0.0 {
            return Err(Error::Unsupported {
                what: "borrowing from parents",
                needs: "a prior_count above 0, which is how much is borrowed".to_owned(),
            });
        }
        batch.check(out)?;
        let needs_groups = match halves {
            Halves::Update => estimator.keeps_parts,
            Halves::Both | Halves::Normalize => estimator.needs_groups,
        };
        if needs_groups && batch.groups.is_none() {
            return Err(Error::GroupsRequired { estimator: estimator.name });
        }
        if estimator.needs_lengths && halves != Halves::Update && batch.lengths.is_none() {
            return Err(Error::LengthsRequired { estimator: estimator.name });
        }
        Ok(())
    }

    pub(crate) fn run<R: Real>(
        &self,
        batch: &Batch<'_, R>,
        halves: Halves,
        mut out: Option<&mut [R]>,
    ) -> Result<(), Error> {
        self.check(batch, halves, out.as_deref().map(<[R]>::len))?;
        let Normalizer { options, scale, .. } = self.normalizer;
        let groups = batch.groups.filter(|_| options.reads_groups());
        let batch = Batch { groups, ..*batch };
        let (scale, state) = (*scale, self.state());
        let is_only = self.is_only && !state.is_shared();
        let call = Call { options, scale, state, is_only, batch };
        let done = with_scratch(|scratch| {
            unless_changed(|| call.fold(scratch)).ok_or(Error::Changed { is_merged: false })?;
            // A hole of weight 0 does not show in sums.
            if batch.weights.is_some() || scratch.is_suspect() {
                if batch.holes().next().is_some() {
                    return Ok(false);
                }
                if !scratch.is_finite() {
                    return Err(Error::Changed { is_merged: false });
                }
            }
            call.find_keys(halves != Halves::Normalize, scratch)?;
            call.find_parents(halves != Halves::Normalize, scratch)?;
            call.remember(halves, scratch)?;
            if let Some(out) = out.as_deref_mut() {
                call.map(halves, scratch)?;
                let written = unless_changed(|| call.write(scratch, out));
                written.ok_or(Error::Changed { is_merged: halves == Halves::Both })?;
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
        let filling = match self.normalizer.options.nan_policy {
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

impl Alone<'_> {
    fn state(&mut self) -> &mut State {
        self.normalizer.gate.wait_for_the_last();
        // SAFETY: nobody is inside, and nobody enters before this ends.
        unsafe { &mut *self.normalizer.state.get() }
    }

    /// Forgets everything and remembers a snapshot instead, bit for bit.
    ///
    /// # Errors
    /// [`Error::Snapshot`] as for [`merge`](Visit::merge); everything stays as it was then.
    pub fn restore(mut self, snapshot: &Snapshot) -> Result<(), Error> {
        snapshot.check()?;
        let snapshot = &*read_by(self.normalizer.options.estimator, snapshot);
        let state = self.state();
        if let Some(region) = state.region() {
            if state.histories().next().is_some() {
                return Err(unsupported("an empty one, for other processes use it too"));
            }
            // One step for all processes: two that find it empty must not both bring their snapshot.
            if !region.claim_restoring() {
                return Err(unsupported(
                    "one that no process has restored into before: let one do it for all",
                ));
            }
            let filled = state.fill(snapshot);
            if filled.is_err() {
                region.disclaim_restoring();
            }
            return filled;
        }
        self.replace(snapshot)
    }

    /// Puts a state that holds a snapshot in the place of this process's own.
    fn replace(&mut self, snapshot: &Snapshot) -> Result<(), Error> {
        let options = &self.normalizer.options;
        let new = State::new(options.kept(), options.track_delta);
        new.fill(snapshot)?;
        *self.state() = new;
        Ok(())
    }

    /// Drops the histories of some clusters and what is pending of them, as if none of their rewards had
    /// ever been folded. What they took up of memory is given back; of a shared table it stays with
    /// their names, and calls of other processes may be under way. Returns the number of histories that
    /// were dropped, without those of parents, which go with the last cluster; clusters without one are
    /// passed over.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where some clusters would stay, and there are parents: nothing was dropped
    /// then. [`Error::Damaged`], of a shared table.
    pub fn forget<'a>(self, ids: impl IntoIterator<Item = AnyId<'a>>) -> Result<usize, Error> {
        let ids: HashSet<AnyId<'_>> = ids.into_iter().collect();
        self.drop_where(|id| ids.contains(&id))
    }

    /// Drops the histories of all other clusters, as [`forget`](Self::forget) does.
    ///
    /// # Errors
    /// As there.
    pub fn keep<'a>(self, ids: impl IntoIterator<Item = AnyId<'a>>) -> Result<usize, Error> {
        let ids: HashSet<AnyId<'_>> = ids.into_iter().collect();
        self.drop_where(|id| !ids.contains(&id))
    }

    fn drop_where(mut self, drops: impl Fn(AnyId<'_>) -> bool) -> Result<usize, Error> {
        let state = self.state();
        let mut snapshot = state.snapshot();
        let (parents, clusters): (Vec<_>, Vec<_>) =
            snapshot.clusters.iter().partition(|entry| entry.id.is_parent());
        let dropped = clusters.iter().filter(|entry| drops(entry.id.borrow())).count();
        let empties = dropped == clusters.len();
        if !parents.is_empty() && dropped > 0 && !empties {
            return Err(Error::Unsupported {
                what: "dropping some of the clusters",
                needs: "histories without parents, which do not tell whose rewards they hold"
                    .to_owned(),
            });
        }
        let keeps = |entry: &Entry| {
            if entry.id.is_parent() { !empties } else { !drops(entry.id.borrow()) }
        };
        snapshot.pending.retain(keeps);
        if state.is_shared() {
            let gone = snapshot.clusters.iter().filter(|entry| !keeps(entry));
            for key in gone.filter_map(|entry| state.find(entry.id.borrow())) {
                let taken = state.streams.take(key)?;
                if !state.is_parent(key) {
                    state.retract_from_pool(std::iter::once(taken.rewards));
                }
                if let Some(pending) = &state.pending {
                    pending.take(key)?;
                }
            }
            return Ok(dropped);
        }
        snapshot.clusters.retain(keeps);
        // To be worked out anew: that of the clusters that stay.
        snapshot.pool = Moments::default();
        self.replace(&snapshot)?;
        Ok(dropped)
    }
}

fn unsupported(needs: &str) -> Error {
    Error::Unsupported { what: "restoring into a shared table", needs: needs.to_owned() }
}

/// A snapshot as a rule reads it, to which numbers of another kind of baseline mean nothing.
fn read_by<'a>(rule: &Rule, snapshot: &'a Snapshot) -> Cow<'a, Snapshot> {
    let is_foreign = |entry: &Entry| {
        let known = rule.baseline.is_none_or(|kind| kind.is_kind_of(entry.baseline));
        !known && entry.baseline.iter().any(|&number| number != 0.0)
    };
    let mut read = Cow::Borrowed(snapshot);
    if snapshot.clusters.iter().chain(&snapshot.pending).any(is_foreign) {
        let Snapshot { clusters, pending, .. } = read.to_mut();
        for entry in clusters.iter_mut().chain(pending).filter(|entry| is_foreign(entry)) {
            entry.baseline = Triple::default();
        }
    }
    read
}
