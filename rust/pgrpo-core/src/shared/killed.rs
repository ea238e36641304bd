//! Processes killed between two instructions of what they do to a region, for real: a child is stepped
//! through it by `ptrace`, and killed with `SIGKILL` at places spread over all of it.
#![allow(unsafe_code, reason = "system calls")]
#![allow(clippy::float_cmp, reason = "exactly equal is what is claimed")]

use std::ffi::c_void;
use std::ptr;

use libc::{
    _exit, MAP_ANONYMOUS, MAP_SHARED, PROT_READ, PROT_WRITE, PTRACE_SINGLESTEP, PTRACE_TRACEME,
    SIGKILL, SIGSTOP, WIFEXITED, fork, kill, mmap, munmap, ptrace, raise, waitpid,
};

use super::{Layout, Region};
use crate::histories::Histories;
use crate::ids::{AnyId, ClusterId};
use crate::moments::Moments;

/// Memory that a forked child shares with its parent.
struct Shared {
    start: *mut c_void,
    layout: Layout,
}

impl Shared {
    fn new() -> Self {
        let layout = Layout::new(5000, 1).unwrap();
        // SAFETY: fresh memory, wherever the system wants it.
        let start = unsafe {
            let (access, kind) = (PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS);
            mmap(ptr::null_mut(), layout.length(), access, kind, -1, 0)
        };
        assert!(start.addr() != usize::MAX, "no memory");
        let header = layout.header("");
        // SAFETY: a header is shorter than the region, which nobody else has yet.
        unsafe { ptr::copy_nonoverlapping(header.as_ptr(), start.cast(), header.len()) };
        Self { start, layout }
    }

    fn open(&self, alone: bool) -> (Region, Histories) {
        let (start, length) = (self.start.cast(), self.layout.length());
        // SAFETY: mapped with this length until self is dropped, which every test does last.
        let mut region = unsafe { Region::open(start, length, self.layout, "", alone) }.unwrap();
        let rewards = Histories::from(region.take_tables().remove(0));
        (region, rewards)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and no longer used.
        unsafe { munmap(self.start, self.layout.length()) };
    }
}

/// Lets a child do `work`, kills it after so many instructions unless it is done before, and returns
/// how many it had done.
fn killed_after(instructions: usize, work: &dyn Fn()) -> usize {
    let mut status = 0;
    // SAFETY: the child does nothing but `work`, which takes no lock that another thread of this
    // process may have held when it was forked.
    unsafe {
        let child = fork();
        if child == 0 {
            ptrace(PTRACE_TRACEME);
            raise(SIGSTOP);
            work();
            _exit(0);
        }
        assert_eq!(waitpid(child, &raw mut status, 0), child);
        assert_eq!(status & 0xff, 0x7f, "the child cannot be traced");
        for done in 0..instructions {
            assert_eq!(ptrace(PTRACE_SINGLESTEP, child, 0, 0), 0);
            assert_eq!(waitpid(child, &raw mut status, 0), child);
            if WIFEXITED(status) {
                return done;
            }
        }
        kill(child, SIGKILL);
        assert_eq!(waitpid(child, &raw mut status, 0), child);
    }
    instructions
}

/// The instructions after which to kill, spread over those of `work`, and on from there.
fn places(work: &dyn Fn()) -> impl Iterator<Item = usize> {
    // A step takes microseconds, and a debug build many of them.
    let kills = if cfg!(debug_assertions) { 40 } else { 250 };
    (0..).step_by(killed_after(usize::MAX, work).div_ceil(kills))
}

fn pair() -> Moments {
    [4.0, 6.0].into_iter().collect()
}

#[test]
fn killed_within_a_merge() {
    let shared = Shared::new();
    let (region, histories) = shared.open(true);
    let key = region.index().key(AnyId::Name("somebody")).unwrap();
    let merge = || {
        histories.merge(key, pair(), 1.0, false).unwrap();
    };
    let (mut kills, mut completed) = (0, 0);
    for instructions in places(&merge) {
        let expected = histories.read(key).count;
        if killed_after(instructions, &merge) < instructions {
            break;
        }
        let seen = histories.read(key).count;
        assert!(seen == expected || seen == expected + 2.0, "{seen} after {expected}");
        kills += 1;
        completed += u32::from(seen != expected);
        let (before, after) = histories.merge(key, pair(), 1.0, false).unwrap();
        assert_eq!(before.count, seen);
        assert_eq!((after.count, after.mean(), after.m2), (seen + 2.0, 5.0, after.count));
    }
    assert!(kills > 30 && (1..kills).contains(&completed), "{completed} of {kills} had committed");
    let seen = histories.read(key);
    let (_, histories) = shared.open(true);
    assert_eq!(histories.read(key), seen);
    assert_eq!(histories.merge(key, pair(), 1.0, false).unwrap().1.count, seen.count + 2.0);
}

#[test]
fn killed_within_an_interning() {
    let shared = Shared::new();
    let (region, _) = shared.open(true);
    let index = region.index();
    // Twice, for what makes it known to others is the last step but few.
    let intern = |number: usize| {
        let name = format!("cluster {number}");
        let key = index.key(AnyId::Name(&name)).unwrap();
        assert_eq!(index.find(AnyId::Name(&name)), Some(key));
        key
    };
    let (mut kills, mut completed) = (0, 0);
    for instructions in places(&|| _ = intern(0)) {
        kills += 1;
        let id = ClusterId::Name(format!("cluster {kills}"));
        if killed_after(instructions, &|| _ = intern(kills)) < instructions {
            break;
        }
        let found = index.find(id.borrow());
        completed += usize::from(found.is_some());
        let key = intern(kills);
        assert!(found.is_none_or(|found| found == key));
        assert_eq!(index.id(key), Some(id));
        assert!(index.keys().count() > kills);
    }
    assert!(kills > 30 && (1..kills).contains(&completed), "{completed} of {kills} had interned");
}
