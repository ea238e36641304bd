//! Mapped files that somebody else may make shorter: an error then, instead of the end of the process.
//!
//! The kernel sends SIGBUS to a thread that touches a page its file no longer has. The handler here
//! puts zeros in place of a watched mapping, notes that its contents are lost, and lets the thread go
//! on, whose call then fails. Looking at the file's size before a call would not do: it may change in
//! the midst of it.
//!
//! Of any other fault, the handler hands the signal on to the one that was there before, and does not
//! come back before the next table is opened. Who installs one later is asked first.
#![cfg_attr(unix, allow(unsafe_code, reason = "signals and mappings are C's"))]

#[cfg(unix)]
pub(crate) use unix::Watch;

/// Where no file becomes shorter while it is mapped, as on Windows, there is nothing to watch.
#[cfg(not(unix))]
pub(crate) struct Watch;

#[cfg(not(unix))]
impl Watch {
    pub(crate) fn new(_start: *mut u8, _length: usize) -> Option<Self> {
        Some(Self)
    }

    pub(crate) fn is_lost(&self) -> bool {
        false
    }
}

#[cfg(unix)]
mod unix {
    use std::ffi::c_void;
    use std::mem::zeroed;
    use std::ptr::{self, null_mut};
    use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

    use libc::{c_int, sigaction, siginfo_t};

    /// Mappings that can be watched at once. The handler may not allocate, nor wait for a lock.
    const MAX_WATCHED: usize = 1024;

    static WATCHED: [Mapping; MAX_WATCHED] = [const { Mapping::new() }; MAX_WATCHED];

    /// The handlers that were there before this one, the latest first.
    static BEFORE: AtomicPtr<Before> = AtomicPtr::new(null_mut());

    struct Mapping {
        is_taken: AtomicBool,
        start: AtomicUsize,
        /// 0 where nothing is watched.
        end: AtomicUsize,
        is_lost: AtomicBool,
    }

    impl Mapping {
        const fn new() -> Self {
            Self {
                is_taken: AtomicBool::new(false),
                start: AtomicUsize::new(0),
                end: AtomicUsize::new(0),
                is_lost: AtomicBool::new(false),
            }
        }

        /// Start and length, if the address lies within.
        fn around(&self, address: usize) -> Option<(usize, usize)> {
            let end = self.end.load(Ordering::SeqCst);
            let start = self.start.load(Ordering::SeqCst);
            // Two mappings may have had this place meanwhile, but not the one that is in use.
            let is_one = self.end.load(Ordering::SeqCst) == end;
            (is_one && (start..end).contains(&address)).then(|| (start, end - start))
        }
    }

    struct Before {
        action: sigaction,
        earlier: *mut Before,
    }

    /// A mapping is watched as long as this lives, and must not be unmapped before.
    pub(crate) struct Watch(&'static Mapping);

    impl Watch {
        /// Watches whole pages. None if too many are watched already, or the system refuses.
        pub(crate) fn new(start: *mut u8, length: usize) -> Option<Self> {
            let mapping =
                WATCHED.iter().find(|mapping| !mapping.is_taken.swap(true, Ordering::SeqCst))?;
            let watch = Self(mapping);
            mapping.is_lost.store(false, Ordering::SeqCst);
            mapping.start.store(start.addr(), Ordering::SeqCst);
            mapping.end.store(start.addr() + length, Ordering::SeqCst);
            install().then_some(watch)
        }

        /// Whether the file became too short, and zeros are in its place.
        pub(crate) fn is_lost(&self) -> bool {
            self.0.is_lost.load(Ordering::SeqCst)
        }
    }

    impl Drop for Watch {
        fn drop(&mut self) {
            self.0.end.store(0, Ordering::SeqCst);
            self.0.is_taken.store(false, Ordering::SeqCst);
        }
    }

    /// Installs the handler, unless it is the one in place.
    fn install() -> bool {
        // SAFETY: zeros are an action, as C programs begin with.
        let mut ours: sigaction = unsafe { zeroed() };
        ours.sa_sigaction = handle as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: as above.
        let mut action: sigaction = unsafe { zeroed() };
        // SAFETY: both point to actions; the handler does only what handlers may.
        if unsafe { sigaction(libc::SIGBUS, &raw const ours, &raw mut action) } != 0 {
            return false;
        }
        if action.sa_sigaction == ours.sa_sigaction {
            return true;
        }
        let mut earlier = BEFORE.load(Ordering::SeqCst);
        if !earlier.is_null() {
            // Who came after this handler may hand on to it again: both would go on for ever.
            action.sa_flags |= libc::SA_RESETHAND;
        }
        // Kept for ever, for a handler may be reading it. There is one per foreign handler installed.
        let new = Box::leak(Box::new(Before { action, earlier }));
        loop {
            new.earlier = earlier;
            let (seen, all) = (Ordering::SeqCst, Ordering::SeqCst);
            match BEFORE.compare_exchange(earlier, ptr::from_mut(new), seen, all) {
                Ok(_) => return true,
                Err(others) => earlier = others,
            }
        }
    }

    /// May interrupt anything: it uses atomics and system calls only.
    extern "C" fn handle(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
        // SAFETY: the kernel gives a valid one to handlers with SA_SIGINFO.
        let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
        // Programs send signals too; those have no address.
        let is_fault = code > 0 && code != libc::SI_USER;
        let found = WATCHED.iter().find_map(|mapping| {
            let (start, length) = mapping.around(address).filter(|_| is_fault)?;
            Some((mapping, start, length))
        });
        if let Some((mapping, start, length)) = found {
            // Before the zeros, for who reads those must know.
            mapping.is_lost.store(true, Ordering::SeqCst);
            if put_zeros(start, length) {
                return;
            }
        }
        hand_on(signal);
        if !is_fault {
            // SAFETY: it is delivered when this handler has returned; a fault comes again by itself.
            unsafe { libc::raise(signal) };
        }
    }

    fn put_zeros(start: usize, length: usize) -> bool {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let start: *mut c_void = ptr::with_exposed_provenance_mut(start);
        // SAFETY: whole pages of a mapping that is in use, for a thread has just touched it; zeros are
        // as good as any bytes a file might have.
        let made = unsafe { libc::mmap(start, length, access, flags, -1, 0) };
        made != libc::MAP_FAILED
    }

    /// Puts the handler that was there before in the place of this one.
    fn hand_on(signal: c_int) {
        let before = BEFORE.load(Ordering::SeqCst);
        // SAFETY: zeros are the default action; what was put into the list stays.
        let action = unsafe {
            if before.is_null() {
                zeroed()
            } else {
                BEFORE.store((*before).earlier, Ordering::SeqCst);
                (*before).action
            }
        };
        // SAFETY: it was in place before.
        unsafe { sigaction(signal, &raw const action, null_mut()) };
    }
}
