//! How a helper gets along with other processes.
//!
//! The system takes the processor from a thread that has had its share of it, in the middle of whatever it does, and gives
//! it back milliseconds later, while the whole team waits for what it was at. A helper that found it had lost time to
//! others therefore rests of its own accord, between two pieces of work, before its share is used up.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Between two looks at the time lost.
const LOOK: Duration = Duration::from_millis(4);
/// In that time, what only another process can have taken.
const LOST: Duration = Duration::from_millis(1);
/// For so long after a loss the processor counts as shared.
const SHARED: Duration = Duration::from_millis(200);
/// While it does, how long to work before a rest, and to rest: well within what the system gives and takes in turn.
const WORK: Duration = Duration::from_millis(2);
const REST: Duration = Duration::from_millis(1);

thread_local! {
    /// Until when the processor of this thread counts as shared.
    static SHARED_UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
}

pub struct Manners {
    /// Since the last rest.
    since: Instant,
    /// At the last look: the time, and what this thread had of it.
    looked: (Instant, Duration),
    shared_until: Option<Instant>,
}

impl Manners {
    pub fn new() -> Self {
        let now = Instant::now();
        Self { since: now, looked: (now, time_of_thread()), shared_until: SHARED_UNTIL.get() }
    }

    /// Whether it is time for a rest.
    pub fn ask_for_rest(&self) -> bool {
        self.shared_until.is_some() && self.since.elapsed() > WORK
    }

    /// Rests if it is time, outside of any work; returns whether it did.
    pub fn rest(&mut self) -> bool {
        let now = Instant::now();
        if now - self.looked.0 > LOOK {
            let time = time_of_thread();
            if (now - self.looked.0).saturating_sub(time - self.looked.1) > LOST {
                self.shared_until = Some(now + SHARED);
            } else if self.shared_until.is_some_and(|until| until < now) {
                self.shared_until = None;
            }
            SHARED_UNTIL.set(self.shared_until);
            self.looked = (now, time);
        }
        let rests = self.ask_for_rest();
        if rests {
            std::thread::sleep(REST);
            let now = Instant::now();
            (self.since, self.looked) = (now, (now, time_of_thread()));
        }
        rests
    }
}

/// The processor's time that this thread has had.
#[cfg(target_os = "linux")]
fn time_of_thread() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes the one struct.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Where it is not known, as if it were all there is.
#[cfg(not(target_os = "linux"))]
fn time_of_thread() -> Duration {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    START.elapsed()
}
