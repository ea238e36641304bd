//! Memory that several processes have mapped, and how it is laid out.
#![allow(unsafe_code, reason = "memory of the caller becomes arenas")]

use std::fmt;

use crate::arena::Arena;
use crate::error::Error;
use crate::index::{Index, Node, Room, Word, random};
use crate::state::POOL;
use crate::sync::Ordering;
use crate::table::Table;

const MAGIC: u64 = u64::from_ne_bytes(*b"pgrposhm");
const VERSION: u64 = 2;
/// Reads differently where bytes are ordered differently.
const BYTE_ORDER: u64 = 0x0102_0304_0506_0708;

/// The header: 512 words, one page.
const HEADER_WORDS: u32 = 512;
const HEADER: usize = HEADER_WORDS as usize * 8;
/// Words of the header before the keys of hashes: magic, byte order, version, capacity, number of
/// streams, length of the region.
const HASH_KEYS_AT: u32 = 6;
/// From here on are the options, a string padded by zeros. The word before is made of the keys: with
/// other ones, every cluster would get another key.
const OPTIONS_AT: u32 = HASH_KEYS_AT + 3;
/// Counters have cache lines of their own at the header's end: those of the index, that of non-finite
/// rewards, and a word that whoever restores a snapshot sets.
const INDEX_COUNTERS: u32 = 448;
const NUM_NONFINITE: u32 = 456;
const IS_RESTORED: u32 = 464;
const MAX_OPTIONS: usize = (INDEX_COUNTERS - OPTIONS_AT) as usize * 8;

/// Heads of rows have 24 bits for the index of a spare, and every row may need one.
const MAX_CAPACITY: u32 = 1 << 23;
const MAX_STREAMS: u32 = 64;
/// Spares for threads within a commit, running or killed.
const MIN_SPARES: u32 = 1 << 16;
const WORDS_PER_KEY: u32 = 8;

/// The size of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    capacity: u32,
    num_streams: u32,
}

impl Layout {
    /// A region for `capacity` clusters with `num_streams` rows each.
    ///
    /// # Errors
    /// [`Error::Option`] if there are too few or too many of either.
    pub fn new(capacity: u64, num_streams: u32) -> Result<Self, Error> {
        let capacity = u32::try_from(capacity)
            .ok()
            .filter(|capacity| (1..=MAX_CAPACITY).contains(capacity))
            .ok_or(Error::Option {
                name: "capacity",
                value: capacity.to_string(),
                expected: "1 to 8388608 clusters".to_owned(),
            })?;
        if !(1..=MAX_STREAMS).contains(&num_streams) {
            let value = num_streams.to_string();
            return Err(Error::Option {
                name: "num_streams",
                value,
                expected: "1 to 64".to_owned(),
            });
        }
        Ok(Self { capacity, num_streams })
    }

    fn num_keys(self) -> u32 {
        (2 * self.capacity).next_power_of_two().max(64)
    }

    /// Of the hashes of n ids, a trie makes n / ln 16 nodes; so many keys may be given out.
    fn room(self) -> Room {
        let keys = self.num_keys();
        Room { nodes: keys, words: keys * WORDS_PER_KEY, keys, capacity: self.capacity }
    }

    fn num_spares(self) -> u32 {
        self.num_keys().max(MIN_SPARES)
    }

    fn names_at(self) -> usize {
        HEADER + Arena::<Node>::bytes(self.room().nodes)
    }

    fn places_at(self) -> usize {
        self.names_at() + Arena::<Word>::bytes(self.room().words)
    }

    fn streams_at(self) -> usize {
        self.places_at() + Arena::<Word>::bytes(self.room().keys)
    }

    fn stream_bytes(self) -> usize {
        Table::bytes(self.num_keys(), self.num_spares())
    }

    /// Bytes of the region.
    #[must_use]
    pub fn length(self) -> usize {
        self.streams_at() + self.num_streams as usize * self.stream_bytes()
    }

