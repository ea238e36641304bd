//! Everything a normalizer remembers.

use crate::error::Error;
use crate::histories::{Histories, Sums};
use crate::ids::{AnyId, ClusterId, direct};
use crate::index::Index;
use crate::moments::Moments;
use crate::shared::Region;
use crate::snapshot::Snapshot;
use crate::sync::{AtomicU64, Ordering};
use crate::table::{INTERNED, Triple};

/// Which sums are kept beside the rewards' histories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Those of parts, which random effects are estimated from.
    pub parts: bool,
    /// Those of the rule's baseline, by the name of their [kind](crate::Rule::baseline).
    pub baseline: Option<&'static str>,
    /// Those of advantages, for diagnostics.
    pub advantages: bool,
    /// The history of all clusters together. It lies among the rewards' histories, under a key that
    /// is no cluster's.
    pub pool: bool,
}

/// The key of the history of all clusters together.
pub(crate) const POOL: u32 = INTERNED;

impl Kept {
    /// Number of streams, the rewards' histories included.
    #[must_use]
    pub fn num_streams(self) -> u32 {
        1 + u32::from(self.parts) + u32::from(self.baseline.is_some()) + u32::from(self.advantages)
    }
}

/// What is remembered of one cluster; zeros where it is not kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry<I = ClusterId> {
    /// The cluster.
    pub id: I,
    /// History of its rewards.
    pub rewards: Moments,
    /// Number of parts, sum of their squared sizes, sum of squares within them.
    pub parts: Triple,
    /// What the rule's baseline is made from, see [`Rule::baseline`](crate::Rule::baseline).
    pub baseline: Triple,
    /// Number of advantages, their sum, sum of their squares.
    pub advantages: Triple,
}

impl<I> Entry<I> {
    pub(crate) fn is_empty(&self) -> bool {
        let sums = [self.parts, self.baseline, self.advantages];
        self.rewards.count == 0.0 && sums.iter().flatten().all(|&sum| sum == 0.0)
    }

    fn with_key(&self, id: u32) -> Entry<u32> {
        let Self { rewards, parts, baseline, advantages, .. } = *self;
        Entry { id, rewards, parts, baseline, advantages }
    }
}

/// The running sums of every cluster.
#[derive(Debug)]
pub(crate) struct Streams {
    /// Histories of rewards.
    pub rewards: Histories,
    /// See [`Kept::parts`].
    pub parts: Option<Sums>,
    /// See [`Kept::baseline`].
    pub baseline: Option<Sums>,
    /// See [`Kept::advantages`].
    pub advantages: Option<Sums>,
}

impl Streams {
    /// Empty ones.
    #[must_use]
    pub fn new(kept: Kept) -> Self {
        Self {
            rewards: Histories::default(),
            parts: kept.parts.then(Sums::default),
            baseline: kept.baseline.map(|_| Sums::default()),
            advantages: kept.advantages.then(Sums::default),
        }
    }

    fn sums(&self) -> [Option<&Sums>; 3] {
        [self.parts.as_ref(), self.baseline.as_ref(), self.advantages.as_ref()]
    }

    /// Adds what was remembered elsewhere of one cluster. Into an empty one this is an exact copy.
    ///
    /// # Errors
    /// [`Error::Damaged`], of a shared table.
    pub fn merge(&self, entry: &Entry<u32>) -> Result<(), Error> {
        self.rewards.merge(entry.id, entry.rewards, 1.0, false)?;
        let triples = [entry.parts, entry.baseline, entry.advantages];
        for (sums, triple) in self.sums().into_iter().zip(triples) {
            if let Some(sums) = sums {
                sums.add(entry.id, triple, 1.0, false)?;
            }
        }
        Ok(())
    }

    /// What is remembered of one cluster.
    #[must_use]
    pub fn entry(&self, id: u32) -> Entry<u32> {
        let [parts, baseline, advantages] =
            self.sums().map(|sums| sums.map(|sums| sums.read(id)).unwrap_or_default());
        Entry { id, rewards: self.rewards.read(id), parts, baseline, advantages }
    }

