//! Auto: between the cluster's history and the group, by what would have varied least.

use crate::estimators::{Baseline, Cell, Folded, Rule, leave_one_out};
use crate::moments::Moments;
use crate::table::Triple;

/// Samples that the starting value of 1 counts for. Scores of the acceptance experiments do not
/// depend on it between 1 and 16, and fall from 64 on.
const PRIOR_EVIDENCE: f64 = 16.0;

/// `A = (r - b) / (s + eps)`, of the baseline `b = lambda_p mean_p + (1 - lambda_p) loo`, where loo is
/// the mean of the other rewards of the group that belong to the cluster. `s = sigma_p e f / f_p`,
/// where e is the root mean square of (r - b) / `sigma_p` over the history, f that of e over the
/// rollouts of the call, and `f_p` over those of the cluster.
///
/// `lambda_p` is the slope of the regression of `y = r - loo` on `x = mean_p - loo` over all samples so
/// far, weighted by the squared norm of their scores, which makes the gradient's variance least. A
/// ridge as strong as 16 samples draws it towards 1, where it starts:
/// `(Sxy + kappa) / (Sxx + kappa)` with `kappa = 16 Syy / n`, clipped to \[0, 1\].
///
/// - Source: the variance-optimal constant baseline (Greensmith, Bartlett and Baxter, JMLR 2004)
///   along the line from the group's mean to the history's.
/// - Order: as `pgrpo`, for history and slope; a sample enters the regression with the mean of the
///   history before its batch, which it is independent of.
/// - Cold start: `pgrpo`, until a second batch of the cluster.
/// - Group of one: `pgrpo`, for there are no others.
/// - Zero variance: as `pgrpo`; equal rewards give 0.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: histories and regression must be restored.
pub static RULE: Rule = Rule {
    name: "auto",
    formula: "(r - b) / (s + eps), b = lambda_p mean_p + (1 - lambda_p) mean of the others in the part",
    source: "here, with the variance-optimal baseline (Greensmith, Bartlett and Baxter 2004)",
    reads_histories: true,
    needs_groups: true,
    zero_alone: false,
    idle: &[],
    keeps_parts: true,
    needs_lengths: false,
    whitens: false,
    baseline: Some(Baseline::Regression(evidence)),
    maps: |folded, scale, maps| folded.blend(scale, maps, |cell| slopes(folded, cell)),
};

/// What of the deviation within the part, and of the part's mean from the history's, is left.
fn slopes(folded: &Folded, cell: &Cell<'_>) -> (f64, f64) {
    let Some(factor) = leave_one_out(cell.moments, cell.weight) else { return (1.0, 1.0) };
    let [xx, xy, yy] = folded.baselines[cell.cluster];
    let ridge = PRIOR_EVIDENCE * yy / folded.own[cell.cluster].count;
    // No samples so far, or none that differed: 0 / 0.
    let lambda = if xx + ridge > 0.0 { ((xy + ridge) / (xx + ridge)).clamp(0.0, 1.0) } else { 1.0 };
    (1.0 + (1.0 - lambda) * (factor - 1.0), lambda)
}

/// What a cell adds to the regression of its cluster, whose history was `before`; `scored` are its
/// rewards with weights multiplied by their score norms.
fn evidence(cell: &Cell<'_>, scored: &Moments, before: &Moments) -> Triple {
    let Some(factor) = leave_one_out(cell.moments, cell.weight) else { return [0.0; 3] };
    if before.count == 0.0 || scored.count == 0.0 {
        return [0.0; 3];
    }
    let part = cell.moments;
    // With d = r - mean of the part: y = r - loo = factor d; x = mean_p - loo = gap + (factor - 1) d.
    let gap = (before.origin - part.origin) + (before.offset - part.offset);
    let shift = (scored.origin - part.origin) + (scored.offset - part.offset);
    let (sum, squares) = (scored.count * shift, scored.m2 + scored.count * shift * shift);
    let rest = factor - 1.0;
    [
        // Not negative but for rounding.
        (scored.count * gap * gap + 2.0 * gap * rest * sum + rest * rest * squares).max(0.0),
        factor * (gap * sum + rest * squares),
        factor * factor * squares,
    ]
}
