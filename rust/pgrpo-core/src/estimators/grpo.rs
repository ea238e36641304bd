//! GRPO: each reward against its group.

use crate::estimators::Scale;
use crate::fold::Fold;

/// Advantages \[N\]: `A = (r - mean_G) / (sigma_G + eps)`, of the group G.
///
/// - Source: `DeepSeekMath` (arXiv 2402.03300).
/// - Order: reads no history.
/// - Cold start: none; a group is complete in itself.
/// - Group of one: 0.
/// - Zero variance: 0.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: costs nothing.
#[must_use]
pub fn advantages(rewards: &[f64], groups: &Fold<i64>, scale: Scale) -> Vec<f64> {
    let divisors: Vec<f64> = groups.moments.iter().map(|group| scale.divisor(group)).collect();
    rewards
        .iter()
        .zip(&groups.slots)
        .map(|(reward, &slot)| (reward - groups.moments[slot].mean) / divisors[slot])
        .collect()
}
