//! What a normalizer can be told.

use std::fmt::Debug;
use std::str::FromStr;

use crate::error::{Error, choose, or};
use crate::estimators::{Baseline, RULES, Rule, Scale};
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

impl Order {
    /// Each with the name users write.
    pub const NAMES: [(&'static str, Self); 2] = [
        ("update_then_normalize", Self::UpdateThenNormalize),
        ("normalize_then_update", Self::NormalizeThenUpdate),
    ];
}

impl NanPolicy {
    /// Each with the name users write.
    pub const NAMES: [(&'static str, Self); 3] =
        [("raise", Self::Raise), ("zero", Self::Zero), ("propagate", Self::Propagate)];
}

impl FromStr for Order {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        choose("order", name, &Self::NAMES)
    }
}

impl FromStr for NanPolicy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        choose("nan_policy", name, &Self::NAMES)
    }
}

/// Everything that can be chosen; [`estimators`](crate::estimators) has the formulas.
///
/// ```
/// use pgrpo_core::{Normalizer, Options, Rule};
///
/// let options = Options { prior_count: 8.0, ..Options::new(Rule::named("pgrpo")?) };
/// let normalizer = Normalizer::new(options)?;
///
/// let error = Normalizer::new(Options { eps: 0.0, ..normalizer.options().clone() }).unwrap_err();
/// assert_eq!(error.to_string(), "eps is 0.0; expected a number from 1e-100 on");
/// # Ok::<(), pgrpo_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The rule.
    pub estimator: &'static Rule,
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

/// Numbers that an option may be: its name, the range as errors and documentation tell it, and a
/// check that returns a value outside of it.
type Range = (&'static str, &'static str, fn(&Options) -> Option<String>);

const RANGES: [Range; 9] = [
    ("ddof", "0 or 1", |o| outside(o.ddof, o.ddof <= 1)),
    ("eps", "a number from 1e-100 on", |o| real(o.eps, o.eps >= 1e-100)),
    ("forgetting", "a number above 0, up to 1", |o| {
        real(o.forgetting, o.forgetting > 0.0 && o.forgetting <= 1.0)
    }),
    ("prior_count", "a number of at least 0", |o| real(o.prior_count, o.prior_count >= 0.0)),
    ("sigma_floor", "a number of at least 0", |o| real(o.sigma_floor, o.sigma_floor >= 0.0)),
    ("clip", "a positive number or None", |o| o.clip.and_then(|clip| real(clip, clip > 0.0))),
    ("min_count", "a number of at least 0", |o| real(o.min_count, o.min_count >= 0.0)),
    ("frequency_weight", "a number from -10 to 10", |o| {
        real(o.frequency_weight, o.frequency_weight.abs() <= 10.0)
    }),
    ("num_threads", "a whole number of at least 1", |o| outside(o.num_threads, o.num_threads >= 1)),
];

fn real(value: f64, inside: bool) -> Option<String> {
    outside(value, inside && value.is_finite())
}

fn outside(value: impl Debug, inside: bool) -> Option<String> {
    (!inside).then(|| format!("{value:?}"))
}

/// What an option may be, as errors tell it: names or a range. None if there is no such option.
#[must_use]
pub fn expected(option: &str) -> Option<String> {
    match option {
        "estimator" => Some(or(&RULES.map(|rule| (rule.name, ())))),
        "order" => Some(or(&Order::NAMES)),
        "nan_policy" => Some(or(&NanPolicy::NAMES)),
        "track_diagnostics" | "track_delta" => Some("True or False".to_owned()),
        number => {
            let range = RANGES.iter().find(|(name, ..)| *name == number);
            range.map(|(_, expected, _)| (*expected).to_owned())
        }
    }
}

impl Options {
    /// Whether calls read the groups of a batch.
    #[must_use]
    pub fn reads_groups(&self) -> bool {
        self.estimator.needs_groups || self.track_diagnostics
    }

    /// A rule, and what is usual of all else: population deviations with an `eps` of 1e-4; the batch is
    /// folded in before its advantages are read; non-finite rewards are refused; nothing is forgotten,
    /// bounded or kept besides; one thread. Python's `Options` begin with the same.
    #[must_use]
    pub fn new(estimator: &'static Rule) -> Self {
        Self {
            estimator,
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

    /// Which sums these options need.
    #[must_use]
    pub fn kept(&self) -> Kept {
        Kept {
            parts: self.estimator.keeps_parts || self.track_diagnostics,
            baseline: self.estimator.baseline.map(Baseline::name),
            advantages: self.track_diagnostics,
            // What is forgotten of a cluster would have to be taken out of it, with an error that
            // stays when what it is of is gone.
            pool: self.reads_pool() && self.forgetting >= 1.0,
        }
    }

    /// Whether advantages depend on the history of all clusters together.
    pub(crate) fn reads_pool(&self) -> bool {
        self.prior_count > 0.0 || self.frequency_weight != 0.0
    }

    /// Refuses options out of their ranges.
    ///
    /// # Errors
    /// [`Error::Option`] names the first.
    pub fn check(&self) -> Result<(), Error> {
        for (name, expected, fault) in RANGES {
            if let Some(value) = fault(self) {
                return Err(Error::Option { name, value, expected: expected.to_owned() });
            }
        }
        if self.track_delta && self.forgetting < 1.0 {
            return Err(Error::Option {
                name: "forgetting",
                value: format!("{:?}", self.forgetting),
                expected: "1 with track_delta, for deltas do not tell how much was forgotten"
                    .to_owned(),
            });
        }
        if self.track_delta
            && let Some(Baseline::ExponentialMean(_)) = self.estimator.baseline
        {
            return Err(Error::Option {
                name: "track_delta",
                value: "True".to_owned(),
                expected: format!(
                    "False under {}, whose exponential mean knows an order that deltas do not have",
                    self.estimator.name
                ),
            });
        }
        Ok(())
    }

    pub(crate) fn scale(&self) -> Scale {
        let Self { ddof, eps, sigma_floor, min_count, .. } = *self;
        Scale { ddof, eps, sigma_floor, min_count }
    }
}
