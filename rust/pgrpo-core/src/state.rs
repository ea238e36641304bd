//! Everything a normalizer remembers.

use crate::error::Error;
use crate::histories::{Histories, Sums};
use crate::ids::{AnyId, ClusterId, Interner};
use crate::moments::Moments;
use crate::shared::Region;
use crate::sync::{AtomicU64, Ordering};
use crate::table::{Table, Triple};

/// Which sums are kept beside the rewards' histories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Those of parts, which random effects are estimated from.
    pub parts: bool,
    /// Those of the regression of `auto`.
    pub regression: bool,
    /// Those of advantages, for diagnostics.
    pub advantages: bool,
}

impl Kept {
    /// Number of streams, the rewards' histories included.
    #[must_use]
    pub fn num_streams(self) -> u32 {
        1 + u32::from(self.parts) + u32::from(self.regression) + u32::from(self.advantages)
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
    /// Sums of x², xy and y² of the regression of `auto`.
    pub regression: Triple,
    /// Number of advantages, their sum, sum of their squares.
    pub advantages: Triple,
}

impl<I> Entry<I> {
    pub(crate) fn is_empty(&self) -> bool {
        let sums = [self.parts, self.regression, self.advantages];
        self.rewards.count == 0.0 && sums.iter().flatten().all(|&sum| sum == 0.0)
    }
}

/// The running sums of every cluster.
#[derive(Debug)]
pub struct Streams {
    /// Histories of rewards.
    pub rewards: Histories,
    /// See [`Kept::parts`].
    pub parts: Option<Sums>,
    /// See [`Kept::regression`].
    pub regression: Option<Sums>,
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
            regression: kept.regression.then(Sums::default),
            advantages: kept.advantages.then(Sums::default),
        }
    }

    fn sums(&self) -> [Option<&Sums>; 3] {
        [self.parts.as_ref(), self.regression.as_ref(), self.advantages.as_ref()]
    }

    /// Adds what was remembered elsewhere of one cluster. Into an empty one this is an exact copy.
    pub fn merge(&self, entry: &Entry<u32>) {
        self.rewards.merge(entry.id, entry.rewards, 1.0);
        let triples = [entry.parts, entry.regression, entry.advantages];
        for (sums, triple) in self.sums().into_iter().zip(triples) {
            if let Some(sums) = sums {
                sums.add(entry.id, triple, 1.0);
            }
        }
    }

    /// What is remembered of one cluster.
    #[must_use]
    pub fn entry(&self, id: u32) -> Entry<u32> {
        let [parts, regression, advantages] =
            self.sums().map(|sums| sums.map(|sums| sums.read(id)).unwrap_or_default());
        Entry { id, rewards: self.rewards.read(id), parts, regression, advantages }
    }

    /// Every cluster here, emptied: what a thread adds meanwhile is either taken or left for the next
    /// time; of a call in progress, perhaps its rewards now and its sums then.
    pub fn take(&self) -> Vec<Entry<u32>> {
        let keys: Vec<u32> = self.rewards.keys().collect();
        let entries = keys.into_iter().map(|id| {
            // Rewards first, as calls add them first.
            let rewards = self.rewards.take(id);
            let [parts, regression, advantages] =
                self.sums().map(|sums| sums.map(|sums| sums.take(id)).unwrap_or_default());
            Entry { id, rewards, parts, regression, advantages }
        });
        entries.filter(|entry| !entry.is_empty()).collect()
    }
}

/// Where the names of clusters are kept.
#[derive(Debug)]
enum Names {
    Own(Interner),
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
    num_nonfinite: AtomicU64,
}

impl State {
    pub(crate) fn new(kept: Kept, track_delta: bool) -> Self {
        Self {
            streams: Streams::new(kept),
            pending: track_delta.then(|| Streams::new(kept)),
            names: Names::Own(Interner::default()),
            num_nonfinite: AtomicU64::new(0),
        }
    }

    /// In tables of a region, as many as [`Kept::num_streams`].
    pub(crate) fn shared(
        kept: Kept,
        track_delta: bool,
        region: Region,
        tables: Vec<Table>,
    ) -> Self {
        let mut tables = tables.into_iter();
        let mut next = || tables.next().expect("a region has the tables it was laid out with");
        let streams = Streams {
            rewards: next().into(),
            parts: kept.parts.then(|| next().into()),
            regression: kept.regression.then(|| next().into()),
            advantages: kept.advantages.then(|| next().into()),
        };
        Self { streams, names: Names::Shared(Box::new(region)), ..Self::new(kept, track_delta) }
    }

    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.names, Names::Shared(_))
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

    /// The key of any id.
    #[inline]
    pub(crate) fn key_of(&self, id: AnyId<'_>) -> Result<u32, Error> {
        match &self.names {
            Names::Own(interner) => Ok(interner.key(id)),
            Names::Shared(region) => region.index().key(id),
        }
    }

    /// The key of any id, if it was ever given one.
    pub(crate) fn find(&self, id: AnyId<'_>) -> Option<u32> {
        match &self.names {
            Names::Own(interner) => interner.find(id),
            Names::Shared(region) => region.index().find(id),
        }
    }

    /// The id of a key.
    pub(crate) fn id_of(&self, key: u32) -> Option<ClusterId> {
        match &self.names {
            Names::Own(interner) => interner.id(key),
            Names::Shared(region) => region.index().id(key),
        }
    }

    /// Every cluster with a history.
    pub(crate) fn histories(&self) -> Box<dyn Iterator<Item = (u32, Moments)> + '_> {
        let rewards = &self.streams.rewards;
        match &self.names {
            Names::Own(_) => Box::new(rewards.iter()),
            Names::Shared(region) => {
                let read = region.index().keys().map(|key| (key, rewards.read(key)));
                Box::new(read.filter(|(_, history)| history.count > 0.0))
            }
        }
    }

    /// What is remembered of every cluster with a history.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        let entries = self.histories().map(|(key, _)| self.streams.entry(key));
        entries.filter_map(|entry| self.named(&entry)).collect()
    }

    pub(crate) fn named(&self, entry: &Entry<u32>) -> Option<Entry> {
        let Entry { id, rewards, parts, regression, advantages } = *entry;
        Some(Entry { id: self.id_of(id)?, rewards, parts, regression, advantages })
    }
}
