//! The table of reward histories, shared by threads.

use std::sync::{Mutex, PoisonError, RwLock};

use crate::moments::Moments;

/// [`Moments`] by dense cluster id: 0, 1, 2, ... The table grows to the highest id merged into.
///
/// # Progress
/// Not lock-free. Each cluster has a mutex, and growth excludes everybody: a thread that is stopped
/// inside [`merge`](Self::merge) holds up the others at the same cluster, or everywhere while the
/// table grows. What is read is one cluster's moments between two merges, never half of one; two
/// clusters may be read at different times.
#[derive(Debug, Default)]
pub struct Histories {
    rows: RwLock<Vec<Mutex<Moments>>>,
}

// A poisoned lock is used all the same: moments are replaced whole, so what it guards is valid.
impl Histories {
    /// The moments of one cluster; empty ones if nothing was merged into it.
    #[must_use]
    pub fn read(&self, cluster: u32) -> Moments {
        let rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        rows.get(cluster as usize)
            .map(|row| *row.lock().unwrap_or_else(PoisonError::into_inner))
            .unwrap_or_default()
    }

    /// Merges a batch's moments into one cluster and returns the moments right after that merge.
    pub fn merge(&self, cluster: u32, batch: Moments) -> Moments {
        let row = cluster as usize;
        let mut rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        if rows.len() <= row {
            drop(rows);
            let mut growing = self.rows.write().unwrap_or_else(PoisonError::into_inner);
            if growing.len() <= row {
                growing.resize_with(row + 1, Mutex::default);
            }
            drop(growing);
            rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        }
        let mut history = rows[row].lock().unwrap_or_else(PoisonError::into_inner);
        *history = history.merge(batch);
        *history
    }

    /// \[K\] moments of every cluster up to the highest id merged into.
    #[must_use]
    pub fn snapshot(&self) -> Vec<Moments> {
        let rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        rows.iter().map(|row| *row.lock().unwrap_or_else(PoisonError::into_inner)).collect()
    }
}
