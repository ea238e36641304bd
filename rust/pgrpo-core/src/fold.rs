//! A batch summed up per id.

use std::collections::HashMap;
use std::hash::Hash;

use crate::moments::{Moments, is_finite_reward};

/// The moments of a batch's rewards under each id, whatever order the ids come in.
///
/// Non-finite rewards are left out of the moments, but keep their slot.
#[derive(Clone, Debug)]
pub struct Fold<I> {
    /// \[K\] distinct ids in order of first appearance, so that equal calls add up equally.
    pub ids: Vec<I>,
    /// \[N\] position in `ids` of each reward's id.
    pub slots: Vec<usize>,
    /// \[K\] moments of the finite rewards of each id.
    pub moments: Vec<Moments>,
}

impl<I: Copy + Eq + Hash> Fold<I> {
    /// Folds `rewards: [N]` by `ids: [N]`.
    #[must_use]
    pub fn new(rewards: &[f64], ids: &[I]) -> Self {
        debug_assert_eq!(rewards.len(), ids.len());
        let mut fold =
            Self { ids: Vec::new(), slots: Vec::with_capacity(ids.len()), moments: Vec::new() };
        let mut slot_of = HashMap::new();
        for (&reward, &id) in rewards.iter().zip(ids) {
            let slot = match fold.slots.last() {
                // Rollouts of a group come in a row: most rewards share the id before theirs.
                Some(&last) if fold.ids[last] == id => last,
                _ => *slot_of.entry(id).or_insert_with(|| {
                    fold.ids.push(id);
                    fold.moments.push(Moments::default());
                    fold.ids.len() - 1
                }),
            };
            fold.slots.push(slot);
            if is_finite_reward(reward) {
                fold.moments[slot].push(reward);
            }
        }
        fold
    }
}
