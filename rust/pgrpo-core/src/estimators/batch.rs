//! Batch normalisation: each reward against all of its call.

use crate::elements::Affine;
use crate::estimators::{Folded, Rule, Scale};
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
pub static RULE: Rule = Rule {
    name: "batch",
    formula: "(r - mean_B) / (sigma_B + eps), of all rewards of the call",
    source: "REINFORCE++, arXiv 2501.03262",
    reads_histories: false,
    needs_groups: false,
    zero_alone: false,
    idle: &[],
    keeps_parts: false,
    needs_lengths: false,
    whitens: false,
    baseline: None,
    maps: |folded, scale, maps| maps.extend(self::maps(folded, scale)),
};

fn maps(folded: &Folded, scale: &Scale) -> impl Iterator<Item = Affine> {
    let batch = folded.moments.iter().copied().fold(Moments::default(), Moments::merge);
    std::iter::repeat_n(scale.standardize(&batch), folded.moments.len())
}
