//! Names of clusters.

use std::fmt;

/// Integers from 0 up to here are keys as they are; rows of a table up to the highest one in use take
/// up address space, but memory only where they are written to.
pub(crate) const DIRECT: i64 = 1 << 22;

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
#[inline]
pub(crate) fn direct(id: AnyId<'_>) -> Option<u32> {
    match id {
        AnyId::Int(id) if (0..DIRECT).contains(&id) => u32::try_from(id).ok(),
        _ => None,
    }
}
