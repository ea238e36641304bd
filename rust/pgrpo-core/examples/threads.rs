//! Advantages for a stream of rollouts from several threads, which share one normalizer: they wait for
//! none another, and no reward is lost.
//!
//! `cargo run --example threads`

use std::thread;

use pgrpo_core::{Batch, Error, Ids, Normalizer, Options, Rule};

const THREADS: u16 = 4;
const BATCHES: u16 = 100;
const SIZE: u16 = 64;

/// Rewards of the batch that comes next, and the cluster each belongs to. Those of cluster 1 are
/// thirty times smaller than those of cluster 0.
fn rollouts(turn: u16) -> (Vec<f32>, Vec<i32>) {
    let rollout = |number: u16| {
        let (cluster, quality) = (number % 2, f32::from((turn + number * 7) % 11));
        (if cluster == 0 { quality } else { quality / 30.0 }, i32::from(cluster))
    };
    (0..SIZE).map(rollout).unzip()
}

fn main() -> Result<(), Error> {
    let normalizer = Normalizer::new(Options::new(Rule::named("pgrpo")?))?;
    let work = &|first: u16| -> Result<(), Error> {
        let mut advantages = vec![0.0; usize::from(SIZE)];
        for turn in 0..BATCHES {
            let (rewards, clusters) = rollouts(first + turn);
            normalizer.advantages(&Batch::new(&rewards, Ids::I32(&clusters)), &mut advantages)?;
            // A step of the optimiser would follow.
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|first| scope.spawn(move || work(first))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no thread panics"))
    })?;
    for entry in normalizer.snapshot().clusters {
        let history = entry.rewards;
        println!("{}: {} rewards, mean {:.3}", entry.id, history.count, history.mean());
        let expected = THREADS * BATCHES * SIZE / 2;
        assert!((history.count - f64::from(expected)).abs() < 0.5);
    }
    Ok(())
}
