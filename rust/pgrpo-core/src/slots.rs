//! Ids of a batch numbered in order of first appearance.
#![allow(clippy::cast_possible_truncation, reason = "batches of 2^32 entries and more are refused")]

use std::hash::{BuildHasher, RandomState};

/// Numbers that nobody can guess, so that nobody can make up ids which share their places in a table.
#[derive(Debug)]
pub(crate) struct Seed([u64; 3]);

impl Default for Seed {
    fn default() -> Self {
        let state = RandomState::new();
        Self([0, 1, 2].map(|number: u64| state.hash_one(number)))
    }
}

/// Both halves of a product of 128 bits in one.
fn folded(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}

impl Seed {
    /// Hash of an id.
    ///
    /// One product alone would leave the hashes of 0, 1, 2, ... at even steps, as large as its factor
    /// says, and with some factors all in few places: a second one mixes them.
    pub(crate) fn one(&self, id: i64) -> u64 {
        self.mixed(id.cast_unsigned() ^ self.0[0])
    }

    /// Hash of two ids.
    pub(crate) fn pair(&self, (first, second): (i64, i64)) -> u64 {
        self.mixed(
            folded(first.cast_unsigned() ^ self.0[0], self.0[1] | 1) ^ second.cast_unsigned(),
        )
    }

    fn mixed(&self, bits: u64) -> u64 {
        let [_, second, third] = self.0;
        folded(folded(bits, second | 1), third | 1)
    }
}

/// A batch's ids as numbers 0, 1, 2, ...: equal ids have equal numbers.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    seed: Seed,
    /// \[N\] the number of each entry.
    pub(crate) of: Vec<u32>,
    /// The entry where each number appeared first.
    pub(crate) first: Vec<u32>,
    /// Open addressing: number + 1, or 0.
    table: Vec<u32>,
}

impl Slots {
    /// Numbers `num_entries` entries by their keys, in order of first appearance.
    pub(crate) fn assign<K: Copy + Eq>(
        &mut self,
        num_entries: usize,
        key: impl Fn(usize) -> K,
        hash: impl Fn(&Seed, K) -> u64,
    ) {
        self.of.clear();
        self.first.clear();
        self.table.clear();
        // Few numbers are usual, however many entries: the table grows with the numbers.
        let mut bits = (2 * num_entries.clamp(4, 512)).next_power_of_two().trailing_zeros();
        self.table.resize(1 << bits, 0);
        let mut last = None;
        for entry in 0..num_entries {
            let wanted = key(entry);
            // Rollouts of a group come in a row.
            if let Some((last, slot)) = last
                && last == wanted
            {
                self.of.push(slot);
                continue;
            }
            if self.first.len() * 2 >= self.table.len() {
                bits += 2;
                self.table.clear();
                self.table.resize(1 << bits, 0);
                for (slot, &entry) in self.first.iter().enumerate() {
                    let mut place = place_of(hash(&self.seed, key(entry as usize)), bits);
                    while self.table[place] != 0 {
                        place = (place + 1) & ((1 << bits) - 1);
                    }
                    self.table[place] = slot as u32 + 1;
                }
            }
            let mut place = place_of(hash(&self.seed, wanted), bits);
            let slot = loop {
                match self.table[place].checked_sub(1) {
                    Some(slot) if key(self.first[slot as usize] as usize) == wanted => break slot,
                    Some(_) => place = (place + 1) & ((1 << bits) - 1),
                    None => {
                        let slot = self.first.len() as u32;
                        self.first.push(entry as u32);
                        self.table[place] = slot + 1;
                        break slot;
                    }
                }
            };
            last = Some((wanted, slot));
            self.of.push(slot);
        }
    }
}

/// Where a key of a hash is looked for first.
fn place_of(hash: u64, bits: u32) -> usize {
    (hash >> (64 - bits)) as usize
}

#[cfg(test)]
mod tests {
    use super::{Seed, Slots, place_of};

    /// Places that are looked at for ids when they are all different.
    fn num_probes(hashes: impl Iterator<Item = u64>, bits: u32) -> usize {
        let mut taken = vec![false; 1 << bits];
        let mut probes = 0;
        for hash in hashes {
            let mut place = place_of(hash, bits);
            while std::mem::replace(&mut taken[place], true) {
                place = (place + 1) & ((1 << bits) - 1);
                probes += 1;
            }
            probes += 1;
        }
        probes
    }

    #[test]
    fn ids_made_up_against_a_known_hash_are_like_any_others() {
        // All of these have the same place if it is the highest bits of (id ^ (id >> 32)) times the golden
        // ratio, which it was once; the others are multiples.
        let inverse = 0xF1DE_83E1_9937_733D_u64;
        assert_eq!(inverse.wrapping_mul(0x9E37_79B9_7F4A_7C15), 1);
        let made_up = |at: u64| at.wrapping_mul(inverse) ^ (at.wrapping_mul(inverse) >> 32);
        for step in [0, 1, 1 << 16, 1 << 32, 1 << 47, (1 << 32) + 1] {
            let id = move |at: u64| if step == 0 { made_up(at) } else { at.wrapping_mul(step) };
            let ids = (0..1 << 12).map(move |at| id(at).cast_signed());
            // Of a hundred seeds, several were bad ones when a hash was one product.
            for seed in [(); 100].map(|()| Seed::default()) {
                let of_one = num_probes(ids.clone().map(|id| seed.one(id)), 13);
                assert!(of_one < 4 << 12, "{of_one} probes with steps of {step:#x}");
                for pair in [|id| (id, id), |id| (id, 7), |id| (7, id)] {
                    let of_pairs = num_probes(ids.clone().map(|id| seed.pair(pair(id))), 13);
                    assert!(
                        of_pairs < 4 << 12,
                        "{of_pairs} probes of pairs with steps of {step:#x}"
                    );
                }
            }
        }
    }

    #[test]
    fn numbers_do_not_depend_on_the_seed() {
        let ids: Vec<i64> = (0..5_000).map(|at| (at * at) % 1_009 - 500).collect();
        let [first, second] = [(); 2].map(|()| {
            let mut slots = Slots::default();
            slots.assign(ids.len(), |at| ids[at], Seed::one);
            (slots.of, slots.first)
        });
        assert_eq!(first, second);
        assert!(first.1.is_sorted());
    }
}
