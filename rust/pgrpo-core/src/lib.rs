//! Per-cluster reward histories and the advantages read from them.
//!
//! A call of [`Normalizer`] sums its batch up per cell, merges once per cluster it touches
//! into the histories ([`histories`], rows of a lock-free [`table`]), lets the estimator make a map of
//! each cell ([`estimators`]), and applies the maps. [`state`] is all that is remembered,
//! [`snapshot`] its form on disk.
//!
//! Everything is computed in `f64`. Axes: N rewards of a batch, K clusters.

// Loom's models are of the table alone; nothing else is built with it.
mod arena;
#[cfg(not(loom))]
pub mod batch;
#[cfg(not(loom))]
mod call;
#[cfg(not(loom))]
pub mod elements;
pub mod error;
#[cfg(not(loom))]
pub mod estimators;
#[cfg(not(loom))]
mod fold;
mod gate;
pub mod histories;
pub mod ids;
mod index;
#[cfg(not(loom))]
mod kernels;
pub mod moments;
#[cfg(not(loom))]
pub mod normalizer;
#[cfg(not(loom))]
pub mod options;
#[cfg(not(loom))]
pub mod several;
pub mod shared;
#[cfg(not(loom))]
pub mod simd;
#[cfg(not(loom))]
mod slots;
#[cfg(not(loom))]
pub mod snapshot;
#[cfg(not(loom))]
pub mod state;
mod sync;
pub mod table;

pub use error::Error;
pub use histories::{Histories, Sums};
pub use ids::{AnyId, ClusterId};
pub use moments::Moments;
#[cfg(not(loom))]
pub use {
    batch::{Batch, Ids},
    estimators::{RULES, Rule},
    gate::forked,
    normalizer::{Alone, Normalizer, Visit},
    options::{NanPolicy, Options, Order},
    several::{Combination, Several},
    snapshot::Snapshot,
    state::Entry,
};
