//! The two passes over a batch: rewards summed per cell, and cells' affine maps applied to rewards.
//!
//! A cell is what an estimator treats alike: a cluster, or the rollouts of a group that belong to one
//! cluster. The passes are plain loops over blocks that stay in the nearest cache. Sums are the same
//! bits with every instruction set and any number of threads; so are advantages, but for `f32` ones
//! of up to 64 cells with AVX-512, which are rounded otherwise (by 2e-7 of 1 + |A| at most).

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::elements::{Affine, Id, Real, Row};
use crate::kernels;
use crate::moments::{Moments, is_finite_reward};

/// Rewards per block: they and their ids stay in the nearest cache.
const BLOCK: usize = 2048;
/// Blocks after which it is decided whether the rest is summed up about a common shift.
const PROBE: usize = 2;
/// Rewards per chunk, at least: what a thread takes at a time. Chunks depend on the batch alone, and
/// are merged in their order, so that results do not depend on the number of threads.
const CHUNK: usize = 1 << 18;
/// A chunk has at least so many times more rewards than cells: merging costs per cell. Below, a common
/// shift does not pay either: the fewer rewards a cell has, the likelier they are close together.
const CHUNK_PER_CELL: usize = 64;

/// Moments of the rewards \[N\] under each id \[N\]: `moments[id]`, of count 0 where there are none.
/// False, and nothing of use in `moments`, if an id is not below `limit`.
///
/// A non-finite reward makes the moments of its cell non-finite. `rows` is a buffer.
pub(crate) fn fold<R: Real, I: Id>(
    rewards: &[R],
    ids: &[I],
    weights: Option<&[f64]>,
    limit: usize,
    num_threads: usize,
    rows: &mut Vec<Row>,
    moments: &mut Vec<Moments>,
) -> bool {
    moments.clear();
    let first = rewards.len().min(CHUNK);
    let weights_of = |from: usize, to: usize| weights.map(|weights| &weights[from..to]);
    let fits = fold_chunk(&rewards[..first], &ids[..first], weights_of(0, first), limit, rows);
    if fits {
        moments.extend(rows.iter().map(|row| row.moments()));
    }
    if !fits || first == rewards.len() {
        return fits;
    }
    let size = CHUNK.max(CHUNK_PER_CELL * moments.len());
    let mut folded = Vec::new();
    folded.resize_with((rewards.len() - first).div_ceil(size), || Some(Vec::new()));
    let tasks = folded.iter_mut().enumerate().map(|(chunk, rows)| (first + chunk * size, rows));
    in_parallel(tasks, num_threads, |(from, rows)| {
        let to = rewards.len().min(from + size);
        let weights = weights_of(from, to);
        let mut filled = Vec::new();
        let fits = fold_chunk(&rewards[from..to], &ids[from..to], weights, limit, &mut filled);
        *rows = fits.then_some(filled);
    });
    for rows in folded {
        let Some(rows) = rows else { return false };
        if rows.len() > moments.len() {
            moments.resize(rows.len(), Moments::default());
        }
        for (total, row) in moments.iter_mut().zip(rows) {
            *total = total.merge(row.moments());
        }
    }
    true
}

/// Does all tasks, each by whichever thread is free.
fn in_parallel<T: Send>(
    tasks: impl ExactSizeIterator<Item = T> + Send,
    num_threads: usize,
    work: impl Fn(T) + Sync,
) {
    let num_helpers = num_threads.min(tasks.len()).saturating_sub(1);
    if num_helpers == 0 {
        return tasks.for_each(work);
    }
    let tasks = Mutex::new(tasks);
    let unwound = Mutex::new(None);
    let go_on = || {
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some(task) = task else { return };
                work(task);
            }
        }));
        if let Err(payload) = result {
            *unwound.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
        }
    };
    thread::scope(|scope| {
        for _ in 0..num_helpers {
            // A system that gives no more threads is no reason to stop half-way.
            let _ = thread::Builder::new().spawn_scoped(scope, go_on);
        }
        go_on();
    });
    // In this thread, with what it was: a scope would make a panic of its own of it.
    if let Some(payload) = unwound.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(payload);
    }
}

/// Grows `rows` to hold all ids; false if one is not below `limit`.
fn make_room<I: Id>(ids: &[I], limit: usize, rows: &mut Vec<Row>) -> bool {
    let highest = kernels::highest(ids);
    if highest >= rows.len() {
        if highest >= limit {
            return false;
        }
        rows.resize((highest + 1).next_power_of_two().min(limit), Row::default());
    }
    true
}

