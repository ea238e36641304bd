//! `MaxRL`: each reward against its group, in units of the group's mean.

use crate::elements::Affine;
use crate::estimators::{Cell, Folded, Rule, centered};

/// The mean of rewards of at least 0 is no less than their deviation over the square root of their
/// number: a smaller share than this is what rounding leaves of a mean of 0.
const ROUNDING: f64 = 1e-9;

/// `A = (r - mean_G) / mean_G`, of the group G, without a unit. For rewards of 0 and 1 its sum of
/// gradients is the mean gradient of the log-likelihood of what succeeded.
///
/// It is meant for rewards of at least 0. A negative mean would turn good and bad round, so where the
/// mean is not above 0 the advantage is 0; and where rewards of both signs nearly cancel, it is large.
///
/// - Source: Maximum Likelihood Reinforcement Learning (arXiv 2602.02710).
/// - Order: reads no history.
/// - Cold start: none; a group is complete in itself.
/// - Group of one: 0.
/// - Zero variance: 0; spreads are not divided by.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: costs nothing.
pub static RULE: Rule = Rule {
    name: "max_rl",
    formula: "(r - mean_G) / mean_G, 0 where mean_G is not above 0",
    source: "Maximum Likelihood Reinforcement Learning, arXiv 2602.02710",
    reads_histories: false,
    needs_groups: true,
    zero_alone: true,
    idle: &["ddof", "eps"],
    keeps_parts: false,
    needs_lengths: false,
    whitens: false,
    baseline: None,
    maps: |folded, _, maps| maps.extend(folded.cells().map(|cell| map(folded, &cell))),
};

fn map(folded: &Folded, cell: &Cell<'_>) -> Affine {
    let group = folded.group(cell);
    let mean = group.mean();
    if group.count > 0.0 && mean > ROUNDING * group.sigma(0) {
        centered(group, 1.0 / mean)
    } else {
        Affine::default()
    }
}
