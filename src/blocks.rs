//! Who owns which block of keys and values and which state slot: numbers and counts, no memory.

/// A fixed set of numbered things (blocks or slots), each free or held by one or more owners.
#[derive(Debug)]
pub struct Pool {
    counts: Vec<u32>,
    free: Vec<u32>,
}

/// All that sequences and cached prefixes hold.
#[derive(Debug)]
pub struct Pools {
    pub blocks: BlockPool,
    /// Of the layers with a window.
    pub window_blocks: BlockPool,
    pub slots: SlotPool,
}

/// Blocks of keys and values. A block may be shared: by sequences with a common prefix and by the prefix cache.
pub type BlockPool = Pool;

/// Recurrent state slots. A slot has one owner: a sequence or a checkpoint.
pub type SlotPool = Pool;

impl Pool {
    /// `len` free ones, numbered from 0 and handed out in that order.
    pub fn new(len: usize) -> Self {
        Self { counts: vec![0; len], free: (0..len as u32).rev().collect() }
    }

    /// Takes a free one, for one owner.
    pub fn take(&mut self) -> Option<u32> {
        let id = self.free.pop()?;
        self.counts[id as usize] = 1;
        Some(id)
    }

    /// Adds an owner to one that is held.
    pub fn share(&mut self, id: u32) {
        debug_assert!(self.counts[id as usize] > 0, "{id} is free");
        self.counts[id as usize] += 1;
    }

    /// Removes an owner; without owners it is free again.
    pub fn release(&mut self, id: u32) {
        let count = &mut self.counts[id as usize];
        debug_assert!(*count > 0, "{id} is free already");
        *count -= 1;
        if *count == 0 {
            self.free.push(id);
        }
    }

    /// How many owners it has.
    pub fn owners(&self, id: u32) -> u32 {
        self.counts[id as usize]
    }

    /// How many there are, free or not.
    pub fn len(&self) -> usize {
        self.counts.len()
    }

    /// How many are free.
    pub fn available(&self) -> usize {
        self.free.len()
    }
}
