//! The rules that turn raw rewards into advantages, one file each.
//!
//! What holds for all of them: order of entries and sizes of groups are free; a non-finite reward
//! never enters a mean or a history, and its own advantage is set by
//! [`NanPolicy`](crate::NanPolicy); equal rewards give an advantage of exactly 0.

pub mod batch;
pub mod dr_grpo;
pub mod grpo;
pub mod pgrpo;
pub mod rloo;

use std::str::FromStr;

use crate::error::Error;
use crate::fold::Fold;
use crate::moments::Moments;

/// How a spread becomes a divisor: `sqrt(m2 / (n - ddof)) + eps`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    ddof: u8,
    eps: f64,
}

impl Scale {
    /// Checks both options: `ddof` 0 or 1, `eps` positive and finite, since equal rewards have no
    /// other divisor, and more degrees of freedom could leave a spread without any.
    ///
    /// # Errors
    /// [`Error::Option`] names the option out of range.
    pub fn new(ddof: i64, eps: f64) -> Result<Self, Error> {
        if !(eps > 0.0 && eps.is_finite()) {
            let (value, expected) = (format!("{eps:?}"), "a positive number");
            return Err(Error::Option { name: "eps", value, expected });
        }
        match ddof {
            0 => Ok(Self { ddof: 0, eps }),
            1 => Ok(Self { ddof: 1, eps }),
            _ => {
                let (value, expected) = (ddof.to_string(), "0 or 1");
                Err(Error::Option { name: "ddof", value, expected })
            }
        }
    }

    /// `sigma + eps`; eps is added to the deviation, never put under its root.
    #[must_use]
    pub fn divisor(&self, moments: &Moments) -> f64 {
        moments.sigma(self.ddof) + self.eps
    }
}

/// Which rule to apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Estimator {
    /// [`pgrpo`]
    Pgrpo,
    /// [`grpo`]
    Grpo,
    /// [`dr_grpo`]
    DrGrpo,
    /// [`rloo`]
    Rloo,
    /// [`batch`]
    Batch,
}

impl Estimator {
    /// Every estimator.
    pub const ALL: [Self; 5] = [Self::Pgrpo, Self::Grpo, Self::DrGrpo, Self::Rloo, Self::Batch];

    /// The name users write.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pgrpo => "pgrpo",
            Self::Grpo => "grpo",
            Self::DrGrpo => "dr_grpo",
            Self::Rloo => "rloo",
            Self::Batch => "batch",
        }
    }

    /// Whether rewards are compared within groups.
    #[must_use]
    pub fn needs_groups(self) -> bool {
        match self {
            Self::Grpo | Self::DrGrpo | Self::Rloo => true,
            Self::Pgrpo | Self::Batch => false,
        }
    }

    /// Advantages \[N\] of `rewards: [N]`.
    ///
    /// `clusters` and `groups` are the same rewards folded by cluster and by group; `histories` are
    /// those of `clusters.ids`. Entries of non-finite rewards mean nothing.
    ///
    /// # Errors
    /// [`Error::GroupsRequired`] where the rule compares within groups and there are none.
    pub fn advantages(
        self,
        rewards: &[f64],
        clusters: &Fold<u32>,
        histories: &[Moments],
        groups: Option<&Fold<i64>>,
        scale: Scale,
    ) -> Result<Vec<f64>, Error> {
        let groups = || groups.ok_or(Error::GroupsRequired { estimator: self.name() });
        Ok(match self {
            Self::Pgrpo => pgrpo::advantages(rewards, clusters, histories, scale),
            Self::Grpo => grpo::advantages(rewards, groups()?, scale),
            Self::DrGrpo => dr_grpo::advantages(rewards, groups()?),
            Self::Rloo => rloo::advantages(rewards, groups()?),
            Self::Batch => batch::advantages(rewards, scale),
        })
    }
}

impl FromStr for Estimator {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|estimator| estimator.name() == name);
        found.ok_or_else(|| Error::Option {
            name: "estimator",
            value: format!("{name:?}"),
            expected: "pgrpo, grpo, dr_grpo, rloo or batch",
        })
    }
}
