//! Dr. GRPO: each reward less its group's mean.

use crate::elements::Affine;
use crate::estimators::{Cell, Folded, centered};

/// `A = r - mean_G`, of the group G, in units of the reward.
///
/// - Source: Understanding R1-Zero-Like Training (arXiv 2503.20783).
/// - Order: reads no history.
/// - Cold start: none; a group is complete in itself.
/// - Group of one: 0.
/// - Zero variance: 0; spreads are not divided by.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: costs nothing.
#[must_use]
pub fn map(folded: &Folded, cell: &Cell<'_>) -> Affine {
    match folded.group(cell) {
        group if group.count > 0.0 => centered(group, 1.0),
        _ => Affine::default(),
    }
}
