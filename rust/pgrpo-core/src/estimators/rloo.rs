//! RLOO: each reward less the mean of the others in its group.

use crate::elements::Affine;
use crate::estimators::{Cell, Folded, Rule, centered, leave_one_out};

/// `A = r - mean of the group's other rewards = (r - mean_G) * W / (W - w)`, in units of the reward,
/// where W is the size of the group and w = 1, or the sum of its weights and their weighted mean.
///
/// - Source: Back to Basics (arXiv 2402.14740).
/// - Order: reads no history.
/// - Cold start: none; a group is complete in itself.
/// - Group of one: 0, for there are no others.
/// - Zero variance: 0; spreads are not divided by.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: costs nothing.
pub static RULE: Rule = Rule {
    name: "rloo",
    formula: "r - mean of the group's other rewards",
    source: "Back to Basics, arXiv 2402.14740",
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
    let factor = leave_one_out(group, cell.weight);
    factor.map(|factor| centered(group, factor)).unwrap_or_default()
}
