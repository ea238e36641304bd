//! Threads at full speed, and threads that are stopped where it hurts most.
#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counts are small")]

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use super::{Buffer, Head, INTERNED, Refused, Table, Triple};

/// Adds the samples {4, 6}: count, sum, and squared deviations from 5.
#[allow(clippy::unnecessary_wraps, reason = "commits take changes that may be refused")]
fn pair([count, sum, m2]: Triple) -> Option<Triple> {
    Some([count + 2.0, sum + 10.0, m2 + 2.0])
}

/// The number of pairs in a triple that was there at one moment; None if there was none such.
fn pairs([count, sum, m2]: Triple) -> Option<f64> {
    (sum == 5.0 * count && m2 == count).then_some(count / 2.0)
}

/// A commit of one pair; whether its triples are whole, and nothing came between them.
fn commit(table: &Table, key: u32) -> bool {
    let (old, new) = table.commit(table.row(key), pair).unwrap();
    pairs(old).zip(pairs(new)).is_some_and(|(old, new)| old + 1.0 == new)
}

/// `writers` commit to a few rows until a reader has seen enough; nothing is torn, nothing is lost.
///
/// They go on until then so that they overlap on a busy machine too, and faults are handed back,
/// for a thread that panics would leave the others running.
fn hammer(writers: u32, keys: &[u32]) {
    let table = Table::default();
    let (done, start) = (AtomicBool::new(false), Barrier::new(writers as usize + 1));
    let write = |number: usize| {
        start.wait();
        let (mut commits, mut whole) = (0_u64, true);
        while !done.load(SeqCst) {
            whole &= commit(&table, keys[(number + commits as usize) % keys.len()]);
            commits += 1;
        }
        whole.then_some(commits)
    };
    let read = || {
        start.wait();
        let mut last = vec![0.0; keys.len()];
        let mut whole = true;
        for turn in 0..1_000_000 {
            let at = turn % keys.len();
            let seen = table.find(keys[at]).map_or(Some(0.0), |row| pairs(table.read(row)));
            // Neither torn nor older than what was seen before.
            whole &= seen.is_some_and(|seen| seen >= last[at]);
            last[at] = seen.unwrap_or_default();
        }
        done.store(true, SeqCst);
        whole
    };
    let commits: u64 = thread::scope(|scope| {
        let write = &write;
        let writers: Vec<_> =
            (0..writers as usize).map(|number| scope.spawn(move || write(number))).collect();
        assert!(scope.spawn(read).join().unwrap(), "a torn read, or one that went back in time");
        writers.into_iter().map(|w| w.join().unwrap().expect("a torn commit")).sum()
    });
    let total: f64 = keys.iter().map(|&key| pairs(table.read(table.row(key))).unwrap()).sum();
    assert_eq!(total, commits as f64, "updates were lost");
}

#[test]
fn one_row_is_never_torn_and_loses_nothing() {
    hammer(2, &[7]);
    hammer(5, &[7]);
}

#[test]
fn some_rows_are_never_torn_and_lose_nothing() {
    hammer(3, &[0, 1, 64, INTERNED, INTERNED + 1, 70_000]);
}

/// Young tables, whose every commit may grow them, entered by all threads at once.
#[test]
fn growing_together_loses_nothing() {
    const THREADS: usize = 4;
    let keys: Vec<u32> = (0..16).flat_map(|bit| [1 << bit, INTERNED + (1 << bit)]).collect();
    for _ in 0..300 {
        let (table, start) = (Table::default(), Barrier::new(THREADS));
        let whole = thread::scope(|scope| {
            let threads: [_; THREADS] = std::array::from_fn(|number| {
                let (table, start, keys) = (&table, &start, &keys);
                scope.spawn(move || {
                    start.wait();
                    (0..keys.len())
                        .all(|at| commit(table, keys[(at * (2 * number + 1)) % keys.len()]))
                })
            });
            threads.map(|thread| thread.join().unwrap())
        });
        assert_eq!(whole, [true; THREADS]);
        for &key in &keys {
            assert_eq!(pairs(table.read(table.find(key).unwrap())), Some(THREADS as f64));
        }
    }
}

/// Origins raced for: all who set one get the same.
#[test]
fn an_origin_is_set_once() {
    let table = Table::default();
    for key in 0..2_000 {
        let start = Barrier::new(3);
        let origins = thread::scope(|scope| {
            let threads = [1.0, 2.0, 3.0].map(|first| {
                let (table, start) = (&table, &start);
                scope.spawn(move || {
                    start.wait();
                    table.origin_or(key, table.row(key), first)
                })
            });
            threads.map(|thread| thread.join().unwrap())
        });
        assert_eq!(table.row(key).origin(), Some(origins[0]));
        assert_eq!(origins, [origins[0]; 3]);
    }
}

