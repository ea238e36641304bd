//! Who is in the middle of a call.

use crate::sync::{AtomicU64, Ordering, yield_now};

/// Somebody wants to be alone: nobody enters.
const CLOSED: u64 = 1 << 31;
const VISITORS: u64 = CLOSED - 1;
/// From this bit on stands how often the process had forked when the word was written.
const FORKS: u32 = 32;

#[cfg(not(loom))]
static NUM_FORKS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

/// Says, in the child of a fork, that the threads of its parent are not here: they will not leave the
/// gates that they had entered.
#[cfg(not(loom))]
pub fn forked() {
    NUM_FORKS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
}

fn num_forks() -> u64 {
    #[cfg(not(loom))]
    return u64::from(NUM_FORKS.load(std::sync::atomic::Ordering::Relaxed));
    #[cfg(loom)]
    0
}

/// A count of visitors, and a door that can be shut behind the last of them.
///
/// # Progress
/// Visitors come and go lock-free; they wait only while somebody is alone, or waits to be.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    word: AtomicU64,
}

impl Gate {
    /// A word as it is to be read in this process.
    fn read(word: u64) -> u64 {
        let forks = num_forks() << FORKS;
        if (word ^ forks) >> FORKS == 0 { word } else { forks }
    }

    /// Changes the word once `change` allows it.
    fn change(&self, change: impl Fn(u64) -> Option<u64>) {
        // Relaxed: nothing is done before the exchange.
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let Some(new) = change(Self::read(word)) else {
                yield_now();
                word = self.word.load(Ordering::Relaxed);
                continue;
            };
            // Acquire pairs with: `open`, whose changes are then seen.
            match self.word.compare_exchange(word, new, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return,
                Err(actual) => word = actual,
            }
        }
    }

    /// Counts a visitor, once the gate is open.
    pub(crate) fn enter(&self) {
        self.change(|word| (word & CLOSED == 0).then_some(word + 1));
    }

    /// Counts a visitor less.
    pub(crate) fn leave(&self) {
        // pairs with: `is_empty` and `wait_for_the_last`, which then see what the visitor did.
        self.word.fetch_sub(1, Ordering::Release);
    }

    /// Whether nobody is inside, and the gate open.
    pub(crate) fn is_empty(&self) -> bool {
        // pairs with: `leave` and `open`.
        Self::read(self.word.load(Ordering::Acquire)) << FORKS == 0
    }

    /// Lets nobody in any more, once whoever has closed it before has opened it.
    pub(crate) fn close(&self) {
        self.change(|word| (word & CLOSED == 0).then_some(word | CLOSED));
    }

    /// Waits until all visitors have left a closed gate.
    pub(crate) fn wait_for_the_last(&self) {
        // pairs with: `leave`.
        while Self::read(self.word.load(Ordering::Acquire)) & VISITORS != 0 {
            yield_now();
        }
    }

    /// Lets visitors in again.
    pub(crate) fn open(&self) {
        // pairs with: `change` and `is_empty`, which then see what was done meanwhile.
        self.word.fetch_and(!CLOSED, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    use super::{FORKS, Gate};

    #[test]
    fn who_closes_it_is_alone() {
        let (gate, inside) = (Gate::default(), AtomicBool::new(false));
        gate.enter();
        assert!(!gate.is_empty());
        gate.leave();
        assert!(gate.is_empty());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..2000 {
                        if round % 8 == 0 {
                            gate.close();
                            gate.wait_for_the_last();
                            assert!(!inside.swap(true, SeqCst));
                            inside.store(false, SeqCst);
                            gate.open();
                        } else {
                            gate.enter();
                            assert!(!inside.load(SeqCst));
                            gate.leave();
                        }
                    }
                });
            }
        });
        assert!(gate.is_empty());
        // A parent's thread was inside, and another waited to be alone: the child has neither.
        gate.enter();
        gate.close();
        assert!(!gate.is_empty());
        // A word of before the fork, as `forked` would make of it for every gate at once.
        gate.word.fetch_xor(1 << FORKS, SeqCst);
        assert!(gate.is_empty());
        gate.enter();
        gate.leave();
        assert!(gate.is_empty());
    }
}
