//! OPO: each reward less the mean of its group by length.

use crate::elements::Affine;
use crate::estimators::{Cell, Folded, Rule, centered};

/// `A = r - sum(w L r) / sum(w L)`, in units of the reward: the sums go over the group, L is the length
/// of a completion and w its weight, 1 if there are none.
///
/// - Source: On-Policy RL with Optimal Reward Baseline (arXiv 2505.23585), where it is the baseline of
///   least variance if the squared norm of a score grows with the length.
/// - Order: reads no history.
/// - Cold start: none; a group is complete in itself.
/// - Group of one: 0.
/// - Zero variance: 0; spreads are not divided by. A group without any length is weighed as if all its
///   completions were of one length, which is `dr_grpo`.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: costs nothing.
pub static RULE: Rule = Rule {
    name: "opo",
    formula: "r - sum(L r) / sum(L) over the group, of the lengths L of completions",
    source: "Optimal Reward Baseline, arXiv 2505.23585",
    reads_histories: false,
    needs_groups: true,
    zero_alone: true,
    idle: &["ddof", "eps"],
    keeps_parts: false,
    needs_lengths: true,
    whitens: false,
    baseline: None,
    maps: |folded, _, maps| maps.extend(folded.cells().map(|cell| map(folded, &cell))),
};

fn map(folded: &Folded, cell: &Cell<'_>) -> Affine {
    let group = [&folded.by_length[cell.group], folded.group(cell)];
    let group = group.into_iter().find(|group| group.count > 0.0);
    group.map(|group| centered(group, 1.0)).unwrap_or_default()
}
