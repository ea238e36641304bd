//! Per-cluster reward histories and the advantages read from them.
//!
//! One call of [`Normalizer`] goes through the modules from left to right: the batch is checked
//! ([`error`]), folded per cluster and per group ([`fold`]), merged into the clusters' histories
//! ([`histories`], made of [`moments`]), and turned into advantages ([`estimators`]).
//!
//! Everything is computed in `f64`. Axes: N rewards of a batch, K clusters.

pub mod error;
pub mod estimators;
pub mod fold;
pub mod histories;
pub mod moments;
pub mod normalizer;

pub use error::Error;
pub use estimators::{Estimator, Scale};
pub use histories::Histories;
pub use moments::Moments;
pub use normalizer::{NanPolicy, Normalizer, Order};
