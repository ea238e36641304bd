//! One stream of running sums per cluster.

use crate::error::Error;
use crate::moments::Moments;
use crate::table::{Refused, Row, Table, Triple};

/// [`Moments`] by cluster key, shared by threads.
///
/// # Progress
/// That of a table: reading waits for nobody, merging is lock-free.
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
    /// `is_only`: no other thread merges meanwhile.
    ///
    /// # Errors
    /// [`Error::Damaged`], of a shared table.
    #[inline(always)]
    pub fn merge(
        &self,
        key: u32,
        batch: Moments,
        kept: f64,
        is_only: bool,
    ) -> Result<(Moments, Moments), Error> {
        let row = self.table.row(key);
        if batch.count == 0.0 {
            let now = self.read_row(row);
            return Ok((now, now));
        }
        let origin = self.table.origin_or(key, row, batch.origin);
        let batch = batch.about(origin);
        let change = |old| Some(triple(moments(origin, old).decayed(kept).merge(batch)));
        let (before, after) = if is_only {
            self.table.commit_as_only(row, change)
        } else {
            self.table.commit(row, change)
        }?;
        Ok((moments(origin, before), moments(origin, after)))
    }

    /// Takes samples out of one cluster again.
    ///
    /// # Errors
    /// [`Refused::Unchanged`] if it has not as many.
    pub(crate) fn retract(&self, key: u32, batch: Moments) -> Result<(), Refused> {
        let Some((row, origin)) = self.table.find(key).and_then(|row| Some((row, row.origin()?)))
        else {
            return if batch.count == 0.0 { Ok(()) } else { Err(Refused::Unchanged([0.0; 3])) };
        };
        let batch = batch.about(origin);
        self.table.commit(row, |old| moments(origin, old).retract(batch).map(triple)).map(|_| ())
    }

    /// Empties one cluster and returns what it had.
    ///
    /// # Errors
    /// [`Error::Damaged`], of a shared table.
    pub fn take(&self, key: u32) -> Result<Moments, Error> {
        let Some(row) = self.table.find(key) else { return Ok(Moments::default()) };
        let Some(origin) = row.origin() else { return Ok(Moments::default()) };
        let (old, _) = self.table.commit(row, |_| Some([0.0; 3]))?;
        Ok(moments(origin, old))
    }

    /// Keys of the clusters that ever had samples, in ascending order; none of a shared table.
    pub fn keys(&self) -> impl Iterator<Item = u32> {
        self.table.iter().map(|(key, _)| key)
    }

    /// Every cluster with samples, with its key, in ascending order; none of a shared table.
    pub fn iter(&self) -> impl Iterator<Item = (u32, Moments)> {
        let read = self.table.iter().map(|(key, row)| (key, self.read_row(row)));
        read.filter(|(_, moments)| moments.count > 0.0)
    }

    fn read_row(&self, row: &Row) -> Moments {
        row.origin().map(|origin| moments(origin, self.table.read(row))).unwrap_or_default()
    }
}

/// Sums by cluster key, each [`Triple`] of which only ever grows by addition and shrinks by decay.
#[derive(Debug, Default)]
pub(crate) struct Sums {
    table: Table,
}

impl Sums {
    /// The sums of one cluster; zeros if nothing was added to it.
    #[must_use]
    pub fn read(&self, key: u32) -> Triple {
        self.table.find(key).map(|row| self.table.read(row)).unwrap_or_default()
    }

    /// `old * kept + batch`; returns the sums right before and right after. `is_only`: no other thread
    /// adds meanwhile.
    ///
    /// # Errors
    /// [`Error::Damaged`], of a shared table.
    pub fn add(
        &self,
        key: u32,
        batch: Triple,
        kept: f64,
        is_only: bool,
    ) -> Result<(Triple, Triple), Error> {
        let row = self.table.row(key);
        let change = |old: Triple| Some(std::array::from_fn(|i| old[i] * kept + batch[i]));
        Ok(if is_only {
            self.table.commit_as_only(row, change)
        } else {
            self.table.commit(row, change)
        }?)
    }

    /// Empties one cluster and returns what it had.
    ///
    /// # Errors
    /// [`Error::Damaged`], of a shared table.
    pub fn take(&self, key: u32) -> Result<Triple, Error> {
        let Some(row) = self.table.find(key) else { return Ok(Triple::default()) };
        Ok(self.table.commit(row, |_| Some(Triple::default()))?.0)
    }
}

#[cfg(not(loom))]
impl From<Table> for Sums {
    fn from(table: Table) -> Self {
        Self { table }
    }
}

#[cfg(all(test, not(loom)))]
mod concurrency;
