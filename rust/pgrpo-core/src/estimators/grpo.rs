//! GRPO: each reward against its group.

use crate::elements::Affine;
use crate::estimators::{Cell, Folded, Scale};

/// `A = (r - mean_G) / (sigma_G + eps)`, of the group G.
///
/// - Source: `DeepSeekMath` (arXiv 2402.03300).
/// - Order: reads no history.
/// - Cold start: none; a group is complete in itself.
/// - Group of one: 0.
/// - Zero variance: 0.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: costs nothing.
#[must_use]
pub fn map(folded: &Folded, cell: &Cell<'_>, scale: &Scale) -> Affine {
    scale.standardize(folded.group(cell))
}
