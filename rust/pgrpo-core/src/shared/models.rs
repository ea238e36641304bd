//! Loom's models of what processes share: every interleaving and every weak order that is allowed
//! (with two or three preemptions), and a process killed before each of its atomic steps.
//!
//! Loom is not told about processes; nothing here depends on the difference from threads.
#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]

use std::sync::atomic::{AtomicBool, Ordering};

use loom::model::Builder;
use loom::sync::Arc;
use loom::thread;

use crate::ids::{AnyId, ClusterId};
use crate::index::Index;
use crate::sync::mortal::live_for;
use crate::table::{INTERNED, Table, Triple};

const KEY: u32 = INTERNED;

fn model(preemptions: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(run);
}

/// Runs a model for a victim killed before step 0, 1, 2, ..., until it comes to its end whatever
/// happens. Returns the number of steps.
fn killed_at_every_step(preemptions: usize, run: fn(steps: u32) -> bool) -> u32 {
    let reached = |steps: u32| {
        let killed = std::sync::Arc::new(AtomicBool::new(false));
        let in_model = killed.clone();
        model(preemptions, move || {
            if run(steps) {
                in_model.store(true, Ordering::SeqCst);
            }
        });
        killed.load(Ordering::SeqCst)
    };
    (0..).find(|&steps| !reached(steps)).expect("lives are finite")
}

/// Commits what a merge of {4, 6} would; returns the number of merges before and after.
fn merge(table: &Table, key: u32) -> (usize, usize) {
    let add = |[count, _, m2]: Triple| Some([count + 2.0, 5.0, m2 + 2.0]);
    let (before, after) = table.commit(table.row(key), add).unwrap();
    (merges(before), merges(after))
}

fn read(table: &Table) -> usize {
    merges(table.read(table.row(KEY)))
}

/// The number of merges that make up a triple.
fn merges(triple: Triple) -> usize {
    let of = |merges: usize| [2.0 * merges as f64, 5.0 * merges.min(1) as f64, 2.0 * merges as f64];
    (0..10).find(|&merges| triple == of(merges)).expect("a triple that was committed")
}

#[test]
fn a_writer_killed_anywhere_blocks_nobody_and_tears_nothing() {
    let steps = killed_at_every_step(2, |steps| {
        let table = Arc::new(Table::default());
        merge(&table, KEY);
        let victim = {
            let table = table.clone();
            thread::spawn(move || live_for(steps, || merge(&table, KEY)).is_none())
        };
        let (before, after) = merge(&table, KEY);
        assert_eq!(after, before + 1);
        assert!(read(&table) >= after);
        let killed = victim.join().unwrap();
        assert!(if killed { (2..=3).contains(&read(&table)) } else { read(&table) == 3 });
        killed
    });
    assert!(steps > 8, "a merge takes {steps} steps");
}

/// Three processes die one after the other, so that both buffers of the row may be claimed for ever,
/// and spares lost.
#[test]
fn after_three_deaths_the_row_works_and_can_be_repaired() {
    let limit = 40;
    for (first, second) in
        (0..limit).flat_map(|first| (0..limit).map(move |second| (first, second)))
    {
        model(2, move || {
            let table = Table::default();
            merge(&table, KEY);
            let die = |steps| {
                let done = live_for(steps, || merge(&table, KEY)).is_some();
                assert!(done || steps < limit - 1, "a merge takes more than {steps} steps");
                usize::from(done)
            };
            let least = 2 + die(first);
            merge(&table, KEY);
            let least = least + die(second) + die((first + second) % limit);
            let count = read(&table);
            assert!((least..=5).contains(&count));
            assert_eq!(merge(&table, KEY), (count, count + 1));
            assert_eq!(merge(&table, KEY), (count + 1, count + 2));
            table.repair([KEY].into_iter());
            // Another row that goes on in a spare, for a buffer of it is claimed: not in one of ours.
            assert!(live_for(3, || merge(&table, KEY + 1)).is_none());
            assert_eq!(merge(&table, KEY + 1), (0, 1));
            assert_eq!(read(&table), count + 2);
            assert_eq!(merge(&table, KEY), (count + 2, count + 3));
        });
    }
}

fn check(index: &Index, id: i64, key: u32) {
    assert_eq!(index.find(AnyId::Int(id)), Some(key));
    assert_eq!(index.id(key), Some(ClusterId::Int(id)));
}

/// Interns an id in another thread.
fn interned(index: &Arc<Index>, id: i64) -> thread::JoinHandle<u32> {
    let index = index.clone();
    thread::spawn(move || index.key(AnyId::Int(id)).unwrap())
}

#[test]
fn two_that_intern_the_same_id_agree() {
    model(2, || {
        let index = Arc::new(Index::default());
        let other = interned(&index, 5);
        let five = index.key(AnyId::Int(5)).unwrap();
        check(&index, 5, five);
        assert_eq!(other.join().unwrap(), five);
    });
}

/// Of three ids at least two begin with the same slot, for here there are two: nodes are added.
#[test]
fn two_that_intern_ids_which_part_further_down_lose_none() {
    model(2, || {
        let index = Arc::new(Index::default());
        let five = index.key(AnyId::Int(5)).unwrap();
        let other = interned(&index, 9);
        let thirteen = index.key(AnyId::Int(13)).unwrap();
        let keys = [five, other.join().unwrap(), thirteen];
        for (id, key) in [5, 9, 13].into_iter().zip(keys) {
            check(&index, id, key);
        }
    });
}

#[test]
fn who_finds_a_key_can_read_its_id() {
    model(2, || {
        let index = Arc::new(Index::default());
        let other = {
            let index = index.clone();
            thread::spawn(move || index.key(AnyId::Int(5)).unwrap())
        };
        // Whoever goes through the keys sees ids that are whole, and perhaps not published yet.
        for key in index.keys() {
            assert!(index.id(key).is_none_or(|id| id == ClusterId::Int(5)));
        }
        if let Some(key) = index.find(AnyId::Int(5)) {
            check(&index, 5, key);
        }
        check(&index, 5, other.join().unwrap());
    });
}

#[test]
fn an_interning_killed_anywhere_leaves_nothing_half_made() {
    let steps = killed_at_every_step(2, |steps| {
        let index = Arc::new(Index::default());
        let victim = {
            let index = index.clone();
            thread::spawn(move || live_for(steps, || index.key(AnyId::Int(5)).unwrap()).is_none())
        };
        let five = index.key(AnyId::Int(5)).unwrap();
        let killed = victim.join().unwrap();
        check(&index, 5, five);
        check(&index, 9, index.key(AnyId::Int(9)).unwrap());
        killed
    });
    assert!(steps > 5, "interning takes {steps} steps");
}
