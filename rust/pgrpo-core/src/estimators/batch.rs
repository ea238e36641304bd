//! Batch normalisation: each reward against all of its call.

use crate::elements::Affine;
use crate::estimators::{Folded, Scale};
use crate::moments::Moments;

/// `A = (r - mean_B) / (sigma_B + eps)`, of the batch B.
///
/// - Source: REINFORCE++ (arXiv 2501.03262).
/// - Order: reads no history.
/// - Cold start: none; a batch is complete in itself.
/// - Group of one: nothing special; groups are not looked at. A batch of one gives 0.
/// - Zero variance: 0.
/// - NaN reward: the batch is treated as if it were one smaller.
/// - Restart: costs nothing.
pub fn maps(folded: &Folded, scale: &Scale) -> impl Iterator<Item = Affine> {
    let batch = folded.moments.iter().copied().fold(Moments::default(), Moments::merge);
    std::iter::repeat_n(scale.standardize(&batch), folded.moments.len())
}
