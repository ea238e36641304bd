//! The class that `ClusterNormalizer` holds for several rewards.
#![allow(clippy::too_many_arguments, reason = "one for each column of a batch")]

use pgrpo_core::Combination;
use pyo3::prelude::*;
use pyo3::types::PyNotImplemented;

use crate::call::{Arguments, Method, call};
use crate::errors::ConfigError;
use crate::normalizer::Normalizer;
use crate::options;

/// Several rewards of each rollout to advantages: the methods of a [`Normalizer`], of rewards that have
/// an axis more.
#[pyclass(frozen, module = "pgrpo.normalizer._core")]
pub(crate) struct Several {
    pub(crate) combination: Combination,
    pub(crate) parts: Vec<Py<Normalizer>>,
}

impl Several {
    fn call<'py>(
        &self,
        py: Python<'py>,
        method: Method,
        arguments: &Arguments<'_, 'py>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let result = call(self, py, method, arguments)?;
        Ok(result.unwrap_or_else(|| PyNotImplemented::get(py).to_owned().into_any()))
    }
}

#[pymethods]
impl Several {
    #[new]
    #[pyo3(signature = (options, names, weights, sums_first, parts, /))]
    fn new(
        options: &Bound<'_, PyAny>,
        names: Vec<String>,
        weights: Vec<f64>,
        sums_first: bool,
        parts: Vec<Py<Normalizer>>,
    ) -> PyResult<Self> {
        let combination =
            Combination { options: options::read(options)?, names, weights, sums_first };
        let num_names = combination.names.len();
        if num_names == 0
            || combination.weights.len() != num_names
            || parts.len() != combination.num_histories()
        {
            return Err(ConfigError::new_err("names, weights and normalizers differ in number"));
        }
        Ok(Self { combination, parts })
    }

    /// Fold a batch into the histories and return its advantages.
    #[pyo3(signature = (rewards, clusters, groups, weights, score_norms, lengths, parents, out, /))]
    fn advantages<'py>(
        slf: &Bound<'py, Self>,
        rewards: &Bound<'py, PyAny>,
        clusters: &Bound<'py, PyAny>,
        groups: Option<&Bound<'py, PyAny>>,
        weights: Option<&Bound<'py, PyAny>>,
        score_norms: Option<&Bound<'py, PyAny>>,
        lengths: Option<&Bound<'py, PyAny>>,
        parents: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let arguments =
            Arguments { rewards, clusters, groups, weights, score_norms, lengths, parents, out };
        slf.get().call(slf.py(), Method::Advantages, &arguments)
    }

    /// Fold a batch into the histories.
    #[pyo3(signature = (rewards, clusters, groups, weights, score_norms, lengths, parents, /))]
    fn update<'py>(
        slf: &Bound<'py, Self>,
        rewards: &Bound<'py, PyAny>,
        clusters: &Bound<'py, PyAny>,
        groups: Option<&Bound<'py, PyAny>>,
        weights: Option<&Bound<'py, PyAny>>,
        score_norms: Option<&Bound<'py, PyAny>>,
        lengths: Option<&Bound<'py, PyAny>>,
        parents: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let out = None;
        let arguments =
            Arguments { rewards, clusters, groups, weights, score_norms, lengths, parents, out };
        slf.get().call(slf.py(), Method::Update, &arguments)
    }

    /// Advantages by the histories as they are.
    #[pyo3(signature = (rewards, clusters, groups, weights, score_norms, lengths, parents, out, /))]
    fn normalize<'py>(
        slf: &Bound<'py, Self>,
        rewards: &Bound<'py, PyAny>,
        clusters: &Bound<'py, PyAny>,
        groups: Option<&Bound<'py, PyAny>>,
        weights: Option<&Bound<'py, PyAny>>,
        score_norms: Option<&Bound<'py, PyAny>>,
        lengths: Option<&Bound<'py, PyAny>>,
        parents: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let arguments =
            Arguments { rewards, clusters, groups, weights, score_norms, lengths, parents, out };
        slf.get().call(slf.py(), Method::Normalize, &arguments)
    }

    /// Take a batch out of the histories again.
    #[pyo3(signature = (rewards, clusters, weights, parents, /))]
    fn retract<'py>(
        slf: &Bound<'py, Self>,
        rewards: &Bound<'py, PyAny>,
        clusters: &Bound<'py, PyAny>,
        weights: Option<&Bound<'py, PyAny>>,
        parents: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (groups, score_norms, lengths, out) = (None, None, None, None);
        let arguments =
            Arguments { rewards, clusters, groups, weights, score_norms, lengths, parents, out };
        slf.get().call(slf.py(), Method::Retract, &arguments)
    }
}
