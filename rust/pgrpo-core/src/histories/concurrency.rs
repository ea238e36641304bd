//! Threads that update at once: counts exact, mean and m2 as two passes find them.

#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{Histories, Sums};
use crate::moments::Moments;

const THREADS: u32 = 4;
const CALLS: u32 = 2_000;
const CLUSTERS: u32 = 7;

/// A cheap, fixed scatter of rewards in [-1, 1), about a mean that differs per cluster.
fn reward(thread: u32, call: u32, entry: u32, cluster: u32) -> f64 {
    let seed = thread.wrapping_mul(0x9E37_79B9) ^ call.wrapping_mul(0x85EB_CA6B) ^ (entry << 7);
    let scattered = seed.wrapping_mul(0xC2B2_AE35) ^ (seed >> 13);
    f64::from(scattered) / f64::from(u32::MAX) * 2.0 - 1.0 + 100.0 * f64::from(cluster)
}

/// The rewards that a thread's call has for a cluster.
fn batch(thread: u32, call: u32, cluster: u32) -> impl Iterator<Item = f64> {
    (0..=(call + cluster) % 9).map(move |entry| reward(thread, call, entry, cluster))
}

/// Runs threads 0 to [`THREADS`] at once.
fn for_each_thread(body: impl Fn(u32) + Sync) {
    thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> =
            (0..THREADS).map(|number| scope.spawn(move || body(number))).collect();
        // One by one: ThreadSanitizer does not see how a scope ends.
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

fn for_each_batch(thread: u32, mut merge: impl FnMut(u32, Moments)) {
    for call in 0..CALLS {
        for cluster in 0..CLUSTERS {
            merge(cluster, batch(thread, call, cluster).collect());
        }
    }
}

#[test]
fn merged_histories_are_those_of_two_passes() {
    let histories = Histories::default();
    for_each_thread(|number| {
        for_each_batch(number, |cluster, batch| {
            let (before, after) = histories.merge(cluster, batch, 1.0, false).unwrap();
            assert_eq!(before.count + batch.count, after.count);
        });
    });
    for cluster in 0..CLUSTERS {
        let calls = (0..THREADS).flat_map(|thread| (0..CALLS).map(move |call| (thread, call)));
        let samples: Vec<f64> =
            calls.flat_map(|(thread, call)| batch(thread, call, cluster)).collect();
        let mean = samples.iter().sum::<f64>() / samples.len() as f64;
        let m2: f64 = samples.iter().map(|reward| (reward - mean).powi(2)).sum();
        let history = histories.read(cluster);
        assert_eq!(history.count, samples.len() as f64);
        assert!((history.mean() - mean).abs() <= 1e-12 * 700.0, "{} {mean}", history.mean());
        assert!((history.m2 - m2).abs() <= 1e-9 * m2, "{} {m2}", history.m2);
    }
}

/// What each thread merged, it takes out again while the others do the same.
#[test]
fn retracting_everything_leaves_nothing() {
    let histories = Histories::default();
    for_each_thread(|number| {
        for_each_batch(number, |cluster, batch| {
            histories.merge(cluster, batch, 1.0, false).unwrap();
        });
        for_each_batch(number, |cluster, batch| histories.retract(cluster, batch).unwrap());
    });
    for cluster in 0..CLUSTERS {
        assert_eq!(histories.read(cluster).count, 0.0);
        assert!(histories.retract(cluster, [1.0].into_iter().collect()).is_err());
    }
}

/// Every merge adds {4, 6}, so that every history between merges has mean 5 and m2 == count.
#[test]
fn readers_see_histories_between_merges_only() {
    let sound = |history: &Moments| history.mean() == 5.0 && history.m2 == history.count;
    let histories = Histories::default();
    let pair: Moments = [4.0, 6.0].into_iter().collect();
    let done = AtomicBool::new(false);
    // Writers go on until the reader has seen enough, so that they overlap on a busy machine too;
    // unsound histories are handed back, for a panicking reader would leave the writers running.
    let write = || {
        let (mut merges, mut all_sound) = (0_u32, true);
        while !done.load(Ordering::SeqCst) {
            // One cluster is fought over, and new ones keep coming, so that the table grows.
            let cluster = if merges % 8 == 0 { merges.min(160_000) / 80 } else { 0 };
            let (before, after) = histories.merge(cluster, pair, 1.0, false).unwrap();
            all_sound &= sound(&after) && before.count + 2.0 == after.count;
            merges += 1;
        }
        all_sound.then_some(merges)
    };
    let read = || {
        let (mut checked, mut unsound) = (0, None);
        while checked < 1_000_000 && unsound.is_none() {
            let seen: Vec<_> = histories.iter().filter(|(_, seen)| seen.count > 0.0).collect();
            // One that is fought over for each that is not.
            let fought_over = (0..seen.len()).map(|_| (0, histories.read(0)));
            checked += 2 * seen.len();
            unsound = fought_over
                .chain(seen.iter().copied())
                .find(|(_, seen)| seen.count > 0.0 && !sound(seen));
        }
        done.store(true, Ordering::SeqCst);
        unsound
    };
    let merges: u32 = thread::scope(|scope| {
        let writers = [scope.spawn(write), scope.spawn(write)];
        assert_eq!(scope.spawn(read).join().unwrap(), None);
        writers.into_iter().map(|writer| writer.join().unwrap().expect("an unsound merge")).sum()
    });
    let count: f64 = histories.iter().map(|(_, history)| history.count).sum();
    assert_eq!(count, 2.0 * f64::from(merges));
}

/// Whole numbers below 2^53: added in any order, the sums are exact.
#[test]
fn sums_of_whole_numbers_are_exact() {
    let sums = Sums::default();
    for_each_thread(|number| {
        let batch = [f64::from(number + 1), f64::from(number * number), 1.0];
        for call in 0..10_000 {
            let (old, new) = sums.add(call % CLUSTERS, batch, 1.0, false).unwrap();
            assert_eq!([0, 1, 2].map(|i| old[i] + batch[i]), new);
        }
    });
    let sums = (0..CLUSTERS).map(|cluster| sums.read(cluster));
    let all = sums.fold([0.0; 3], |all, sum| [0, 1, 2].map(|i| all[i] + sum[i]));
    assert_eq!(all, [1e4 * 10.0, 1e4 * 14.0, 1e4 * 4.0]);
}
