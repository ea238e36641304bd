//! The class that `ClusterNormalizer` holds.
#![allow(clippy::too_many_arguments, reason = "one for each column of a batch")]

use numpy::PyArray1;
use pgrpo_core::shared::{Layout, Region};
use pgrpo_core::{Alone, Kept, Options, Snapshot};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyNotImplemented};

use crate::arrays::{bytes_mut, ids};
use crate::call::{Arguments, Method, call, detached};
use crate::errors::{ConfigError, DataError, to_python};
use crate::watch::Watch;
use crate::{options, table};

/// The smallest page there is: a mapping begins at a multiple of it.
const PAGE: usize = 4096;

/// Rewards to advantages, with a history per cluster. Methods that are given an array which is not of
/// the plainest kind return `NotImplemented`, and have done nothing then.
#[pyclass(frozen, module = "pgrpo.normalizer._core")]
pub(crate) struct Normalizer {
    // Before `memory`, which it may lie in: fields are dropped in their order.
    pub(crate) core: pgrpo_core::Normalizer,
    memory: Option<Mapped>,
}

/// The mapping of a shared table.
struct Mapped {
    path: String,
    // Before `_array`, with which the mapping goes.
    watch: Watch,
    _array: Py<PyArray1<u8>>,
}

impl Mapped {
    /// Refuses to go on, or to say what was read, when the file has become shorter than the mapping.
    fn check(&self) -> PyResult<()> {
        if self.watch.is_lost() {
            return Err(DataError::new_err(format!(
                "{}: shared table: its file became shorter while it was open, and its histories are \
                 lost; expected nobody to write to it: delete it, and open another",
                self.path
            )));
        }
        Ok(())
    }
}

/// Path of a shared table, its mapped bytes, its capacity, the options all processes must agree on,
/// and whether nobody else has it mapped.
type Memory<'py> = (String, Bound<'py, PyArray1<u8>>, u64, String, bool);

/// What processes that share a table must agree on: what they say, and which sums are kept.
fn agreed_on(options: &str, kept: Kept) -> String {
    let Kept { parts, baseline, advantages, pool } = kept;
    let others = [(parts, "parts"), (advantages, "advantages"), (pool, "pool")];
    let others = others.into_iter().filter(|(kept, _)| *kept).map(|(_, name)| name);
    let sums: Vec<&str> = others.chain(baseline).collect();
    format!("{options} sums=rewards,{}", sums.join(","))
}

/// Bytes of a shared table, and its header.
#[pyfunction]
#[pyo3(signature = (options, capacity, agreed, /))]
pub(crate) fn layout<'py>(
    options: &Bound<'py, PyAny>,
    capacity: u64,
    agreed: &str,
) -> PyResult<(usize, Bound<'py, PyBytes>)> {
    let kept = options::read(options)?.kept();
    let layout = Layout::new(capacity, kept.num_streams()).map_err(to_python)?;
    let header = layout.header(&agreed_on(agreed, kept));
    Ok((layout.length(), PyBytes::new(options.py(), &header)))
}

impl Normalizer {
    fn call<'py>(
        &self,
        py: Python<'py>,
        method: Method,
        arguments: &Arguments<'_, 'py>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let result = self.checked(|core| call(core, py, method, arguments))?;
        Ok(result.unwrap_or_else(|| PyNotImplemented::get(py).to_owned().into_any()))
    }

    /// Does work with the core, which comes to nothing if the file of a shared table has become shorter.
    fn checked<T>(&self, work: impl FnOnce(&pgrpo_core::Normalizer) -> PyResult<T>) -> PyResult<T> {
        let Some(memory) = &self.memory else { return work(&self.core) };
        memory.check()?;
        let result = work(&self.core);
        memory.check()?;
        result
    }

    fn open(options: Options, memory: Memory<'_>) -> PyResult<Self> {
        let (path, memory, capacity, agreed, alone) = memory;
        let layout = Layout::new(capacity, options.kept().num_streams()).map_err(to_python)?;
        let Some((start, length)) = bytes_mut(&memory) else {
            return Err(ConfigError::new_err("memory is not contiguous, or read-only"));
        };
        if !start.addr().is_multiple_of(PAGE) {
            return Err(ConfigError::new_err(
                "memory does not begin with a page; expected a mapping",
            ));
        }
        let Some(watch) = Watch::new(start, length) else {
            let message = "too many shared tables are open; expected 1024 at most in one process";
            return Err(ConfigError::new_err(message));
        };
        let agreed = agreed_on(&agreed, options.kept());
        // SAFETY: the array keeps its bytes as long as the core keeps the array. What others write to
        // them meanwhile may spoil histories, but not lead outside: they are read as atomics only.
        #[allow(unsafe_code, reason = "memory that other processes have mapped too")]
        let region = unsafe { Region::open(start, length, layout, &agreed, alone) };
        let region = region.map_err(|mismatch| ConfigError::new_err(mismatch.to_string()))?;
        let core = pgrpo_core::Normalizer::shared(options, region).map_err(to_python)?;
        let mapped = Mapped { path, watch, _array: memory.unbind() };
        mapped.check()?;
        Ok(Self { core, memory: Some(mapped) })
    }
}

