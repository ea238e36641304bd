//! Memory that grows without moving: what was handed out stays where it is.
#![allow(unsafe_code, reason = "zeroed pages become rows without being written to")]

use std::fmt;
use std::marker::PhantomData;
#[cfg(not(loom))]
use std::{alloc, mem};

use crate::sync::{AtomicPtr, Ordering};

/// Elements of the first segment. Each later one is as long as all before it together.
#[cfg(not(loom))]
const BASE: u32 = 64;
#[cfg(loom)]
const BASE: u32 = 2;
/// Enough segments for indices up to 2^31.
#[cfg(not(loom))]
const SEGMENTS: usize = 27;
#[cfg(loom)]
const SEGMENTS: usize = 4;

/// A type whose value of all zero bytes is its `Default`.
///
/// # Safety
/// Zeroed memory must be a valid value, and a shared reference must be all that is needed to use it.
pub(crate) unsafe trait Zeroed: Default + Sync {}

/// Elements 0, 1, 2, ..., each zero until it is written to.
///
/// Segments are taken from the system zeroed, so that only the pages in use take up memory.
///
/// # Progress
/// Lock-free: who loses the race to add a segment uses the winner's. (The system's allocator may
/// lock for its own part.)
pub(crate) struct Arena<T> {
    segments: [AtomicPtr<u8>; SEGMENTS],
    /// Segments of a mapped region are not ours to free.
    owned: bool,
    elements: PhantomData<T>,
}

/// The segment of an element, and its place there.
fn locate(index: u32) -> (usize, usize) {
    let segment = u32::BITS - (index / BASE).leading_zeros();
    let start = if segment == 0 { 0 } else { BASE << (segment - 1) };
    (segment as usize, (index - start) as usize)
}

fn segment_length(segment: usize) -> usize {
    (BASE as usize) << segment.saturating_sub(1)
}

impl<T: Zeroed> Arena<T> {
    pub(crate) fn new() -> Self {
        let segments = std::array::from_fn(|_| AtomicPtr::new(std::ptr::null_mut()));
        Self { segments, owned: true, elements: PhantomData }
    }

    /// An arena of `capacity` elements that lies in memory of somebody else. Indices from `capacity`
    /// rounded up to a whole segment must not be asked for.
    ///
    /// # Safety
    /// `start` is aligned for `T` and has [`bytes`](Self::bytes) bytes that are valid values of `T`
    /// for as long as the arena is used, and touched by nothing but atomic operations meanwhile.
    #[cfg(not(loom))]
    pub(crate) unsafe fn over(start: *mut u8, capacity: u32) -> Self {
        let mut arena = Self::new();
        arena.owned = false;
        let (mut at, mut segment) = (0, 0);
        while at < capacity as usize {
            // SAFETY: the caller gave room for whole segments.
            let pointer = unsafe { start.add(at * mem::size_of::<T>()) };
            arena.segments[segment].store(pointer, Ordering::Relaxed);
            at += segment_length(segment);
            segment += 1;
        }
        arena
    }

    /// Bytes that [`over`](Self::over) needs for `capacity` elements: whole segments.
    #[cfg(not(loom))]
    pub(crate) fn bytes(capacity: u32) -> usize {
        (capacity.max(BASE) as usize).next_power_of_two() * mem::size_of::<T>()
    }

    /// The element, unless no neighbour of it was ever asked for by [`get`](Self::get).
    pub(crate) fn find(&self, index: u32) -> Option<&T> {
        let (segment, at) = locate(index);
        // pairs with: the publication in `add_segment`.
        let start = self.segments[segment].load(Ordering::Acquire);
        // SAFETY: a published segment holds `segment_length` elements and lives as long as self.
        (!start.is_null()).then(|| unsafe { &*elements::<T>(start).add(at) })
    }

    /// The element, in a segment added now if need be.
    pub(crate) fn get(&self, index: u32) -> &T {
        loop {
            if let Some(element) = self.find(index) {
                return element;
            }
            self.add_segment(locate(index).0);
        }
    }

    /// Every element of the segments there are, with its index.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let present = (0..SEGMENTS).filter(|&segment| {
            // pairs with: the publication in `add_segment`.
            !self.segments[segment].load(Ordering::Acquire).is_null()
        });
        present.flat_map(|segment| {
            let start = if segment == 0 { 0 } else { segment_length(segment) };
            let indices = start..start + segment_length(segment);
            indices.filter_map(|index| {
                let index = u32::try_from(index).ok()?;
                Some((index, self.find(index)?))
            })
        })
    }

    #[cold]
    fn add_segment(&self, segment: usize) {
        assert!(self.owned, "an index beyond the capacity of a mapped region");
        let new = allocate::<T>(segment_length(segment));
        let null = std::ptr::null_mut();
        // pairs with: the loads in `find` and `iter`, which then see zeroed elements.
        let added = self.segments[segment].compare_exchange(
            null,
            new,
            Ordering::Release,
            Ordering::Relaxed,
        );
        if added.is_err() {
            // SAFETY: it was allocated just now with the same length, and nobody has seen it.
            unsafe { free::<T>(new, segment_length(segment)) };
        }
    }
}

impl<T> Drop for Arena<T> {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        for (segment, start) in self.segments.iter_mut().enumerate() {
            #[cfg(not(loom))]
            let start = *start.get_mut();
            #[cfg(loom)]
            let start = start.with_mut(|start| *start);
            if !start.is_null() {
                // SAFETY: allocated with this length by `add_segment`; `&mut self` excludes users.
                unsafe { free::<T>(start, segment_length(segment)) };
            }
        }
    }
}

impl<T> fmt::Debug for Arena<T> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Arena").finish_non_exhaustive()
    }
}

/// The first element of a segment.
///
/// Memory of a stricter alignment than the allocator's own would be zeroed by hand, touching every
/// page; so segments are aligned here, within a little more room.
#[cfg(not(loom))]
fn elements<T>(start: *mut u8) -> *mut T {
    start.map_addr(|address| address.next_multiple_of(mem::align_of::<T>())).cast()
}

#[cfg(not(loom))]
fn layout<T>(length: usize) -> alloc::Layout {
    let bytes = length * mem::size_of::<T>() + mem::align_of::<T>();
    alloc::Layout::from_size_align(bytes, 16).expect("segments are far below isize::MAX bytes")
}

#[cfg(not(loom))]
fn allocate<T: Zeroed>(length: usize) -> *mut u8 {
    // SAFETY: the layout is not empty.
    let start = unsafe { alloc::alloc_zeroed(layout::<T>(length)) };
    if start.is_null() {
        alloc::handle_alloc_error(layout::<T>(length));
    }
    start
}

#[cfg(not(loom))]
unsafe fn free<T>(start: *mut u8, length: usize) {
    // SAFETY: the caller has it from `allocate` with the same length. Atomics need no drop.
    unsafe { alloc::dealloc(start, layout::<T>(length)) }
}

// Loom's atomics are not zero bytes: they are made one by one.
#[cfg(loom)]
fn elements<T>(start: *mut u8) -> *mut T {
    start.cast()
}

#[cfg(loom)]
fn allocate<T: Zeroed>(length: usize) -> *mut u8 {
    let elements: Box<[T]> = (0..length).map(|_| T::default()).collect();
    Box::into_raw(elements).cast()
}

#[cfg(loom)]
unsafe fn free<T>(start: *mut u8, length: usize) {
    // SAFETY: the caller has it from `allocate` with the same length.
    drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(start.cast::<T>(), length)) });
}
