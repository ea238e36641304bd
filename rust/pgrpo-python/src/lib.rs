//! The Python module `pgrpo._core`: conversions only. Each method reads its arrays, detaches from the
//! interpreter where that pays, calls the core and maps its error.
#![allow(clippy::needless_pass_by_value, reason = "PyO3 hands arguments over by value")]

use std::str::FromStr;

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pgrpo_core::{Error, Estimator, Moments, NanPolicy, Order, Scale};
use pyo3::prelude::*;

mod errors {
    //! The exception classes, which Python owns.
    pyo3::import_exception!(pgrpo.errors, ConfigError);
    pyo3::import_exception!(pgrpo.errors, DataError);
}

/// Below this many rewards a call is over before other threads could have used the interpreter.
const DETACH_FROM: usize = 4096;

/// `PyReadonlyArray1`: read-only to us; the caller must not write to it while the call lasts.
type Input<'py, T> = PyReadonlyArray1<'py, T>;

/// Counts, means and m2 of clusters, each \[K\].
type Columns<'py> =
    (Bound<'py, PyArray1<u64>>, Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<f64>>);

fn to_python(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Option { .. } => errors::ConfigError::new_err(message),
        Error::Length { .. }
        | Error::GroupsRequired { .. }
        | Error::NonFinite { .. }
        | Error::History { .. } => errors::DataError::new_err(message),
    }
}

/// Runs `work` on a batch of `size`, detached from the interpreter if it is large.
fn run<T: Send>(
    py: Python<'_>,
    size: usize,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> PyResult<T> {
    let result = if size < DETACH_FROM { work() } else { py.detach(work) };
    result.map_err(to_python)
}

/// Rewards to advantages over dense cluster ids; all arrays are C-contiguous.
#[pyclass(frozen, module = "pgrpo._core")]
struct Normalizer(pgrpo_core::Normalizer);

#[pymethods]
impl Normalizer {
    #[new]
    fn new(estimator: &str, ddof: i64, eps: f64, order: &str, nan_policy: &str) -> PyResult<Self> {
        let make = || {
            Ok(pgrpo_core::Normalizer::new(
                Estimator::from_str(estimator)?,
                Scale::new(ddof, eps)?,
                Order::from_str(order)?,
                NanPolicy::from_str(nan_policy)?,
            ))
        };
        make().map(Self).map_err(to_python)
    }

    /// Fold a batch into the histories and return its advantages [N].
    #[pyo3(signature = (rewards, clusters, groups=None))]
    fn advantages<'py>(
        &self,
        py: Python<'py>,
        rewards: Input<'py, f64>,
        clusters: Input<'py, u32>,
        groups: Option<Input<'py, i64>>,
    ) -> PyResult<Bound<'py, PyArray1<f64>>> {
        let (rewards, clusters) = (rewards.as_slice()?, clusters.as_slice()?);
        let groups = groups.as_ref().map(|groups| groups.as_slice()).transpose()?;
        let work = || self.0.advantages(rewards, clusters, groups);
        Ok(run(py, rewards.len(), work)?.into_pyarray(py))
    }

    /// Fold a batch into the histories.
    fn update(
        &self,
        py: Python<'_>,
        rewards: Input<'_, f64>,
        clusters: Input<'_, u32>,
    ) -> PyResult<()> {
        let (rewards, clusters) = (rewards.as_slice()?, clusters.as_slice()?);
        run(py, rewards.len(), || self.0.update(rewards, clusters))
    }

    /// Advantages [N] by the histories as they are.
    #[pyo3(signature = (rewards, clusters, groups=None))]
    fn normalize<'py>(
        &self,
        py: Python<'py>,
        rewards: Input<'py, f64>,
        clusters: Input<'py, u32>,
        groups: Option<Input<'py, i64>>,
    ) -> PyResult<Bound<'py, PyArray1<f64>>> {
        let (rewards, clusters) = (rewards.as_slice()?, clusters.as_slice()?);
        let groups = groups.as_ref().map(|groups| groups.as_slice()).transpose()?;
        let work = || self.0.normalize(rewards, clusters, groups);
        Ok(run(py, rewards.len(), work)?.into_pyarray(py))
    }

    /// Counts, means and m2 by dense cluster id, each [K].
    fn snapshot<'py>(&self, py: Python<'py>) -> Columns<'py> {
        let moments = self.0.snapshot();
        let counts: Vec<u64> = moments.iter().map(|moments| moments.count).collect();
        let means: Vec<f64> = moments.iter().map(|moments| moments.mean).collect();
        let m2s: Vec<f64> = moments.iter().map(|moments| moments.m2).collect();
        (counts.into_pyarray(py), means.into_pyarray(py), m2s.into_pyarray(py))
    }

    /// Merge histories kept elsewhere: `clusters[i]` has counts[i], means[i], m2s[i].
    fn absorb(
        &self,
        py: Python<'_>,
        clusters: Input<'_, u32>,
        counts: Input<'_, u64>,
        means: Input<'_, f64>,
        m2s: Input<'_, f64>,
        num_nonfinite: u64,
    ) -> PyResult<()> {
        let columns = counts.as_slice()?.iter().zip(means.as_slice()?).zip(m2s.as_slice()?);
        let moments = columns.map(|((&count, &mean), &m2)| Moments { count, mean, m2 });
        let parts: Vec<_> = clusters.as_slice()?.iter().copied().zip(moments).collect();
        run(py, parts.len(), || self.0.absorb(&parts, num_nonfinite))
    }

    /// Non-finite rewards left out of the histories so far.
    #[getter]
    fn num_nonfinite(&self) -> u64 {
        self.0.num_nonfinite()
    }
}

#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::Normalizer;

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "Python's name for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