    /// Empties one cluster and returns what it had: what a thread adds meanwhile is either taken or
    /// left; of a call in progress, perhaps its rewards are taken and its sums left.
    ///
    /// # Errors
    /// [`Error::Damaged`], of a shared table.
    pub fn take(&self, id: u32) -> Result<Entry<u32>, Error> {
        // Rewards first, as calls add them first.
        let rewards = self.rewards.take(id)?;
        let take = |sums: Option<&Sums>| sums.map_or(Ok(Triple::default()), |sums| sums.take(id));
        let [parts, baseline, advantages] = self.sums();
        let (parts, baseline) = (take(parts)?, take(baseline)?);
        Ok(Entry { id, rewards, parts, baseline, advantages: take(advantages)? })
    }

    /// What is remembered of every cluster, with the clusters emptied.
    ///
    /// # Errors
    /// [`Error::Damaged`], of a shared table.
    pub fn take_all(&self) -> Result<Vec<Entry<u32>>, Error> {
        let keys: Vec<u32> = self.rewards.keys().collect();
        let entries: Result<Vec<_>, Error> = keys.into_iter().map(|id| self.take(id)).collect();
        Ok(entries?.into_iter().filter(|entry| !entry.is_empty()).collect())
    }
}

/// Where the names of clusters are kept.
#[derive(Debug)]
enum Names {
    Own(Box<Index>),
    /// In memory that other processes use as well, like the streams then.
    Shared(Box<Region>),
}

/// Streams with the ids of their clusters.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) streams: Streams,
    /// What was folded since the last delta, if deltas are kept; never shared.
    pub(crate) pending: Option<Streams>,
    names: Names,
    /// Whether the history of all clusters together is kept.
    keeps_pool: bool,
    num_nonfinite: AtomicU64,
}

impl State {
    pub(crate) fn new(kept: Kept, track_delta: bool) -> Self {
        Self {
            streams: Streams::new(kept),
            pending: track_delta.then(|| Streams::new(kept)),
            names: Names::Own(Box::default()),
            keeps_pool: kept.pool,
            num_nonfinite: AtomicU64::new(0),
        }
    }

    /// In the rows of a region, which has [`Kept::num_streams`] streams.
    pub(crate) fn shared(kept: Kept, track_delta: bool, mut region: Region) -> Self {
        let mut tables = region.take_tables().into_iter();
        let mut next = || tables.next().expect("a region has the tables it was laid out with");
        let streams = Streams {
            rewards: next().into(),
            parts: kept.parts.then(|| next().into()),
            baseline: kept.baseline.map(|_| next().into()),
            advantages: kept.advantages.then(|| next().into()),
        };
        Self { streams, names: Names::Shared(Box::new(region)), ..Self::new(kept, track_delta) }
    }

    pub(crate) fn is_shared(&self) -> bool {
        self.region().is_some()
    }

    /// The memory that other processes use as well.
    pub(crate) fn region(&self) -> Option<&Region> {
        match &self.names {
            Names::Own(_) => None,
            Names::Shared(region) => Some(region),
        }
    }

    pub(crate) fn num_nonfinite(&self) -> u64 {
        match &self.names {
            // Relaxed: a counter, which says nothing about other memory.
            Names::Own(_) => self.num_nonfinite.load(Ordering::Relaxed),
            Names::Shared(region) => region.num_nonfinite(),
        }
    }

    pub(crate) fn add_nonfinite(&self, found: u64) {
        match &self.names {
            // Relaxed: as above.
            Names::Own(_) => {
                self.num_nonfinite.fetch_add(found, Ordering::Relaxed);
            }
            Names::Shared(region) => region.add_nonfinite(found),
        }
    }

    fn index(&self) -> &Index {
        match &self.names {
            Names::Own(index) => index,
            Names::Shared(region) => region.index(),
        }
    }

    /// The key of an id that is one itself. In memory of this process alone, rows are taken up to the
    /// highest such key.
    #[inline]
    fn own_key(&self, id: AnyId<'_>) -> Option<u32> {
        direct(id).filter(|_| !self.is_shared())
    }

    /// The key of any id.
    #[inline]
    pub(crate) fn key_of(&self, id: AnyId<'_>) -> Result<u32, Error> {
        self.own_key(id).map_or_else(|| self.index().key(id), Ok)
    }

    /// The key of any id, if it was ever given one.
    #[inline]
    pub(crate) fn find(&self, id: AnyId<'_>) -> Option<u32> {
        self.own_key(id).or_else(|| self.index().find(id))
    }

    /// Whether a key is a parent's.
    pub(crate) fn is_parent(&self, key: u32) -> bool {
        self.index().is_parent(key)
    }

    /// The id of a key.
    pub(crate) fn id_of(&self, key: u32) -> Option<ClusterId> {
        if key < INTERNED {
            return Some(ClusterId::Int(i64::from(key)));
        }
        self.index().id(key)
    }

