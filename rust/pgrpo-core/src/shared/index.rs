//! From cluster ids to slots.

use crate::arena::{Arena, Zeroed};
use crate::error::Error;
use crate::ids::{AnyId, ClusterId};
use crate::sync::{AtomicU64, Ordering};
use crate::table::INTERNED;

/// Slots that are tried for an id before it is refused, which bounds every look-up. A table of 2^24
/// slots, half full with integers, had 64 taken in a row at most.
const PROBES: u32 = 256;

/// Bytes of one word of names.
const WORD: usize = 8;

#[derive(Default)]
#[repr(transparent)]
pub(super) struct Word(pub(super) AtomicU64);

// SAFETY: one atomic; zero is its default.
#[allow(unsafe_code, reason = "words come out of zeroed pages")]
unsafe impl Zeroed for Word {}

/// The keys of cluster ids, [`INTERNED`] plus the number of a slot: a hash table of fixed capacity
/// with linear probing, which nothing is ever taken out of.
///
/// A new id is first written down behind the names there are, where nobody looks; then one exchange
/// on an empty slot publishes it. A slot holds half of the id's hash (high 32 bits), and the place of
/// its name plus 1 (low 32 bits); 0 is an empty slot.
///
/// # Progress
/// Looking up is wait-free. Interning is lock-free: who loses a slot has seen another id enter the
/// table, or the same.
pub struct Index {
    slots: Arena<Word>,
    names: Arena<Word>,
    /// Its element [`USED`](Self::USED) is the number of words taken from `names`.
    counters: Arena<Word>,
    /// A power of two.
    num_slots: u32,
    num_words: u32,
    /// Ids that find room for sure.
    capacity: u32,
}

impl Index {
    /// Where `counters` holds the number of words of `names` in use.
    pub(super) const USED: u32 = if cfg!(loom) { 0 } else { 448 };

    pub(super) fn new(
        [slots, names, counters]: [Arena<Word>; 3],
        num_slots: u32,
        num_words: u32,
        capacity: u32,
    ) -> Self {
        assert!(num_slots.is_power_of_two());
        Self { slots, names, counters, num_slots, num_words, capacity }
    }

    /// The key of an id, which may be new.
    ///
    /// # Errors
    /// [`Error::Full`] if there is no room for a new id.
    pub fn key(&self, id: AnyId<'_>) -> Result<u32, Error> {
        match id {
            AnyId::Int(id) => self.intern(&Encoded { header: INT, payload: &id.to_le_bytes() }),
            AnyId::Name(name) => self.intern(&Encoded::name(name)),
        }
    }

    /// The key of an id, if it has one.
    #[must_use]
    pub fn find(&self, id: AnyId<'_>) -> Option<u32> {
        match id {
            AnyId::Int(id) => self.search(&Encoded { header: INT, payload: &id.to_le_bytes() }),
            AnyId::Name(name) => self.search(&Encoded::name(name)),
        }
    }

    /// The id of a key; None for a key that was never given out.
    #[must_use]
    pub fn id(&self, key: u32) -> Option<ClusterId> {
        let slot = key.checked_sub(INTERNED).filter(|&slot| slot < self.num_slots)?;
        let at = place(self.entry(slot))?;
        let payload = |words| (1..=words).map(move |word| self.word(at + word).to_le_bytes());
        match self.word(at) {
            INT => Some(ClusterId::Int(i64::from_le_bytes(payload(1).next()?))),
            header => {
                // A length that leads out of the names is no length: the region is not ours alone.
                let length = usize::try_from(header >> 1).ok()?;
                let words = length.div_ceil(WORD) as u64;
                if at + words >= u64::from(self.num_words) {
                    return None;
                }
                let mut bytes: Vec<u8> = payload(words).flatten().collect();
                bytes.truncate(length);
                String::from_utf8(bytes).ok().map(ClusterId::Name)
            }
        }
    }

    /// Every key that was given out, in the order of slots.
    pub fn keys(&self) -> impl Iterator<Item = u32> {
        (0..self.num_slots).filter(|&slot| self.entry(slot) != 0).map(|slot| INTERNED + slot)
    }

