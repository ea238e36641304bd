//! The one door to atomics: std's, or loom's when its models are built (`--cfg loom`).

#[cfg(not(loom))]
pub(crate) use std::{
    sync::atomic::{AtomicPtr, AtomicU64, Ordering, fence},
    thread::yield_now,
};

#[cfg(loom)]
pub(crate) use {
    loom::thread::yield_now,
    mortal::{AtomicPtr, AtomicU64, Ordering, fence},
};

/// Loom's atomics in the hands of threads that can be killed before any of their steps, a step being
/// an operation on an atomic or a fence.
#[cfg(loom)]
pub(crate) mod mortal {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    use loom::sync::atomic;
    pub(crate) use loom::sync::atomic::Ordering;

    loom::lazy_static! {
        static ref STEPS: atomic::AtomicU64 = atomic::AtomicU64::new(0);
    }

    loom::thread_local! {
        static STEPS_LEFT: Cell<Option<u32>> = Cell::new(None);
    }

    /// What a killed thread unwinds with.
    struct Killed;

    /// Runs `body` until it is done or would take one step more than `num_steps`: then it ends there
    /// and None is returned. That is SIGKILL as far as `body` cleans nothing up by `Drop`.
    pub(crate) fn live_for<R>(num_steps: u32, body: impl FnOnce() -> R) -> Option<R> {
        STEPS_LEFT.with(|left| left.set(Some(num_steps)));
        let result = catch_unwind(AssertUnwindSafe(body));
        STEPS_LEFT.with(|left| left.set(None));
        match result {
            Ok(result) => Some(result),
            Err(payload) if payload.is::<Killed>() => None,
            Err(payload) => resume_unwind(payload),
        }
    }

    fn step() {
        let left =
            STEPS_LEFT.with(|left| left.replace(left.get().map(|left| left.wrapping_sub(1))));
        if left == Some(0) {
            // Not `panic!`: no message, no backtrace.
            resume_unwind(Box::new(Killed));
        }
        // Loom (0.7) changes the order of two operations only if the later one depends on the last
        // access to its atomic: that hides an exchange after a load of the same thread from the
        // others' earlier loads. This store makes every two steps depend on each other. It orders
        // no memory, for nobody loads it.
        STEPS.store(0, Ordering::Relaxed);
    }

    pub(crate) fn fence(ordering: Ordering) {
        step();
        atomic::fence(ordering);
    }

    #[derive(Debug, Default)]
    pub(crate) struct AtomicU64(atomic::AtomicU64);

    impl AtomicU64 {
        pub(crate) fn load(&self, ordering: Ordering) -> u64 {
            step();
            self.0.load(ordering)
        }

        pub(crate) fn store(&self, value: u64, ordering: Ordering) {
            step();
            self.0.store(value, ordering);
        }

        pub(crate) fn compare_exchange(
            &self,
            current: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            step();
            self.0.compare_exchange(current, new, success, failure)
        }

        pub(crate) fn fetch_and(&self, value: u64, ordering: Ordering) -> u64 {
            step();
            self.0.fetch_and(value, ordering)
        }

        pub(crate) fn fetch_or(&self, value: u64, ordering: Ordering) -> u64 {
            step();
            self.0.fetch_or(value, ordering)
        }

        pub(crate) fn fetch_sub(&self, value: u64, ordering: Ordering) -> u64 {
            step();
            self.0.fetch_sub(value, ordering)
        }
    }

    #[derive(Debug)]
    pub(crate) struct AtomicPtr<T>(atomic::AtomicPtr<T>);

    impl<T> AtomicPtr<T> {
        pub(crate) fn new(pointer: *mut T) -> Self {
            Self(atomic::AtomicPtr::new(pointer))
        }

        pub(crate) fn load(&self, ordering: Ordering) -> *mut T {
            step();
            self.0.load(ordering)
        }

        pub(crate) fn compare_exchange(
            &self,
            current: *mut T,
            new: *mut T,
            success: Ordering,
            failure: Ordering,
        ) -> Result<*mut T, *mut T> {
            step();
            self.0.compare_exchange(current, new, success, failure)
        }

        pub(crate) fn with_mut<R>(&mut self, body: impl FnOnce(&mut *mut T) -> R) -> R {
            self.0.with_mut(body)
        }
    }
}
