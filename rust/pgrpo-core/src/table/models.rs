//! Every interleaving and every stale read that loom finds, up to a number of preemptions:
//! `make loom`.
#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]

use std::sync::Arc as Shared;
use std::sync::atomic::{AtomicBool, AtomicU64 as Counter, Ordering::SeqCst};

use loom::sync::{Arc, Mutex};
use loom::thread;

use super::{Buffer, Head, Refused, Row, Table, Triple};
use crate::gate::Gate;
use crate::sync::Ordering;
use crate::sync::mortal::live_for;

/// Explores a model and says in how many executions.
fn explore(name: &str, preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    println!("{name}: {} executions", executions(preemptions, model));
}

fn executions(preemptions: usize, model: impl Fn() + Send + Sync + 'static) -> u64 {
    let executions = Shared::new(Counter::new(0));
    let counted = Shared::clone(&executions);
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 10_000;
    builder.preemption_bound.get_or_insert(preemptions);
    builder.check(move || {
        counted.fetch_add(1, SeqCst);
        model();
    });
    executions.load(SeqCst)
}

/// Adds the samples {4, 6}: count, sum, and squared deviations from 5.
fn pair([count, sum, m2]: Triple) -> Option<Triple> {
    Some([count + 2.0, sum + 10.0, m2 + 2.0])
}

/// The number of pairs in a triple that was there at one moment.
fn pairs([count, sum, m2]: Triple) -> f64 {
    assert!(sum == 5.0 * count && m2 == count, "torn: {:?}", [count, sum, m2]);
    count / 2.0
}

/// A commit of one pair: its triples are whole, and nothing came between them.
fn commit(table: &Table, row: &Row) -> f64 {
    let (old, new) = table.commit(row, pair).unwrap();
    assert_eq!(pairs(old) + 1.0, pairs(new));
    pairs(new)
}

/// A table all of whose memory is there, as it is where processes share one, with `stopped` writers
/// that were stopped for ever once they had claimed an inline buffer of row 0, and a commit since each.
fn table(stopped: usize) -> Arc<Table> {
    let table = Table::default();
    table.stack.get(0);
    table.spares.get(0);
    for _ in 0..stopped {
        let row = table.row(0);
        let head = Head(row.head.load(Ordering::Relaxed));
        assert!(matches!(table.claim(row, head), Ok(Some((_, Buffer::Inline(_))))));
        // Its first commit goes into a spare, and the other inline buffer is free to be claimed.
        commit(&table, table.row(0));
    }
    Arc::new(table)
}

fn claims(table: &Table) -> u64 {
    let head = table.row(0).head.load(Ordering::Relaxed);
    head & (Head::claim(0) | Head::claim(1))
}

/// Two writers of `commits` each and a reader of one row.
fn writers_and_reader(name: &str, stopped: usize, commits: [usize; 2], preemptions: usize) {
    explore(name, preemptions, move || {
        let table = table(stopped);
        let before = claims(&table);
        let writers = commits.map(|commits| {
            let table = Arc::clone(&table);
            thread::spawn(move || {
                let counts: Vec<_> = (0..commits).map(|_| commit(&table, table.row(0))).collect();
                assert!(counts.is_sorted());
            })
        });
        pairs(table.read(table.row(0)));
        for writer in writers {
            writer.join().unwrap();
        }
        let total = pairs(table.read(table.row(0)));
        assert_eq!(total, (stopped + commits.iter().sum::<usize>()) as f64, "an update was lost");
        assert_eq!(claims(&table), before);
    });
}

#[test]
fn nothing_is_torn_or_lost() {
    writers_and_reader("writers and reader", 0, [1, 1], 3);
}

#[test]
fn nothing_is_torn_or_lost_beside_a_stopped_writer() {
    writers_and_reader("one stopped writer", 1, [1, 1], 2);
}

#[test]
fn nothing_is_torn_or_lost_in_spares() {
    writers_and_reader("two stopped writers", 2, [1, 1], 2);
}

