//! What a merge and a read of one cluster's history cost, alone and beside other threads.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use criterion::{Criterion, criterion_group, criterion_main};
use pgrpo_core::Moments;
use pgrpo_core::internals::Histories;

const CLUSTERS: u32 = 64;

/// Times merges and reads while `others` threads merge into `clusters` clusters.
fn beside(criterion: &mut Criterion, name: &str, others: u32, clusters: u32) {
    let histories = Histories::default();
    let batch: Moments = [4.0, 6.0].into_iter().collect();
    let done = AtomicBool::new(false);
    let write = || {
        let mut turn = 0_u32;
        while !done.load(Ordering::Relaxed) {
            histories.merge(turn % clusters, batch, 1.0, false).unwrap();
            turn = turn.wrapping_add(1);
        }
    };
    let mut turn = 0_u32;
    let mut next = || {
        turn = turn.wrapping_add(1);
        black_box(turn % clusters)
    };
    let mut group = criterion.benchmark_group(name);
    thread::scope(|scope| {
        for _ in 0..others {
            scope.spawn(write);
        }
        group.bench_function("merge", |bench| {
            bench.iter(|| histories.merge(next(), black_box(batch), 1.0, false));
        });
        group.bench_function("read", |bench| bench.iter(|| histories.read(next())));
        done.store(true, Ordering::Relaxed);
    });
    group.finish();
}

fn table(criterion: &mut Criterion) {
    beside(criterion, "alone", 0, CLUSTERS);
    beside(criterion, "beside a writer to 64 clusters", 1, CLUSTERS);
    beside(criterion, "beside a writer to the same cluster", 1, 1);
}

criterion_group!(benches, table);
criterion_main!(benches);
