//! Ids of a batch numbered in order of first appearance.
#![allow(clippy::cast_possible_truncation, reason = "batches of 2^32 entries and more are refused")]

/// A batch's ids as numbers 0, 1, 2, ...: equal ids have equal numbers.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    /// \[N\] the number of each entry.
    pub(crate) of: Vec<u32>,
    /// The entry where each number appeared first.
    pub(crate) first: Vec<u32>,
    /// Open addressing: number + 1, or 0.
    table: Vec<u32>,
}

impl Slots {
    /// Numbers `num_entries` entries by their keys.
    pub(crate) fn assign<K: Copy + Eq>(
        &mut self,
        num_entries: usize,
        key: impl Fn(usize) -> K,
        hash: impl Fn(K) -> u64,
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
                    let mut place = spread(hash(key(entry as usize)), bits);
                    while self.table[place] != 0 {
                        place = (place + 1) & ((1 << bits) - 1);
                    }
                    self.table[place] = slot as u32 + 1;
                }
            }
            let mut place = spread(hash(wanted), bits);
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

/// The highest bits of a product with 2^64 over the golden ratio: near keys lie far apart.
fn spread(hash: u64, bits: u32) -> usize {
    ((hash ^ (hash >> 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - bits)) as usize
}
