//! GRPO: each reward against its group.

use crate::elements::Affine;
use crate::estimators::{Cell, Folded, Rule, Scale};

/// `A = (r - mean_G) / (sigma_G + eps)`, of the group G.
///
/// - Source: `DeepSeekMath` (arXiv 2402.03300).
/// - Order: reads no history.
/// - Cold start: none; a group is complete in itself.
/// - Group of one: 0.
/// - Zero variance: 0.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: costs nothing.
pub static RULE: Rule = Rule {
    name: "grpo",
    formula: "(r - mean_G) / (sigma_G + eps), of the group G",
    source: "DeepSeekMath, arXiv 2402.03300",
    reads_histories: false,
    needs_groups: true,
    zero_alone: true,
    idle: &[],
    keeps_parts: false,
    needs_lengths: false,
    whitens: false,
    baseline: None,
    maps: |folded, scale, maps| maps.extend(folded.cells().map(|cell| map(folded, &cell, scale))),
};

fn map(folded: &Folded, cell: &Cell<'_>, scale: &Scale) -> Affine {
    scale.standardize(folded.group(cell))
}
