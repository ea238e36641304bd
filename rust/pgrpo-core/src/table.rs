//! Triples of numbers that threads replace whole, without locks.
//!
//! A row is one cache line: a head, an origin, and two inline buffers of a triple each. The head
//! names the buffer that is current. To commit, a thread claims the other inline buffer, writes the
//! new triple there, and moves the head to it. Should that buffer be claimed by another thread
//! already, perhaps one that was stopped, the new triple goes into a spare node instead, and the
//! head to that: nobody waits for anybody. A head carries the number of commits, so that readers
//! notice when the triple they were reading was replaced, and read again.

use std::fmt;

use crate::arena::{Arena, Zeroed};
use crate::error::Error;
use crate::index::Word;
use crate::sync::{AtomicU64, Ordering, fence};

/// Keys from here on are numbers that interning gave out; keys below are what users call a cluster.
pub(crate) const INTERNED: u32 = 1 << 31;

/// What a row holds; what the three numbers mean is up to the user of the table.
pub type Triple = [f64; 3];

/// Why a commit was not made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Refused {
    /// The change does not go with this triple.
    Unchanged(Triple),
    /// Both inline buffers of the row are claimed, and no spare node is left: that takes as many
    /// threads, stopped or killed in the middle of a commit, as there are spare nodes, or somebody else
    /// who has written to the table.
    NoBuffer,
}

impl From<Refused> for Error {
    /// For a commit whose change goes with any triple.
    fn from(_: Refused) -> Self {
        Self::Damaged { what: "a cluster's row is claimed by writers that are gone" }
    }
}

/// One of the two inline buffers, or a spare node by its index.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Buffer {
    Inline(u64),
    Spare(u32),
}

/// The word that decides: which buffer is current, which are claimed, how many commits there were.
///
/// Bits 0-1: current buffer (0, 1, or 2 for a spare). Bits 2 and 3: inline buffer 0 or 1 is claimed.
/// Bits 4-27: index of the spare. Bits 28-63: number of commits. A zero is a row never written to.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Head(u64);

const SPARE: u64 = 2;
const SPARE_BITS: u32 = 24;
const SPARE_SHIFT: u32 = 4;
const MAX_SPARES: u32 = 1 << SPARE_BITS;
const VERSION_SHIFT: u32 = SPARE_SHIFT + SPARE_BITS;

impl Head {
    #[allow(clippy::cast_possible_truncation, reason = "24 bits are kept")]
    fn current(self) -> Buffer {
        match self.0 & 3 {
            SPARE => Buffer::Spare((self.0 >> SPARE_SHIFT) as u32 & ((1 << SPARE_BITS) - 1)),
            inline => Buffer::Inline(inline),
        }
    }

    fn claim(buffer: u64) -> u64 {
        1 << (2 + buffer)
    }

    /// An inline buffer that is neither current nor claimed.
    fn free(self) -> Option<u64> {
        [0, 1].into_iter().find(|&buffer| {
            self.current() != Buffer::Inline(buffer) && self.0 & Self::claim(buffer) == 0
        })
    }

    /// The head after a commit into `buffer`, which is no longer claimed; claims of others stay.
    fn next(self, buffer: Buffer) -> Self {
        let version = (self.0 >> VERSION_SHIFT).wrapping_add(1) << VERSION_SHIFT;
        let claims = self.0 & (Self::claim(0) | Self::claim(1));
        Self(match buffer {
            Buffer::Inline(inline) => version | (claims & !Self::claim(inline)) | inline,
            Buffer::Spare(index) => version | claims | (u64::from(index) << SPARE_SHIFT) | SPARE,
        })
    }

    /// Whether what was current then is current still, claims aside.
    fn is_current(self, then: Self) -> bool {
        let claims = Self::claim(0) | Self::claim(1);
        (self.0 ^ then.0) & !claims == 0
    }
}

#[derive(Default)]
#[repr(C)]
struct Words([AtomicU64; 3]);