/// Pairs go in, and out again where there are any, and the rows are emptied at times.
#[test]
fn refused_and_emptying_commits_lose_nothing() {
    const TURNS: u64 = 60_000;
    let table = Table::default();
    let row = table.row(0);
    let (taken, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    let unpair =
        |[count, sum, m2]: Triple| (count >= 2.0).then_some([count - 2.0, sum - 10.0, m2 - 2.0]);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for _ in 0..2 {
            threads.push(scope.spawn(|| assert!((0..TURNS).all(|_| commit(&table, 0)))));
            threads.push(scope.spawn(|| {
                for _ in 0..TURNS {
                    match table.commit(row, unpair) {
                        Ok((old, new)) => {
                            assert_eq!(pairs(old), pairs(new).map(|new| new + 1.0));
                            taken.fetch_add(1, SeqCst);
                        }
                        Err(error) => {
                            let Refused::Unchanged(old) = error else { panic!("{error:?}") };
                            assert_eq!(pairs(old), Some(0.0), "refused without a reason");
                            refused.fetch_add(1, SeqCst);
                        }
                    }
                }
            }));
        }
        threads.push(scope.spawn(|| {
            for _ in 0..TURNS / 10 {
                let (old, new) = table.commit(row, |_| Some([0.0; 3])).unwrap();
                assert_eq!(new, [0.0; 3]);
                taken.fetch_add(pairs(old).expect("a torn triple was taken") as u64, SeqCst);
            }
        }));
        // One by one: ThreadSanitizer does not see how a scope ends.
        for thread in threads {
            thread.join().unwrap();
        }
    });
    let left = pairs(table.read(row)).unwrap();
    assert_eq!(left + taken.into_inner() as f64, 2.0 * TURNS as f64);
    // No claim was left behind: nobody needs a spare any more.
    let spares = table.stack.get(0).taken.load(SeqCst);
    for _ in 0..10 {
        assert!(commit(&table, 0));
    }
    assert_eq!(table.stack.get(0).taken.load(SeqCst), spares);
    let head = Head(row.head.load(SeqCst));
    assert!(matches!(table.claim(row, head), Ok(Some((_, Buffer::Inline(_))))));
}

/// Writers stopped between claim and publication, one inline buffer claimed by each, hold up neither
/// writers nor readers; and what they read is thrown away when they go on.
fn frozen_writers(frozen: u64) {
    const COMMITS: u64 = 20_000;
    let table = Table::default();
    let row = table.row(0);
    let (stopped, go_on) = (AtomicU64::new(0), AtomicBool::new(false));
    // A commit as `Table::commit` does it, but for the stop.
    let freeze = || {
        let head = Head(row.head.load(SeqCst));
        let mut old = table.words(row, head.current()).load();
        let (mut head, buffer) = table.claim(row, head).ok().flatten().unwrap();
        stopped.fetch_add(1, SeqCst);
        // For ever, but that a test should fail, not hang.
        let released = (0..60_000).any(|_| {
            thread::sleep(Duration::from_millis(1));
            go_on.load(SeqCst)
        });
        let mut attempts = 1;
        loop {
            table.words(row, buffer).store(pair(old).unwrap());
            match table.publish(row, head, buffer) {
                Ok(()) => return (released, attempts),
                Err(actual) => head = actual,
            }
            old = table.words(row, head.current()).load();
            attempts += 1;
        }
    };
    thread::scope(|scope| {
        let mut writers = Vec::new();
        for number in 1..=frozen {
            writers.push(scope.spawn(freeze));
            while stopped.load(SeqCst) < number {
                thread::yield_now();
            }
            // This goes into a spare, so that the next can claim the other inline buffer.
            commit(&table, 0);
        }
        let claimed = row.head.load(SeqCst) >> 2 & 3;
        let others = [(); 2].map(|()| {
            scope.spawn(|| {
                (0..COMMITS).all(|_| commit(&table, 0) && pairs(table.read(row)).is_some())
            })
        });
        let whole = others.map(|other| other.join().unwrap());
        let (total, spares) = (table.read(row), table.stack.get(0).taken.load(SeqCst));
        go_on.store(true, SeqCst);
        assert_eq!(u64::from(claimed.count_ones()), frozen, "the writers stopped elsewhere");
        assert_eq!(whole, [true; 2]);
        assert_eq!(pairs(total), Some((2 * COMMITS + frozen) as f64));
        assert!(spares <= 3, "{spares} spares for one that is current and two threads");
        for writer in writers {
            let (released, attempts) = writer.join().unwrap();
            assert!(released, "the others waited for a writer that was frozen");
            assert!(attempts > 1, "a commit went through that was based on an old triple");
        }
    });
    assert_eq!(pairs(table.read(row)), Some((2 * COMMITS + 2 * frozen) as f64));
}

#[test]
fn a_frozen_writer_delays_nobody() {
    frozen_writers(1);
}

#[test]
fn two_frozen_writers_delay_nobody() {
    frozen_writers(2);
}
