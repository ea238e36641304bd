//! The steps of one call: fold, remember, map, write.
#![allow(clippy::cast_possible_truncation, reason = "cells are numbered in 32 bits, see `Slots`")]

use std::cell::Cell;

use crate::batch::{Batch, Ids, number};
use crate::elements::{Affine, Real, Row};
use crate::error::Error;
use crate::estimators::{Baseline, Folded, Scale, advantages_of};
use crate::fold::{apply, fold};
use crate::histories::Sums;
use crate::ids::DIRECT;
use crate::moments::Moments;
use crate::options::{Options, Order};
use crate::slots::{Seed, Slots};
use crate::state::State;
use crate::table::Triple;

/// Which halves of a call are done.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Halves {
    Both,
    Update,
    Normalize,
}

/// One call; its groups are None where nobody wants to know them.
pub(crate) struct Call<'a, R> {
    pub(crate) options: &'a Options,
    pub(crate) scale: Scale,
    pub(crate) state: &'a State,
    /// Whether no other call is going on.
    pub(crate) is_only: bool,
    pub(crate) batch: Batch<'a, R>,
}

/// Buffers of a call, kept by each thread: small batches would spend their time in the allocator.
#[derive(Default)]
pub(crate) struct Scratch {
    slots: Slots,
    cluster_slots: Slots,
    group_slots: Slots,
    parent_slots: Slots,
    /// By cluster.
    keys: Vec<u32>,
    /// By cluster: its moments in this batch. Empty where cells are clusters.
    batch: Vec<Moments>,
    /// By cluster: its history before this batch, where that is asked for.
    before: Vec<Moments>,
    /// By parent: its key. Empty unless parents are given.
    parent_keys: Vec<u32>,
    /// By parent: its rewards in this batch.
    parent_batch: Vec<Moments>,
    /// By parent: its history as it is read.
    parents: Vec<Moments>,
    /// All clusters' history together, as it is read.
    pool: Option<Moments>,
    /// By cluster: what advantages are multiplied with for the cluster's frequency.
    factors: Vec<f64>,
    folded: Folded,
    maps: Vec<Affine>,
    rows: Vec<Row>,
    pairs: Vec<[f64; 2]>,
    /// Length of the table of maps by key, where the batch was folded by its ids as they are.
    by_index: Option<usize>,
}

impl Scratch {
    fn clear(&mut self) {
        self.by_index = None;
        self.pool = None;
        self.keys.clear();
        self.batch.clear();
        self.before.clear();
        self.parent_keys.clear();
        self.parent_batch.clear();
        self.parents.clear();
        self.factors.clear();
        self.folded.clear();
        self.maps.clear();
    }

    /// Keys of the clusters, and their moments in this batch.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (&u32, &Moments)> {
        let cells_are_clusters = self.batch.is_empty();
        self.keys.iter().zip(if cells_are_clusters { &self.folded.moments } else { &self.batch })
    }

    /// The same of their parents.
    pub(crate) fn parent_parts(&self) -> impl Iterator<Item = (&u32, &Moments)> {
        self.parent_keys.iter().zip(&self.parent_batch)
    }

    /// Whether all sums are finite, as those of finite rewards are.
    pub(crate) fn is_finite(&self) -> bool {
        self.folded.moments.iter().all(|moments| (moments.offset + moments.m2).is_finite())
    }

    /// Whether a non-finite reward may be among these. Too large a one shows in one of the three.
    pub(crate) fn is_suspect(&self) -> bool {
        self.folded.moments.iter().any(|moments| {
            !(moments.origin.abs() < 1e130 && moments.offset.abs() < 1e130 && moments.m2 < 1e260)
        })
    }
}

/// The key of a cluster that nothing is known of: no row has it.
const UNKNOWN: u32 = u32::MAX;

/// Buffers for more cells, or more rewards of a batch that is not folded by index, are not kept. None
/// is longer than the longest of those that are looked at.
const KEPT: usize = 1 << 16;

/// Lends the thread's buffers, emptied.
pub(crate) fn with_scratch<T>(work: impl FnOnce(&mut Scratch) -> T) -> T {
    thread_local! {
        static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
    }
    let mut scratch = SCRATCH.take().unwrap_or_default();
    scratch.clear();
    let result = work(&mut scratch);
    if [&scratch.keys, &scratch.slots.of].iter().all(|list| list.capacity() <= KEPT)
        && scratch.rows.capacity() <= KEPT
    {
        SCRATCH.set(Some(scratch));
    }
    result
}

