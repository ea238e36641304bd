//! One call: its arguments read, the interpreter left where that pays, the core called.

use numpy::{Element, PyArray1};
use pgrpo_core::elements::Real;
use pgrpo_core::{Batch, Error, Normalizer, Visit};
use pyo3::prelude::*;

use crate::arrays::{Ids, Reals, few, fresh_mut, ids, reals, reals_mut};
use crate::errors::to_python;

/// Below this many rewards a call is over before other threads could have used the interpreter.
const DETACH_FROM: usize = 4096;

/// Whether all threads hold one lock while they are attached to the interpreter.
const HAS_LOCK: bool = cfg!(not(Py_GIL_DISABLED));

/// Runs `work` on `size` entries, detached from the interpreter if they are many.
fn run(
    py: Python<'_>,
    core: &Normalizer,
    size: usize,
    work: impl FnOnce(&Visit<'_>) -> Result<(), Error> + Send,
) -> PyResult<()> {
    let result = if size >= DETACH_FROM {
        detached(py, core.visit(), |visit| work(&visit))
    } else if HAS_LOCK {
        // SAFETY: everybody enters, and asks to be alone, with the interpreter's lock, which this thread
        // keeps to the end.
        #[allow(unsafe_code, reason = "the lock is the interpreter's")]
        let visit = unsafe { core.visit_under_lock() };
        work(&visit)
    } else {
        work(&core.visit())
    };
    result.map_err(to_python)
}

/// Does work that ends a visit, or the time alone, without the interpreter. Who waits for that end holds
/// the interpreter perhaps: it must not be needed before.
pub(crate) fn detached<G: Send, T: Send>(
    py: Python<'_>,
    guard: G,
    work: impl FnOnce(G) -> T + Send,
) -> T {
    py.detach(move || work(guard))
}

/// Which method of the core a call is for.
#[derive(Clone, Copy)]
pub(crate) enum Method {
    Advantages,
    Update,
    Normalize,
    Retract,
}

impl Method {
    fn call<R: Real>(
        self,
        visit: &Visit<'_>,
        batch: &Batch<'_, R>,
        out: &mut [R],
    ) -> Result<(), Error> {
        match self {
            Self::Advantages => visit.advantages(batch, out),
            Self::Update => visit.update(batch),
            Self::Normalize => visit.normalize(batch, out),
            Self::Retract => visit.retract(batch),
        }
    }

    fn gives_advantages(self) -> bool {
        matches!(self, Self::Advantages | Self::Normalize)
    }
}

/// The arguments of a call, as they came.
pub(crate) struct Arguments<'a, 'py> {
    pub(crate) rewards: &'a Bound<'py, PyAny>,
    pub(crate) clusters: &'a Bound<'py, PyAny>,
    pub(crate) groups: Option<&'a Bound<'py, PyAny>>,
    pub(crate) weights: Option<&'a Bound<'py, PyAny>>,
    pub(crate) score_norms: Option<&'a Bound<'py, PyAny>>,
    pub(crate) lengths: Option<&'a Bound<'py, PyAny>>,
    pub(crate) out: Option<&'a Bound<'py, PyAny>>,
}

/// Reads the arguments and calls the core. None where one of them is not of the plainest kind.
pub(crate) fn call<'py>(
    core: &Normalizer,
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
    let Arguments { weights, score_norms, lengths, .. } = *arguments;
    let mut columns = [None; 3];
    for (column, argument) in columns.iter_mut().zip([weights, score_norms, lengths]) {
        if let Some(argument) = argument {
            let Some(Reals::F64(values)) = reals(argument) else { return Ok(None) };
            *column = Some(values);
        }
    }
    let [weights, score_norms, lengths] = columns;
    match reals(arguments.rewards) {
        Some(Reals::F32(rewards)) => {
            let batch = Parts { rewards, clusters, groups, weights, score_norms, lengths };
            call_parts(core, py, method, &batch, arguments)
        }
        Some(Reals::F64(rewards)) => {
            let batch = Parts { rewards, clusters, groups, weights, score_norms, lengths };
            call_parts(core, py, method, &batch, arguments)
        }
        None => Ok(None),
    }
}

fn call_parts<'py, R: Real + Element>(
    core: &Normalizer,
    py: Python<'py>,
    method: Method,
    parts: &Parts<'_, 'py, R>,
    arguments: &Arguments<'_, 'py>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let size = parts.rewards.len();
    parts.with_batch(|batch| {
        if !method.gives_advantages() {
            run(py, core, size, |visit| method.call(visit, batch, &mut []))?;
            return Ok(Some(py.None().into_bound(py)));
        }
        if let Some(given) = arguments.out {
            let inputs = [
                Some(arguments.rewards),
                Some(arguments.clusters),
                arguments.groups,
                arguments.weights,
                arguments.score_norms,
                arguments.lengths,
            ];
            let Some(out) = reals_mut::<R>(given, &inputs) else { return Ok(None) };
            run(py, core, size, |visit| method.call(visit, batch, out))?;
            return Ok(Some(given.clone()));
        }
        let array =
            if size < DETACH_FROM { few(py, size) } else { PyArray1::zeros(py, size, false) };
        let out = fresh_mut(&array)?;
        run(py, core, size, |visit| method.call(visit, batch, out))?;
        Ok(Some(array.into_any()))
    })
}

/// What a batch is made of, as it was read.
struct Parts<'a, 'py, R> {
    rewards: &'a [R],
    clusters: Ids<'a, 'py>,
    groups: Option<Ids<'a, 'py>>,
    weights: Option<&'a [f64]>,
    score_norms: Option<&'a [f64]>,
    lengths: Option<&'a [f64]>,
}

impl<R> Parts<'_, '_, R> {
    fn with_batch<T>(&self, work: impl FnOnce(&Batch<'_, R>) -> PyResult<T>) -> PyResult<T> {
        let Self { rewards, weights, score_norms, lengths, .. } = *self;
        self.clusters.with(|clusters| {
            let batch = Batch { rewards, clusters, groups: None, weights, score_norms, lengths };
            match &self.groups {
                None => work(&batch),
                Some(groups) => {
                    groups.with(|groups| work(&Batch { groups: Some(groups), ..batch }))
                }
            }
        })
    }
}
