//! The keys of cluster ids.

use std::hash::{BuildHasher, Hasher, RandomState};

use siphasher::sip::SipHasher13;

use crate::arena::{Arena, Zeroed};
use crate::error::Error;
use crate::ids::{AnyId, ClusterId};
use crate::sync::{AtomicU64, Ordering};
use crate::table::INTERNED;

/// Slots of a node: as many as so many bits of a hash tell apart.
const DIGIT: u32 = if cfg!(loom) { 1 } else { 4 };
const FANOUT: usize = 1 << DIGIT;
/// Levels that one hash of 64 bits leads down.
const LEVELS_PER_HASH: u32 = u64::BITS / DIGIT;
/// Ids that share a node this deep share two hashes under a secret key: no table of ours goes there,
/// and what somebody else has written, even a node that leads to itself, is left here.
const MAX_LEVELS: u32 = 2 * LEVELS_PER_HASH;

/// Bytes of one word of names.
const WORD: usize = 8;

#[derive(Default)]
#[repr(transparent)]
pub(crate) struct Word(pub(crate) AtomicU64);

// SAFETY: atomics alone; zero is their default.
#[allow(unsafe_code, reason = "words come out of zeroed pages")]
unsafe impl Zeroed for Word {}

/// Where the ids whose hashes begin alike part. 128 bytes.
#[derive(Default)]
#[repr(C, align(64))]
pub(crate) struct Node([Word; FANOUT]);

// SAFETY: as above.
#[allow(unsafe_code, reason = "nodes come out of zeroed pages")]
unsafe impl Zeroed for Node {}

/// What is counted: words of names, nodes and keys in use, each in a word of its own.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Counter {
    Names,
    Nodes,
    Keys,
}

/// Room for an index: elements of each arena.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    pub(crate) nodes: u32,
    pub(crate) words: u32,
    pub(crate) keys: u32,
    /// Ids that find room for sure, as errors tell it.
    pub(crate) capacity: u32,
}

/// Gives cluster ids their keys, [`INTERNED`] + 1, + 2, ..., in the order in which they come; key
/// [`INTERNED`] is nobody's.
///
/// It is a trie of hashes: the lowest bits of an id's hash choose a slot of node 0, the next ones a
/// slot of the node that this leads to, until a slot leads to the id's own name. A slot is a word:
///
/// | bits | name | node | empty |
/// |---|---|---|---|
/// | 0 | 0 | 1 | 0 |
/// | 1-32 | place of the name, plus 1 | number of the node | 0 |
/// | 33-63 | the highest bits of the hash | 0 | 0 |
///
/// A new id is first written down behind the names there are, where nobody looks; then one exchange on
/// an empty slot publishes it. Where another id's name is in the slot, one exchange puts a node there
/// that leads to that name. Nothing is ever taken out. Hashes are keyed by two random numbers, so that
/// nobody can make up ids that share them.
///
/// # Progress
/// Looking up is wait-free: it ends [`MAX_LEVELS`] nodes deep. Interning is lock-free: who loses a slot
/// has seen another id enter the index, or the same; what it had taken of names and keys stays unused.
pub(crate) struct Index {
    nodes: Arena<Node>,
    names: Arena<Word>,
    /// By key less [`INTERNED`]: place of its name plus 1, or 0.
    places: Arena<Word>,
    counters: Arena<Word>,
    /// Word of `counters` where [`Counter`]s begin.
    counters_at: u32,
    room: Room,
    hash_keys: [u64; 2],
}

/// Two numbers that nobody can guess.
pub(crate) fn random() -> [u64; 2] {
    [0, 1].map(|number: u64| RandomState::new().hash_one(number))
}

impl Default for Index {
    /// An index that grows.
    fn default() -> Self {
        let room = Room { nodes: 1 << 30, words: u32::MAX, keys: 1 << 31, capacity: (1 << 31) - 1 };
        Self {
            nodes: Arena::new(),
            names: Arena::new(),
            places: Arena::new(),
            counters: Arena::new(),
            counters_at: 0,
            room,
            hash_keys: if cfg!(loom) { [0; 2] } else { random() },
        }
    }
}

