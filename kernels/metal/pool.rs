//! Buffers for results, kept from one launch to the next. Candle's own pool gives back all that is idle whenever a result
//! is read, so that every decode step would ask the system for all of its buffers again, and nothing while none is read.

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
    /// A buffer of at least `bytes` that holds anything: the smallest idle one that is not twice as large as it need be,
    /// or one that `create` makes of the bytes that it is told.
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
            let Ok(buffer) = pool.get(bytes, create);
            assert!((bytes..2 * (bytes + bytes / 8 + 256)).contains(&*buffer), "{bytes} in {buffer}");
            assert!(!used.iter().any(|other| Arc::ptr_eq(other, &buffer)), "{bytes}: somebody has it");
            used.push(buffer);
            while used.len() > 20 {
                used.swap_remove(random.below(used.len()));
            }
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
        assert_eq!((pool.idle_bytes(), pool.trim(0).len()), (0, 0));
        drop(held);
        assert_eq!(pool.idle_bytes(), 36 << 16);
        // One that was asked for again stays, and no other.
        drop(pool.get(8 << 16, create));
        pool.trim(usize::MAX);
        assert_eq!(pool.idle_bytes(), 8 << 16);
        // Over the limit, the longest unused goes first.
        for _ in 0..2 {
            drop((pool.get(3 << 16, create), pool.get(8 << 16, create)));
            let out: Vec<usize> = pool.trim(8 << 16).iter().map(|buffer| **buffer).collect();
            assert_eq!((pool.idle_bytes(), out), (8 << 16, vec![3 << 16]));
        }
    }
}
