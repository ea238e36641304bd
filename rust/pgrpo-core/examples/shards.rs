//! Histories of shards merged: each shard sends what it has folded in since the last time, and a fresh
//! normalizer has the history of all.
//!
//! `cargo run --example shards`

use pgrpo_core::{AnyId, Batch, Error, Ids, Normalizer, Options, Rule, Snapshot};

fn main() -> Result<(), Error> {
    let options = Options { track_delta: true, ..Options::new(Rule::named("pgrpo")?) };
    let (all, mut num_rewards) = (Normalizer::new(options.clone())?, 0.0);
    let shards = [Normalizer::new(options.clone())?, Normalizer::new(options)?];
    let clusters = ["novice", "expert", "novice"].map(AnyId::Name);
    for round in [0.0, 1.0] {
        for (shard, better) in shards.iter().zip([0.0, 0.25]) {
            let rewards = [round, 0.5 + better, 1.0 - better];
            shard.update(&Batch::new(&rewards, Ids::Any(&clusters)))?;
            num_rewards += 3.0;
            // As bytes, for they would go through a file or over a network.
            let bytes = shard.delta()?.encode();
            all.merge(&Snapshot::decode(&bytes)?)?;
        }
    }
    let snapshot = all.snapshot();
    for entry in &snapshot.clusters {
        println!("{}: {} rewards, mean {}", entry.id, entry.rewards.count, entry.rewards.mean());
    }
    let merged: f64 = snapshot.clusters.iter().map(|entry| entry.rewards.count).sum();
    assert!((merged - num_rewards).abs() < 0.5, "every reward was merged once");
    Ok(())
}