impl Words {
    /// The triple, or a mixture of two if it is being written to: the head tells.
    fn load(&self) -> Triple {
        std::array::from_fn(|word| f64::from_bits(self.0[word].load(Ordering::Relaxed)))
    }

    fn store(&self, triple: Triple) {
        // pairs with: the fence in `Table::read`. Whoever reads one of these words also sees that
        // the buffer had ceased to be current before.
        fence(Ordering::Release);
        for (word, value) in self.0.iter().zip(triple) {
            word.store(value.to_bits(), Ordering::Relaxed);
        }
    }
}

/// Rows that share a bit in [`Table::blocks`]; each segment of an arena has a multiple of so many.
const BLOCK: u32 = if cfg!(loom) { 2 } else { 64 };

/// A row: 64 bytes, one cache line.
#[derive(Default)]
#[repr(C, align(64))]
pub(crate) struct Row {
    head: AtomicU64,
    /// Bits of the origin, complemented: 0 stands for none, which no number's bits would be.
    origin: AtomicU64,
    inline: [Words; 2],
}

// SAFETY: atomics alone; zero is their default.
#[allow(unsafe_code, reason = "rows come out of zeroed pages")]
unsafe impl Zeroed for Row {}

impl Row {
    /// The number that the row's triple is relative to, once there is one.
    #[inline]
    pub(crate) fn origin(&self) -> Option<f64> {
        // Relaxed: it is set once, and says nothing about other memory.
        match self.origin.load(Ordering::Relaxed) {
            0 => None,
            bits => Some(f64::from_bits(!bits)),
        }
    }
}

/// A node for a triple whose row has no free inline buffer.
#[derive(Default)]
#[repr(C)]
struct Spare {
    words: Words,
    /// While it is free: index + 1 of the next free node, 0 for none.
    next: AtomicU64,
}

// SAFETY: atomics alone; zero is their default.
#[allow(unsafe_code, reason = "nodes come out of zeroed pages")]
unsafe impl Zeroed for Spare {}

/// Top of the stack of free spare nodes (bits 0-24: index + 1; bits 25-63: number of changes, so
/// that a stale top is noticed), and the number of nodes ever taken.
#[derive(Default)]
#[repr(C)]
struct Stack {
    top: AtomicU64,
    taken: AtomicU64,
}

// SAFETY: atomics alone; zero is their default.
#[allow(unsafe_code, reason = "it comes out of a zeroed page")]
unsafe impl Zeroed for Stack {}

/// Rows by key, each an origin and a [`Triple`]; all are zeros until written to.
///
/// Keys below [`INTERNED`] and keys from there on are two arrays, each with memory up to the highest
/// key in use.
///
/// # Progress
/// - Readers ([`read`](Self::read)) wait for nobody; they begin again only when a commit to their
///   row went through meanwhile. What they return was the row's triple at one moment.
/// - Writers ([`commit`](Self::commit)) are lock-free: whatever threads are stopped and wherever,
///   some commit of the others is done within a bounded number of steps. (Were all 2^24 spare nodes
///   in use, a commit to a row with both buffers claimed would be refused.)
/// - Growth is lock-free as far as the system's allocator is.
pub struct Table {
    rows: [Arena<Row>; 2],
    /// A bit for every [`BLOCK`] rows, which is set once one of them has an origin, so that going
    /// through all rows takes as long as there are such. None where the rows are somebody else's.
    blocks: Option<[Arena<Word>; 2]>,
    spares: Arena<Spare>,
    /// One element: an arena, because processes share it with the rows.
    stack: Arena<Stack>,
    /// Spare nodes there may be: a power of two.
    num_spares: u32,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            rows: [Arena::new(), Arena::new()],
            blocks: Some([Arena::new(), Arena::new()]),
            spares: Arena::new(),
            stack: Arena::new(),
            num_spares: MAX_SPARES,
        }
    }
}

