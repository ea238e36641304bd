//! One stream of running sums per cluster.

use crate::moments::Moments;
use crate::table::{Row, Table, Triple};

/// [`Moments`] by cluster key, shared by threads.
///
/// # Progress
/// That of [`Table`]: reading waits for nobody, merging is lock-free.
#[derive(Debug, Default)]
pub struct Histories {
    table: Table,
}

#[cfg(not(loom))]
impl From<Table> for Histories {
    fn from(table: Table) -> Self {
        Self { table }
    }
}

fn moments(origin: f64, [count, offset, m2]: Triple) -> Moments {
    Moments { count, origin, offset, m2 }
}

fn triple(moments: Moments) -> Triple {
    [moments.count, moments.offset, moments.m2]
}

impl Histories {
    /// The moments of one cluster; empty ones if nothing was merged into it.
    #[must_use]
    #[inline]
    pub fn read(&self, key: u32) -> Moments {
        self.table.find(key).map(|row| self.read_row(row)).unwrap_or_default()
    }

    /// Merges a batch's moments into one cluster, whose samples so far then count `kept` times as
    /// much, and returns the moments right before and right after. An empty batch changes nothing.
    #[inline(always)]
    pub fn merge(&self, key: u32, batch: Moments, kept: f64) -> (Moments, Moments) {
        let row = self.table.row(key);
        if batch.count == 0.0 {
            let now = self.read_row(row);
            return (now, now);
        }
        let origin = row.origin_or(batch.origin);
        let batch = batch.about(origin);
        let change = |old| Some(triple(moments(origin, old).decayed(kept).merge(batch)));
        let (before, after) = match self.table.commit(row, change) {
            Ok(both) => both,
            Err(old) => (old, old),
        };
        (moments(origin, before), moments(origin, after))
    }

    /// Takes samples out of one cluster again. False, and nothing changed, if it has not as many.
    pub fn retract(&self, key: u32, batch: Moments) -> bool {
        let Some((row, origin)) = self.table.find(key).and_then(|row| Some((row, row.origin()?)))
        else {
            return batch.count == 0.0;
        };
        let batch = batch.about(origin);
        self.table.commit(row, |old| moments(origin, old).retract(batch).map(triple)).is_ok()
    }

    /// Empties one cluster and returns what it had.
    pub fn take(&self, key: u32) -> Moments {
        let Some(row) = self.table.find(key) else { return Moments::default() };
        let Some(origin) = row.origin() else { return Moments::default() };
        let (Ok((old, _)) | Err(old)) = self.table.commit(row, |_| Some([0.0; 3]));
        moments(origin, old)
    }

    /// Keys of the clusters that ever had samples: low ones first.
    pub fn keys(&self) -> impl Iterator<Item = u32> {
        self.table.iter().filter(|(_, row)| row.origin().is_some()).map(|(key, _)| key)
    }

    /// Every cluster with samples, with its key: those of low keys first.
    pub fn iter(&self) -> impl Iterator<Item = (u32, Moments)> {
        let present = self.table.iter().filter(|(_, row)| row.origin().is_some());
        let read = present.map(|(key, row)| (key, self.read_row(row)));
        read.filter(|(_, moments)| moments.count > 0.0)
    }

    fn read_row(&self, row: &Row) -> Moments {
        row.origin().map(|origin| moments(origin, self.table.read(row))).unwrap_or_default()
    }
}

/// Sums by cluster key, each [`Triple`] of which only ever grows by addition and shrinks by decay.
#[derive(Debug, Default)]
pub struct Sums {
    table: Table,
}

impl Sums {
    /// The sums of one cluster; zeros if nothing was added to it.
    #[must_use]
    pub fn read(&self, key: u32) -> Triple {
        self.table.find(key).map(|row| self.table.read(row)).unwrap_or_default()
    }

    /// `old * kept + batch`; returns the sums right before and right after.
    pub fn add(&self, key: u32, batch: Triple, kept: f64) -> (Triple, Triple) {
        let row = self.table.row(key);
        row.origin_or(0.0);
        let change = |old: Triple| Some(std::array::from_fn(|i| old[i] * kept + batch[i]));
        let (Ok(both) | Err(both)) = self.table.commit(row, change).map_err(|old| (old, old));
        both
    }

    /// Empties one cluster and returns what it had.
    pub fn take(&self, key: u32) -> Triple {
        let Some(row) = self.table.find(key) else { return Triple::default() };
        let (Ok((old, _)) | Err(old)) = self.table.commit(row, |_| Some(Triple::default()));
        old
    }

    /// Every cluster something was ever added to, with its key: those of low keys first.
    pub fn iter(&self) -> impl Iterator<Item = (u32, Triple)> {
        let present = self.table.iter().filter(|(_, row)| row.origin().is_some());
        present.map(|(key, row)| (key, self.table.read(row)))
    }
}

#[cfg(not(loom))]
impl From<Table> for Sums {
    fn from(table: Table) -> Self {
        Self { table }
    }
}
