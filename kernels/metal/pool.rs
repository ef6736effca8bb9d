//! Buffers for results, kept from one launch to the next, and when a step waits so that memory is given back. Candle's
//! own pool gives back all that is idle whenever a result is read, so that every decode step would ask the system for
//! all of its buffers again, and nothing while none is read.

use std::sync::Arc;

/// Buffers of type `B`. One is idle when the pool alone holds it. The GPU may still be at work on it: candle orders
/// whoever writes it next behind that.
pub(crate) struct Pool<B> {
    kept: Vec<Kept<B>>,
    /// Buffers asked for so far, and before the last call of [`Pool::trim`].
    asked: u64,
    asked_before: u64,
}

struct Kept<B> {
    buffer: Arc<B>,
    bytes: usize,
    /// When it was last asked for.
    asked: u64,
}

impl<B> Kept<B> {
    fn is_idle(&self) -> bool {
        Arc::strong_count(&self.buffer) == 1
    }
}

impl<B> Default for Pool<B> {
    fn default() -> Self {
        Self { kept: vec![], asked: 0, asked_before: 0 }
    }
}

impl<B> Pool<B> {
    /// A buffer of at least `bytes` that holds anything: the smallest idle one that is not twice as large as it need
    /// be, or one that `create` makes of the bytes that it is told.
    pub fn get<E>(&mut self, bytes: usize, create: impl FnOnce(usize) -> Result<Arc<B>, E>) -> Result<Arc<B>, E> {
        let bytes = roomy(bytes);
        self.asked += 1;
        let fits = |kept: &&mut Kept<B>| (bytes..2 * bytes).contains(&kept.bytes) && kept.is_idle();
        if let Some(kept) = self.kept.iter_mut().filter(fits).min_by_key(|kept| kept.bytes) {
            kept.asked = self.asked;
            return Ok(kept.buffer.clone());
        }
        let buffer = create(bytes)?;
        self.kept.push(Kept { buffer: buffer.clone(), bytes, asked: self.asked });
        Ok(buffer)
    }

    pub fn idle_bytes(&self) -> usize {
        self.kept.iter().filter(|kept| kept.is_idle()).map(|kept| kept.bytes).sum()
    }

    /// Takes out the idle buffers that nobody has asked for since the last call, and then others until no more than
    /// `limit` bytes are idle, in the order in which they were asked for. The GPU must have ended its work on them.
    pub fn trim(&mut self, limit: usize) -> Vec<Arc<B>> {
        let before = std::mem::replace(&mut self.asked_before, self.asked);
        let mut idle = self.idle_bytes();
        self.kept.sort_by_key(|kept| kept.asked);
        let goes = |kept: &mut Kept<B>| {
            let goes = kept.is_idle() && (kept.asked <= before || idle > limit);
            idle -= if goes { kept.bytes } else { 0 };
            goes
        };
        self.kept.extract_if(.., goes).map(|kept| kept.buffer).collect()
    }
}

/// `bytes` and up to an eighth more, so that results of almost one size share buffers.
fn roomy(bytes: usize) -> usize {
    bytes.next_multiple_of((bytes.next_power_of_two() / 16).max(256)).max(256)
}

/// Bytes that may be idle at a step's end, in our pool; and by which the GPU's memory may have grown since the last
/// wait: candle gives back what is idle in its own only then.
const MAX_IDLE: usize = 512 << 20;
/// Steps until candle lets go of command buffers, if nothing is read for so long. One that has read a result waits for
/// nothing here.
const STEPS: u32 = 32;

/// What steps on a device leave behind.
pub(crate) struct Memory<B> {
    pub pool: Pool<B>,
    /// Since the last wait.
    steps: u32,
    /// Bytes that the GPU had given out after it.
    allocated: usize,
}

impl<B> Default for Memory<B> {
    fn default() -> Self {
        Self { pool: Pool::default(), steps: 0, allocated: 0 }
    }
}

impl<B> Memory<B> {
    /// Whether a step that ends must wait for the GPU, which has given out `allocated` bytes: too much is idle, or may
    /// be, or nobody has waited in a while.
    pub fn must_wait(&mut self, allocated: usize) -> bool {
        self.steps += 1;
        let has_grown = allocated > self.allocated + MAX_IDLE;
        has_grown || self.steps >= STEPS || self.pool.idle_bytes() > MAX_IDLE
    }

    /// After that wait: the buffers to give back.
    pub fn trim(&mut self) -> Vec<Arc<B>> {
        self.pool.trim(MAX_IDLE)
    }

