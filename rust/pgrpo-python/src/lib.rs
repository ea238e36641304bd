//! The Python module `pgrpo.normalizer._core`: conversions only. Each method reads its arguments,
//! detaches from the interpreter where that pays, calls the core and maps its error.
#![allow(clippy::needless_pass_by_value, reason = "PyO3 hands arguments over by value")]

mod arrays;
mod call;
mod errors;
mod normalizer;
mod options;
mod several;
mod table;
mod watch;

use pyo3::prelude::*;

/// What calling costs: the arguments of a [`Normalizer`](normalizer::Normalizer)'s method, and nothing
/// done. For benchmarks.
#[pyfunction]
#[pyo3(signature = (rewards, clusters, groups, weights, score_norms, lengths, parents, out, /))]
#[expect(clippy::too_many_arguments, reason = "one for each column of a batch")]
fn _noop(
    rewards: &Bound<'_, PyAny>,
    clusters: &Bound<'_, PyAny>,
    groups: Option<&Bound<'_, PyAny>>,
    weights: Option<&Bound<'_, PyAny>>,
    score_norms: Option<&Bound<'_, PyAny>>,
    lengths: Option<&Bound<'_, PyAny>>,
    parents: Option<&Bound<'_, PyAny>>,
    out: Option<&Bound<'_, PyAny>>,
) {
    let _ = (rewards, clusters, groups, weights, score_norms, lengths, parents, out);
}

/// Called by the interpreter in the child of a fork.
#[pyfunction]
fn forked() {
    pgrpo_core::forked();
}

#[pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;
    use pyo3::types::IntoPyDict;

    #[pymodule_export]
    use super::_noop;

    #[pymodule_export]
    use super::normalizer::{Normalizer, layout};

    #[pymodule_export]
    use super::several::Several;

    #[pymodule_export]
    use super::options::{Rule, check, expected};

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "Python's name for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let py = module.py();
        module.add("RULES", super::options::rules(py)?)?;
        // Where processes fork, the threads of the parent are not in the child.
        if let Some(register) = py.import("os")?.getattr_opt("register_at_fork")? {
            let forked = wrap_pyfunction!(super::forked, py)?;
            register.call((), Some(&[("after_in_child", forked)].into_py_dict(py)?))?;
        }
        Ok(())
    }
}
