//! GDPO of several rewards: each against its group, and their weighted sum against the batch.

use crate::elements::{Affine, Real};
use crate::estimators::{Folded, Rule, Scale, advantages_of, grpo};
use crate::moments::Moments;
use crate::options::Options;

/// `A = (a - mean_B(a)) / (sigma_B(a) + eps)`, of the weighted sum a over the rewards of a rollout of
/// `(r - mean_G) / (sigma_G + eps)`; the second mean and deviation are those of all rollouts of the call.
///
/// This rule is that of one reward: [`grpo`], standardised. For several, [`whiten`] standardises the
/// sum of what [`grpo`] makes of each.
///
/// - Source: Group reward-Decoupled Normalization Policy Optimization (arXiv 2601.05242). It has only
///   its letters in common with the GDPO of Yao et al., which is a kind of DPO.
/// - Order: reads no history.
/// - Cold start: none; a batch is complete in itself.
/// - Group of one: a is 0, and so is A, for groups have a mean of 0 each.
/// - Zero variance: of a group, a is 0; of all groups, A is 0.
/// - NaN reward: group and batch are treated as if they were one smaller.
/// - Restart: costs nothing.
pub static RULE: Rule = Rule {
    name: "gdpo_multi",
    formula: "(a - mean_B(a)) / (sigma_B(a) + eps), a = sum over rewards of (r - mean_G) / (sigma_G + eps)",
    source: "GDPO, arXiv 2601.05242",
    reads_histories: false,
    needs_groups: true,
    zero_alone: true,
    idle: &[],
    keeps_parts: false,
    needs_lengths: false,
    whitens: true,
    baseline: None,
    maps,
};

fn maps(folded: &Folded, scale: &Scale, maps: &mut Vec<Affine>) {
    (grpo::RULE.maps)(folded, scale, maps);
    let told = folded.moments.iter().zip(maps.iter()).map(|(cell, map)| advantages_of(cell, map));
    let all = told.fold(Moments::default(), Moments::merge);
    let unit = 1.0 / (all.sigma(scale.ddof) + scale.eps);
    // A group without any weight keeps its advantage of 0.
    for map in maps.iter_mut().filter(|map| map.scale != 0.0) {
        map.offset += all.mean() / map.scale;
        map.scale *= unit;
    }
}

/// Standardises values \[N\] in place by their own mean and deviation: `(v - mean) / (sigma + eps)`.
/// Weights \[N\] are 1 if there are none; NaN values are left out, and left as they are.
///
/// Without any weight, the values become 0.
pub fn whiten<R: Real>(values: &mut [R], weights: Option<&[f64]>, options: &Options) {
    let mut all = Moments::default();
    for (at, value) in values.iter().map(|value| value.to_f64()).enumerate() {
        if !value.is_nan() {
            let count = weights.map_or(1.0, |weights| weights[at]);
            all = all.merge(Moments { count, origin: value, ..Moments::default() });
        }
    }
    let map = options.scale().standardize(&all);
    for value in values.iter_mut().filter(|value| !value.to_f64().is_nan()) {
        *value = R::from_f64(((value.to_f64() - map.origin) - map.offset) * map.scale);
    }
}