impl<R: Real> Call<'_, R> {
    /// Sums the batch up by cell. Remembers nothing yet, the ids of clusters no more than rewards.
    pub(crate) fn fold(&self, scratch: &mut Scratch) {
        let Batch { rewards, groups, parents, weights, .. } = self.batch;
        // A table of keys does not pay for a few rewards.
        let many = rewards.len() >= 32;
        let in_order =
            matches!(self.options.estimator.baseline, Some(Baseline::ExponentialMean(_)));
        let alone = groups.is_none() && parents.is_none() && weights.is_none();
        let plain = many && alone && !in_order && !self.state.is_shared();
        if !(plain && self.fold_by_index(scratch)) {
            self.fold_by_cell(scratch);
        }
    }

    /// Finds the keys of the clusters, giving new ones if they are to be merged into.
    pub(crate) fn find_keys(&self, merging: bool, scratch: &mut Scratch) -> Result<(), Error> {
        let Scratch { slots, cluster_slots, keys, by_index, .. } = scratch;
        if by_index.is_some() {
            return Ok(());
        }
        let key = |entry: u32| {
            let id = self.batch.clusters.id(entry as usize);
            if merging { self.state.key_of(id) } else { Ok(self.state.find(id).unwrap_or(UNKNOWN)) }
        };
        if self.batch.groups.is_none() {
            for &entry in &slots.first {
                keys.push(key(entry)?);
            }
        } else {
            for &cell in &cluster_slots.first {
                keys.push(key(slots.first[cell as usize])?);
            }
        }
        Ok(())
    }

    /// Finds the keys of the parents as `find_keys` does, after it, and what they have in this batch: what
    /// their clusters have.
    pub(crate) fn find_parents(&self, merging: bool, scratch: &mut Scratch) -> Result<(), Error> {
        let Some(ids) = self.batch.parents else { return Ok(()) };
        let Scratch { slots, cluster_slots, parent_slots, keys, folded, batch, .. } = scratch;
        let mut parent_keys = Vec::with_capacity(keys.len());
        for cluster in 0..keys.len() {
            let grouped = self.batch.groups.is_some();
            let cell = if grouped { cluster_slots.first[cluster] as usize } else { cluster };
            let id = ids.id(slots.first[cell] as usize).as_parent();
            let found = if merging { Some(self.state.key_of(id)?) } else { self.state.find(id) };
            parent_keys.push(found.unwrap_or(UNKNOWN));
        }
        parent_slots.assign(keys.len(), |cluster| i64::from(parent_keys[cluster]), Seed::one);
        let first = parent_slots.first.iter();
        scratch.parent_keys.extend(first.map(|&cluster| parent_keys[cluster as usize]));
        scratch.parent_batch.resize(scratch.parent_keys.len(), Moments::default());
        let clusters = if batch.is_empty() { &folded.moments } else { &*batch };
        for (&parent, &moments) in parent_slots.of.iter().zip(clusters) {
            let parent = &mut scratch.parent_batch[parent as usize];
            *parent = parent.merge(moments);
        }
        Ok(())
    }

    /// Folds by cluster, where ids are small numbers that are keys: the fastest way. False if not.
    fn fold_by_index(&self, scratch: &mut Scratch) -> bool {
        let (rewards, threads) = (self.batch.rewards, self.options.num_threads);
        // No more cells than twice the rewards: they are all looked at once the rewards are summed.
        let limit = (2 * rewards.len()).min(usize::try_from(DIRECT).unwrap_or(usize::MAX));
        let (rows, moments) = (&mut scratch.rows, &mut scratch.folded.moments);
        let fits = match self.batch.clusters {
            Ids::I32(ids) => fold(rewards, ids, None, limit, threads, rows, moments),
            Ids::I64(ids) => fold(rewards, ids, None, limit, threads, rows, moments),
            Ids::Any(_) => false,
        };
        if !fits {
            return false;
        }
        scratch.by_index = Some(moments.len());
        for key in 0..moments.len() {
            if moments[key].count > 0.0 {
                moments[scratch.keys.len()] = moments[key];
                scratch.keys.push(key as u32);
            }
        }
        moments.truncate(scratch.keys.len());
        true
    }

    /// Folds by cluster, or by cluster and group, whatever the ids.
    fn fold_by_cell(&self, scratch: &mut Scratch) {
        let Batch { rewards, weights, .. } = self.batch;
        let (cluster_numbers, group_numbers): (Vec<i64>, Vec<i64>);
        let mut clusters = self.batch.clusters;
        if let Ids::Any(ids) = clusters {
            cluster_numbers = number(ids);
            clusters = Ids::I64(&cluster_numbers);
        }
        let mut groups = self.batch.groups;
        if let Some(Ids::Any(ids)) = groups {
            group_numbers = number(ids);
            groups = Some(Ids::I64(&group_numbers));
        }
        let Scratch { slots, cluster_slots, group_slots, folded, .. } = scratch;
        if let Some(groups) = groups {
            let pair = |entry: usize| (clusters.value(entry), groups.value(entry));
            slots.assign(rewards.len(), pair, Seed::pair);
        } else {
            slots.assign(rewards.len(), |entry| clusters.value(entry), Seed::one);
        }
        let (threads, moments) = (self.options.num_threads, &mut folded.moments);
        fold(rewards, &slots.of, weights, usize::MAX, threads, &mut scratch.rows, moments);
        moments.truncate(slots.first.len());
        if let Some(weights) = weights {
            folded.weights.resize(moments.len(), 0.0);
            for (&weight, &slot) in weights.iter().zip(&slots.of) {
                folded.weights[slot as usize] += weight * weight;
            }
            for (square, moments) in folded.weights.iter_mut().zip(moments.iter()) {
                *square = if moments.count > 0.0 { *square / moments.count } else { 0.0 };
            }
        }
        let Some(groups) = groups else { return };
        let first = |cell: usize| slots.first[cell] as usize;
        cluster_slots.assign(moments.len(), |cell| clusters.value(first(cell)), Seed::one);
        group_slots.assign(moments.len(), |cell| groups.value(first(cell)), Seed::one);
        scratch.batch.resize(cluster_slots.first.len(), Moments::default());
        folded.groups.resize(group_slots.first.len(), Moments::default());
        for (cell, &moments) in moments.iter().enumerate() {
            let cluster = &mut scratch.batch[cluster_slots.of[cell] as usize];
            *cluster = cluster.merge(moments);
            let group = &mut folded.groups[group_slots.of[cell] as usize];
            *group = group.merge(moments);
        }
        folded.cluster_of.clone_from(&cluster_slots.of);
        folded.group_of.clone_from(&group_slots.of);
    }

    /// Merges what was folded, unless only the other half is wanted, and reads what is remembered.
    pub(crate) fn remember(&self, halves: Halves, scratch: &mut Scratch) -> Result<(), Error> {
        let Options { estimator, order, forgetting, .. } = *self.options;
        let is_only = self.is_only;
        let (streams, pending) = (&self.state.streams, self.state.pending.as_ref());
        let merging = halves != Halves::Normalize;
        let reads_after = order == Order::UpdateThenNormalize;
        if self.options.reads_pool() && halves != Halves::Update && !reads_after {
            scratch.pool = self.state.worked_out_pool();
        }
        let Scratch { keys, folded, before, batch, slots, .. } = scratch;
        let batch: &[Moments] = if batch.is_empty() { &folded.moments } else { batch };
        folded.histories.reserve(keys.len());
        for (&key, &moments) in keys.iter().zip(batch) {
            let (old, new) = self.remember_rewards(key, moments, merging)?;
            if let Some(Baseline::Regression(_)) = estimator.baseline {
                before.push(old);
            }
            folded.histories.push(if reads_after { new } else { old });
        }
        for (&key, &moments) in scratch.parent_keys.iter().zip(&scratch.parent_batch) {
            let (old, new) = self.remember_rewards(key, moments, merging)?;
            scratch.parents.push(if reads_after { new } else { old });
        }
        scratch.pool = self.remember_pool(halves, batch, scratch.pool)?;
        let touched = |sums: &Sums, pending: Option<&Sums>, added: &[Triple], kept: &[f64]| {
            let kept = kept.iter().copied().chain(std::iter::repeat(forgetting));
            let changes = added.iter().zip(kept);
            let read =
                keys.iter().zip(batch).zip(changes).map(|((&key, batch), (&added, kept))| {
                    if !merging || batch.count == 0.0 {
                        return Ok(sums.read(key));
                    }
                    if let Some(pending) = pending {
                        pending.add(key, added, 1.0, is_only)?;
                    }
                    let (old, new) = sums.add(key, added, kept, is_only)?;
                    Ok(if reads_after { new } else { old })
                });
            read.collect::<Result<Vec<Triple>, Error>>()
        };
        if let Some(sums) = &streams.parts
            && self.batch.groups.is_some()
        {
            let mut added = vec![Triple::default(); keys.len()];
            for cell in folded.cells().filter(|cell| cell.moments.count > 0.0) {
                let [parts, squares, within] = &mut added[cell.cluster];
                *parts += cell.weight;
                *squares += cell.moments.count * cell.moments.count;
                *within += cell.moments.m2;
            }
            let pending = pending.and_then(|pending| pending.parts.as_ref());
            folded.parts = touched(sums, pending, &added, &[])?;
            folded.own.clone_from(&folded.histories);
        }
        if let Some((sums, baseline)) = streams.baseline.as_ref().zip(estimator.baseline) {
            let mut added = vec![Triple::default(); keys.len()];
            let mut kept = Vec::new();
            match baseline {
                Baseline::Regression(evidence) if merging => {
                    let scored = match self.batch.score_norms {
                        Some(norms) => self.reweighted(norms, slots),
                        None => folded.moments.clone(),
                    };
                    for (cell, scored) in folded.cells().zip(&scored) {
                        let terms = evidence(&cell, scored, &before[cell.cluster]);
                        for (sum, value) in added[cell.cluster].iter_mut().zip(terms) {
                            *sum += value;
                        }
                    }
                }
                Baseline::ExponentialMean(decay) if merging => {
                    kept = self.folded_in_order(decay, slots, folded, &mut added);
                }
                _ => {}
            }
            let pending = pending.and_then(|pending| pending.baseline.as_ref());
            folded.baselines = touched(sums, pending, &added, &kept)?;
        }
        Ok(())
    }

    /// Merges the rewards of a cluster, or of a parent, unless only the other half is wanted, and returns
    /// its history right before and right after.
    #[inline(always)]
    fn remember_rewards(
        &self,
        key: u32,
        batch: Moments,
        merging: bool,
    ) -> Result<(Moments, Moments), Error> {
        let rewards = &self.state.streams.rewards;
        if !merging {
            let now = rewards.read(key);
            return Ok((now, now));
        }
        if let Some(pending) = &self.state.pending {
            pending.rewards.merge(key, batch, 1.0, self.is_only)?;
        }
        rewards.merge(key, batch, self.options.forgetting, self.is_only)
    }

    /// Merges a batch into the history of all clusters together, as `remember` does, and returns that as
    /// it is read, if it is read and there is any. `before` is what it was, where it is worked out.
    fn remember_pool(
        &self,
        halves: Halves,
        batch: &[Moments],
        before: Option<Moments>,
    ) -> Result<Option<Moments>, Error> {
        let reads_after = self.options.order == Order::UpdateThenNormalize;
        let merged = if halves == Halves::Normalize {
            None
        } else {
            self.state.merge_into_pool(batch.iter().copied(), self.is_only)?
        };
        if !self.options.reads_pool() || halves == Halves::Update {
            return Ok(None);
        }
        let pool = match merged {
            Some((old, new)) => Some(if reads_after { new } else { old }),
            None if reads_after || halves == Halves::Normalize => Some(self.state.pool()),
            None => before,
        };
        Ok(pool.filter(|pool| pool.count > 0.0))
    }

    /// What the rewards of each cluster add to its exponential mean, and how much they leave of it.
    fn folded_in_order(
        &self,
        decay: f64,
        slots: &Slots,
        folded: &Folded,
        added: &mut [Triple],
    ) -> Vec<f64> {
        let mut kept = vec![1.0; added.len()];
        // From the last reward to the first, so that `kept` is what later ones leave of it.
        for (entry, &cell) in slots.of.iter().enumerate().rev() {
            let cell = cell as usize;
            let cluster = folded.cluster_of.get(cell).map_or(cell, |&of| of as usize);
            let weight = self.batch.weights.map_or(1.0, |weights| weights[entry]);
            let left = decay.powf(weight);
            let reward = self.batch.rewards[entry].to_f64();
            added[cluster][1] += kept[cluster] * (1.0 - left) * reward;
            kept[cluster] *= left;
        }
        kept
    }

    /// The rewards of each cell with weights multiplied by a column.
    fn reweighted(&self, column: &[f64], slots: &Slots) -> Vec<Moments> {
        let Batch { rewards, weights, .. } = self.batch;
        let weights: Vec<f64> = match weights {
            Some(weights) => weights.iter().zip(column).map(|(w, value)| w * value).collect(),
            None => column.to_vec(),
        };
        let (mut rows, mut moments) = (Vec::new(), Vec::new());
        fold(rewards, &slots.of, Some(&weights), usize::MAX, 1, &mut rows, &mut moments);
        moments
    }

    /// Makes the maps of all cells.
    pub(crate) fn map(&self, halves: Halves, scratch: &mut Scratch) -> Result<(), Error> {
        let Options { estimator, prior_count, frequency_weight, .. } = *self.options;
        let Scratch { keys, folded, maps, factors, slots, parents, parent_slots, .. } = scratch;
        if let Some(pool) = scratch.pool {
            let of_pool = pool.counted_as(prior_count);
            for parent in parents.iter_mut() {
                *parent = parent.merge(of_pool).counted_as(prior_count);
            }
            for (cluster, history) in folded.histories.iter_mut().enumerate() {
                let share = history.count / pool.count;
                factors.push(if share > 0.0 { share.powf(-frequency_weight) } else { 1.0 });
                let prior = if parents.is_empty() {
                    of_pool
                } else {
                    parents[parent_slots.of[cluster] as usize]
                };
                *history = history.merge(prior);
            }
        }
        if estimator.needs_lengths
            && let Some(lengths) = self.batch.lengths
        {
            folded.by_length.resize(folded.groups.len(), Moments::default());
            for (moments, &group) in
                self.reweighted(lengths, slots).into_iter().zip(&folded.group_of)
            {
                let group = &mut folded.by_length[group as usize];
                *group = group.merge(moments);
            }
        }
        (estimator.maps)(folded, &self.scale, maps);
        if frequency_weight != 0.0 && !factors.is_empty() {
            for (map, cell) in maps.iter_mut().zip(folded.cells()) {
                map.scale *= factors[cell.cluster];
            }
        }
        if let Some(sums) = &self.state.streams.advantages
            && halves == Halves::Both
        {
            let mut added = vec![Triple::default(); keys.len()];
            for (cell, map) in folded.cells().zip(maps.iter()) {
                let Moments { count, offset: mean, m2, .. } = advantages_of(cell.moments, map);
                let [number, sum, squares] = &mut added[cell.cluster];
                *number += count;
                *sum += count * mean;
                *squares += m2 + count * mean * mean;
            }
            for (&key, &added) in keys.iter().zip(&added) {
                // With an eps near 0 advantages can be too large to be summed up.
                if added[0] > 0.0 && added.iter().all(|sum| sum.is_finite()) {
                    sums.add(key, added, self.options.forgetting, self.is_only)?;
                }
            }
        }
        Ok(())
    }

    /// Writes the advantages.
    pub(crate) fn write(&self, scratch: &mut Scratch, out: &mut [R]) {
        let num_threads = self.options.num_threads;
        let Scratch { maps, pairs, keys, slots, by_index, .. } = scratch;
        let (rewards, num_cells, maps) = (self.batch.rewards, maps.len(), maps.iter().copied());
        if let Some(length) = *by_index {
            let places = keys.iter().map(|&key| key as usize).zip(maps);
            match self.batch.clusters {
                Ids::I32(ids) => apply(rewards, ids, length, places, num_threads, pairs, out),
                Ids::I64(ids) => apply(rewards, ids, length, places, num_threads, pairs, out),
                Ids::Any(_) => unreachable!("such ids are never folded by index"),
            }
        } else {
            let places = (0..num_cells).zip(maps);
            apply(rewards, &slots.of, num_cells, places, num_threads, pairs, out);
        }
        if let Some(clip) = self.options.clip {
            for advantage in out {
                *advantage = R::from_f64(advantage.to_f64().clamp(-clip, clip));
            }
        }
    }
}