impl Index {
    /// An index in memory of somebody else; its counters begin at a word of `counters`.
    #[cfg(not(loom))]
    pub(crate) fn over(
        nodes: Arena<Node>,
        [names, places, counters]: [Arena<Word>; 3],
        counters_at: u32,
        room: Room,
        hash_keys: [u64; 2],
    ) -> Self {
        Self { nodes, names, places, counters, counters_at, room, hash_keys }
    }

    /// The key of an id, which may be new.
    ///
    /// # Errors
    /// [`Error::Full`] if there is no room for a new id, [`Error::Damaged`] where somebody else has
    /// written to the index.
    pub(crate) fn key(&self, id: AnyId<'_>) -> Result<u32, Error> {
        let id = &Encoded::new(id);
        let hash = self.hash(id.words(), 0);
        let mut node = 0;
        let mut written: Option<(u32, u64)> = None;
        let mut child: Option<u32> = None;
        for level in 0..MAX_LEVELS {
            let slot = &self.node(node)?.0[self.digit(hash, id.words(), level)].0;
            loop {
                // pairs with: the exchanges below, whose name or node is then seen.
                let entry = slot.load(Ordering::Acquire);
                let new = match Entry::of(entry) {
                    Entry::Empty => {
                        let (_, place) = match written {
                            Some(written) => written,
                            None => *written.insert(self.write(id)?),
                        };
                        (hash & TAG) | (place + 1) << 1
                    }
                    Entry::Name(place) if self.holds(entry, hash, place, id) => {
                        return self.key_at(place);
                    }
                    Entry::Name(place) => {
                        let child = match child {
                            Some(child) => child,
                            None => *child.insert(self.take(Counter::Nodes, 1)?),
                        };
                        // The name that is here goes on below, where its own digits lead.
                        let other = self.hash(self.words_at(place), 0);
                        let below = self.digit(other, self.words_at(place), level + 1);
                        for (at, slot) in self.node(child)?.0.iter().enumerate() {
                            // Relaxed: published by the exchange.
                            slot.0.store(if at == below { entry } else { 0 }, Ordering::Relaxed);
                        }
                        u64::from(child) << 1 | 1
                    }
                    Entry::Node(child) => {
                        node = child;
                        break;
                    }
                };
                // Release pairs with: the loads of slots, whoever sees the slot sees what it leads to.
                if slot.compare_exchange(entry, new, Ordering::Release, Ordering::Relaxed).is_ok() {
                    if let Entry::Node(taken) = Entry::of(new) {
                        child = None;
                        node = taken;
                        break;
                    }
                    let (key, _) = written.expect("a name is written before it is published");
                    return Ok(key);
                }
            }
        }
        Err(Error::Damaged { what: "its index of clusters leads nowhere" })
    }

    /// The key of an id, if it has one.
    #[must_use]
    pub(crate) fn find(&self, id: AnyId<'_>) -> Option<u32> {
        let id = &Encoded::new(id);
        let hash = self.hash(id.words(), 0);
        let mut node = 0;
        for level in 0..MAX_LEVELS {
            // pairs with: the exchanges in `key`, whose name or node is then seen.
            let digit = self.digit(hash, id.words(), level);
            let entry = self.nodes.find(node)?.0[digit].0.load(Ordering::Acquire);
            match Entry::of(entry) {
                Entry::Empty => return None,
                Entry::Name(place) => {
                    let key = self.holds(entry, hash, place, id).then(|| self.key_at(place));
                    return key?.ok();
                }
                Entry::Node(child) => node = child,
            }
        }
        None
    }

