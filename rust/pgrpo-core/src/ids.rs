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
    /// An integer that [parents](crate::Batch::parents) are called by: another than the cluster's.
    ParentInt(i64),
    /// A string that a parent is called by.
    ParentName(String),
}

/// The same, borrowed. Batches name clusters and parents alike by the first two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AnyId<'a> {
    /// An integer.
    Int(i64),
    /// A string.
    Name(&'a str),
    /// An integer that a parent is called by.
    ParentInt(i64),
    /// A string that a parent is called by.
    ParentName(&'a str),
}

impl AnyId<'_> {
    /// The parent that is called so.
    #[must_use]
    pub fn as_parent(self) -> Self {
        match self {
            Self::Int(id) | Self::ParentInt(id) => Self::ParentInt(id),
            Self::Name(name) | Self::ParentName(name) => Self::ParentName(name),
        }
    }
}

impl ClusterId {
    /// Whether it is a parent's.
    #[must_use]
    pub fn is_parent(&self) -> bool {
        matches!(self, Self::ParentInt(_) | Self::ParentName(_))
    }

    /// The same, borrowed.
    #[must_use]
    pub fn borrow(&self) -> AnyId<'_> {
        match self {
            Self::Int(id) => AnyId::Int(*id),
            Self::Name(name) => AnyId::Name(name),
            Self::ParentInt(id) => AnyId::ParentInt(*id),
            Self::ParentName(name) => AnyId::ParentName(name),
        }
    }
}

impl From<AnyId<'_>> for ClusterId {
    fn from(id: AnyId<'_>) -> Self {
        match id {
            AnyId::Int(id) => Self::Int(id),
            AnyId::Name(name) => Self::Name(name.to_owned()),
            AnyId::ParentInt(id) => Self::ParentInt(id),
            AnyId::ParentName(name) => Self::ParentName(name.to_owned()),
        }
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(id) => write!(out, "{id}"),
            Self::Name(name) => write!(out, "{name:?}"),
            Self::ParentInt(id) => write!(out, "{id} (a parent)"),
            Self::ParentName(name) => write!(out, "{name:?} (a parent)"),
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