    fn intern(&self, id: &Encoded) -> Result<u32, Error> {
        let hash = id.hash();
        let mut written = None;
        for slot in self.probes(hash) {
            let mut entry = self.entry(slot);
            if entry == 0 {
                let at = match written {
                    Some(at) => at,
                    None => *written.insert(self.write(id)?),
                };
                // Release pairs with: `entry`, whoever sees the slot sees the name.
                let published = self.slots.get(slot).0.compare_exchange(
                    0,
                    (hash & TAG) | (at + 1),
                    Ordering::AcqRel,
                    Ordering::Acquire,
                );
                match published {
                    Ok(_) => return Ok(INTERNED | slot),
                    Err(actual) => entry = actual,
                }
            }
            if self.holds(entry, hash, id) {
                return Ok(INTERNED | slot);
            }
        }
        Err(Error::Full { what: "clusters", capacity: self.capacity.into() })
    }

    fn search(&self, id: &Encoded) -> Option<u32> {
        let hash = id.hash();
        for slot in self.probes(hash) {
            let entry = self.entry(slot);
            if entry == 0 {
                return None;
            }
            if self.holds(entry, hash, id) {
                return Some(INTERNED | slot);
            }
        }
        None
    }

    /// The slots where an id may be, in the order in which everybody tries them.
    fn probes(&self, hash: u64) -> impl Iterator<Item = u32> {
        let mask = self.num_slots - 1;
        // The low half of the hash; the high one is the tag.
        let first = index(hash & u64::from(mask));
        (0..self.num_slots.min(PROBES)).map(move |probe| first.wrapping_add(probe) & mask)
    }

    fn entry(&self, slot: u32) -> u64 {
        // pairs with: the exchange in `intern`, whose name is then seen.
        self.slots.get(slot).0.load(Ordering::Acquire)
    }

    fn holds(&self, entry: u64, hash: u64, id: &Encoded) -> bool {
        (entry ^ hash) & TAG == 0
            && place(entry)
                .is_some_and(|at| (at..).zip(id.words()).all(|(at, word)| self.word(at) == word))
    }

    /// Takes room among the names and writes an id there. Whoever dies here has wasted the room.
    fn write(&self, id: &Encoded) -> Result<u64, Error> {
        let length = id.words().count() as u64;
        let used = &self.counters.get(Self::USED).0;
        // Relaxed: room that nobody else gets; it says nothing about other memory.
        let mut at = used.load(Ordering::Relaxed);
        loop {
            let end = at.saturating_add(length);
            if end > u64::from(self.num_words) {
                let capacity = u64::from(self.num_words) * WORD as u64;
                return Err(Error::Full { what: "bytes of cluster names", capacity });
            }
            match used.compare_exchange(at, end, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => break,
                Err(actual) => at = actual,
            }
        }
        for (at, word) in (at..).zip(id.words()) {
            // Relaxed: published by the exchange in `intern`.
            self.names.get(index(at)).0.store(word, Ordering::Relaxed);
        }
        Ok(at)
    }

    /// A word of the names; 0 outside of them, where an entry leads that was not written by us.
    fn word(&self, at: u64) -> u64 {
        if at >= u64::from(self.num_words) {
            return 0;
        }
        // Relaxed: published by the exchange in `intern`.
        self.names.get(index(at)).0.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for Index {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Index").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

/// The half of a hash that a slot holds.
const TAG: u64 = !(u32::MAX as u64);

/// The header of an integer. That of a string is 2 * length + 1.
const INT: u64 = 0;

/// Where the name of a slot is.
fn place(entry: u64) -> Option<u64> {
    (entry & !TAG).checked_sub(1)
}

fn index(at: u64) -> u32 {
    u32::try_from(at).expect("there are fewer than 2^32 slots and words")
}

/// An id as words: a header that tells integers from strings, then their bytes.
struct Encoded<'a> {
    header: u64,
    payload: &'a [u8],
}

impl<'a> Encoded<'a> {
    fn name(name: &'a str) -> Self {
        Self { header: (name.len() as u64) << 1 | 1, payload: name.as_bytes() }
    }

    fn words(&self) -> impl Iterator<Item = u64> {
        let payload = self.payload.chunks(WORD).map(|bytes| {
            let mut word = [0; WORD];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(word)
        });
        std::iter::once(self.header).chain(payload)
    }

    /// Part of the format: processes of all versions must agree.
    fn hash(&self) -> u64 {
        self.words().fold(0, |hash, word| {
            // The finalizer of splitmix64 (Steele, Lea and Flood 2014), once per word.
            let mut mixed = (hash ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        })
    }
}