    /// The id of a key; None for a key that was never given out.
    #[must_use]
    pub(crate) fn id(&self, key: u32) -> Option<ClusterId> {
        let place = self.place_of(key)?;
        let payload = |words| (0..words).map(move |word| self.word(place + 2 + word).to_le_bytes());
        let header = self.word(place + 1);
        let is_parent = header & PARENT != 0;
        match header & !PARENT {
            INT => {
                let id = i64::from_le_bytes(payload(1).next()?);
                Some(if is_parent { ClusterId::ParentInt(id) } else { ClusterId::Int(id) })
            }
            header => {
                // A length that leads out of the names is no length: the memory is not ours alone.
                let length = usize::try_from(header >> 1).ok()?;
                let words = length.div_ceil(WORD) as u64;
                if place + 1 + words >= u64::from(self.room.words) {
                    return None;
                }
                let mut bytes: Vec<u8> = payload(words).flatten().collect();
                bytes.truncate(length);
                let kind = if is_parent { ClusterId::ParentName } else { ClusterId::Name };
                String::from_utf8(bytes).ok().map(kind)
            }
        }
    }

    /// Whether a key is a parent's.
    pub(crate) fn is_parent(&self, key: u32) -> bool {
        self.place_of(key).is_some_and(|place| self.word(place + 1) & PARENT != 0)
    }

    /// Where the name of a key is written down.
    fn place_of(&self, key: u32) -> Option<u64> {
        let key = key.checked_sub(INTERNED).filter(|&key| key < self.room.keys)?;
        // Acquire pairs with: the store in `write`; a key may come by another way than a slot.
        let place = self.places.find(key)?.0.load(Ordering::Acquire).checked_sub(1)?;
        // A place that is none is none of ours.
        Some(place).filter(|&place| place < u64::from(self.room.words))
    }

    /// Every key that was given out, in that order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = u32> {
        let counter = self.counters.find(self.counters_at + Counter::Keys as u32);
        // Relaxed: what a key leads to is read with an order of its own.
        let used = counter.map_or(0, |counter| counter.0.load(Ordering::Relaxed));
        let used = used.min(u64::from(self.room.keys) - 1);
        (1..=index(used)).map(|key| INTERNED | key)
    }

    /// Takes elements of an arena that nobody else gets; number 0 is never among them. Whoever dies
    /// with them has wasted them.
    fn take(&self, counter: Counter, number: u32) -> Result<u32, Error> {
        let (room, what) = match counter {
            Counter::Names => (self.room.words, "bytes of cluster names"),
            Counter::Nodes => (self.room.nodes, "clusters"),
            Counter::Keys => (self.room.keys, "clusters"),
        };
        let counter = &self.counters.get(self.counters_at + counter as u32).0;
        // Relaxed: it says nothing about other memory.
        let mut used = counter.load(Ordering::Relaxed);
        loop {
            let end = used.saturating_add(u64::from(number));
            if end >= u64::from(room) {
                let bytes = u64::from(room) * WORD as u64;
                let capacity =
                    if what == "clusters" { u64::from(self.room.capacity) } else { bytes };
                return Err(Error::Full { what, capacity });
            }
            match counter.compare_exchange(used, end, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(index(used) + 1),
                Err(actual) => used = actual,
            }
        }
    }

    /// Gives an id a key and writes both down: the key, and the place of the name.
    fn write(&self, id: &Encoded<'_>) -> Result<(u32, u64), Error> {
        let length = id.words().count() + 1;
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let place = u64::from(self.take(Counter::Names, length)?);
        let key = self.take(Counter::Keys, 1)?;
        let words = std::iter::once(u64::from(key)).chain(id.words());
        for (at, word) in (place..).zip(words) {
            // Relaxed: published by the exchange in `key`, and below.
            self.names.get(index(at)).0.store(word, Ordering::Relaxed);
        }
        // pairs with: `id`.
        self.places.get(key).0.store(place + 1, Ordering::Release);
        Ok((INTERNED | key, place))
    }

    fn node(&self, number: u32) -> Result<&Node, Error> {
        if number >= self.room.nodes {
            return Err(Error::Damaged { what: "its index of clusters leads nowhere" });
        }
        Ok(self.nodes.get(number))
    }

    /// Whether a name is that of an id.
    fn holds(&self, entry: u64, hash: u64, place: u64, id: &Encoded<'_>) -> bool {
        (entry ^ hash) & TAG == 0
            && (place + 1..).zip(id.words()).all(|(at, word)| self.word(at) == word)
    }

    /// The key that was written down with a name.
    fn key_at(&self, place: u64) -> Result<u32, Error> {
        let key = self.word(place);
        if !(1..u64::from(self.room.keys)).contains(&key) {
            return Err(Error::Damaged { what: "a cluster's key is none" });
        }
        Ok(INTERNED | index(key))
    }

    /// A word of the names; 0 outside of them, where an entry leads that was not written by us.
    fn word(&self, at: u64) -> u64 {
        if at >= u64::from(self.room.words) {
            return 0;
        }
        // Relaxed: published by the exchange in `key`, or the store of its place.
        self.names.find(index(at)).map_or(0, |word| word.0.load(Ordering::Relaxed))
    }

    /// The words of a name.
    fn words_at(&self, place: u64) -> impl Iterator<Item = u64> {
        let header = self.word(place + 1) & !PARENT;
        let length = if header == INT { 1 } else { (header >> 1).div_ceil(WORD as u64) };
        // No more than there are: the length may be somebody else's.
        let end = (place + 2).saturating_add(length).min(u64::from(self.room.words));
        (place + 1..end).map(|at| self.word(at))
    }

    /// The slot that an id takes at a level; `hash` is its first one.
    fn digit(&self, hash: u64, id: impl Iterator<Item = u64>, level: u32) -> usize {
        let (round, level) = (level / LEVELS_PER_HASH, level % LEVELS_PER_HASH);
        let hash = if round == 0 { hash } else { self.hash(id, round) };
        index(hash >> (DIGIT * level) & (FANOUT as u64 - 1)) as usize
    }

    /// Part of the format, as processes of all builds must agree.
    fn hash(&self, id: impl Iterator<Item = u64>, round: u32) -> u64 {
        let [first, second] = self.hash_keys;
        let mut hasher = SipHasher13::new_with_keys(first, second ^ u64::from(round));
        id.for_each(|word| hasher.write_u64(word));
        hasher.finish()
    }
}