    /// After they were given back, which leaves `allocated` bytes.
    pub fn settled(&mut self, allocated: usize) {
        (self.steps, self.allocated) = (0, allocated);
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::testing::Random;

    /// Stands for a buffer of so many bytes.
    fn create(bytes: usize) -> Result<Arc<usize>, Infallible> {
        Ok(Arc::new(bytes))
    }

    #[test]
    fn buffers_have_one_user_enough_room_and_little_more() {
        let (mut pool, mut random, mut used) = (Pool::default(), Random::new(1), Vec::<Arc<usize>>::new());
        for _ in 0..2000 {
            let magnitude = random.below(24);
            let bytes = random.below(1 << magnitude);
            let room = bytes.max(1)..=bytes + bytes / 8 + 256;
            let Ok(buffer) = pool.get(bytes, |created| {
                assert!(room.contains(&created), "{bytes} in a new one of {created}");
                create(created)
            });
            assert!((*room.start()..2 * room.end()).contains(&*buffer), "{bytes} in {buffer}");
            assert!(!used.iter().any(|other| Arc::ptr_eq(other, &buffer)), "{bytes}: somebody has it");
            used.push(buffer);
            while used.len() > 20 {
                used.swap_remove(random.below(used.len()));
            }
        }
    }

    #[test]
    fn the_smallest_that_is_idle_is_taken() {
        let mut pool = Pool::default();
        drop([30, 18, 16, 40, 22].map(|size| pool.get(size << 16, create)));
        // At last those that are idle are too small or too large.
        let taken = [17, 18, 18, 18].map(|size| pool.get(size << 16, create));
        assert_eq!(taken, [18, 22, 30, 18].map(|size| create(size << 16)));
        assert_eq!(pool.idle_bytes(), (16 + 40) << 16);
    }

    #[test]
    fn almost_the_same_sizes_share() {
        let mut pool = Pool::default();
        for (size, other) in [(100, 200), (300, 500), (70_000, 73_000)] {
            drop(pool.get(size, create));
            assert!(pool.get(other, Err).is_ok(), "{other} after {size}");
        }
    }

    #[test]
    fn the_same_step_again_creates_nothing() {
        let (mut pool, mut created) = (Pool::default(), 0);
        for step in 0..20 {
            let mut held = Vec::new();
            for bytes in [4096, 100, 70_000, 100, 4096, 70_001] {
                let Ok(buffer) = pool.get(bytes, |bytes| {
                    created += 1;
                    create(bytes)
                });
                held.push(buffer);
                if held.len() > 2 {
                    held.remove(0);
                }
            }
            drop(held);
            if step % 4 == 3 {
                pool.trim(1 << 20);
            }
        }
        assert_eq!(created, 4);
    }

    #[test]
    fn what_is_idle_is_bounded_and_what_nobody_asks_for_goes() {
        let mut pool = Pool::default();
        let held: Vec<_> = (1..=8).map(|size| pool.get(size << 16, create)).collect();
        for _ in 0..2 {
            assert_eq!((pool.idle_bytes(), pool.trim(0).len()), (0, 0));
        }
        drop(held);
        assert_eq!(pool.idle_bytes(), 36 << 16);
        // What was asked for since stays, again or for the first time, and nothing else: not the last one before.
        drop((pool.get(7 << 16, create), pool.get(20 << 16, create)));
        pool.trim(usize::MAX);
        assert_eq!(pool.idle_bytes(), 27 << 16);
        // Over the limit, the longest unused goes first, until the rest is within it.
        for _ in 0..2 {
            drop((pool.get(20 << 16, create), pool.get(3 << 16, create), pool.get(7 << 16, create)));
            let out: Vec<usize> = pool.trim(10 << 16).iter().map(|buffer| **buffer).collect();
            assert_eq!((pool.idle_bytes(), out), (10 << 16, vec![20 << 16]));
        }
    }

    #[test]
    fn steps_wait_when_memory_grows_is_idle_or_nobody_has_waited() {
        let mut memory = Memory::default();
        memory.settled(1 << 30);
        for _ in 0..2 {
            assert!((1..STEPS).all(|_| !memory.must_wait((1 << 30) + MAX_IDLE)), "waits early");
            assert!(memory.must_wait(0), "does not wait after {STEPS} steps");
            memory.settled(1 << 30);
        }
        assert!(memory.must_wait((1 << 30) + MAX_IDLE + 1), "does not wait where memory has grown");
        memory.settled(2 << 30);
        assert!(!memory.must_wait(2 << 30));

        let held = [0; 5].map(|_| memory.pool.get(MAX_IDLE / 4, create));
        assert!(!memory.must_wait(2 << 30), "what is held is not idle");
        drop(held);
        assert!(memory.must_wait(2 << 30), "does not wait where too much is idle");
        assert_eq!((memory.trim().len(), memory.pool.idle_bytes()), (1, MAX_IDLE));
        memory.settled(2 << 30);
        assert!(!memory.must_wait(2 << 30));
    }
}
