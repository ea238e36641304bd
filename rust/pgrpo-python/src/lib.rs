//! The Python module `pgrpo.normalizer._core`: conversions only. Each method reads its arguments, detaches from
//! the interpreter where that pays, calls the core and maps its error.
#![allow(clippy::needless_pass_by_value, reason = "PyO3 hands arguments over by value")]

mod arrays;
mod table;

use std::str::FromStr;

use numpy::{Element, PyArray1, PyArrayMethods};
use pgrpo_core::elements::Real;
use pgrpo_core::shared::{Layout, Region};
use pgrpo_core::state::Kept;
use pgrpo_core::{Batch, Error, Estimator, NanPolicy, Options, Order, Snapshot};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use arrays::{Ids, Reals, bytes_mut, ids, reals, reals_mut};

mod errors {
    //! The exception classes, which Python owns.
    pyo3::import_exception!(pgrpo.errors, CheckpointError);
    pyo3::import_exception!(pgrpo.errors, ConfigError);
    pyo3::import_exception!(pgrpo.errors, DataError);
}

/// Below this many rewards a call is over before other threads could have used the interpreter.
const DETACH_FROM: usize = 4096;

/// What processes that share a table must agree on: what they say, and which sums are kept.
fn agreed_on(options: &str, kept: Kept) -> String {
    let Kept { parts, regression, advantages } = kept;
    let names = [(parts, "parts"), (regression, "regression"), (advantages, "advantages")];
    let sums: Vec<&str> = names.iter().filter(|(kept, _)| *kept).map(|(_, name)| *name).collect();
    format!("{options} sums=rewards,{}", sums.join(","))
}

fn to_python(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Option { .. } | Error::Unsupported { .. } => errors::ConfigError::new_err(message),
        Error::Snapshot { .. } => errors::CheckpointError::new_err(message),
        Error::Length { .. }
        | Error::Size { .. }
        | Error::Changed
        | Error::GroupsRequired { .. }
        | Error::NonFinite { .. }
        | Error::Weight { .. }
        | Error::Retract { .. }
        | Error::Full { .. } => errors::DataError::new_err(message),
    }
}

/// Runs `work` on `size` entries, detached from the interpreter if they are many.
fn run<T: Send>(
    py: Python<'_>,
    size: usize,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> PyResult<T> {
    let result = if size < DETACH_FROM { work() } else { py.detach(work) };
    result.map_err(to_python)
}

/// Which method of the core a call is for.
#[derive(Clone, Copy)]
enum Method {
    Advantages,
    Update,
    Normalize,
    Retract,
}

impl Method {
    fn name(self) -> &'static str {
        match self {
            Self::Advantages => "__call__",
            Self::Update => "update",
            Self::Normalize => "normalize",
            Self::Retract => "retract",
        }
    }

    fn call<R: Real>(
        self,
        core: &pgrpo_core::Normalizer,
        batch: &Batch<'_, R>,
        out: &mut [R],
    ) -> Result<(), Error> {
        match self {
            Self::Advantages => core.advantages(batch, out),
            Self::Update => core.update(batch),
            Self::Normalize => core.normalize(batch, out),
            Self::Retract => core.retract(batch),
        }
    }

    fn gives_advantages(self) -> bool {
        matches!(self, Self::Advantages | Self::Normalize)
    }
}

/// The arguments of a call, as they came.
struct Arguments<'a, 'py> {
    rewards: &'a Bound<'py, PyAny>,
    clusters: &'a Bound<'py, PyAny>,
    groups: Option<&'a Bound<'py, PyAny>>,
    weights: Option<&'a Bound<'py, PyAny>>,
    score_norms: Option<&'a Bound<'py, PyAny>>,
    out: Option<&'a Bound<'py, PyAny>>,
}

/// Rewards to advantages, with a history per cluster. Arrays that are not of the plainest kind are
/// converted by the method `_convert` of the subclass in Python, which calls back with ones that are.
#[pyclass(frozen, subclass, module = "pgrpo.normalizer._core")]
struct Normalizer {
    // Before `memory`, which it may lie in: fields are dropped in their order.
    core: pgrpo_core::Normalizer,
    #[expect(dead_code, reason = "keeps the mapping of a shared table")]
    memory: Option<Py<PyArray1<u8>>>,
}

