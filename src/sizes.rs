//! How an engine's memory is divided among blocks, windows and slots.

use candle_core::{DType, Device};
use models::{CacheSpec, cache};

use crate::device::{available_memory, default_step};
use crate::engine::{EngineOptions, ModelLimits};
use crate::scheduler::{Limits, Window};
use crate::{Error, Result};

/// How many blocks and slots an engine gets.
pub(crate) struct Sizes {
    pub limits: Limits,
    pub max_context: usize,
}

impl Sizes {
    /// Divides the memory of `options` among what a model with these caches keeps, in elements of `dtype`.
    ///
    /// # Errors
    ///
    /// An option is zero, or the memory does not hold a single block and slot.
    pub fn plan(
        specs: &[CacheSpec],
        model: &ModelLimits,
        dtype: DType,
        device: &Device,
        options: &EngineOptions,
    ) -> Result<Self> {
        let EngineOptions { max_sequences, block_size, .. } = *options;
        let max_tokens_per_step = options.max_tokens_per_step.unwrap_or(default_step(device));
        let checkpoint_interval = options.checkpoint_interval.unwrap_or(default_step(device).max(2048));
        for (name, value) in [
            ("max_sequences", max_sequences),
            ("max_tokens_per_step", max_tokens_per_step),
            ("block_size", block_size),
            ("checkpoint_interval", checkpoint_interval),
        ] {
            if value == 0 {
                return Err(Error::Request(format!("{name} is 0, expected 1 or more")));
            }
        }
        let max_context = options.max_context.unwrap_or(usize::MAX).min(model.max_positions);
        let block_bytes = cache::bytes_per_block(specs, block_size, dtype);
        let slot_bytes = cache::bytes_per_slot(specs);
        let stateful = slot_bytes > 0;
        let memory = options.memory.unwrap_or_else(|| available_memory(device) / 2);
        let num_slots = if stateful {
            (memory / 2 / slot_bytes).clamp(1, max_sequences + options.max_checkpoints)
        } else {
            max_sequences
        };
        let max_sequences = max_sequences.min(num_slots).min(max_tokens_per_step);
        let left = memory.saturating_sub(num_slots * slot_bytes);
        let window_block_bytes = cache::bytes_per_window_block(specs, block_size, dtype);
        let mut window_bytes = 0;
        let step = max_tokens_per_step.min(max_sequences.saturating_mul(max_context));
        let window = cache::window(specs).map(|tokens| {
            let least = |sequences| Window::blocks_for(sequences, tokens, block_size, step);
            let cached = options.max_checkpoints * Window::blocks_per_sequence(tokens, block_size);
            let num_blocks = (left / 2 / window_block_bytes).clamp(least(1), least(max_sequences) + cached);
            window_bytes = num_blocks * window_block_bytes;
            Window { tokens, num_blocks }
        });
        let left = left.saturating_sub(window_bytes);
        let useful = max_sequences.saturating_mul(max_context.div_ceil(block_size) + 1);
        let num_blocks = left.checked_div(block_bytes).unwrap_or(useful).min(useful);
        if num_blocks == 0 || num_slots * slot_bytes + window_bytes > memory {
            return Err(Error::Request(format!(
                "{memory} bytes of memory for the cache, a sequence needs {} at least",
                block_bytes + slot_bytes + window_bytes
            )));
        }
        let windows = window.map_or(usize::MAX, |window| window.max_sequences(block_size, step));
        let max_sequences = max_sequences.min(windows);
        let limits = Limits {
            block_size,
            num_blocks,
            num_slots,
            max_tokens_per_step,
            max_sequences,
            checkpoint_interval,
            stateful,
            window,
        };
        Ok(Self { limits, max_context })
    }
}
