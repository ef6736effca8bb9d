//! What an engine's cache holds of some prefixes, on the host: for a file, or another engine.

use std::collections::HashMap;

use candle_core::Tensor;
use kernels::NO_BLOCK;
use serde::{Deserialize, Serialize};

use crate::prefix_cache::Prefix;
use crate::{Error, Result};

/// A part of the cache on the host.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub layout: SnapshotLayout,
    /// As [`Cache::export`] gives them.
    pub tensors: HashMap<String, Tensor>,
}

/// Where a snapshot's tensors belong. Blocks and slots of the prefixes are indices into them.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotLayout {
    /// Tokens per block.
    pub block_size: usize,
    pub num_blocks: usize,
    pub num_window_blocks: usize,
    pub num_slots: usize,
    pub prefixes: Vec<Prefix>,
}

impl SnapshotLayout {
    /// Refuses what no engine would have written: a snapshot may come from a file.
    pub fn check(&self, block_size: usize, vocab_size: usize) -> Result<()> {
        let fail = |message: String| Err(Error::Request(format!("saved cache: {message}")));
        if self.block_size != block_size {
            return fail(format!("blocks of {} tokens, the engine has blocks of {block_size}", self.block_size));
        }
        for prefix in &self.prefixes {
            let len = prefix.tokens.len();
            let Prefix { blocks, window_blocks, .. } = prefix;
            let held = |index: u32| index == NO_BLOCK || (index as usize) < self.num_window_blocks;
            let consistent = blocks.len() == len.div_ceil(block_size)
                && blocks.iter().all(|&index| (index as usize) < self.num_blocks)
                && (window_blocks.is_empty() || window_blocks.len() == blocks.len())
                && window_blocks.iter().all(|&index| held(index))
                && prefix
                    .states
                    .iter()
                    .all(|&(position, index)| (1..=len).contains(&position) && (index as usize) < self.num_slots);
            if !consistent {
                return fail(format!("a prefix of {len} tokens does not match its blocks and states"));
            }
            if let Some(token) = prefix.tokens.iter().find(|&&token| token as usize >= vocab_size) {
                return fail(format!("token {token}, the model has {vocab_size} of them"));
            }
        }
        Ok(())
    }
}

/// Replaces the blocks of a prefix of `len` tokens by their indices in `picked`, where each stands with its tokens.
pub(crate) fn pick_blocks(blocks: &mut [u32], len: usize, block_size: usize, picked: &mut Vec<(u32, usize)>) {
    for (depth, block) in blocks.iter_mut().enumerate().filter(|(_, block)| **block != NO_BLOCK) {
        let index = index_of(picked, (*block, 0), |(block, _)| *block);
        let rows = &mut picked[index as usize].1;
        *rows = block_size.min(len - depth * block_size).max(*rows);
        *block = index;
    }
}

/// Where something of this id stands in `known`; it is added if it is new.
pub(crate) fn index_of<T>(known: &mut Vec<T>, new: T, id: impl Fn(&T) -> u32) -> u32 {
    let index = known.iter().position(|it| id(it) == id(&new)).unwrap_or_else(|| {
        known.push(new);
        known.len() - 1
    });
    index as u32
}
