//! Dr. GRPO: each reward less its group's mean.

use crate::elements::Affine;
use crate::estimators::{Cell, Folded, Rule, centered};

/// `A = r - mean_G`, of the group G, in units of the reward.
///
/// - Source: Understanding R1-Zero-Like Training (arXiv 2503.20783).
/// - Order: reads no history.
/// - Cold start: none; a group is complete in itself.
/// - Group of one: 0.
/// - Zero variance: 0; spreads are not divided by.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: costs nothing.
pub static RULE: Rule = Rule {
    name: "dr_grpo",
    formula: "r - mean_G",
    source: "Dr. GRPO, arXiv 2503.20783",
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
    match folded.group(cell) {
        group if group.count > 0.0 => centered(group, 1.0),
        _ => Affine::default(),
    }
}