/// Sums up one chunk about its first reward, all cells alike, which is fastest; the cells that this
/// serves badly once more, about the first reward of each.
fn fold_chunk<R: Real, I: Id>(
    rewards: &[R],
    ids: &[I],
    weights: Option<&[f64]>,
    limit: usize,
    rows: &mut Vec<Row>,
) -> bool {
    rows.clear();
    let shift = rewards.first().map_or(0.0, |reward| reward.to_f64());
    if weights.is_some() || rewards.len() < BLOCK || !is_finite_reward(shift) {
        return fold_each(rewards, ids, weights, limit, rows);
    }
    for (at, (rewards_here, ids_here)) in rewards.chunks(BLOCK).zip(ids.chunks(BLOCK)).enumerate() {
        if !make_room(ids_here, limit, rows) {
            return false;
        }
        let few = rewards.len() < CHUNK_PER_CELL * rows.len();
        if few || at == PROBE && !are_near(rows) {
            rows.clear();
            return fold_each(rewards, ids, None, limit, rows);
        }
        kernels::about(shift, rewards_here, ids_here, rows);
    }
    let mut poor = Vec::new();
    for (id, row) in rows.iter_mut().enumerate() {
        row.set_shift(shift);
        if row.cancels() {
            poor.resize(id + 1, false);
            poor[id] = true;
            *row = Row::default();
        }
    }
    if !poor.is_empty() {
        for (reward, id) in rewards.iter().zip(ids) {
            if poor.get(id.index()) == Some(&true) {
                kernels::push(rows, *id, *reward);
            }
        }
    }
    true
}

/// Whether a common shift serves the cells well as far as can be told: seven of eight that have two
/// rewards or more. One reward tells nothing, whatever it is.
fn are_near(rows: &[Row]) -> bool {
    let told = || rows.iter().filter(|row| row.has_several());
    told().filter(|row| row.cancels()).count() * 8 <= told().count()
}

/// Sums up one chunk about the first reward of each cell.
fn fold_each<R: Real, I: Id>(
    rewards: &[R],
    ids: &[I],
    weights: Option<&[f64]>,
    limit: usize,
    rows: &mut Vec<Row>,
) -> bool {
    let mut from = 0;
    for (rewards, ids) in rewards.chunks(BLOCK).zip(ids.chunks(BLOCK)) {
        if !make_room(ids, limit, rows) {
            return false;
        }
        kernels::each(rewards, ids, weights.map(|weights| &weights[from..]), rows);
        from += rewards.len();
    }
    true
}

/// Advantages from here on are written past the caches, which they would only sweep.
const STREAM_FROM: usize = 1 << 20;

/// Advantages \[N\] of the rewards \[N\]: the map of `ids[i]` applied to each, out of `maps` with
/// their ids, all below `num_maps`. `pairs` is a buffer.
pub(crate) fn apply<R: Real, I: Id>(
    rewards: &[R],
    ids: &[I],
    num_maps: usize,
    maps: impl Iterator<Item = (usize, Affine)> + Clone,
    num_threads: usize,
    pairs: &mut Vec<[f64; 2]>,
    out: &mut [R],
) {
    pairs.clear();
    pairs.resize(num_maps, [0.0; 2]);
    let mut exact = true;
    for (id, Affine { origin, offset, scale }) in maps.clone() {
        let center = origin + offset;
        let lost = offset - (center - origin);
        exact &= (lost * scale).abs() <= R::NEGLIGIBLE;
        pairs[id] = [center, scale];
    }
    let mut placed = Vec::new();
    if !exact {
        placed.resize(num_maps, Affine::default());
        maps.for_each(|(id, map)| placed[id] = map);
    }
    let streamed = out.len() >= STREAM_FROM;
    let chunks = rewards.chunks(CHUNK).zip(ids.chunks(CHUNK)).zip(out.chunks_mut(CHUNK));
    in_parallel(chunks, num_threads, |((rewards, ids), out)| {
        if !exact {
            kernels::apply_exactly(rewards, ids, &placed, out);
        } else if !kernels::permute(rewards, ids, pairs, streamed, out) {
            kernels::apply(rewards, ids, pairs, out);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, PROBE, are_near};
    use crate::elements::Row;
    use crate::kernels;

    /// Rows as they are when the probe looks at them, of rewards `x + means[id]` about the first one.
    fn probed(num_cells: usize, mean: impl Fn(usize) -> f64) -> Vec<Row> {
        let mut rows = vec![Row::default(); num_cells];
        let scattered = |at: usize| (at * 7919) % num_cells;
        let id = |at| u32::try_from(scattered(at)).unwrap();
        let ids: Vec<u32> = (0..PROBE * BLOCK).map(id).collect();
        let rewards: Vec<f64> =
            (0..ids.len()).map(|at| (at as f64 * 0.7).sin() + mean(scattered(at))).collect();
        kernels::about(rewards[0], &rewards, &ids, &mut rows);
        rows
    }

    #[test]
    fn cells_of_one_reward_do_not_count_against_a_common_shift() {
        for num_cells in [1, 64, 3_000, 3_500, 10_000, 100_000] {
            assert!(are_near(&probed(num_cells, |_| 0.0)), "{num_cells} cells");
        }
        for num_cells in [64, 2_000, 3_500] {
            let apart = probed(num_cells, |id| 1e4 * (1.0 + id as f64));
            assert!(!are_near(&apart), "{num_cells} cells far apart");
        }
    }
}