impl Table {
    /// A table of keys from [`INTERNED`] on that lies in memory of somebody else. Whatever bytes are
    /// there, no index read from them leads outside.
    ///
    /// # Safety
    /// `start` is aligned to 64 bytes and has [`bytes`](Self::bytes) bytes for as long as the table is
    /// used, touched by nothing but atomic operations meanwhile.
    #[cfg(not(loom))]
    #[allow(unsafe_code, reason = "memory of the caller becomes arenas")]
    pub(crate) unsafe fn over(start: *mut u8, num_rows: u32, num_spares: u32) -> Self {
        assert!(num_spares.is_power_of_two() && num_spares <= MAX_SPARES);
        let spares_at = Arena::<Row>::bytes(num_rows);
        let stack_at = spares_at + Arena::<Spare>::bytes(num_spares);
        // SAFETY: the parts follow each other within `bytes`, each a multiple of 64 bytes long; any
        // bytes are valid atomics.
        unsafe {
            Self {
                rows: [Arena::over(start, 0), Arena::over(start, num_rows)],
                blocks: None,
                spares: Arena::over(start.add(spares_at), num_spares),
                stack: Arena::over(start.add(stack_at), 1),
                num_spares,
            }
        }
    }

    /// Bytes that [`over`](Self::over) needs.
    #[cfg(not(loom))]
    pub(crate) fn bytes(num_rows: u32, num_spares: u32) -> usize {
        Arena::<Row>::bytes(num_rows) + Arena::<Spare>::bytes(num_spares) + Arena::<Stack>::bytes(1)
    }

    /// Takes back what killed writers had claimed in the rows of `keys`, all there are, and every
    /// spare. Nobody else may use the table meanwhile.
    #[cfg(any(not(loom), test))]
    pub(crate) fn repair(&self, keys: impl Iterator<Item = u32>) {
        for row in keys.map(|key| self.row(key)) {
            let head = Head(row.head.load(Ordering::SeqCst));
            let mut repaired = Head(head.0 & !(Head::claim(0) | Head::claim(1)));
            if let Buffer::Spare(_) = head.current() {
                row.inline[0].store(self.words(row, head.current()).load());
                repaired = repaired.next(Buffer::Inline(0));
            }
            row.head.store(repaired.0, Ordering::SeqCst);
        }
        let stack = self.stack.get(0);
        stack.top.store(0, Ordering::SeqCst);
        stack.taken.store(0, Ordering::SeqCst);
    }

    /// A spare node; one of them also for an index that is none, as somebody else's memory may hold.
    fn spare(&self, index: u32) -> &Spare {
        self.spares.get(index & (self.num_spares - 1))
    }

    /// The row of a key, which may be new.
    #[inline]
    pub(crate) fn row(&self, key: u32) -> &Row {
        self.rows[(key >> 31) as usize].get(key & !INTERNED)
    }

    /// The row of a key, if there is memory for it already.
    #[inline]
    pub(crate) fn find(&self, key: u32) -> Option<&Row> {
        self.rows[(key >> 31) as usize].find(key & !INTERNED)
    }

    /// The origin of a key's row, which is set to a finite number if there is none.
    #[inline]
    pub(crate) fn origin_or(&self, key: u32, row: &Row, first: f64) -> f64 {
        debug_assert!(first.is_finite());
        row.origin().unwrap_or_else(|| {
            if let Some(blocks) = &self.blocks {
                let block = (key & !INTERNED) / BLOCK;
                let word = &blocks[(key >> 31) as usize].get(block / u64::BITS).0;
                // Before the origin is set, so that whoever sees that one need not do this. pairs with:
                // `iter`, which is called by threads that know of a commit.
                word.fetch_or(1 << (block % u64::BITS), Ordering::Release);
            }
            let new = !first.to_bits();
            let set = row.origin.compare_exchange(0, new, Ordering::Relaxed, Ordering::Relaxed);
            set.map_or_else(|bits| f64::from_bits(!bits), |_| first)
        })
    }

