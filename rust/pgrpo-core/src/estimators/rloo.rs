//! RLOO: each reward less the mean of the others in its group.

use crate::fold::Fold;

/// Advantages \[N\]: `A = r - mean of the group's other rewards = (r - mean_G) * n / (n - 1)`, in
/// units of the reward.
///
/// - Source: Back to Basics (arXiv 2402.14740).
/// - Order: reads no history.
/// - Cold start: none; a group is complete in itself.
/// - Group of one: 0, for there are no others.
/// - Zero variance: 0; spreads are not divided by.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: costs nothing.
#[must_use]
pub fn advantages(rewards: &[f64], groups: &Fold<i64>) -> Vec<f64> {
    rewards
        .iter()
        .zip(&groups.slots)
        .map(|(reward, &slot)| {
            let group = &groups.moments[slot];
            match group.count {
                0 | 1 => 0.0,
                count => (reward - group.mean) * (count as f64 / (count - 1) as f64),
            }
        })
        .collect()
}
