//! What a step reads next.
//!
//! Between two products of a step are small things that one thread does alone, while memory rests and the other threads
//! wait. A model's steps read the same weights in the same order, so who waits asks for the weights that followed the last
//! time: the beginning of its own part of them, as much as a second-level cache has room for.

use std::cell::Cell;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use crate::simd::prefetch_at;

/// Where weights begin, and their bytes. They may be gone when somebody asks for them: then a request has no effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stretch {
    start: usize,
    len: usize,
}

impl<T> From<&[T]> for Stretch {
    fn from(weights: &[T]) -> Self {
        Self { start: weights.as_ptr().addr(), len: size_of_val(weights) }
    }
}

/// A stretch that threads share. One that is read while it is written may be part of each, which is only a bad guess.
#[derive(Default)]
pub struct SharedStretch {
    start: AtomicUsize,
    len: AtomicUsize,
}

impl SharedStretch {
    const fn new() -> Self {
        Self { start: AtomicUsize::new(0), len: AtomicUsize::new(0) }
    }

    pub fn set(&self, Stretch { start, len }: Stretch) {
        self.len.store(len, Relaxed);
        self.start.store(start, Relaxed);
    }

    pub fn get(&self) -> Stretch {
        Stretch { start: self.start.load(Relaxed), len: self.len.load(Relaxed) }
    }
}

/// What was read after weights, by where these begin. Several may have the same place.
struct Followers([SharedStretch; 1 << PLACES]);

/// As a power of two. The largest models have some hundreds of weights.
const PLACES: u32 = 12;

impl Followers {
    const fn new() -> Self {
        Self([const { SharedStretch::new() }; 1 << PLACES])
    }

    fn of(&self, weights: Stretch) -> &SharedStretch {
        // Fibonacci hashing (Knuth, The Art of Computer Programming, 6.4).
        let place = (weights.start as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - PLACES);
        &self.0[place as usize]
    }

    fn read(&self, weights: Stretch) -> Stretch {
        self.of(LAST.replace(weights)).set(weights);
        self.of(weights).get()
    }
}

static FOLLOWERS: Followers = Followers::new();

thread_local! {
    /// What this thread read last, as the leader of steps.
    static LAST: Cell<Stretch> = const { Cell::new(Stretch { start: 0, len: 0 }) };
}

/// Takes note that `weights` are read; returns what was read after them the last time.
pub fn read(weights: Stretch) -> Stretch {
    FOLLOWERS.read(weights)
}

/// How far a thread has asked for what comes next.
#[derive(Default)]
pub struct Ahead {
    of: Stretch,
    asked: usize,
}

impl Ahead {
    /// Asks for a little more of the part of `next` that is that of `thread` of `threads`; returns whether there was any.
    pub fn ask(&mut self, next: Stretch, thread: usize, threads: usize) -> bool {
        /// What lies in a second-level cache beside whatever else a step needs.
        const MOST: usize = 256 << 10;
        /// A few lines: whoever asks looks for work in between.
        const ONCE: usize = 1 << 10;
        if next != self.of {
            *self = Self { of: next, asked: 0 };
        }
        let part = next.len / threads;
        let is_more = self.asked < part.min(MOST);
        if is_more {
            let start = next.start.wrapping_add(part * thread + self.asked);
            prefetch_at(std::ptr::without_provenance::<u8>(start), ONCE);
            self.asked += ONCE;
        }
        is_more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_is_expected_to_follow() {
        let followers = Followers::new();
        let [a, b, c] = [1, 2, 3].map(|i| Stretch { start: i << 20, len: 64 });
        for _ in 0..2 {
            for weights in [a, b, c] {
                followers.read(weights);
            }
        }
        assert_eq!([a, b, c].map(|weights| followers.read(weights)), [b, c, a]);
        assert_eq!([b, c].map(|weights| followers.read(weights)), [c, b], "b has just followed c");
    }

    #[test]
    fn each_thread_asks_for_the_beginning_of_its_part_and_no_more() {
        let next = Stretch { start: 1 << 20, len: 4 << 20 };
        let mut ahead = Ahead::default();
        let mut count = |next| (0..).take_while(|_| ahead.ask(next, 1, 2)).count();
        assert_eq!(count(next), 256);
        assert_eq!(count(next), 0);
        assert_eq!(count(Stretch { len: 2 << 12, ..next }), 4);
        assert_eq!(count(Stretch::default()), 0);
    }
}
