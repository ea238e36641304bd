//! P-GRPO, the default: each reward against its cluster's history.

use crate::estimators::Scale;
use crate::fold::Fold;
use crate::moments::Moments;

/// Advantages \[N\]: `A = (r - mean_p) / (sigma_p + eps)`, of the history of cluster p.
///
/// - Source: Personalized Group Relative Policy Optimization (arXiv 2603.10009).
/// - Order: a batch enters the histories before they are read (`update_then_normalize`), which
///   bounds |A| by sqrt(n - 1); the other order is unbiased and unbounded.
/// - Cold start: a cluster without history has nothing to compare with and gives 0; this can only be
///   met in the other order. Its second batch is already compared with the first, however small
///   the spread of that was.
/// - Group of one: nothing special; groups are not looked at.
/// - Zero variance: `(r - mean_p) / eps`; 0 while all rewards of the cluster were equal.
/// - NaN reward: enters no history; its advantage follows the policy.
/// - Restart: the histories must be restored, else every cluster starts cold.
#[must_use]
pub fn advantages(
    rewards: &[f64],
    clusters: &Fold<u32>,
    histories: &[Moments],
    scale: Scale,
) -> Vec<f64> {
    let divisors: Vec<f64> = histories.iter().map(|history| scale.divisor(history)).collect();
    rewards
        .iter()
        .zip(&clusters.slots)
        .map(|(reward, &slot)| match histories[slot].count {
            0 => 0.0,
            _ => (reward - histories[slot].mean) / divisors[slot],
        })
        .collect()
}