    /// Every row with an origin, with its key, in ascending order of keys. None at all where the rows
    /// are somebody else's: who knows the keys of such has to ask for them one by one.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Row)> {
        let halves = self.blocks.iter().flatten().zip(&self.rows).zip([0, INTERNED]);
        halves.flat_map(|((blocks, rows), half)| {
            let blocks = blocks.iter().flat_map(|(at, word)| {
                // pairs with: `origin_or`.
                let word = word.0.load(Ordering::Acquire);
                let set = (0..u64::BITS).filter(move |bit| word & (1 << bit) != 0);
                set.map(move |bit| at * u64::BITS + bit)
            });
            let indices = blocks.flat_map(|block| block * BLOCK..(block + 1) * BLOCK);
            let present = indices.filter_map(move |index| Some((half | index, rows.find(index)?)));
            present.filter(|(_, row)| row.origin().is_some())
        })
    }

    /// The triple of a row as it was at one moment.
    #[inline]
    pub(crate) fn read(&self, row: &Row) -> Triple {
        loop {
            // pairs with: the exchange in `publish`, whose triple is then seen.
            let head = Head(row.head.load(Ordering::Acquire));
            let triple = self.words(row, head.current()).load();
            // pairs with: the fence in `Words::store`.
            fence(Ordering::Acquire);
            if Head(row.head.load(Ordering::Relaxed)).is_current(head) {
                return triple;
            }
        }
    }

    /// Replaces the triple of a row by `change` of it, in one step; returns both, old and new.
    ///
    /// `change` runs again when another commit came first, and may run on a mixture of triples, the
    /// result of which is thrown away.
    ///
    /// # Errors
    /// [`Refused::Unchanged`] if `change` returned None for a triple that was there at one moment;
    /// [`Refused::NoBuffer`]. Nothing is changed then.
    #[inline(always)]
    pub(crate) fn commit(
        &self,
        row: &Row,
        mut change: impl FnMut(Triple) -> Option<Triple>,
    ) -> Result<(Triple, Triple), Refused> {
        // pairs with: the exchange in `publish`, whose triple is then seen.
        let mut head = Head(row.head.load(Ordering::Acquire));
        let mut target = None;
        loop {
            // Before anything is claimed: what is computed here need not wait for that.
            let old = self.words(row, head.current()).load();
            let Some(new) = change(old) else {
                // pairs with: the fence in `Words::store`.
                fence(Ordering::Acquire);
                let actual = Head(row.head.load(Ordering::Acquire));
                if actual.is_current(head) {
                    if let Some(target) = target {
                        self.disclaim(row, target);
                    }
                    return Err(Refused::Unchanged(old));
                }
                head = actual;
                continue;
            };
            let buffer = match target {
                Some(buffer) => buffer,
                None => match self.claim(row, head) {
                    Ok(Some((claimed, buffer))) => {
                        head = claimed;
                        *target.insert(buffer)
                    }
                    Ok(None) => return Err(Refused::NoBuffer),
                    Err(actual) => {
                        head = actual;
                        continue;
                    }
                },
            };
            self.words(row, buffer).store(new);
            match self.publish(row, head, buffer) {
                Ok(()) => return Ok((old, new)),
                Err(actual) => head = actual,
            }
        }
    }

    /// The same without an exchange, as long as no other thread commits; readers may be there. The
    /// head is what they go by: it is stored last.
    #[inline(always)]
    pub(crate) fn commit_as_only(
        &self,
        row: &Row,
        mut change: impl FnMut(Triple) -> Option<Triple>,
    ) -> Result<(Triple, Triple), Refused> {
        // Relaxed: whoever committed before has handed over to this thread.
        let head = Head(row.head.load(Ordering::Relaxed));
        let (Buffer::Inline(_), Some(free)) = (head.current(), head.free()) else {
            return self.commit(row, change);
        };
        let old = self.words(row, head.current()).load();
        let new = change(old).ok_or(Refused::Unchanged(old))?;
        self.words(row, Buffer::Inline(free)).store(new);
        // Release pairs with: the loads of the head, whoever sees it sees the triple.
        row.head.store(head.next(Buffer::Inline(free)).0, Ordering::Release);
        Ok((old, new))
    }

    #[inline]
    fn words<'a>(&'a self, row: &'a Row, buffer: Buffer) -> &'a Words {
        match buffer {
            Buffer::Inline(inline) => &row.inline[usize::from(inline & 1 == 1)],
            Buffer::Spare(index) => &self.spare(index).words,
        }
    }

    /// A buffer that nobody else writes to until it is published, and the head then; None if there is no
    /// buffer; or the head that has taken the place of the one given.
    #[inline]
    fn claim(&self, row: &Row, head: Head) -> Result<Option<(Head, Buffer)>, Head> {
        let Some(inline) = head.free() else {
            return Ok(self.take_spare().map(|spare| (head, Buffer::Spare(spare))));
        };
        let claimed = Head(head.0 | Head::claim(inline));
        // Acquire pairs with: `publish`, as above, and claims that were given up. Release: the triple
        // that was read is one that was current until now.
        match row.head.compare_exchange(head.0, claimed.0, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(Some((claimed, Buffer::Inline(inline)))),
            Err(actual) => Err(Head(actual)),
        }
    }

    /// Makes `target` current, if nothing was committed since `head` was seen.
    #[inline]
    fn publish(&self, row: &Row, mut head: Head, target: Buffer) -> Result<(), Head> {
        loop {
            let next = head.next(target);
            // Release pairs with: the loads of the head, whoever sees it sees the triple.
            match row.head.compare_exchange(head.0, next.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    if let Buffer::Spare(displaced) = head.current() {
                        self.give_spare(displaced);
                    }
                    return Ok(());
                }
                // Another claim came or went; the triple that was read is current still.
                Err(actual) if Head(actual).is_current(head) => head = Head(actual),
                Err(actual) => return Err(Head(actual)),
            }
        }
    }

    fn disclaim(&self, row: &Row, target: Buffer) {
        match target {
            Buffer::Spare(spare) => self.give_spare(spare),
            Buffer::Inline(inline) => {
                // pairs with: `claim`.
                row.head.fetch_and(!Head::claim(inline), Ordering::AcqRel);
            }
        }
    }

    fn take_spare(&self) -> Option<u32> {
        let stack = self.stack.get(0);
        // pairs with: `give_spare`, whose link is then seen.
        let mut top = stack.top.load(Ordering::Acquire);
        while let Some(spare) = first_free(top) {
            let next = self.spare(spare).next.load(Ordering::Relaxed);
            match stack.top.compare_exchange(
                top,
                changed(top, next),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Some(spare),
                Err(actual) => top = actual,
            }
        }
        // Relaxed: a number nobody else gets; it says nothing about other memory.
        let mut taken = stack.taken.load(Ordering::Relaxed);
        while taken < u64::from(self.num_spares) {
            match stack.taken.compare_exchange(
                taken,
                taken + 1,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return u32::try_from(taken).ok(),
                Err(actual) => taken = actual,
            }
        }
        None
    }

    fn give_spare(&self, spare: u32) {
        let stack = self.stack.get(0);
        let node = self.spare(spare);
        let mut top = stack.top.load(Ordering::Relaxed);
        loop {
            node.next.store(top & FIRST, Ordering::Relaxed);
            // Release pairs with: `take_spare`, which then sees the link.
            match stack.top.compare_exchange(
                top,
                changed(top, u64::from(spare) + 1),
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(actual) => top = actual,
            }
        }
    }
}

/// Bits of a stack's top that name a node.
const FIRST: u64 = (1 << (SPARE_BITS + 1)) - 1;

/// The node on top of a stack.
fn first_free(top: u64) -> Option<u32> {
    u32::try_from(top & FIRST).ok()?.checked_sub(1)
}

/// The stack's top after another change, with a new first node.
fn changed(top: u64, first: u64) -> u64 {
    (top & !FIRST).wrapping_add(FIRST + 1) | first
}

impl fmt::Debug for Table {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Table").finish_non_exhaustive()
    }
}

#[cfg(all(test, loom))]
mod models;
#[cfg(all(test, not(loom)))]
mod stress;
