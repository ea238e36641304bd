//! Threads that update at once: counts exact, mean and m2 as two passes find them.

#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use pgrpo_core::{Estimator, Histories, Moments, NanPolicy, Normalizer, Order, Scale};

const THREADS: u32 = 4;
const CALLS: u32 = 300;
const CLUSTERS: u32 = 7;

/// A cheap, fixed scatter of rewards in [-1, 1), about a mean that differs per cluster.
fn reward(thread: u32, call: u32, entry: u32, cluster: u32) -> f64 {
    let seed = thread.wrapping_mul(0x9E37_79B9) ^ call.wrapping_mul(0x85EB_CA6B) ^ (entry << 7);
    let scattered = seed.wrapping_mul(0xC2B2_AE35) ^ (seed >> 13);
    f64::from(scattered) / f64::from(u32::MAX) * 2.0 - 1.0 + 100.0 * f64::from(cluster)
}

fn batch(thread: u32, call: u32) -> (Vec<f64>, Vec<u32>) {
    let cluster = |entry: u32| (entry * entry + call) % CLUSTERS;
    let entries = 0..(1 + call % 60);
    entries.map(|entry| (reward(thread, call, entry, cluster(entry)), cluster(entry))).unzip()
}

#[test]
fn no_update_is_lost_or_torn() {
    let scale = Scale::new(0, 1e-4).unwrap();
    let normalizer =
        Normalizer::new(Estimator::Pgrpo, scale, Order::UpdateThenNormalize, NanPolicy::Raise);
    thread::scope(|scope| {
        for number in 0..THREADS {
            let normalizer = &normalizer;
            scope.spawn(move || {
                for call in 0..CALLS {
                    let (rewards, clusters) = batch(number, call);
                    let advantages = normalizer.advantages(&rewards, &clusters, None).unwrap();
                    assert_eq!(advantages.len(), rewards.len());
                }
            });
        }
    });
    let mut samples = vec![Vec::new(); CLUSTERS as usize];
    for (thread, call) in (0..THREADS).flat_map(|t| (0..CALLS).map(move |c| (t, c))) {
        let (rewards, clusters) = batch(thread, call);
        for (reward, cluster) in rewards.into_iter().zip(clusters) {
            samples[cluster as usize].push(reward);
        }
    }
    for (history, samples) in normalizer.snapshot().into_iter().zip(samples) {
        let mean = samples.iter().sum::<f64>() / samples.len() as f64;
        let m2: f64 = samples.iter().map(|r| (r - mean).powi(2)).sum();
        assert_eq!(history.count, samples.len() as u64);
        assert!((history.mean - mean).abs() <= 1e-12 * 700.0);
        assert!((history.m2 - m2).abs() <= 1e-9 * m2.max(1.0), "{} {m2}", history.m2);
    }
}

/// Every merge adds {4, 6}, so that every history between merges has mean 5 and m2 == count.
#[test]
fn readers_see_histories_between_merges_only() {
    let sound = |history: &Moments| history.mean == 5.0 && history.m2 == history.count as f64;
    let histories = Histories::default();
    let pair: Moments = [4.0, 6.0].into_iter().collect();
    let done = AtomicBool::new(false);
    // Writers go on until the reader has seen enough, so that they overlap on a busy machine too;
    // unsound histories are handed back, for a panicking reader would leave the writers running.
    let write = || {
        let mut merges = 0;
        while !done.load(Ordering::SeqCst) {
            // One cluster is fought over, and new ones keep coming, so that the table grows.
            let cluster = if merges % 8 == 0 { merges.min(160_000) / 8_000 } else { 0 };
            let after = histories.merge(cluster, pair);
            assert!(sound(&after), "{after:?}");
            merges += 1;
        }
        merges
    };
    let read = || {
        let mut checked = 0;
        let mut unsound = None;
        while checked < 1_000_000 && unsound.is_none() {
            let seen: Vec<_> = histories.snapshot().into_iter().filter(|h| h.count > 0).collect();
            checked += seen.len();
            unsound = seen.into_iter().find(|history| !sound(history));
        }
        done.store(true, Ordering::SeqCst);
        unsound
    };
    let merges: u32 = thread::scope(|scope| {
        let writers = [scope.spawn(write), scope.spawn(write)];
        assert_eq!(scope.spawn(read).join().unwrap(), None);
        writers.into_iter().map(|writer| writer.join().unwrap()).sum()
    });
    let count: u64 = histories.snapshot().iter().map(|history| history.count).sum();
    assert_eq!(count, 2 * u64::from(merges));
}

/// Young tables, whose every merge may grow them, entered by all threads at once.
#[test]
fn growing_together_loses_nothing() {
    let pair: Moments = [4.0, 6.0].into_iter().collect();
    for _ in 0..2_000 {
        let (histories, start) = (Histories::default(), Barrier::new(THREADS as usize));
        thread::scope(|scope| {
            for number in 0..THREADS {
                let (histories, start) = (&histories, &start);
                scope.spawn(move || {
                    start.wait();
                    for cluster in 0..CLUSTERS {
                        histories.merge((cluster * (number + 1)) % CLUSTERS, pair);
                    }
                });
            }
        });
        let counts: Vec<u64> = histories.snapshot().iter().map(|h| h.count).collect();
        assert_eq!(counts, [2 * u64::from(THREADS); CLUSTERS as usize]);
    }
}