/// One writer, whose third commit goes into the spare that its first displaced, and a reader that may
/// hold the head of back then.
#[test]
fn a_spare_is_used_again_under_a_reader() {
    explore("spare used again", 2, || {
        let table = table(2);
        let writer = thread::spawn({
            let table = Arc::clone(&table);
            move || [(); 3].map(|()| commit(&table, table.row(0)))
        });
        pairs(table.read(table.row(0)));
        writer.join().unwrap();
        assert_eq!(pairs(table.read(table.row(0))), 5.0);
        assert_eq!(table.stack.get(0).taken.load(Ordering::Relaxed), 2, "none was used again");
    });
}

/// The same for inline buffers: the second commit writes over what the reader may be reading.
#[test]
fn a_buffer_is_used_again_under_a_reader() {
    explore("buffer used again", 2, || {
        let table = table(0);
        let writer = thread::spawn({
            let table = Arc::clone(&table);
            move || [(); 2].map(|()| commit(&table, table.row(0)))
        });
        let first = pairs(table.read(table.row(0)));
        let second = pairs(table.read(table.row(0)));
        assert!(first <= second, "time went back from {second} to {first}");
        writer.join().unwrap();
        assert_eq!(pairs(table.read(table.row(0))), 2.0);
    });
}

/// A thread finds the top of the stack and its successor; the other takes both and gives the top
/// back: what the first knows is wrong, though the top is what it was.
#[test]
fn no_spare_is_given_out_twice() {
    explore("stack of spares", 3, || {
        let table = table(0);
        let spares = [table.take_spare().unwrap(), table.take_spare().unwrap()];
        spares.into_iter().for_each(|spare| table.give_spare(spare));
        let other = thread::spawn({
            let table = Arc::clone(&table);
            move || {
                let mine = [table.take_spare().unwrap(), table.take_spare().unwrap()];
                table.give_spare(mine[0]);
                mine[1]
            }
        });
        let first = table.take_spare().unwrap();
        let second = table.take_spare().unwrap();
        let third = other.join().unwrap();
        let mut held = [first, second, third];
        held.sort_unstable();
        assert!(held.is_sorted_by(|a, b| a < b), "given out twice: {held:?}");
    });
}

#[test]
fn an_origin_is_set_once() {
    explore("origin", 3, || {
        let table = table(0);
        let others = [4.0, 6.0].map(|first| {
            let table = Arc::clone(&table);
            thread::spawn(move || table.origin_or(0, table.row(0), first))
        });
        let seen = table.row(0).origin();
        let set = others.map(|other| other.join().unwrap());
        assert_eq!(set[0], set[1]);
        assert!(seen.is_none_or(|seen| seen == set[0]));
        assert_eq!(table.row(0).origin(), Some(set[0]));
    });
}

/// Two threads add the same segments, of rows and of what tells which of them are used; whoever knows
/// of a commit finds its row when going through all.
#[test]
fn growing_together_loses_nothing() {
    explore("growth", 3, || {
        let table: Arc<Table> = Arc::new(Table::default());
        let others = [2, 3].map(|key| {
            let table = Arc::clone(&table);
            thread::spawn(move || table.origin_or(key, table.row(key), f64::from(key)))
        });
        for (key, row) in table.iter() {
            assert_eq!(row.origin(), Some(f64::from(key)));
        }
        assert_eq!(others.map(|other| other.join().unwrap()), [2.0, 3.0]);
        let found: Vec<_> = table.iter().map(|(key, row)| (key, row.origin())).collect();
        assert_eq!(found, [(2, Some(2.0)), (3, Some(3.0))]);
    });
}

/// Threads with one lock between them: one commits without an exchange while it holds the lock and
/// sees nobody inside, the other goes inside under the lock and commits without it, and a reader heeds
/// neither. (Without the count of those inside, this fails.)
#[test]
fn the_only_writer_needs_no_exchange() {
    explore("only writer", 2, || {
        let (table, gate, lock) = (table(0), Arc::new(Gate::default()), Arc::new(Mutex::new(())));
        let reader = thread::spawn({
            let table = Arc::clone(&table);
            move || pairs(table.read(table.row(0)))
        });
        let other = thread::spawn({
            let (table, gate, lock) = (Arc::clone(&table), Arc::clone(&gate), Arc::clone(&lock));
            move || {
                let held = lock.lock().unwrap();
                gate.enter();
                drop(held);
                commit(&table, table.row(0));
                gate.leave();
            }
        });
        let held = lock.lock().unwrap();
        let row = table.row(0);
        let (old, new) = if gate.is_empty() {
            table.commit_as_only(row, pair).unwrap()
        } else {
            table.commit(row, pair).unwrap()
        };
        assert_eq!(pairs(old) + 1.0, pairs(new));
        drop(held);
        other.join().unwrap();
        assert!(reader.join().unwrap() <= 2.0);
        assert_eq!(pairs(table.read(table.row(0))), 2.0, "an update was lost");
    });
}

