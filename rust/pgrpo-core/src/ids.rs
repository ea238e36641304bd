//! Names of clusters, and the keys that stand for them in the tables.

use std::collections::HashMap;
use std::fmt;
use std::sync::{PoisonError, RwLock};

use crate::table::INTERNED;

/// Integers from 0 up to here are keys as they are; rows of a table up to the highest one in use take
/// up address space, but memory only where they are written to.
pub const DIRECT: i64 = 1 << 22;

/// Name of a cluster; integers and strings never collide.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ClusterId {
    /// An integer.
    Int(i64),
    /// A string.
    Name(String),
}

/// The same, borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AnyId<'a> {
    /// An integer.
    Int(i64),
    /// A string.
    Name(&'a str),
}

impl ClusterId {
    /// The same, borrowed.
    #[must_use]
    pub fn borrow(&self) -> AnyId<'_> {
        match self {
            Self::Int(id) => AnyId::Int(*id),
            Self::Name(name) => AnyId::Name(name),
        }
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(id) => write!(out, "{id}"),
            Self::Name(name) => write!(out, "{name:?}"),
        }
    }
}

/// The key of an integer that is its own.
fn direct(id: i64) -> Option<u32> {
    if (0..DIRECT).contains(&id) { u32::try_from(id).ok() } else { None }
}

/// Gives a key to every id that is not one itself: [`INTERNED`], `INTERNED + 1`, ...
///
/// # Progress
/// A lock, shared by readers, is held for each look-up and alone for each new id: interning may wait.
/// Integers below [`DIRECT`] never come here.
#[derive(Debug, Default)]
pub struct Interner {
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    ints: HashMap<i64, u32>,
    names: HashMap<String, u32>,
    ids: Vec<ClusterId>,
}

// A poisoned lock is used all the same: what it guards is complete after every statement but the last.
impl Interner {
    /// The key of an integer.
    #[inline]
    pub fn int(&self, id: i64) -> u32 {
        if let Some(key) = direct(id) {
            return key;
        }
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(&key) = known.ints.get(&id) {
            return key;
        }
        drop(known);
        let known = &mut *self.known.write().unwrap_or_else(PoisonError::into_inner);
        *known.ints.entry(id).or_insert_with(|| add(&mut known.ids, ClusterId::Int(id)))
    }

    /// The key of a string.
    pub fn name(&self, id: &str) -> u32 {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(&key) = known.names.get(id) {
            return key;
        }
        drop(known);
        let known = &mut *self.known.write().unwrap_or_else(PoisonError::into_inner);
        let entry = known.names.entry(id.to_owned());
        *entry.or_insert_with(|| add(&mut known.ids, ClusterId::Name(id.to_owned())))
    }

    /// The key of any id, if it was ever given one.
    pub fn find(&self, id: AnyId<'_>) -> Option<u32> {
        let known = || self.known.read().unwrap_or_else(PoisonError::into_inner);
        match id {
            AnyId::Int(id) => direct(id).or_else(|| known().ints.get(&id).copied()),
            AnyId::Name(name) => known().names.get(name).copied(),
        }
    }

    /// The key of any id.
    #[inline]
    pub fn key(&self, id: AnyId<'_>) -> u32 {
        match id {
            AnyId::Int(id) => self.int(id),
            AnyId::Name(name) => self.name(name),
        }
    }

    /// The id of a key, if it was given to one.
    #[must_use]
    pub fn id(&self, key: u32) -> Option<ClusterId> {
        if key < INTERNED {
            return Some(ClusterId::Int(i64::from(key)));
        }
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.ids.get((key - INTERNED) as usize).cloned()
    }
}

fn add(ids: &mut Vec<ClusterId>, id: ClusterId) -> u32 {
    ids.push(id);
    INTERNED + u32::try_from(ids.len() - 1).expect("fewer than 2^31 ids fit into memory")
}
