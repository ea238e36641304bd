//! One region under several handles, as several processes have it: all agree, and whatever bytes lie
//! there nothing worse than an error or strange numbers comes of it.
#![allow(unsafe_code, reason = "regions are made of memory")]
#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]
#![allow(clippy::cast_possible_wrap, clippy::cast_possible_truncation, reason = "small numbers")]

use std::collections::HashSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use proptest::prelude::*;

use super::{Layout, Mismatch, Region};
use crate::estimators::pgrpo;
use crate::histories::Histories;
use crate::ids::{AnyId, ClusterId};
use crate::index::Index;
use crate::moments::Moments;
use crate::normalizer::Normalizer;
use crate::options::Options;

const OPTIONS: &str = "forgetting=1.0";

/// One cache line, so that a vector of them is aligned as mapped memory is.
#[derive(Default)]
#[repr(align(64))]
struct Line([AtomicU64; 8]);

/// What a file would be.
struct Memory {
    lines: Vec<Line>,
    layout: Layout,
}

impl Memory {
    fn new(capacity: u64, num_streams: u32) -> Self {
        let layout = Layout::new(capacity, num_streams).unwrap();
        let mut lines = Vec::new();
        lines.resize_with(layout.length() / 64, Line::default);
        let memory = Self { lines, layout };
        memory.write(0, &layout.header(OPTIONS));
        memory
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        &self.lines[at / 8].0[at % 8]
    }

    /// Writes whole words from a word on.
    fn write(&self, at: usize, bytes: &[u8]) {
        for (at, bytes) in (at..).zip(bytes.chunks_exact(8)) {
            self.word(at).store(u64::from_ne_bytes(bytes.try_into().unwrap()), Ordering::SeqCst);
        }
    }

    fn length(&self) -> usize {
        self.lines.len() * 64
    }

    fn try_open(
        &self,
        length: usize,
        layout: Layout,
        options: &str,
        alone: bool,
    ) -> Result<Handle, Mismatch> {
        assert!(length <= self.length());
        let start = self.lines.as_ptr().cast_mut().cast();
        // SAFETY: aligned lines of atomics, which outlive every handle of a test.
        let mut region = unsafe { Region::open(start, length, layout, options, alone) }?;
        let streams = region.take_tables().into_iter().map(Histories::from).collect();
        Ok(Handle { region, streams })
    }

    fn open(&self, alone: bool) -> Handle {
        self.try_open(self.length(), self.layout, OPTIONS, alone).unwrap()
    }

    fn refusal(&self, length: usize, layout: Layout, options: &str) -> String {
        self.try_open(length, layout, options, true).unwrap_err().to_string()
    }
}

/// What a process has.
#[derive(Debug)]
struct Handle {
    region: Region,
    streams: Vec<Histories>,
}

impl Handle {
    fn index(&self) -> &Index {
        self.region.index()
    }
}

fn pair() -> Moments {
    [4.0, 6.0].into_iter().collect()
}

#[allow(clippy::needless_pass_by_value, reason = "it is mapped over arrays of values")]
fn name(name: impl ToString) -> ClusterId {
    ClusterId::Name(name.to_string())
}

#[test]
fn every_handle_has_the_same_keys() {
    let memory = Memory::new(64, 1);
    let [one, other] = [memory.open(true), memory.open(false)];
    let ints = [0, 1, -1, 7, i64::MIN, i64::MAX].map(ClusterId::Int);
    let long = "long ".repeat(300);
    let names = ["", "7", "a", "a\0", "eight by", "eight byt", "größer", &long].map(name);
    let ids = ints.into_iter().chain(names);
    let ids: Vec<ClusterId> = ids.flat_map(|id| [id.borrow().as_parent().into(), id]).collect();
    assert!(ids.iter().all(|id| one.index().find(id.borrow()).is_none()));
    let keys: Vec<u32> = ids.iter().map(|id| one.index().key(id.borrow()).unwrap()).collect();
    assert_eq!(keys.iter().collect::<HashSet<_>>().len(), ids.len());
    for (&key, id) in keys.iter().zip(&ids) {
        assert_eq!(other.index().find(id.borrow()), Some(key));
        assert_eq!(other.index().key(id.borrow()).unwrap(), key);
        assert_eq!(other.index().id(key).as_ref(), Some(id));
        assert_eq!(other.index().is_parent(key), id.is_parent());
    }
    assert_eq!(other.index().keys().collect::<Vec<_>>(), keys, "in the order in which they came");
    assert_eq!(one.index().id(0), None);
    assert_eq!(one.index().id(u32::MAX), None);
}

#[test]
fn threads_that_meet_the_same_ids_at_once_agree() {
    let memory = Memory::new(512, 1);
    let start = Barrier::new(4);
    let keys: Vec<Vec<u32>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let handle = memory.open(false);
                    start.wait();
                    (0..512).map(|id| handle.index().key(name(id).borrow()).unwrap()).collect()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(keys.iter().all(|of_thread| *of_thread == keys[0]));
    // Who lost a race for an id has taken a key for nothing, which leads to the same id.
    let index = memory.open(false);
    let all: HashSet<ClusterId> =
        index.index().keys().map(|key| index.index().id(key).unwrap()).collect();
    assert_eq!(all.len(), 512);
}