/// Mapped bytes of a shared table, its capacity, the options all processes must agree on, and
/// whether nobody else has it mapped.
type Memory<'py> = (Bound<'py, PyArray1<u8>>, u64, String, bool);

impl Normalizer {
    /// None where an argument has to be converted first.
    fn try_call<'py>(
        &self,
        py: Python<'py>,
        method: Method,
        arguments: &Arguments<'_, 'py>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(clusters) = ids(arguments.clusters) else { return Ok(None) };
        let groups = match arguments.groups {
            None => None,
            Some(groups) => match ids(groups) {
                None => return Ok(None),
                groups => groups,
            },
        };
        let mut columns = [None, None];
        for (column, argument) in columns.iter_mut().zip([arguments.weights, arguments.score_norms])
        {
            if let Some(argument) = argument {
                let Some(Reals::F64(values)) = reals(argument) else { return Ok(None) };
                *column = Some(values);
            }
        }
        let [weights, score_norms] = columns;
        match reals(arguments.rewards) {
            Some(Reals::F32(rewards)) => {
                let batch = Parts { rewards, clusters, groups, weights, score_norms };
                self.call(py, method, &batch, arguments)
            }
            Some(Reals::F64(rewards)) => {
                let batch = Parts { rewards, clusters, groups, weights, score_norms };
                self.call(py, method, &batch, arguments)
            }
            None => Ok(None),
        }
    }

    fn call<'py, R: Real + Element>(
        &self,
        py: Python<'py>,
        method: Method,
        parts: &Parts<'_, 'py, R>,
        arguments: &Arguments<'_, 'py>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let size = parts.rewards.len();
        parts.with_batch(|batch| {
            if !method.gives_advantages() {
                run(py, size, || method.call(&self.core, batch, &mut []))?;
                return Ok(Some(py.None().into_bound(py)));
            }
            if let Some(given) = arguments.out {
                let inputs = [
                    Some(arguments.rewards),
                    Some(arguments.clusters),
                    arguments.groups,
                    arguments.weights,
                    arguments.score_norms,
                ];
                let Some(out) = reals_mut::<R>(given, &inputs) else { return Ok(None) };
                run(py, size, || method.call(&self.core, batch, out))?;
                return Ok(Some(given.clone()));
            }
            let array = PyArray1::<R>::zeros(py, size, false);
            let mut out = array.readwrite();
            let slice = out.as_slice_mut()?;
            run(py, size, || method.call(&self.core, batch, slice))?;
            drop(out);
            Ok(Some(array.into_any()))
        })
    }
}

/// What a batch is made of, as it was read.
struct Parts<'a, 'py, R> {
    rewards: &'a [R],
    clusters: Ids<'a, 'py>,
    groups: Option<Ids<'a, 'py>>,
    weights: Option<&'a [f64]>,
    score_norms: Option<&'a [f64]>,
}

impl<R> Parts<'_, '_, R> {
    fn with_batch<T>(&self, work: impl FnOnce(&Batch<'_, R>) -> PyResult<T>) -> PyResult<T> {
        let Self { rewards, weights, score_norms, .. } = *self;
        self.clusters.with(|clusters| {
            let batch = Batch { rewards, clusters, groups: None, weights, score_norms };
            match &self.groups {
                None => work(&batch),
                Some(groups) => {
                    groups.with(|groups| work(&Batch { groups: Some(groups), ..batch }))
                }
            }
        })
    }
}

/// Calls the core, or has the arguments converted first.
fn call<'py>(
    slf: &Bound<'py, Normalizer>,
    method: Method,
    arguments: &Arguments<'_, 'py>,
) -> PyResult<Bound<'py, PyAny>> {
    if let Some(result) = slf.get().try_call(slf.py(), method, arguments)? {
        return Ok(result);
    }
    let Arguments { rewards, clusters, groups, weights, score_norms, out } = arguments;
    let all = (method.name(), rewards, clusters, groups, weights, score_norms, out);
    slf.call_method1("_convert", all)
}

