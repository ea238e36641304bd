//! Shrinkage: between the cluster's history and the group, by how much prompts differ.

use crate::estimators::{Cell, Folded, Rule};
use crate::moments::Moments;
use crate::table::Triple;

/// `A = (r - b) / (s + eps)`, of the baseline `b = w mean_G + (1 - w) mean_p`, `w = G / (G + k)`, where k
/// is the variance within groups over that between groups of the cluster, both running. `s = sigma_p e f / f_p`,
/// where e is the root mean square of (r - b) / `sigma_p` over the history, f that of e over the
/// rollouts of the call, and `f_p` over those of the cluster. Only the part of a group that belongs to the cluster counts as G.
///
/// The variances are those of one-way random effects: with a parts of sizes `n_g`, N samples, and
/// sums of squares SSW within and SSB between, `MSW = SSW / (N - a)` and
/// `tau² = (SSB - a MSW) / (N - sum n_g² / N)`; `k = MSW / tau²`.
///
/// - Source: Henderson's method (Biometrics 1953) for the variances, the best linear predictor for b.
/// - Order: as `pgrpo`, for the history and the variances alike.
/// - Cold start: until a second part was seen, and as long as all parts are of one sample or prompts
///   do not differ, this is `pgrpo`.
/// - Group of one: weighs its own reward as little as a group of one deserves; `pgrpo` if all are.
/// - Zero variance: as `pgrpo`; equal rewards give 0.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: histories and variances must be restored.
pub static RULE: Rule = Rule {
    name: "shrinkage",
    formula: "(r - b) / (s + eps), b = w mean_G + (1 - w) mean_p",
    source: "here, with random-effects variances (Henderson 1953)",
    reads_histories: true,
    needs_groups: true,
    zero_alone: false,
    idle: &[],
    keeps_parts: true,
    needs_lengths: false,
    whitens: false,
    baseline: None,
    maps: |folded, scale, maps| {
        folded.blend(scale, maps, |cell| (1.0, weight_of_history(folded, cell)));
    },
};

fn weight_of_history(folded: &Folded, cell: &Cell<'_>) -> f64 {
    let size = cell.moments.count / cell.weight.max(f64::MIN_POSITIVE);
    prompt_weight(&folded.own[cell.cluster], folded.parts[cell.cluster], size)
}

/// `1 - w = MSW / (MSW + G tau²)` for a part of G samples.
fn prompt_weight(own: &Moments, [parts, squares, within]: Triple, size: f64) -> f64 {
    let count = own.count;
    // No part of two, or one part only. Weighted sums are equal up to rounding.
    if count - parts <= 1e-12 * count || count * count - squares <= 1e-12 * count * count {
        return 1.0;
    }
    let mean_within = within / (count - parts);
    let between = (own.m2 - within).max(0.0);
    let tau2 = ((between - parts * mean_within) / (count - squares / count)).max(0.0);
    if tau2 == 0.0 { 1.0 } else { mean_within / (mean_within + size * tau2) }
}