/// Calls `work` with the ids, and returns the number of histories it dropped.
fn drop_clusters<'py>(
    normalizer: &Bound<'py, Normalizer>,
    clusters: &Bound<'py, PyAny>,
    work: impl FnOnce(Alone<'_>, pgrpo_core::Ids<'_>) -> Result<usize, pgrpo_core::Error> + Send,
) -> PyResult<Bound<'py, PyAny>> {
    let py = normalizer.py();
    let Some(ids) = ids(clusters, None) else {
        return Ok(PyNotImplemented::get(py).to_owned().into_any());
    };
    let dropped = normalizer.get().checked(|core| {
        ids.with(|ids| detached(py, core.alone(), |alone| work(alone, ids))).map_err(to_python)
    })?;
    Ok(dropped.into_pyobject(py)?.into_any())
}

#[pymethods]
impl Normalizer {
    #[new]
    #[pyo3(signature = (options, memory=None, /))]
    fn new(options: &Bound<'_, PyAny>, memory: Option<Memory<'_>>) -> PyResult<Self> {
        let options = options::read(options)?;
        if let Some(memory) = memory {
            return Self::open(options, memory);
        }
        let core = pgrpo_core::Normalizer::new(options).map_err(to_python)?;
        Ok(Self { core, memory: None })
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

    /// Non-finite rewards left out of the histories so far.
    #[getter]
    fn num_nonfinite(&self) -> PyResult<u64> {
        self.checked(|core| Ok(core.num_nonfinite()))
    }

    /// Everything remembered, as ids and columns.
    fn columns<'py>(&self, py: Python<'py>) -> PyResult<table::State<'py>> {
        let snapshot =
            self.checked(|core| Ok(detached(py, core.visit(), |visit| visit.snapshot())))?;
        table::to_python(py, &snapshot)
    }

    /// Forgets everything and remembers columns instead.
    fn restore_columns(&self, py: Python<'_>, state: table::State<'_>) -> PyResult<()> {
        let snapshot = table::to_core(state)?;
        self.checked(|core| {
            detached(py, core.alone(), |alone| alone.restore(&snapshot)).map_err(to_python)
        })
    }

    /// Everything remembered, in the layout of snapshots.
    fn encode<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes =
            self.checked(|core| Ok(detached(py, core.visit(), |visit| visit.snapshot().encode())))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Forgets everything and remembers a snapshot instead.
    fn restore(&self, py: Python<'_>, snapshot: &[u8]) -> PyResult<()> {
        let snapshot = py.detach(|| Snapshot::decode(snapshot)).map_err(to_python)?;
        self.checked(|core| {
            detached(py, core.alone(), |alone| alone.restore(&snapshot)).map_err(to_python)
        })
    }

    /// Drops the histories of some clusters.
    #[pyo3(signature = (clusters, /))]
    fn forget<'py>(
        slf: &Bound<'py, Self>,
        clusters: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        drop_clusters(slf, clusters, |alone, ids| alone.forget(ids.iter()))
    }

    /// Drops the histories of all other clusters.
    #[pyo3(signature = (clusters, /))]
    fn keep<'py>(
        slf: &Bound<'py, Self>,
        clusters: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        drop_clusters(slf, clusters, |alone, ids| alone.keep(ids.iter()))
    }

    /// Folds in a snapshot of another normalizer, or a delta.
    fn merge(&self, py: Python<'_>, snapshot: &[u8]) -> PyResult<()> {
        let snapshot = py.detach(|| Snapshot::decode(snapshot)).map_err(to_python)?;
        self.checked(|core| {
            detached(py, core.visit(), |visit| visit.merge(&snapshot)).map_err(to_python)
        })
    }

    /// What was folded since the last call, in the layout of snapshots.
    fn delta<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let delta = self
            .checked(|core| detached(py, core.visit(), |visit| visit.delta()).map_err(to_python))?;
        Ok(PyBytes::new(py, &delta.encode()))
    }
}
