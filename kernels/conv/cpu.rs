//! The convolution on the CPU: blocks of channels on threads, vectors along the channels.

use std::ops::Range;

use crate::Batch;
use crate::cpu::{RowStarts, Shared, share};
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, load, store};

/// `x` `[N, channels]`, `weight` `[channels, width]`, `state` `[S, channels, width - 1]`; returns `[N, channels]`.
pub fn causal_conv1d<T: Stored>(
    x: &(&[T], RowStarts),
    weight: &[f32],
    state: &mut [f32],
    batch: &Batch,
    channels: usize,
    width: usize,
) -> Vec<T> {
    let past = width - 1;
    let mut out = vec![T::round(0.0); batch.num_tokens() * channels];
    let (shared_out, shared_state) = (Shared::new(&mut out), Shared::new(state));
    let blocks = channels.div_ceil(CHANNELS);
    share(batch.num_sequences() * blocks, |task| {
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
        dispatch(Task { x, weight, window, width, tokens, channels, block, out: &shared_out });
    });
    out
}

/// Taps of the inner loop: narrower weights get zeros in front, which add nothing.
const TAPS: usize = 4;
/// Channels and tokens whose inputs stay in the first-level cache, 16 KiB.
const CHANNELS: usize = 256;
const TOKENS: usize = 16;

/// The tokens of one sequence on a block of channels.
struct Task<'a, T> {
    x: &'a (&'a [T], RowStarts<'a>),
    weight: &'a [f32],
    window: &'a mut [f32],
    width: usize,
    tokens: Range<usize>,
    channels: usize,
    block: Range<usize>,
    out: &'a Shared<'a, T>,
}

impl<T: Stored> Kernel for Task<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { x: (x, rows), weight, window, width, tokens, channels, block, out } = self;
        let mut weights = [[0.0; CHANNELS]; TAPS];
        for (j, row) in weights[TAPS - width..].iter_mut().enumerate() {
            row.iter_mut().zip(weight[j..].iter().step_by(width)).for_each(|(to, from)| *to = *from);
        }
        // The window and, behind it, the inputs of some tokens.
        let mut inputs = vec![[0.0; CHANNELS]; TAPS - 1 + tokens.len().min(TOKENS)];
        for (j, row) in inputs[TAPS - width..TAPS - 1].iter_mut().enumerate() {
            row.iter_mut().zip(window[j..].iter().step_by(width - 1)).for_each(|(to, from)| *to = *from);
        }
        for start in tokens.clone().step_by(TOKENS) {
            let tokens = start..tokens.end.min(start + TOKENS);
            for (t, input) in tokens.clone().zip(&mut inputs[TAPS - 1..]) {
                let x = &x[rows.start(t) + block.start..][..block.len()];
                for (x, input) in x.chunks(LANES).zip(input.as_chunks_mut().0) {
                    load::<V, T>(x).store(input);
                }
            }
            for (t, inputs) in tokens.clone().zip(inputs.windows(TAPS)) {
                // SAFETY: no other task has these channels at this token.
                let out = unsafe { out.part(t * channels + block.start, block.len()) };
                for (c, out) in out.chunks_mut(LANES).enumerate() {
                    let mut sum = V::splat(0.0);
                    for j in 0..TAPS {
                        let weight = V::load(&weights[j].as_chunks().0[c]);
                        sum = weight.mul_add(V::load(&inputs[j].as_chunks().0[c]), sum);
                    }
                    store(sum.mul(sum.sigmoid()), out);
                }
            }
            inputs.copy_within(tokens.len()..tokens.len() + TAPS - 1, 0);
        }
        for (j, row) in inputs[TAPS - width..TAPS - 1].iter().enumerate() {
            window[j..].iter_mut().step_by(width - 1).zip(row).for_each(|(to, from)| *to = *from);
        }
    }
}
