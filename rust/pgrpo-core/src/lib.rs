//! Per-cluster reward histories and the advantages read from them.
//!
//! A call of [`Normalizer`] sums its batch up per cell, merges once per cluster it touches
//! into the histories, which are rows of a lock-free table, lets the estimator make a map of each cell
//! ([`estimators`]), and applies the maps. A [`Snapshot`] is all that is remembered, and its form on disk.
//!
//! Everything is computed in `f64`. Axes: N rewards of a batch, K clusters.

// Loom's models are of the table alone; hardly anything else is built with it, or used.
#![cfg_attr(loom, allow(dead_code))]

mod arena;
#[cfg(not(loom))]
mod batch;
#[cfg(not(loom))]
mod call;
#[cfg(not(loom))]
mod elements;
mod error;
#[cfg(not(loom))]
pub mod estimators;
#[cfg(not(loom))]
mod fold;
mod gate;
mod histories;
mod ids;
mod index;
#[cfg(not(loom))]
mod kernels;
mod moments;
#[cfg(not(loom))]
mod normalizer;
#[cfg(not(loom))]
pub mod options;
#[cfg(not(loom))]
pub mod several;
pub mod shared;
#[cfg(not(loom))]
mod simd;
#[cfg(not(loom))]
mod slots;
#[cfg(not(loom))]
mod snapshot;
#[cfg(not(loom))]
mod state;
mod sync;
mod table;

pub use error::Error;
pub use ids::{AnyId, ClusterId};
pub use moments::{MAX_REWARD, Moments, is_finite_reward};
#[cfg(not(loom))]
pub use {
    batch::{Batch, Ids},
    elements::Real,
    estimators::{RULES, Rule},
    gate::forked,
    normalizer::{Alone, Normalizer, Visit},
    options::{NanPolicy, Options, Order},
    several::{Combination, Several},
    snapshot::Snapshot,
    state::{Entry, Kept},
};

/// What benches and tests of this crate look at from outside; nobody else should, for it may change.
#[cfg(not(loom))]
#[doc(hidden)]
pub mod internals {
    pub use crate::histories::Histories;
    pub use crate::simd::{Level, level};
}

/// The README's example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