#[test]
fn what_it_was_made_for_fits_and_more_is_refused() {
    for capacity in [1, 33, 1000, 20_000] {
        let memory = Memory::new(capacity, 1);
        let handle = memory.open(true);
        let intern = |id: i64| {
            if id % 2 == 0 {
                handle.index().key(AnyId::Int(id))
            } else {
                handle.index().key(AnyId::Name(&id.to_string()))
            }
        };
        let capacity = i64::try_from(capacity).unwrap();
        assert!((0..capacity).all(|id| intern(id).is_ok()));
        let full = (capacity..).find_map(|id| intern(id).err()).unwrap();
        let message = format!("the shared table is full: it has room for {capacity} clusters");
        assert_eq!(full.to_string(), message);
        assert!((0..capacity).all(|id| intern(id).is_ok()), "known ids are never refused");
    }
    let memory = Memory::new(1, 1);
    let handle = memory.open(true);
    let refused = handle.index().key(AnyId::Name(&"x".repeat(4096))).unwrap_err();
    assert!(refused.to_string().contains("4096 bytes of cluster names"), "{refused}");
    assert!(handle.index().key(AnyId::Name(&"x".repeat(4000))).is_ok());
}

#[test]
fn no_update_is_lost_or_torn_between_handles() {
    let memory = Memory::new(8, 2);
    let done = AtomicBool::new(false);
    let sound = |moments: Moments| {
        moments.count == 0.0 || (moments.mean() == 5.0 && moments.m2 == moments.count)
    };
    let merges: u64 = thread::scope(|scope| {
        let writers: Vec<_> = (0..3_i64)
            .map(|number| {
                let (memory, done) = (&memory, &done);
                scope.spawn(move || {
                    let handle = memory.open(false);
                    let mut merges = 0;
                    while !done.load(Ordering::SeqCst) {
                        let key =
                            handle.index().key(AnyId::Int((merges as i64 + number) % 2)).unwrap();
                        for stream in &handle.streams {
                            assert!(sound(stream.merge(key, pair(), 1.0, false).unwrap().1));
                        }
                        handle.region.add_nonfinite(1);
                        merges += 1;
                    }
                    merges
                })
            })
            .collect();
        let reader = memory.open(false);
        let mut unsound = None;
        for _ in 0..200_000 {
            let keys = reader.index().keys();
            let seen = keys.map(|key| reader.streams[0].read(key));
            unsound = unsound.or(seen.into_iter().find(|&moments| !sound(moments)));
        }
        done.store(true, Ordering::SeqCst);
        assert_eq!(unsound, None);
        writers.into_iter().map(|writer| writer.join().unwrap()).sum()
    });
    let handle = memory.open(true);
    for stream in &handle.streams {
        let count: f64 = handle.index().keys().map(|key| stream.read(key).count).sum();
        assert_eq!(count, 2.0 * merges as f64);
    }
    assert_eq!(handle.region.num_nonfinite(), merges);
}

/// Word offsets of a row and of the stack of spares, as the table of the module's docs has them, of
/// which `size` is S.
fn places(size: usize, key: usize) -> (usize, usize) {
    let rows = (4096 + 128 * size + 64 * size + 8 * size) / 8;
    (rows + 8 * key, rows + (64 * size + 32 * size.max(65536)) / 8)
}

#[test]
fn rows_claimed_by_the_dead_still_work_and_are_repaired_when_alone() {
    let memory = Memory::new(100, 1);
    let handle = memory.open(true);
    let key = handle.index().key(AnyId::Name("left")).unwrap();
    let (head, stack) = places(256, (key & 0xff) as usize);
    handle.streams[0].merge(key, pair(), 1.0, false).unwrap();
    // Two writers were killed, each with an inline buffer claimed.
    memory.word(head).fetch_or(0b1100, Ordering::SeqCst);
    for merges in 2..=200_000 {
        let (_, after) = handle.streams[0].merge(key, pair(), 1.0, false).unwrap();
        assert_eq!(
            (after.count, after.mean(), after.m2),
            (2.0 * f64::from(merges), 5.0, after.count)
        );
    }
    assert_eq!(memory.word(head).load(Ordering::SeqCst) & 0b1111, 0b1110, "it lives on spares");
    let taken = memory.word(stack + 1).load(Ordering::SeqCst);
    assert!((1..=2).contains(&taken), "{taken} spares");
    let before = handle.streams[0].read(key);
    drop(handle);
    let handle = memory.open(true);
    assert_eq!(handle.streams[0].read(key), before);
    assert_eq!(memory.word(head).load(Ordering::SeqCst) & 0b1111, 0, "nothing is claimed");
    assert_eq!([0, 1].map(|at| memory.word(stack + at).load(Ordering::SeqCst)), [0, 0]);
    assert_eq!(
        handle.streams[0].merge(key, pair(), 1.0, false).unwrap().1.count,
        before.count + 2.0
    );
}

