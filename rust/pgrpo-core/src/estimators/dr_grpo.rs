//! Dr. GRPO: each reward less its group's mean.

use crate::fold::Fold;

/// Advantages \[N\]: `A = r - mean_G`, of the group G, in units of the reward.
///
/// - Source: Understanding R1-Zero-Like Training (arXiv 2503.20783).
/// - Order: reads no history.
/// - Cold start: none; a group is complete in itself.
/// - Group of one: 0.
/// - Zero variance: 0; spreads are not divided by.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: costs nothing.
#[must_use]
pub fn advantages(rewards: &[f64], groups: &Fold<i64>) -> Vec<f64> {
    rewards
        .iter()
        .zip(&groups.slots)
        .map(|(reward, &slot)| reward - groups.moments[slot].mean)
        .collect()
}