    /// Every cluster and every parent with a history, in ascending order of keys.
    pub(crate) fn histories(&self) -> Box<dyn Iterator<Item = (u32, Moments)> + '_> {
        let rewards = &self.streams.rewards;
        match &self.names {
            Names::Own(_) => Box::new(rewards.iter().filter(|&(key, _)| key != POOL)),
            Names::Shared(region) => {
                let read = region.index().keys().map(|key| (key, rewards.read(key)));
                Box::new(read.filter(|(_, history)| history.count > 0.0))
            }
        }
    }

    /// The history of all clusters together: the one that is kept, or worked out from all of them.
    pub(crate) fn pool(&self) -> Moments {
        self.worked_out_pool().unwrap_or_else(|| self.streams.rewards.read(POOL))
    }

    /// The history of all clusters together, worked out from all of them; None where it is kept.
    pub(crate) fn worked_out_pool(&self) -> Option<Moments> {
        if self.keeps_pool {
            return None;
        }
        let clusters = self.histories().filter(|&(key, _)| !self.is_parent(key));
        let histories = clusters.map(|(_, history)| history);
        Some(histories.fold(Moments::default(), Moments::merge))
    }

    /// Merges what was merged into clusters into the history of all together, if that is kept; returns
    /// it right before and right after.
    #[inline]
    pub(crate) fn merge_into_pool(
        &self,
        batch: impl Iterator<Item = Moments>,
        is_only: bool,
    ) -> Result<Option<(Moments, Moments)>, Error> {
        if !self.keeps_pool {
            return Ok(None);
        }
        let all = batch.fold(Moments::default(), Moments::merge);
        self.streams.rewards.merge(POOL, all, 1.0, is_only).map(Some)
    }

    /// Takes what was taken out of clusters out of the history of all together.
    pub(crate) fn retract_from_pool(&self, batch: impl Iterator<Item = Moments>) {
        if self.keeps_pool {
            let all = batch.fold(Moments::default(), Moments::merge);
            // It holds what its clusters hold, but for calls that are under way.
            let _ = self.streams.rewards.retract(POOL, all);
        }
    }

    /// Adds what was remembered elsewhere, and the history of all clusters together that goes with it.
    pub(crate) fn merge(&self, snapshot: &Snapshot, pool: Moments) -> Result<(), Error> {
        let keys = self.keys_of(&snapshot.clusters)?;
        for (entry, key) in snapshot.clusters.iter().zip(keys) {
            self.streams.merge(&entry.with_key(key))?;
        }
        self.merge_into_pool(std::iter::once(pool), false)?;
        self.add_nonfinite(snapshot.num_nonfinite);
        Ok(())
    }

    /// Brings everything of a snapshot into a state without histories.
    pub(crate) fn fill(&self, snapshot: &Snapshot) -> Result<(), Error> {
        let kept = snapshot.pool;
        self.merge(snapshot, if kept.count > 0.0 { kept } else { snapshot.pooled() })?;
        let Some(pending) = &self.pending else { return Ok(()) };
        pending.take_all()?;
        for (entry, key) in snapshot.pending.iter().zip(self.keys_of(&snapshot.pending)?) {
            pending.merge(&entry.with_key(key))?;
        }
        Ok(())
    }

    /// Everything remembered; each cluster's history as it was at one moment.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let pending = self.pending.iter().flat_map(|pending| {
            let entries = pending.rewards.keys().map(|key| pending.entry(key));
            entries.filter(|entry| !entry.is_empty()).filter_map(|entry| self.named(&entry))
        });
        let entries = self.histories().map(|(key, _)| self.streams.entry(key));
        Snapshot {
            clusters: entries.filter_map(|entry| self.named(&entry)).collect(),
            pending: pending.collect(),
            pool: if self.keeps_pool { self.pool() } else { Moments::default() },
            num_nonfinite: self.num_nonfinite(),
        }
    }

    fn keys_of(&self, entries: &[Entry]) -> Result<Vec<u32>, Error> {
        entries.iter().map(|entry| self.key_of(entry.id.borrow())).collect()
    }

    pub(crate) fn named(&self, entry: &Entry<u32>) -> Option<Entry> {
        let Entry { id, rewards, parts, baseline, advantages } = *entry;
        Some(Entry { id: self.id_of(id)?, rewards, parts, baseline, advantages })
    }
}
