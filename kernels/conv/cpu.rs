//! The convolution on the CPU: blocks of channels on threads, vectors along the channels.

use std::ops::Range;

use rayon::prelude::*;

use crate::Batch;
use crate::cpu::{Element, Rows, Shared};
use crate::lanes::{self, Kernel, Lanes, exp, fma};

/// `x` `[N, channels]`, `weight` `[channels, width]`, `state` `[S, channels, width - 1]`; returns `[N, channels]`.
pub fn causal_conv1d<T: Element>(
    x: Rows<T>,
    weight: &[f32],
    state: &mut [f32],
    batch: &Batch,
    channels: usize,
    width: usize,
) -> Vec<T> {
    let past = width - 1;
    let mut out = vec![T::zero(); batch.num_tokens() * channels];
    let (shared_out, shared_state) = (Shared::new(&mut out), Shared::new(state));
    let blocks = channels.div_ceil(CHANNELS);
    (0..batch.num_sequences() * blocks).into_par_iter().for_each(|task| {
        let sequence = &batch.host[task / blocks];
        let first = task % blocks * CHANNELS;
        let block = first..channels.min(first + CHANNELS);
        // SAFETY: no two tasks have the same channels of one sequence, nor two sequences one slot.
        let window = unsafe { shared_state.part((sequence.slot * channels + first) * past, block.len() * past) };
        if sequence.is_fresh() {
            window.fill(0.0);
        }
        let weight = &weight[first * width..][..block.len() * width];
        let tokens = sequence.tokens.clone();
        lanes::run(Task { x, weight, window, tokens, channels, block, out: &shared_out });
    });
    out
}

/// Channels and tokens whose inputs stay in the first-level cache, 16 KiB.
const CHANNELS: usize = 256;
const TOKENS: usize = 16;

/// The tokens of one sequence on a block of channels.
struct Task<'a, T> {
    x: Rows<'a, T>,
    weight: &'a [f32],
    window: &'a mut [f32],
    tokens: Range<usize>,
    channels: usize,
    block: Range<usize>,
    out: &'a Shared<'a, T>,
}

impl<T: Element> Kernel for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Self { x, weight, window, tokens, channels, block, out } = self;
        let len = block.len();
        let (past, width) = (window.len() / len, weight.len() / len);
        // The window's inputs and behind them those of some tokens; the weights; one token's sums: all along the
        // channels.
        let mut scratch = vec![0.0; (past + tokens.len().min(TOKENS) + width + 1) * len];
        let (weights, rest) = scratch.split_at_mut(width * len);
        let (sums, inputs) = rest.split_at_mut(len);
        for c in 0..len {
            (0..width).for_each(|j| weights[j * len + c] = weight[c * width + j]);
            (0..past).for_each(|j| inputs[j * len + c] = window[c * past + j]);
        }
        for start in tokens.clone().step_by(TOKENS) {
            let tokens = start..tokens.end.min(start + TOKENS);
            for (t, input) in tokens.clone().zip(inputs[past * len..].chunks_exact_mut(len)) {
                T::widen_all(x.part(t, block.start, len), input);
            }
            for (i, t) in tokens.clone().enumerate() {
                sums.fill(0.0);
                for (weights, input) in weights.chunks_exact(len).zip(inputs[i * len..].chunks_exact(len)) {
                    for ((sum, weight), input) in sums.iter_mut().zip(weights).zip(input) {
                        *sum = fma::<V>(*weight, *input, *sum);
                    }
                }
                for sum in sums.iter_mut() {
                    *sum /= 1.0 + exp::<V>(-*sum);
                }
                // SAFETY: no other task has these channels at this token.
                T::round_all(sums, unsafe { out.part(t * channels + block.start, len) });
            }
            inputs.copy_within(tokens.len() * len..(tokens.len() + past) * len, 0);
        }
        for c in 0..len {
            (0..past).for_each(|j| window[c * past + j] = inputs[j * len + c]);
        }
    }
}
