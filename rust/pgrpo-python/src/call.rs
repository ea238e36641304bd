//! One call: its arguments read, the interpreter left where that pays, the core called.

use std::borrow::Cow;

use numpy::Element;
use pgrpo_core::{Batch, Error, Normalizer, Options, Real, Visit};
use pyo3::prelude::*;

use crate::arrays::{Grid, Ids, Reals, fresh_mut, ids, numbers, reals_mut, rewards, rows, zeros};
use crate::errors::to_python_of;
use crate::several::Several;

/// Below this many rewards a call is over before other threads could have used the interpreter.
const DETACH_FROM: usize = 4096;

/// Whether all threads hold one lock while they are attached to the interpreter.
const HAS_LOCK: bool = cfg!(not(Py_GIL_DISABLED));

/// What a call is made to.
pub(crate) trait Core {
    /// Number of rewards of each rollout, where they have an axis of their own.
    fn several(&self) -> Option<usize>;

    fn options(&self) -> &Options;

    /// Runs a method on `size` entries, detached from the interpreter if they are many.
    fn run<R: Real>(
        &self,
        py: Python<'_>,
        size: usize,
        method: Method,
        batch: &Batch<'_, R>,
        out: &mut [R],
    ) -> Result<(), Error>;
}

impl Core for Normalizer {
    fn several(&self) -> Option<usize> {
        None
    }

    fn options(&self) -> &Options {
        self.options()
    }

    fn run<R: Real>(
        &self,
        py: Python<'_>,
        size: usize,
        method: Method,
        batch: &Batch<'_, R>,
        out: &mut [R],
    ) -> Result<(), Error> {
        let mut work = |visit: &Visit<'_>| match method {
            Method::Advantages => visit.advantages(batch, out),
            Method::Update => visit.update(batch),
            Method::Normalize => visit.normalize(batch, out),
            Method::Retract => visit.retract(batch),
        };
        if size >= DETACH_FROM {
            detached(py, self.visit(), |visit| work(&visit))
        } else if HAS_LOCK {
            // SAFETY: everybody enters, and asks to be alone, with the interpreter's lock, which this
            // thread keeps to the end.
            #[allow(unsafe_code, reason = "the lock is the interpreter's")]
            let visit = unsafe { self.visit_under_lock() };
            work(&visit)
        } else {
            work(&self.visit())
        }
    }
}

impl Core for Several {
    fn several(&self) -> Option<usize> {
        Some(self.combination.names.len())
    }

    fn options(&self) -> &Options {
        &self.combination.options
    }

    fn run<R: Real>(
        &self,
        py: Python<'_>,
        size: usize,
        method: Method,
        batch: &Batch<'_, R>,
        out: &mut [R],
    ) -> Result<(), Error> {
        let visits = self.combination.visit(self.parts.iter().map(|part| &part.get().core));
        let mut work = |visits: pgrpo_core::Several<'_>| match method {
            Method::Advantages => visits.advantages(batch, out),
            Method::Update => visits.update(batch),
            Method::Normalize => visits.normalize(batch, out),
            Method::Retract => visits.retract(batch),
        };
        if size >= DETACH_FROM { detached(py, visits, work) } else { work(visits) }
    }
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
    pub(crate) parents: Option<&'a Bound<'py, PyAny>>,
    pub(crate) out: Option<&'a Bound<'py, PyAny>>,
}

/// Reads the arguments and calls the core. None where one of them is not of the plainest kind, or of a
/// shape that does not go with that of the rewards.
pub(crate) fn call<'py>(
    core: &impl Core,
    py: Python<'py>,
    method: Method,
    arguments: &Arguments<'_, 'py>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let Some((rewards, grid)) = rewards(arguments.rewards, core.several()) else { return Ok(None) };
    let Some(clusters) = ids(arguments.clusters, grid) else { return Ok(None) };
    let groups = match arguments.groups {
        None => grid.filter(|_| core.options().reads_groups()).map(rows),
        Some(groups) => match ids(groups, grid) {
            None => return Ok(None),
            groups => groups,
        },
    };
    let parents = match arguments.parents {
        None => None,
        Some(parents) => match ids(parents, grid) {
            None => return Ok(None),
            parents => parents,
        },
    };
    let Arguments { weights, score_norms, lengths, .. } = *arguments;
    let mut columns = [const { None }; 3];
    for (column, argument) in columns.iter_mut().zip([weights, score_norms, lengths]) {
        if let Some(argument) = argument {
            let Some(values) = numbers(argument, grid) else { return Ok(None) };
            *column = Some(values);
        }
    }
    let [weights, score_norms, lengths] = columns;
    let columns = Columns { clusters, groups, parents, weights, score_norms, lengths };
    match rewards {
        Reals::F32(rewards) => {
            call_parts(core, py, method, &Parts { rewards, grid, columns: &columns }, arguments)
        }
        Reals::F64(rewards) => {
            call_parts(core, py, method, &Parts { rewards, grid, columns: &columns }, arguments)
        }
    }
}

fn call_parts<'py, R: Real + Element>(
    core: &impl Core,
    py: Python<'py>,
    method: Method,
    parts: &Parts<'_, 'py, R>,
    arguments: &Arguments<'_, 'py>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let (size, grid) = (parts.rewards.len() / core.several().unwrap_or(1), parts.grid);
    parts.with_batch(|batch| {
        let run = |out: &mut [R]| {
            let result = core.run(py, size, method, batch, out);
            result.map_err(|error| to_python_of(error, grid))
        };
        if !method.gives_advantages() {
            run(&mut [])?;
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
                arguments.parents,
            ];
            let Some(out) = reals_mut::<R>(given, grid, &inputs) else { return Ok(None) };
            run(out)?;
            return Ok(Some(given.clone()));
        }
        if let Some(shape) = grid {
            let array = zeros::<R, _>(py, shape);
            run(fresh_mut(&array)?)?;
            return Ok(Some(array.into_any()));
        }
        let array = zeros::<R, _>(py, size);
        run(fresh_mut(&array)?)?;
        Ok(Some(array.into_any()))
    })
}

/// What a batch is made of, as it was read.
struct Parts<'a, 'py, R> {
    rewards: &'a [R],
    grid: Grid,
    columns: &'a Columns<'a, 'py>,
}

/// What a batch has beside its rewards.
struct Columns<'a, 'py> {
    clusters: Ids<'a, 'py>,
    groups: Option<Ids<'a, 'py>>,
    parents: Option<Ids<'a, 'py>>,
    weights: Option<Cow<'a, [f64]>>,
    score_norms: Option<Cow<'a, [f64]>>,
    lengths: Option<Cow<'a, [f64]>>,
}

impl<R: Real> Parts<'_, '_, R> {
    fn with_batch<T>(&self, work: impl FnOnce(&Batch<'_, R>) -> PyResult<T>) -> PyResult<T> {
        let Columns { clusters, groups, parents, weights, score_norms, lengths } = self.columns;
        let [weights, score_norms, lengths] = [weights, score_norms, lengths].map(Option::as_deref);
        let [mut own, mut of_groups, mut of_parents] = [const { Vec::new() }; 3];
        let plain = Batch::new(self.rewards, clusters.view(&mut own));
        let groups = groups.as_ref().map(|groups| groups.view(&mut of_groups));
        let parents = parents.as_ref().map(|parents| parents.view(&mut of_parents));
        work(&Batch { groups, parents, weights, score_norms, lengths, ..plain })
    }
}
