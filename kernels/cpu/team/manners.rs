//! How a helper gets along with other processes.
//!
//! The system takes the processor from a thread that has had its share of it, in the middle of whatever it does, and gives
//! it back milliseconds later, while the whole team waits for what it was at. A helper that keeps losing time to others
//! therefore rests of its own accord, between two pieces of work, before its share is used up. A loss alone is no reason:
//! every machine has something to do now and then.
//!
//! One that is where the leader is, beside another process that has a processor to itself, moves away: the two wait for
//! each other there, and the system sees nothing to mend, because that process is always busy and a helper rests.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Between two looks at the time lost.
const LOOK: Duration = Duration::from_millis(4);
/// In that time, what only another process can have taken.
const LOST: Duration = Duration::from_millis(1);
/// A loss so soon after another shows a process that does not stop.
const AGAIN: Duration = Duration::from_millis(20);
/// For so long after it the processor counts as shared.
const SHARED: Duration = Duration::from_millis(200);
/// While it does, how long to work before a rest, and to rest: well within what the system gives and takes in turn.
const WORK: Duration = Duration::from_millis(2);
const REST: Duration = Duration::from_millis(1);

thread_local! {
    /// Until when the processor of this thread counts as shared.
    static SHARED_UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
    /// When this thread last found a loss.
    static LAST_LOSS: Cell<Option<Instant>> = const { Cell::new(None) };
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

    /// Rests if it is time, outside of any work, and does not stay on the processor `leader`; returns whether it rested.
    pub fn rest(&mut self, leader: usize) -> bool {
        let now = Instant::now();
        if now - self.looked.0 > LOOK {
            let time = time_of_thread();
            if (now - self.looked.0).saturating_sub(time - self.looked.1) > LOST {
                if processor() == leader {
                    move_away();
                } else if LAST_LOSS.replace(Some(now)).is_some_and(|last| now - last < AGAIN) {
                    self.shared_until = Some(now + SHARED);
                }
            } else if self.shared_until.is_some_and(|until| until < now) {
                self.shared_until = None;
            }
            SHARED_UNTIL.set(self.shared_until);
            self.looked = (now, time);
        }
        let rests = self.ask_for_rest();
        if rests {
            std::thread::sleep(REST);
            if processor() == leader {
                move_away();
            }
            let now = Instant::now();
            (self.since, self.looked) = (now, (now, time_of_thread()));
        }
        rests
    }
}

/// That of this thread at the moment.
#[cfg(target_os = "linux")]
pub fn processor() -> usize {
    // SAFETY: the call takes nothing.
    unsafe { libc::sched_getcpu() as usize }
}

/// Not known.
#[cfg(not(target_os = "linux"))]
pub fn processor() -> usize {
    0
}

/// Moves this thread to another processor, if it may run there.
#[cfg(target_os = "linux")]
fn move_away() {
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: the calls read and write a set of the size that they are told; zero is one.
    unsafe {
        let mut all: libc::cpu_set_t = std::mem::zeroed();
        let here = processor();
        if here >= libc::CPU_SETSIZE as usize || libc::sched_getaffinity(0, size, &mut all) != 0 {
            return;
        }
        let mut others = all;
        libc::CPU_CLR(here, &mut others);
        if libc::CPU_COUNT(&others) > 0 && libc::sched_setaffinity(0, size, &others) == 0 {
            libc::sched_setaffinity(0, size, &all);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn move_away() {}

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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Asleep it has lost time too.
    #[test]
    fn who_keeps_losing_time_rests_before_long() {
        let mut manners = Manners::new();
        assert!(!manners.ask_for_rest());
        std::thread::sleep(2 * LOOK);
        assert!(!manners.rest(usize::MAX), "a loss alone is no reason");
        LAST_LOSS.set(Instant::now().checked_sub(2 * AGAIN));
        std::thread::sleep(2 * LOOK);
        assert!(!manners.rest(usize::MAX), "nor are two far apart");
        // Of another step of the same thread.
        let mut manners = Manners::new();
        LAST_LOSS.set(Some(Instant::now() + Duration::from_secs(60)));
        std::thread::sleep(2 * LOOK);
        assert!(manners.rest(usize::MAX));
        assert!(!manners.rest(usize::MAX), "it has just rested");
        std::thread::sleep(2 * WORK);
        assert!(manners.ask_for_rest() && manners.rest(usize::MAX));
    }

    #[test]
    fn who_moves_is_elsewhere_and_free_to_return() {
        let allowed = || {
            // SAFETY: the call writes a set of the size that it is told; zero is one.
            unsafe {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                assert_eq!(libc::sched_getaffinity(0, size_of_val(&set), &mut set), 0);
                set
            }
        };
        let before = allowed();
        let moved = (0..100).filter(|_| {
            let here = processor();
            move_away();
            processor() != here
        });
        // SAFETY: the set is whole.
        let (moved, others) = (moved.count(), unsafe { libc::CPU_COUNT(&before) } > 1);
        assert!(if others { moved > 90 } else { moved == 0 }, "{moved} of 100 times");
        // SAFETY: both sets are whole.
        assert!(unsafe { libc::CPU_EQUAL(&before, &allowed()) });
    }
}
