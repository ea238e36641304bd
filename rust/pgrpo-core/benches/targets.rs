//! How native threads get on with each other: throughput of two against one, waiting beside a
//! stopped thread, and whether anything is torn or lost.
//!
//! `cargo bench --bench targets -- PATH` writes JSON to PATH (without it, to the terminal), by the
//! numbers of the project's targets: 9, the throughput of two threads as a multiple of one's, by batch
//! size; 10, the longest wait beside a writer that stands still for 50 ms; 11, torn reads and lost
//! updates.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counts are small")]
#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]
#![allow(unsafe_code, reason = "threads are stopped by signals, at any instruction")]

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

#[path = "../tests/usual/mod.rs"]
mod usual;

use pgrpo_core::internals::Histories;
use pgrpo_core::{Batch, Ids, Moments, Normalizer};
use usual::usual;

const CLUSTERS: u32 = 64;
const WINDOW: Duration = Duration::from_millis(100);
const FREEZE: Duration = Duration::from_millis(50);
const FREEZES: usize = 60;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Xorshift: random enough for ids and rewards.
fn random(state: &mut u64) -> u32 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 32) as u32
}

/// Samples per second of `threads` threads that share a normalizer, calls of `size` rewards each.
fn throughput(normalizer: &Normalizer, threads: u64, size: usize) -> f64 {
    let start = Barrier::new(threads as usize + 1);
    let (done, samples) = (AtomicBool::new(false), AtomicU64::new(0));
    let hammer = |seed: u64| {
        let mut state = seed;
        let rewards: Vec<f32> = (0..size).map(|_| random(&mut state) as f32 / 4e9).collect();
        let clusters: Vec<i32> =
            (0..size).map(|_| (random(&mut state) % CLUSTERS).cast_signed()).collect();
        let mut advantages = vec![0.0; size];
        let batch = Batch {
            rewards: &rewards,
            clusters: Ids::I32(&clusters),
            groups: None,
            parents: None,
            weights: None,
            score_norms: None,
            lengths: None,
        };
        start.wait();
        let mut calls = 0;
        while !done.load(SeqCst) {
            normalizer.advantages(&batch, &mut advantages).expect("finite rewards");
            calls += 1;
        }
        samples.fetch_add(calls * size as u64, SeqCst);
    };
    let began = thread::scope(|scope| {
        let hammer = &hammer;
        for number in 1..=threads {
            scope.spawn(move || hammer(number * 0x9E37_79B9_7F4A_7C15));
        }
        start.wait();
        let began = Instant::now();
        thread::sleep(WINDOW);
        done.store(true, SeqCst);
        began
    });
    samples.into_inner() as f64 / began.elapsed().as_secs_f64()
}

/// Target 9: the median ratio of windows with two threads to windows with one, taken in turn.
fn scaling(size: usize) -> f64 {
    let normalizer = Normalizer::new(usual()).expect("valid options");
    let ratios = (0..21).map(|_| {
        let one = throughput(&normalizer, 1, size);
        throughput(&normalizer, 2, size) / one
    });
    median(ratios.collect())
}

static FROZEN: AtomicBool = AtomicBool::new(false);

extern "C" fn freeze(_signal: libc::c_int) {
    FROZEN.store(true, SeqCst);
    let time = libc::timespec { tv_sec: 0, tv_nsec: FREEZE.as_nanos() as libc::c_long };
    // SAFETY: nanosleep may be called from a signal handler.
    unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) };
    FROZEN.store(false, SeqCst);
}

/// How often the system took the processor from this thread.
fn num_preemptions() -> i64 {
    // SAFETY: zero is a valid rusage, and getrusage only writes to it.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage);
        usage.ru_nivcsw
    }
}