    /// The first bytes of a new region, the others of which are zeros. `options` is what all its
    /// users must agree on.
    ///
    /// # Panics
    /// If `options` are longer than a header has room for, 3512 bytes.
    #[must_use]
    pub fn header(self, options: &str) -> Vec<u8> {
        assert!(options.len() <= MAX_OPTIONS, "options of {} bytes", options.len());
        let keys = random();
        let words = self.header_words().into_iter().chain(keys).chain([seal(keys)]);
        let mut bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        bytes.extend(options.as_bytes());
        bytes.resize(HEADER, 0);
        bytes
    }

    fn header_words(self) -> [u64; HASH_KEYS_AT as usize] {
        let [capacity, streams] = [self.capacity, self.num_streams].map(u64::from);
        [MAGIC, BYTE_ORDER, VERSION, capacity, streams, self.length() as u64]
    }
}

/// Memory that is not the region it was taken for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    what: &'static str,
    found: String,
    expected: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "shared table: {} {}; expected {}", self.what, self.found, self.expected)
    }
}

impl std::error::Error for Mismatch {}

/// A mapped region: the ids of its clusters, what it counts, and the rows of each stream.
///
/// ```
/// use std::sync::atomic::{AtomicU8, Ordering};
///
/// use pgrpo_core::shared::{Layout, Region};
/// use pgrpo_core::{Batch, Ids, Normalizer, Options, Rule};
///
/// let options = Options::new(Rule::named("pgrpo")?);
/// let layout = Layout::new(100, options.kept().num_streams())?;
/// // In earnest, a file that all processes map: they begin with a page.
/// let memory: Vec<AtomicU8> = (0..layout.length() + 64).map(|_| AtomicU8::new(0)).collect();
/// let at = memory.as_ptr().align_offset(64);
/// for (byte, value) in memory[at..].iter().zip(layout.header("agreed")) {
///     byte.store(value, Ordering::SeqCst);
/// }
/// let normalizers = [true, false].map(|alone| {
///     let start = memory[at..].as_ptr().cast_mut().cast();
///     // SAFETY: aligned atomics that outlive the normalizers.
///     let region = unsafe { Region::open(start, layout.length(), layout, "agreed", alone) };
///     Normalizer::shared(options.clone(), region.unwrap()).unwrap()
/// });
/// normalizers[0].update(&Batch::new(&[0.0, 1.0], Ids::I32(&[7, 7])))?;
/// assert_eq!(normalizers[1].snapshot().clusters[0].rewards.count, 2.0);
/// # Ok::<(), pgrpo_core::Error>(())
/// ```
pub struct Region {
    index: Index,
    header: Arena<Word>,
    tables: Vec<Table>,
}

impl Region {
    /// A region that lies in memory of somebody else.
    ///
    /// `options` and the layout must be those that it was made with. Nobody else but the caller may
    /// use the region meanwhile if `alone` is given: what killed processes left behind is then taken
    /// back.
    ///
    /// Bytes that nobody like us has written make for strange statistics, and for nothing worse.
    ///
    /// # Errors
    /// [`Mismatch`] if this is no such region.
    ///
    /// # Safety
    /// `start` is aligned to 64 bytes and has `length` readable and writable bytes for as long as
    /// the region is used, and all its users touch them by atomic operations alone.
    pub unsafe fn open(
        start: *mut u8,
        length: usize,
        layout: Layout,
        options: &str,
        alone: bool,
    ) -> Result<Self, Mismatch> {
        if length < HEADER || !start.addr().is_multiple_of(64) {
            return Err(refused("length", length, format!("at least {HEADER} aligned bytes")));
        }
        // SAFETY: the header is within the bytes the caller vouches for; any bytes are words.
        let header = unsafe { Arena::<Word>::over(start, HEADER_WORDS) };
        check(&header, length, layout, options)?;
        let room = layout.room();
        // SAFETY: as above; the parts follow each other, up to the length that was checked.
        let (nodes, words) = unsafe {
            let names = Arena::over(start.add(layout.names_at()), room.words);
            let places = Arena::over(start.add(layout.places_at()), room.keys);
            let counters = Arena::over(start, HEADER_WORDS);
            (Arena::over(start.add(HEADER), room.nodes), [names, places, counters])
        };
        let hash_keys = hash_keys(&header);
        let index = Index::over(nodes, words, INDEX_COUNTERS, room, hash_keys);
        let stream = |number: u32| {
            let at = layout.streams_at() + number as usize * layout.stream_bytes();
            // SAFETY: as above; a table uses `stream_bytes` bytes from there, and any bytes do.
            unsafe { Table::over(start.add(at), room.keys, layout.num_spares()) }
        };
        let tables: Vec<Table> = (0..layout.num_streams).map(stream).collect();
        if alone {
            for table in &tables {
                table.repair(std::iter::once(POOL).chain(index.keys()));
            }
        }
        Ok(Self { index, header, tables })
    }

