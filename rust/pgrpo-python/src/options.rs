//! `pgrpo.normalizer.Options` read, and what Python is told of options and estimators.

use pgrpo_core::{NanPolicy, Options, Order, RULES};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::errors::{ConfigError, to_python};

/// A value of an option, of something in Python; None if that is of another type.
trait Value: Sized {
    fn read(value: &Bound<'_, PyAny>) -> Option<Result<Self, pgrpo_core::Error>>;
}

macro_rules! plain {
    ($($kind:ty),*) => {$(
        impl Value for $kind {
            fn read(value: &Bound<'_, PyAny>) -> Option<Result<Self, pgrpo_core::Error>> {
                value.extract().ok().map(Ok)
            }
        }
    )*};
}

macro_rules! named {
    ($($kind:ty: $parse:expr),*) => {$(
        impl Value for $kind {
            fn read(value: &Bound<'_, PyAny>) -> Option<Result<Self, pgrpo_core::Error>> {
                value.extract::<&str>().ok().map($parse)
            }
        }
    )*};
}

plain!(u8, usize, f64, Option<f64>, bool);
named!(&'static pgrpo_core::Rule: pgrpo_core::Rule::named, Order: str::parse, NanPolicy: str::parse);

fn field<T: Value>(options: &Bound<'_, PyAny>, name: &str) -> PyResult<T> {
    let value = options.getattr(name)?;
    if let Some(read) = T::read(&value) {
        return read.map_err(to_python);
    }
    let mut met = value.repr()?.to_string();
    if let Some((cut, _)) = met.char_indices().nth(60) {
        met.truncate(cut);
        met.push_str("...");
    }
    let expected = pgrpo_core::options::expected(name).unwrap_or_default();
    Err(ConfigError::new_err(format!("{name} is {met}; expected {expected}")))
}

macro_rules! fields {
    ($options:ident, $($name:ident),*) => {
        Options { $($name: field($options, stringify!($name))?),* }
    };
}

/// Reads the attributes of an `Options`, whose ranges the core checks.
pub(crate) fn read(options: &Bound<'_, PyAny>) -> PyResult<Options> {
    Ok(fields!(
        options,
        estimator,
        ddof,
        eps,
        order,
        nan_policy,
        forgetting,
        prior_count,
        sigma_floor,
        clip,
        min_count,
        frequency_weight,
        track_diagnostics,
        track_delta,
        num_threads
    ))
}

/// Refuse options out of their ranges, or of other types.
#[pyfunction]
#[pyo3(signature = (options, /))]
pub(crate) fn check(options: &Bound<'_, PyAny>) -> PyResult<()> {
    read(options)?.check().map_err(to_python)
}

/// What an option may be, as errors tell it; None if there is no such option.
#[pyfunction]
#[pyo3(signature = (option, /))]
pub(crate) fn expected(option: &str) -> Option<String> {
    pgrpo_core::options::expected(option)
}

/// What there is to know of an estimator.
#[pyclass(frozen, module = "pgrpo.normalizer._core")]
pub(crate) struct Rule(&'static pgrpo_core::Rule);

#[pymethods]
impl Rule {
    /// The name users write.
    #[getter]
    fn name(&self) -> &str {
        self.0.name
    }

    /// The advantage of a reward r, in one line.
    #[getter]
    fn formula(&self) -> &str {
        self.0.formula
    }

    /// Where it was published.
    #[getter]
    fn source(&self) -> &str {
        self.0.source
    }

    /// Whether advantages depend on the histories of clusters.
    #[getter]
    fn reads_histories(&self) -> bool {
        self.0.reads_histories
    }

    /// Whether rewards are compared within groups, which a batch must have then.
    #[getter]
    fn needs_groups(&self) -> bool {
        self.0.needs_groups
    }

    /// Whether a group of one always gives 0.
    #[getter]
    fn zero_alone(&self) -> bool {
        self.0.zero_alone
    }

    /// Whether it keeps sums of groups, for which updates need groups as well.
    #[getter]
    fn keeps_parts(&self) -> bool {
        self.0.keeps_parts
    }

    /// Whether score norms have an effect.
    #[getter]
    fn reads_score_norms(&self) -> bool {
        self.0.reads_score_norms()
    }

    /// Whether rewards are weighed by lengths of completions, which a batch must have then.
    #[getter]
    fn needs_lengths(&self) -> bool {
        self.0.needs_lengths
    }

    /// Whether it standardises the advantages of the whole call.
    #[getter]
    fn whitens(&self) -> bool {
        self.0.whitens
    }

    /// Options that have no effect on advantages, with this `frequency_weight`.
    fn without_effect(&self, frequency_weight: f64) -> Vec<&str> {
        self.0.without_effect(frequency_weight)
    }
}

/// Every estimator, by its name.
pub(crate) fn rules(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let rules = PyDict::new(py);
    for rule in RULES {
        rules.set_item(rule.name, Bound::new(py, Rule(rule))?)?;
    }
    Ok(rules)
}
