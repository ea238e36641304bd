//! Lite: the group's mean, and the deviation of the whole batch.

use crate::elements::Affine;
use crate::estimators::{Folded, Rule, Scale, centered};
use crate::moments::Moments;

/// `A = (r - mean_G) / (sigma_B + eps)`, of the group G and all rewards B of the call.
///
/// - Source: Tricks or Traps (arXiv 2508.08221).
/// - Order: reads no history.
/// - Cold start: none; a batch is complete in itself.
/// - Group of one: 0, but its reward counts in `sigma_B`.
/// - Zero variance: 0 where a group's rewards are equal.
/// - NaN reward: group and batch are treated as if they were one smaller.
/// - Restart: costs nothing.
pub static RULE: Rule = Rule {
    name: "lite",
    formula: "(r - mean_G) / (sigma_B + eps), of the group G and all rewards B of the call",
    source: "Tricks or Traps, arXiv 2508.08221",
    reads_histories: false,
    needs_groups: true,
    zero_alone: true,
    idle: &[],
    keeps_parts: false,
    needs_lengths: false,
    whitens: false,
    baseline: None,
    maps: |folded, scale, maps| maps.extend(self::maps(folded, scale)),
};

fn maps(folded: &Folded, scale: &Scale) -> impl Iterator<Item = Affine> {
    let batch = folded.moments.iter().copied().fold(Moments::default(), Moments::merge);
    let unit = 1.0 / (batch.sigma(scale.ddof) + scale.eps);
    folded.cells().map(move |cell| {
        let group = folded.group(&cell);
        if group.count > 0.0 { centered(group, unit) } else { Affine::default() }
    })
}
