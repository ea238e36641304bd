//! P-GRPO, the default: each reward against its cluster's history.

use crate::elements::Affine;
use crate::estimators::{Cell, Folded, Rule, Scale, centered};

/// `A = (r - mean_p) / (sigma_p + eps)`, of the history of cluster p.
///
/// - Source: Personalized Group Relative Policy Optimization (arXiv 2603.10009).
/// - Order: a batch enters the histories before they are read (`update_then_normalize`), which
///   bounds |A| by sqrt(n - 1); the other order is unbiased and unbounded.
/// - Cold start: a history of fewer than `min_count` samples gives 0. With the default, 1, that is met
///   in the other order only, and a second batch is already compared with the first, however small
///   the spread of that was; `prior_count` lets a cold cluster read the pooled history.
/// - Group of one: nothing special; groups are not looked at.
/// - Zero variance: `(r - mean_p) / eps`; 0 while all rewards of the cluster were equal.
/// - NaN reward: enters no history; its advantage follows the policy.
/// - Restart: the histories must be restored, else every cluster starts cold.
pub static RULE: Rule = Rule {
    name: "pgrpo",
    formula: "(r - mean_p) / (sigma_p + eps), of the history of cluster p",
    source: "P-GRPO, arXiv 2603.10009",
    reads_histories: true,
    needs_groups: false,
    zero_alone: false,
    idle: &[],
    keeps_parts: false,
    needs_lengths: false,
    whitens: false,
    baseline: None,
    maps: |folded, scale, maps| maps.extend(folded.cells().map(|cell| map(folded, &cell, scale))),
};

fn map(folded: &Folded, cell: &Cell<'_>, scale: &Scale) -> Affine {
    let history = folded.history(cell);
    if scale.is_known(history) {
        centered(history, 1.0 / (scale.sigma(history) + scale.eps))
    } else {
        Affine::default()
    }
}
