//! One table for several processes, in memory that all of them have mapped.
//!
//! A region is laid out by its capacity and its number of streams alone, so that nothing read from
//! it decides where anything lies:
//!
//! | part | bytes |
//! |---|---|
//! | header: what the region is, and counters | 4096 |
//! | index: nodes | 128 S |
//! | names of the clusters, one behind the other | 64 S |
//! | where the name of each key is | 8 S |
//! | per stream: rows | 64 S |
//! | per stream: spare nodes | 32 max(S, 65536) |
//! | per stream: stack of free spare nodes | 1024 |
//!
//! S is the next power of two from twice the capacity on (and from 64 on). All
//! parts but the header are zeros at first: in a sparse file, pages take up memory when they are
//! written to.
//!
//! # Progress
//! That of a [`Normalizer`](crate::Normalizer), between processes as between threads. A process that is
//! killed, at whichever instant, leaves every row as it was before or after a whole commit. What it
//! may leave behind besides: a claimed inline buffer (that row goes on with the other one and with
//! spares) or a spare node that nobody uses, or a name, a key and nodes that the index does not lead
//! to; one of these per thread killed. [`Region::open`] takes the first two back when it is alone.
//! A call that touches several clusters or streams commits to one after the other; killed within, it
//! has committed to some of them.

#[cfg(all(test, not(loom), target_os = "linux", target_pointer_width = "64"))]
mod killed;
#[cfg(all(loom, test))]
mod models;
#[cfg(not(loom))]
mod region;
#[cfg(all(test, not(loom)))]
mod tests;

#[cfg(not(loom))]
pub use region::{Layout, Mismatch, Region};