/// Target 10, in ms: a writer to a cluster is stopped over and over at whatever instruction it is;
/// the longest that another thread's merge and read of the cluster took meanwhile, without those
/// during which the system gave its processor to another program; and with them.
fn longest_wait() -> [f64; 2] {
    let histories = Histories::default();
    let batch: Moments = [4.0, 6.0].into_iter().collect();
    let (done, freezes) = (AtomicBool::new(false), AtomicU64::new(0));
    // SAFETY: the handler does what a handler may.
    unsafe { libc::signal(libc::SIGUSR1, freeze as extern "C" fn(libc::c_int) as usize) };
    thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (histories, done) = (&histories, &done);
        scope.spawn(move || {
            // SAFETY: always.
            sender.send(unsafe { libc::pthread_self() }).expect("a receiver");
            while !done.load(SeqCst) {
                histories.merge(0, batch, 1.0, false).unwrap();
            }
        });
        let other = scope.spawn(|| {
            let (mut longest, mut preempted) = ([0.0_f64; 2], num_preemptions());
            while !done.load(SeqCst) {
                let began = Instant::now();
                histories.merge(0, batch, 1.0, false).unwrap();
                std::hint::black_box(histories.read(0));
                let took_ms = began.elapsed().as_secs_f64() * 1e3;
                if !FROZEN.load(SeqCst) || took_ms <= longest[0] {
                    continue;
                }
                longest[1] = longest[1].max(took_ms);
                let preemptions = num_preemptions();
                if preemptions == preempted {
                    longest[0] = took_ms;
                }
                preempted = preemptions;
            }
            longest
        });
        let writer = receiver.recv().expect("a writer");
        for turn in 0..FREEZES {
            // At another instruction each time.
            thread::sleep(Duration::from_micros(1_000 + 37 * turn as u64));
            // SAFETY: the writer runs until `done`.
            unsafe { libc::pthread_kill(writer, libc::SIGUSR1) };
            thread::sleep(FREEZE + Duration::from_millis(5));
            freezes.fetch_add(1, SeqCst);
        }
        done.store(true, SeqCst);
        other.join().expect("no panic")
    })
}

/// Target 11: torn reads, lost updates and commits, of two writers that merge {4, 6} and a reader.
fn faults() -> [u64; 3] {
    const TURNS: u64 = 10_000_000;
    let histories = Histories::default();
    let batch: Moments = [4.0, 6.0].into_iter().collect();
    let sound = |seen: Moments| seen.count == 0.0 || seen.mean() == 5.0 && seen.m2 == seen.count;
    let torn = AtomicU64::new(0);
    let left = AtomicU64::new(2);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for turn in 0..TURNS {
                    // Mostly one cluster, fought over.
                    let key = if turn % 4 == 0 { turn as u32 % CLUSTERS } else { 0 };
                    let (_, after) = histories.merge(key, batch, 1.0, false).unwrap();
                    torn.fetch_add(u64::from(!sound(after)), SeqCst);
                }
                left.fetch_sub(1, SeqCst);
            });
        }
        scope.spawn(|| {
            while left.load(SeqCst) > 0 {
                let unsound = (0..CLUSTERS).filter(|&key| !sound(histories.read(key))).count()
                    + (0..CLUSTERS).filter(|_| !sound(histories.read(0))).count();
                torn.fetch_add(unsound as u64, SeqCst);
            }
        });
    });
    let merged: f64 = histories.iter().map(|(_, history)| history.count / 2.0).sum();
    [torn.into_inner(), (2 * TURNS).abs_diff(merged as u64), 2 * TURNS]
}

fn main() {
    let (large, small) = (scaling(1024), scaling(64));
    let [wait, with_preemptions] = longest_wait();
    let [torn, lost, commits] = faults();
    let json = format!(
        r#"{{"9": {{"1024": {large:.3}, "64": {small:.3}}},
 "10": {{"longest_wait_ms": {wait:.4}, "with_preemptions_ms": {with_preemptions:.4}, "freezes": {FREEZES}}},
 "11": {{"torn": {torn}, "lost": {lost}, "commits": {commits}}}}}
"#
    );
    // Cargo adds `--bench`.
    match std::env::args().skip(1).find(|argument| !argument.starts_with("--")) {
        Some(path) => std::fs::write(path, json).expect("PATH can be written to"),
        None => print!("{json}"),
    }
}
