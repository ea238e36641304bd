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
        expected: String,
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
    /// More rewards than one call takes.
    Size {
        /// Entries of `rewards`.
        rewards: usize,
    },
    /// Rewards or ids were changed while they were read.
    Changed {
        /// Whether the histories hold the batch, as it was before.
        is_merged: bool,
    },
    /// A cluster has two parents in one call.
    Parents {
        /// Position of a parent that is another than before.
        index: usize,
        /// Name of the cluster.
        cluster: String,
        /// Name of that parent.
        met: String,
        /// Name of the cluster's first one.
        expected: String,
    },
    /// The estimator compares within groups, and no groups were given.
    GroupsRequired {
        /// Name of the estimator.
        estimator: &'static str,
    },
    /// The estimator weighs by lengths, and no lengths were given.
    LengthsRequired {
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
    /// One of several rewards of a rollout is such.
    NonFiniteOf {
        /// Name of the reward.
        reward: String,
        /// Position of the rollout.
        index: usize,
        /// The reward.
        value: f64,
    },
    /// A weight, score norm or length is negative, not a number, or 2^20 and more.
    Weight {
        /// `weights`, `score_norms` or `lengths`.
        name: &'static str,
        /// Position of the first such entry.
        index: usize,
        /// The entry.
        value: f64,
    },
    /// More was to be taken out of a history than it holds.
    Retract {
        /// Name of the cluster.
        cluster: String,
        /// Samples, or their weight, to be taken out.
        count: f64,
        /// Samples, or their weight, in the history.
        held: f64,
    },
    /// What was asked for needs an option that was not chosen, or does not go with the one that was.
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// What it would need.
        needs: String,
    },
    /// A snapshot that cannot be read.
    Snapshot {
        /// What is wrong with it.
        reason: String,
    },
    /// A shared table has no room for another entry.
    Full {
        /// What ran out.
        what: &'static str,
        /// How much of it there is.
        capacity: u64,
    },
    /// A shared table that somebody else has written to, or in which too many processes were killed.
    Damaged {
        /// What is wrong with it.
        what: &'static str,
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
            Self::Size { rewards } => {
                write!(out, "rewards has {rewards} entries; expected fewer than 2^32")
            }
            Self::Changed { is_merged } => {
                let state = if *is_merged { "; the histories hold what they were" } else { "" };
                write!(
                    out,
                    "rewards or ids were changed by another thread while they were read{state}"
                )
            }
            Self::Parents { index, cluster, met, expected } => write!(
                out,
                "parents[{index}] is {met}; expected {expected}, which cluster {cluster} has earlier \
                 in the call"
            ),
            Self::GroupsRequired { estimator } => {
                write!(out, "estimator {estimator} needs groups: one group id for each reward")
            }
            Self::LengthsRequired { estimator } => {
                write!(out, "estimator {estimator} needs lengths: that of each reward's completion")
            }
            Self::NonFinite { index, value } => write!(
                out,
                "rewards[{index}] is {value:?}; expected a finite number below 1e140 in magnitude, \
                 or another nan_policy"
            ),
            Self::NonFiniteOf { reward, index, value } => write!(
                out,
                "rewards[{index}] of {reward:?} is {value:?}; expected a finite number below 1e140 in \
                 magnitude, or another nan_policy"
            ),
            Self::Weight { name, index, value } => {
                write!(out, "{name}[{index}] is {value:?}; expected a number from 0 to below 2^20")
            }
            Self::Retract { cluster, count, held } => {
                write!(
                    out,
                    "cluster {cluster} holds {held} samples; cannot retract {count} of them"
                )
            }
            Self::Unsupported { what, needs } => write!(out, "{what} needs {needs}"),
            Self::Snapshot { reason } => write!(out, "normalizer snapshot: {reason}"),
            Self::Full { what, capacity } => {
                write!(out, "the shared table is full: it has room for {capacity} {what}")
            }
            Self::Damaged { what } => write!(out, "the shared table is damaged: {what}"),
        }
    }
}

impl std::error::Error for Error {}

/// The value of a name, or an error that tells the names there are.
pub(crate) fn choose<T: Copy>(
    option: &'static str,
    name: &str,
    values: &[(&str, T)],
) -> Result<T, Error> {
    match values.iter().find(|(known, _)| *known == name) {
        Some(&(_, value)) => Ok(value),
        None => {
            Err(Error::Option { name: option, value: format!("{name:?}"), expected: or(values) })
        }
    }
}

/// `a, b or c`.
pub(crate) fn or<T>(values: &[(&str, T)]) -> String {
    let names: Vec<&str> = values.iter().map(|(name, _)| *name).collect();
    let (last, others) = names.split_last().expect("there is something to choose from");
    format!("{} or {last}", others.join(", "))
}
