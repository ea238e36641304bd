//! RAE: each reward less an exponential mean of its cluster's.

use crate::elements::Affine;
use crate::estimators::{Baseline, Rule};

/// What one reward leaves of the mean before it, as in the source.
const DECAY: f64 = 0.95;

/// `A = r - b`, in units of the reward, of the exponential mean b of cluster p: it starts at 0, and for
/// each reward `b <- 0.95 b + 0.05 r`.
///
/// The rewards of a call are folded in as they come, and all of them are compared with the same b. A
/// reward of weight w leaves `0.95^w` of what b was.
///
/// - Source: role-conditioned advantage estimation of SPIRAL (arXiv 2506.24119), where clusters are the
///   roles of a game. Its code reads b before a game enters it (`normalize_then_update`).
/// - Order: a batch enters b before it is read, or after, as `order` says. A batch whose rewards are
///   in another order gives another b. So b is not in deltas, cannot be retracted, and is merged into
///   a normalizer only that has seen nothing.
/// - Cold start: b is near 0 for the first dozens of rewards, so that advantages are nearly the rewards;
///   `min_count` changes nothing about that.
/// - Group of one: nothing special; groups are not looked at.
/// - Zero variance: equal rewards give r - b, which vanishes as b comes to be r.
/// - NaN reward: does not enter b; its advantage follows the policy.
/// - Restart: b must be restored, else every cluster starts at 0.
pub static RULE: Rule = Rule {
    name: "rae",
    formula: "r - b, where b <- 0.95 b + 0.05 r for each reward of cluster p, from b = 0",
    source: "SPIRAL, arXiv 2506.24119",
    reads_histories: true,
    needs_groups: false,
    zero_alone: false,
    idle: &["ddof", "eps", "forgetting", "prior_count", "sigma_floor", "min_count"],
    keeps_parts: false,
    needs_lengths: false,
    whitens: false,
    baseline: Some(Baseline::ExponentialMean(DECAY)),
    maps: |folded, _, maps| {
        maps.extend(folded.cells().map(|cell| {
            let [_, mean, _] = folded.baselines[cell.cluster];
            Affine { origin: mean, offset: 0.0, scale: 1.0 }
        }));
    },
};
