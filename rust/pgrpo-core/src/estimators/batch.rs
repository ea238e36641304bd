//! Batch normalisation: each reward against all of its call.

use crate::estimators::Scale;
use crate::moments::{Moments, is_finite_reward};

/// Advantages \[N\]: `A = (r - mean_B) / (sigma_B + eps)`, of the batch B.
///
/// - Source: REINFORCE++ (arXiv 2501.03262).
/// - Order: reads no history.
/// - Cold start: none; a batch is complete in itself.
/// - Group of one: nothing special; groups are not looked at. A batch of one gives 0.
/// - Zero variance: 0.
/// - NaN reward: the batch is treated as if it were one smaller.
/// - Restart: costs nothing.
#[must_use]
pub fn advantages(rewards: &[f64], scale: Scale) -> Vec<f64> {
    let batch: Moments = rewards.iter().copied().filter(|&r| is_finite_reward(r)).collect();
    let divisor = scale.divisor(&batch);
    rewards.iter().map(|reward| (reward - batch.mean) / divisor).collect()
}