/// A change that is refused leaves no claim behind and was right to be refused.
#[test]
fn a_refusal_gives_its_claim_back() {
    for stopped in [0, 1] {
        explore("refusal", 2, move || {
            let table = table(stopped);
            let before = claims(&table);
            let writer = thread::spawn({
                let table = Arc::clone(&table);
                move || [(); 2].map(|()| commit(&table, table.row(0)))
            });
            let enough = 2.0 * (stopped as f64 + 2.0);
            let unpair = |[count, sum, m2]: Triple| {
                (count >= enough).then_some([count - 2.0, sum - 10.0, m2 - 2.0])
            };
            let taken = match table.commit(table.row(0), unpair) {
                Ok((old, new)) => pairs(old) - pairs(new),
                Err(refused) => {
                    let Refused::Unchanged(old) = refused else { panic!("{refused:?}") };
                    assert!(pairs(old) < (stopped + 2) as f64, "refused without a reason");
                    0.0
                }
            };
            writer.join().unwrap();
            assert_eq!(pairs(table.read(table.row(0))), (stopped + 2) as f64 - taken);
            assert_eq!(claims(&table), before);
            // A spare that was taken for nothing is free again.
            let spares = table.stack.get(0).taken.load(Ordering::Relaxed);
            let row = table.row(0).head.load(Ordering::Relaxed);
            let current = u64::from(matches!(Head(row).current(), Buffer::Spare(_)));
            let free = std::iter::from_fn(|| {
                let spare = table.take_spare();
                (table.stack.get(0).taken.load(Ordering::Relaxed) == spares).then_some(spare)
            });
            assert_eq!(free.count() as u64 + current, spares);
        });
    }
}

#[test]
fn emptying_loses_nothing() {
    explore("take", 2, || {
        let table = table(0);
        let writer = thread::spawn({
            let table = Arc::clone(&table);
            move || [(); 2].map(|()| table.commit(table.row(0), pair).unwrap())
        });
        let (taken, empty) = table.commit(table.row(0), |_| Some([0.0; 3])).unwrap();
        assert_eq!(empty, [0.0; 3]);
        writer.join().unwrap();
        assert_eq!(pairs(taken) + pairs(table.read(table.row(0))), 2.0);
    });
}

/// A writer is killed before each of its steps in turn, at every moment of the others' work: the
/// others finish theirs, nothing is torn, and the dead one's commit is there as a whole or not at
/// all.
fn killed_at_every_step(name: &str, stopped: usize, preemptions: usize) {
    let mut total = 0;
    for steps in 0.. {
        let killed = Shared::new(AtomicBool::new(false));
        let reached = Shared::clone(&killed);
        total += executions(preemptions, move || {
            let table = table(stopped);
            let victim = thread::spawn({
                let table = Arc::clone(&table);
                move || live_for(steps, || commit(&table, table.row(0))).is_some()
            });
            commit(&table, table.row(0));
            let lived = victim.join().unwrap();
            reached.fetch_or(!lived, SeqCst);
            let total = pairs(table.read(table.row(0)));
            let own = (stopped + 1) as f64;
            assert!(total == own + 1.0 || !lived && total == own, "{total} pairs, {own} own");
            // The row works on.
            assert_eq!(commit(&table, table.row(0)), total + 1.0);
        });
        if !killed.load(SeqCst) {
            println!("{name} after each of {steps} steps: {total} executions");
            assert!(steps > 10, "no writer is done after {steps} steps");
            return;
        }
    }
}

#[test]
fn a_killed_writer_stops_nobody() {
    killed_at_every_step("killed", 0, 3);
}

#[test]
fn a_killed_writer_beside_a_dead_one_stops_nobody() {
    killed_at_every_step("killed beside a dead one", 1, 3);
}

#[test]
fn a_killed_writer_to_a_spare_stops_nobody() {
    killed_at_every_step("killed with a spare", 2, 2);
}
