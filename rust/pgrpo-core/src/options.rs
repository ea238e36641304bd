//! What a normalizer can be told.

use std::str::FromStr;

use crate::error::Error;
use crate::estimators::{Estimator, Scale};
use crate::state::Kept;

/// Whether a batch's rewards are normalised by histories that already hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Merge the batch, then read: |advantage| of `pgrpo` is at most sqrt(n - 1).
    UpdateThenNormalize,
    /// Read what came before the batch, then merge it: unbiased, but unbounded while n is small.
    NormalizeThenUpdate,
}

/// What becomes of a reward that is not a finite number (or too large to be squared). It never
/// enters a mean or a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NanPolicy {
    /// The whole batch is refused.
    Raise,
    /// Its advantage is 0.
    Zero,
    /// Its advantage is NaN.
    Propagate,
}

/// The value of a name, or an error that tells the names there are.
fn named<T: Copy>(
    option: &'static str,
    name: &str,
    values: &[(&str, T)],
    expected: &'static str,
) -> Result<T, Error> {
    match values.iter().find(|(known, _)| *known == name) {
        Some(&(_, value)) => Ok(value),
        None => Err(Error::Option { name: option, value: format!("{name:?}"), expected }),
    }
}

impl FromStr for Order {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let values = [
            ("update_then_normalize", Self::UpdateThenNormalize),
            ("normalize_then_update", Self::NormalizeThenUpdate),
        ];
        named("order", name, &values, "update_then_normalize or normalize_then_update")
    }
}

impl FromStr for NanPolicy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let values = [("raise", Self::Raise), ("zero", Self::Zero), ("propagate", Self::Propagate)];
        named("nan_policy", name, &values, "raise, zero or propagate")
    }
}

/// Everything that can be chosen; `docs/estimators.md` has the formulas.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The rule.
    pub estimator: Estimator,
    /// Deviations divide by count - ddof: 0 or 1.
    pub ddof: u8,
    /// Added to deviations; positive.
    pub eps: f64,
    /// Histories before or after the batch.
    pub order: Order,
    /// What becomes of non-finite rewards.
    pub nan_policy: NanPolicy,
    /// What a sample counts for when the next batch of its cluster comes: in (0, 1\].
    pub forgetting: f64,
    /// Pseudo-samples of the pooled history that every history is read with.
    pub prior_count: f64,
    /// Least deviation of a history that is read.
    pub sigma_floor: f64,
    /// Bound of |advantage|.
    pub clip: Option<f64>,
    /// Samples of a history below which advantages are 0.
    pub min_count: f64,
    /// Advantages are multiplied by the share of their cluster to the power of minus this.
    pub frequency_weight: f64,
    /// Whether sums for diagnostics are kept.
    pub track_diagnostics: bool,
    /// Whether deltas are kept.
    pub track_delta: bool,
    /// Threads that a large batch is worked on by.
    pub num_threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            estimator: Estimator::Pgrpo,
            ddof: 0,
            eps: 1e-4,
            order: Order::UpdateThenNormalize,
            nan_policy: NanPolicy::Raise,
            forgetting: 1.0,
            prior_count: 0.0,
            sigma_floor: 0.0,
            clip: None,
            min_count: 1.0,
            frequency_weight: 0.0,
            track_diagnostics: false,
            track_delta: false,
            num_threads: 1,
        }
    }
}

impl Options {
    /// Which sums these options need.
    #[must_use]
    pub fn kept(&self) -> Kept {
        Kept {
            parts: self.estimator.needs_parts() || self.track_diagnostics,
            regression: self.estimator == Estimator::Auto,
            advantages: self.track_diagnostics,
        }
    }

    /// The scale, if every option is in its range.
    pub(crate) fn check(&self) -> Result<Scale, Error> {
        let Self { ddof, eps, sigma_floor, min_count, .. } = *self;
        let reals = [
            ("eps", eps, eps >= 1e-100, "a number from 1e-100 on"),
            (
                "forgetting",
                self.forgetting,
                self.forgetting > 0.0 && self.forgetting <= 1.0,
                "a number above 0, up to 1",
            ),
            ("prior_count", self.prior_count, self.prior_count >= 0.0, "a number of at least 0"),
            ("sigma_floor", sigma_floor, sigma_floor >= 0.0, "a number of at least 0"),
            ("clip", self.clip.unwrap_or(1.0), self.clip.unwrap_or(1.0) > 0.0, "a positive number"),
            ("min_count", min_count, min_count >= 0.0, "a number of at least 0"),
            (
                "frequency_weight",
                self.frequency_weight,
                self.frequency_weight.abs() <= 10.0,
                "a number from -10 to 10",
            ),
        ];
        for (name, value, in_range, expected) in reals {
            if !(in_range && value.is_finite()) {
                return Err(Error::Option { name, value: format!("{value:?}"), expected });
            }
        }
        if ddof > 1 {
            let (value, expected) = (ddof.to_string(), "0 or 1");
            return Err(Error::Option { name: "ddof", value, expected });
        }
        if self.num_threads == 0 {
            let (value, expected) = ("0".to_owned(), "a number of at least 1");
            return Err(Error::Option { name: "num_threads", value, expected });
        }
        if self.track_delta && self.forgetting < 1.0 {
            return Err(Error::Option {
                name: "forgetting",
                value: format!("{:?}", self.forgetting),
                expected: "1 with track_delta, for deltas do not tell how much was forgotten",
            });
        }
        Ok(Scale { ddof, eps, sigma_floor, min_count })
    }
}