#[test]
fn what_does_not_fit_together_is_refused_by_name() {
    let memory = Memory::new(64, 1);
    let layout = |capacity, streams| Layout::new(capacity, streams).unwrap();
    let length = memory.length();
    let refusal = |layout, options| memory.refusal(length, layout, options);
    let reason = "shared table: capacity 64; expected 65";
    assert_eq!(refusal(layout(65, 1), OPTIONS), reason);
    let reason = "shared table: number of streams 1; expected 2";
    assert_eq!(refusal(layout(64, 2), OPTIONS), reason);
    let reason = "shared table: options forgetting=1.0; expected forgetting=0.9";
    assert_eq!(refusal(layout(64, 1), "forgetting=0.9"), reason);
    let shorter = memory.refusal(length - 64, memory.layout, OPTIONS);
    assert_eq!(shorter, format!("shared table: file size {}; expected {length}", length - 64));
    memory.word(2).store(9, Ordering::SeqCst);
    assert_eq!(refusal(memory.layout, OPTIONS), "shared table: version 9; expected 2");
    memory.word(1).store(0x0807_0605_0403_0201, Ordering::SeqCst);
    assert!(refusal(memory.layout, OPTIONS).contains("byte order 0x807060504030201"));
    memory.word(0).store(0, Ordering::SeqCst);
    assert!(refusal(memory.layout, OPTIONS).contains("begins with [00, 00"));
    for (capacity, streams) in [(0, 1), (1 << 24, 1), (1, 0), (1, 65)] {
        assert!(Layout::new(capacity, streams).is_err());
    }
}

/// Does everything there is to do.
fn use_all(handle: &Handle, alone: bool) {
    let index = handle.index();
    let keys: Vec<u32> = index.keys().collect();
    for &key in keys.iter().take(100) {
        let _ = index.id(key);
        let _ = handle.streams[0].read(key);
    }
    let _ = index.find(AnyId::Name("unknown"));
    let new = [index.key(AnyId::Int(5)), index.key(AnyId::Name("five and more than eight bytes"))];
    for key in keys.into_iter().take(100).chain(new.into_iter().flatten()) {
        // Made up claims on all buffers are refused, were they not cleared by who came alone.
        let merged = handle.streams[0].merge(key, pair(), 0.5, false);
        assert!(!alone || merged.is_ok());
        let _ = handle.streams[0].retract(key, pair());
        let _ = handle.streams[0].take(key);
    }
    handle.region.add_nonfinite(1);
}

proptest! {
    #[test]
    fn a_damaged_header_is_refused(
        word in 0_usize..10,
        bit in 0_u32..64,
    ) {
        let memory = Memory::new(4, 1);
        memory.word(word).fetch_xor(1 << bit, Ordering::SeqCst);
        prop_assert!(memory.try_open(memory.length(), memory.layout, OPTIONS, true).is_err());
    }

    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..8192), length in 0_usize..8192) {
        let memory = Memory::new(4, 1);
        memory.write(0, &bytes);
        let intact = memory.layout.header(OPTIONS);
        let written = &bytes[..bytes.len() / 8 * 8];
        prop_assume!(!intact.starts_with(&written[..written.len().min(4096)]));
        prop_assert!(memory.try_open(length, memory.layout, OPTIONS, true).is_err());
        prop_assert!(memory.try_open(memory.length(), memory.layout, OPTIONS, false).is_err());
    }

    /// Behind an intact header anything may lie.
    #[test]
    fn damaged_contents_do_no_harm(
        seed in any::<u64>(),
        density in 1_u64..200,
        extreme in any::<bool>(),
        alone in any::<bool>(),
    ) {
        let memory = Memory::new(30, 1);
        let handle = memory.open(true);
        for id in 0..20 {
            let key = handle.index().key(AnyId::Name(&format!("a cluster called {id}"))).unwrap();
            handle.streams[0].merge(key, pair(), 1.0, false).unwrap();
        }
        let (mut state, spares) = (seed, places(64, 64).0);
        for at in 512..memory.length() / 8 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Most of the region are spare nodes; its end is their stack.
            let hit = at < spares + 64 || at >= memory.length() / 8 - 128;
            if hit && (state >> 33) % density == 0 {
                let value = if extreme { u64::MAX } else { state.rotate_left(29) };
                memory.word(at).store(value, Ordering::SeqCst);
            }
        }
        for counter in 448..451 {
            let value = if extreme { u64::MAX } else { state >> 50 };
            memory.word(counter).store(value, Ordering::SeqCst);
        }
        drop(handle);
        use_all(&memory.open(alone), alone);
    }
}

#[test]
fn a_normalizer_refuses_a_region_of_other_streams() {
    let memory = Memory::new(64, 2);
    let start = memory.lines.as_ptr().cast_mut().cast();
    // SAFETY: as above.
    let region = unsafe { Region::open(start, memory.length(), memory.layout, OPTIONS, true) };
    let error = Normalizer::shared(Options::new(&pgrpo::RULE), region.unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "num_streams is 2; expected 1, which these options keep");
}