    /// The rows of each stream, which are its user's then.
    pub(crate) fn take_tables(&mut self) -> Vec<Table> {
        std::mem::take(&mut self.tables)
    }

    /// Number of streams, until their rows are taken.
    pub(crate) fn num_streams(&self) -> usize {
        self.tables.len()
    }

    /// The keys of cluster ids.
    #[must_use]
    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    /// Non-finite rewards that all users of the region left out of the histories.
    #[must_use]
    pub(crate) fn num_nonfinite(&self) -> u64 {
        self.header.get(NUM_NONFINITE).0.load(Ordering::SeqCst)
    }

    /// Claims the right to restore a snapshot, which one user of the region has once. False if another
    /// has had it.
    pub(crate) fn claim_restoring(&self) -> bool {
        let word = &self.header.get(IS_RESTORED).0;
        word.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Gives the right back, nothing having been restored.
    pub(crate) fn disclaim_restoring(&self) {
        self.header.get(IS_RESTORED).0.store(0, Ordering::SeqCst);
    }

    /// Adds to [`num_nonfinite`](Self::num_nonfinite).
    pub(crate) fn add_nonfinite(&self, found: u64) {
        self.header.get(NUM_NONFINITE).0.fetch_add(found, Ordering::SeqCst);
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Region").field("index", &self.index).finish_non_exhaustive()
    }
}

fn hash_keys(header: &Arena<Word>) -> [u64; 2] {
    [0, 1].map(|key| header.get(HASH_KEYS_AT + key).0.load(Ordering::SeqCst))
}

/// A number that changes with every bit of the keys.
fn seal([first, second]: [u64; 2]) -> u64 {
    first ^ second.rotate_left(32)
}

/// Compares the header with the one that such a region would have.
fn check(
    header: &Arena<Word>,
    length: usize,
    layout: Layout,
    options: &str,
) -> Result<(), Mismatch> {
    let word = |at: u32| header.get(at).0.load(Ordering::SeqCst);
    let expected = layout.header_words();
    let found = [0, 1, 2, 3, 4, 5].map(word);
    if found[0] != MAGIC {
        let bytes = |word: u64| format!("{:02x?}", word.to_ne_bytes());
        return Err(refused("begins with", bytes(found[0]), bytes(MAGIC)));
    }
    if found[1] != BYTE_ORDER {
        return Err(refused("byte order", format!("{:#x}", found[1]), format!("{BYTE_ORDER:#x}")));
    }
    let names = ["version", "capacity", "number of streams", "length"];
    for (at, what) in (2..).zip(names) {
        if found[at] != expected[at] {
            return Err(refused(what, found[at], expected[at]));
        }
    }
    if length as u64 != expected[5] {
        return Err(refused("file size", length, expected[5]));
    }
    let (found, expected) = (word(OPTIONS_AT - 1), seal(hash_keys(header)));
    if found != expected {
        return Err(refused("keys of hashes sealed with", found, expected));
    }
    let bytes: Vec<u8> =
        (OPTIONS_AT..INDEX_COUNTERS).flat_map(|at| word(at).to_ne_bytes()).collect();
    let found = String::from_utf8_lossy(&bytes);
    if found.trim_end_matches('\0') != options {
        return Err(refused("options", found.trim_end_matches('\0'), options));
    }
    Ok(())
}

fn refused(what: &'static str, found: impl fmt::Display, expected: impl fmt::Display) -> Mismatch {
    Mismatch { what, found: found.to_string(), expected: expected.to_string() }
}