impl std::fmt::Debug for Index {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Index").field("room", &self.room).finish_non_exhaustive()
    }
}

/// The highest bits of a slot and of a hash.
const TAG: u64 = u64::MAX << 33;

/// What a slot leads to.
enum Entry {
    Empty,
    Name(u64),
    Node(u32),
}

impl Entry {
    #[allow(clippy::cast_possible_truncation, reason = "32 bits are kept")]
    fn of(slot: u64) -> Self {
        let number = (slot & !TAG) >> 1;
        match (slot & 1, number.checked_sub(1)) {
            (1, _) => Self::Node(number as u32),
            (_, Some(place)) => Self::Name(place),
            (_, None) => Self::Empty,
        }
    }
}

/// The header of an integer. That of a string is 2 * length + 1.
const INT: u64 = 0;
/// In the header of a parent's id.
const PARENT: u64 = 1 << 63;

fn index(at: u64) -> u32 {
    u32::try_from(at).expect("there are fewer than 2^32 elements of each kind")
}

/// An id as words: a header that tells integers from strings, then their bytes.
struct Encoded<'a> {
    header: u64,
    payload: Payload<'a>,
}

enum Payload<'a> {
    Int([u8; WORD]),
    Name(&'a [u8]),
}

impl<'a> Encoded<'a> {
    fn new(id: AnyId<'a>) -> Self {
        let kind = match id {
            AnyId::Int(_) | AnyId::Name(_) => 0,
            AnyId::ParentInt(_) | AnyId::ParentName(_) => PARENT,
        };
        match id {
            AnyId::Int(id) | AnyId::ParentInt(id) => {
                Self { header: kind | INT, payload: Payload::Int(id.to_le_bytes()) }
            }
            AnyId::Name(name) | AnyId::ParentName(name) => {
                let header = kind | (name.len() as u64) << 1 | 1;
                Self { header, payload: Payload::Name(name.as_bytes()) }
            }
        }
    }

    fn words(&self) -> impl Iterator<Item = u64> {
        let payload = match &self.payload {
            Payload::Int(bytes) => &bytes[..],
            Payload::Name(bytes) => bytes,
        };
        let payload = payload.chunks(WORD).map(|bytes| {
            let mut word = [0; WORD];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(word)
        });
        std::iter::once(self.header).chain(payload)
    }
}
