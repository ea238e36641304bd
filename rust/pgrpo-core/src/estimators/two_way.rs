//! Two-way normalisation, for groups that mix clusters: what is special neither to the cluster nor to
//! the group.

use crate::elements::Affine;
use crate::estimators::{Cell, Folded, Rule, Scale};

/// `A = (e - mean_G(e)) / (sigma_p + eps)`, of e = r - `mean_p` by the history of cluster p, and its
/// mean over the group.
///
/// - Source: P-GRPO (arXiv 2603.10009) with the group's baseline of GRPO put back.
/// - Order: as `pgrpo`; the groups are those of the batch.
/// - Cold start: a cluster with fewer than `min_count` samples gives 0, and its rewards stay out of
///   the group's mean.
/// - Group of one: 0.
/// - Zero variance: of the history, divided by eps; equal rewards give 0.
/// - NaN reward: the group is treated as if it were one smaller.
/// - Restart: the histories must be restored, else every cluster starts cold.
pub static RULE: Rule = Rule {
    name: "two_way",
    formula: "(e - mean_G(e)) / (sigma_p + eps), of e = r - mean_p",
    source: "here",
    reads_histories: true,
    needs_groups: true,
    zero_alone: true,
    idle: &[],
    keeps_parts: false,
    needs_lengths: false,
    whitens: false,
    baseline: None,
    maps: |folded, scale, maps| maps.extend(self::maps(folded, scale)),
};

fn maps(folded: &Folded, scale: &Scale) -> impl Iterator<Item = Affine> {
    let residual = |cell: &Cell<'_>| {
        let history = folded.history(cell);
        let (of, from) = (cell.moments, history);
        (of.origin - from.origin) + (of.offset - from.offset)
    };
    let known: Vec<bool> = folded.histories.iter().map(|history| scale.is_known(history)).collect();
    let mut groups = vec![(0.0, 0.0); folded.groups.len()];
    for cell in folded.cells().filter(|cell| known[cell.cluster]) {
        let (weight, sum) = &mut groups[cell.group];
        *weight += cell.moments.count;
        *sum += cell.moments.count * residual(&cell);
    }
    folded.cells().map(move |cell| {
        let history = folded.history(&cell);
        let (weight, sum) = groups[cell.group];
        if !known[cell.cluster] || weight == 0.0 {
            return Affine::default();
        }
        Affine {
            origin: history.origin,
            offset: history.offset + sum / weight,
            scale: 1.0 / (scale.sigma(history) + scale.eps),
        }
    })
}