#[pymethods]
impl Normalizer {
    #[new]
    #[pyo3(signature = (
        estimator="pgrpo", *, ddof=0, eps=1e-4, order="update_then_normalize", nan_policy="raise",
        forgetting=1.0, prior_count=0.0, sigma_floor=0.0, clip=None, min_count=1.0,
        frequency_weight=0.0, track_diagnostics=false, track_delta=false, num_threads=1, memory=None,
    ))]
    #[expect(clippy::too_many_arguments, reason = "options are told apart by keyword")]
    fn new(
        estimator: &str,
        ddof: i64,
        eps: f64,
        order: &str,
        nan_policy: &str,
        forgetting: f64,
        prior_count: f64,
        sigma_floor: f64,
        clip: Option<f64>,
        min_count: f64,
        frequency_weight: f64,
        track_diagnostics: bool,
        track_delta: bool,
        num_threads: usize,
        memory: Option<Memory<'_>>,
    ) -> PyResult<Self> {
        let make = || {
            Ok(Options {
                estimator: Estimator::from_str(estimator)?,
                ddof: u8::try_from(ddof).map_err(|_| Error::Option {
                    name: "ddof",
                    value: ddof.to_string(),
                    expected: "0 or 1",
                })?,
                eps,
                order: Order::from_str(order)?,
                nan_policy: NanPolicy::from_str(nan_policy)?,
                forgetting,
                prior_count,
                sigma_floor,
                clip,
                min_count,
                frequency_weight,
                track_diagnostics,
                track_delta,
                num_threads,
            })
        };
        let options = make().map_err(to_python)?;
        let Some((memory, capacity, agreed, alone)) = memory else {
            let core = pgrpo_core::Normalizer::new(options).map_err(to_python)?;
            return Ok(Self { core, memory: None });
        };
        let layout = Layout::new(capacity, options.kept().num_streams()).map_err(to_python)?;
        let Some((start, length)) = bytes_mut(&memory) else {
            return Err(errors::ConfigError::new_err("memory is not contiguous, or read-only"));
        };
        let agreed = agreed_on(&agreed, options.kept());
        // SAFETY: the array keeps its bytes as long as the core keeps the array. What others write to
        // them meanwhile may spoil histories, but not lead outside: they are read as atomics only.
        #[allow(unsafe_code, reason = "memory that other processes have mapped too")]
        let region = unsafe { Region::open(start, length, layout, &agreed, alone) };
        let (region, tables) =
            region.map_err(|mismatch| errors::ConfigError::new_err(mismatch.to_string()))?;
        let core = pgrpo_core::Normalizer::shared(options, region, tables).map_err(to_python)?;
        Ok(Self { core, memory: Some(memory.unbind()) })
    }

    /// Bytes of a shared table, and its header.
    #[staticmethod]
    fn _layout<'py>(
        py: Python<'py>,
        estimator: &str,
        track_diagnostics: bool,
        capacity: u64,
        agreed: &str,
    ) -> PyResult<(usize, Bound<'py, PyBytes>)> {
        let choose = || {
            let estimator = Estimator::from_str(estimator)?;
            let options = Options { estimator, track_diagnostics, ..Options::default() };
            let layout = Layout::new(capacity, options.kept().num_streams())?;
            Ok((layout, agreed_on(agreed, options.kept())))
        };
        let (layout, agreed) = choose().map_err(to_python)?;
        Ok((layout.length(), PyBytes::new(py, &layout.header(&agreed))))
    }

    /// Fold a batch into the histories and return its advantages [N].
    #[pyo3(signature = (rewards, clusters, groups=None, *, weights=None, score_norms=None, out=None))]
    fn __call__<'py>(
        slf: &Bound<'py, Self>,
        rewards: &Bound<'py, PyAny>,
        clusters: &Bound<'py, PyAny>,
        groups: Option<&Bound<'py, PyAny>>,
        weights: Option<&Bound<'py, PyAny>>,
        score_norms: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let arguments = Arguments { rewards, clusters, groups, weights, score_norms, out };
        call(slf, Method::Advantages, &arguments)
    }

    /// Fold a batch into the histories.
    #[pyo3(signature = (rewards, clusters, groups=None, *, weights=None, score_norms=None))]
    fn update<'py>(
        slf: &Bound<'py, Self>,
        rewards: &Bound<'py, PyAny>,
        clusters: &Bound<'py, PyAny>,
        groups: Option<&Bound<'py, PyAny>>,
        weights: Option<&Bound<'py, PyAny>>,
        score_norms: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let arguments = Arguments { rewards, clusters, groups, weights, score_norms, out: None };
        call(slf, Method::Update, &arguments)
    }

    /// Advantages [N] by the histories as they are.
    #[pyo3(signature = (rewards, clusters, groups=None, *, weights=None, score_norms=None, out=None))]
    fn normalize<'py>(
        slf: &Bound<'py, Self>,
        rewards: &Bound<'py, PyAny>,
        clusters: &Bound<'py, PyAny>,
        groups: Option<&Bound<'py, PyAny>>,
        weights: Option<&Bound<'py, PyAny>>,
        score_norms: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let arguments = Arguments { rewards, clusters, groups, weights, score_norms, out };
        call(slf, Method::Normalize, &arguments)
    }

    /// Take a batch out of the histories again.
    #[pyo3(signature = (rewards, clusters, *, weights=None))]
    fn retract<'py>(
        slf: &Bound<'py, Self>,
        rewards: &Bound<'py, PyAny>,
        clusters: &Bound<'py, PyAny>,
        weights: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (groups, score_norms, out) = (None, None, None);
        let arguments = Arguments { rewards, clusters, groups, weights, score_norms, out };
        call(slf, Method::Retract, &arguments)
    }

    /// Non-finite rewards left out of the histories so far.
    #[getter]
    fn num_nonfinite(&self) -> u64 {
        self.core.num_nonfinite()
    }

    /// Everything remembered, as ids and columns.
    fn _columns<'py>(&self, py: Python<'py>) -> PyResult<table::State<'py>> {
        let snapshot = py.detach(|| self.core.snapshot());
        table::to_python(py, &snapshot)
    }

    /// Forgets everything and remembers columns instead.
    fn _restore_columns(&self, py: Python<'_>, state: table::State<'_>) -> PyResult<()> {
        let snapshot = table::to_core(state)?;
        py.detach(|| self.core.restore(&snapshot)).map_err(to_python)
    }

    /// Everything remembered, in the layout of snapshots.
    fn _encode<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &py.detach(|| self.core.snapshot().encode()))
    }

    /// Forgets everything and remembers a snapshot instead.
    fn _restore(&self, py: Python<'_>, snapshot: &[u8]) -> PyResult<()> {
        py.detach(|| self.core.restore(&Snapshot::decode(snapshot)?)).map_err(to_python)
    }

    /// Folds in a snapshot of another normalizer, or a delta.
    fn _merge(&self, py: Python<'_>, snapshot: &[u8]) -> PyResult<()> {
        py.detach(|| self.core.merge(&Snapshot::decode(snapshot)?)).map_err(to_python)
    }

    /// What was folded since the last call, in the layout of snapshots.
    fn delta<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let delta = py.detach(|| self.core.delta()).map_err(to_python)?;
        Ok(PyBytes::new(py, &delta.encode()))
    }
}

/// What calling costs: the signature of a [`Normalizer`], and nothing done. For benchmarks.
#[pyclass(frozen, module = "pgrpo.normalizer._core")]
struct Noop;

#[pymethods]
impl Noop {
    #[pyo3(signature = (rewards, clusters, groups=None, *, weights=None, score_norms=None, out=None))]
    #[expect(clippy::unused_self, reason = "it is called as a normalizer is")]
    fn __call__<'py>(
        &self,
        rewards: &Bound<'py, PyAny>,
        clusters: &Bound<'py, PyAny>,
        groups: Option<&Bound<'py, PyAny>>,
        weights: Option<&Bound<'py, PyAny>>,
        score_norms: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) {
        let _ = (rewards, clusters, groups, weights, score_norms, out);
    }
}

#[pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::Normalizer;

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "Python's name for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("_noop", Bound::new(module.py(), super::Noop)?)
    }
}
