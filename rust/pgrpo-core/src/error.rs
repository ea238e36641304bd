//! What can be wrong with the options or with a batch.

use std::fmt;

/// One refused input. Whatever is refused has changed nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Error {
    /// An option has a value outside of its range.
    Option {
        /// Name of the option.
        name: &'static str,
        /// The value met, as the user would write it.
        value: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// Two arrays of one call differ in length.
    Length {
        /// Entries of `rewards`.
        rewards: usize,
        /// Name of the other array.
        name: &'static str,
        /// Entries of the other array.
        length: usize,
    },
    /// The estimator compares within groups, and no groups were given.
    GroupsRequired {
        /// Name of the estimator.
        estimator: &'static str,
    },
    /// A reward is NaN, infinite or too large to be squared, and the policy is to refuse such.
    NonFinite {
        /// Position of the first such reward.
        index: usize,
        /// The reward.
        value: f64,
    },
    /// A history that was not kept by this crate: infinite, or of negative spread.
    History {
        /// Dense id of its cluster.
        cluster: u32,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Option { name, value, expected } => {
                write!(out, "{name} is {value}; expected {expected}")
            }
            Self::Length { rewards, name, length } => {
                write!(out, "rewards has {rewards} entries, {name} has {length}")
            }
            Self::GroupsRequired { estimator } => {
                write!(out, "estimator {estimator} needs groups: one group id for each reward")
            }
            Self::NonFinite { index, value } => write!(
                out,
                "rewards[{index}] is {value:?}; expected a finite number below 1e140 in magnitude, \
                 or another nan_policy"
            ),
            Self::History { cluster, reason } => write!(out, "history {cluster} {reason}"),
        }
    }
}

impl std::error::Error for Error {}
