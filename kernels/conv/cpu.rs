//! The convolution on the CPU: blocks of channels on threads, vectors along the channels.

use std::ops::Range;

use crate::Batch;
use crate::cpu::{RowStarts, Shared, share, zeros};
use crate::linear::tile::pieces;
use crate::simd::{Kernel, LANES, Lanes, PAIR, Stored, Vector, dispatch, load, load_pair, prefetch, store_pair};

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
    let mut out = zeros(batch.num_tokens() * channels);
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
/// Tokens whose inputs and outputs, pieces of rows far apart, are asked for before their turn.
const AHEAD: usize = 2;

/// The tokens of one sequence on a block of channels.
struct Task<'a, T> {
    x: &'a (&'a [T], RowStarts),
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
        let Self { x: (x, rows), weight, window, width, tokens, channels, block, out: shared } = self;
        let past = width - 1;
        let mut weights = [[0.0; CHANNELS]; TAPS];
        turn::<V>(weight, width, &mut weights[TAPS - width..]);
        // The window and, behind it, the inputs of some tokens.
        let mut inputs = vec![[0.0; CHANNELS]; TAPS - 1 + tokens.len().min(TOKENS)];
        turn::<V>(window, past, &mut inputs[TAPS - width..TAPS - 1]);
        for piece in pieces(tokens.clone(), TOKENS) {
            for (i, t) in piece.clone().enumerate() {
                let ahead = tokens.end.min(t + 1 + AHEAD) - 1;
                let (next_x, next_out) = (rows.start(ahead) + block.start, ahead * channels + block.start);
                let row = &x[rows.start(t) + block.start..][..block.len()];
                for (x, input) in row.chunks(PAIR).zip(inputs[i + TAPS - 1].as_chunks_mut::<PAIR>().0) {
                    load_pair::<V, T>(x).write(input);
                }
                let inputs = inputs[i..].first_chunk::<TAPS>().expect("as many as there are tokens, and the window");
                // SAFETY: no other task has these channels at this token.
                let out = unsafe { shared.part(t * channels + block.start, block.len()) };
                for (c, out) in out.chunks_mut(PAIR).enumerate() {
                    prefetch(&x[next_x + c * PAIR..][..out.len()]);
                    shared.fetch(next_out + c * PAIR..next_out + c * PAIR + out.len());
                    let mut sum = V::Pair::splat(0.0);
                    for j in 0..TAPS {
                        let weight = V::Pair::read(&weights[j].as_chunks::<PAIR>().0[c]);
                        sum = weight.mul_add(V::Pair::read(&inputs[j].as_chunks::<PAIR>().0[c]), sum);
                    }
                    store_pair::<V, T>(sum.mul(sum.sigmoid()), out);
                }
            }
            inputs.copy_within(piece.len()..piece.len() + TAPS - 1, 0);
        }
        for (j, row) in inputs[TAPS - width..TAPS - 1].iter().enumerate() {
            window[j..].iter_mut().step_by(past).zip(row).for_each(|(to, from)| *to = *from);
        }
    }
}

/// `columns[j][c] = rows[c][j]` of rows of `width`, at most eight.
#[inline(always)]
fn turn<V: Lanes>(rows: &[f32], width: usize, columns: &mut [[f32; CHANNELS]]) {
    for piece in pieces(0..rows.len() / width, LANES) {
        let mut eight = [V::splat(0.0); LANES];
        for (lanes, row) in eight.iter_mut().zip(piece.clone()) {
            *lanes = load::<V, f32>(&rows[row * width..rows.len().min(row * width + LANES)]);
        }
        for (turned, column) in V::transpose(eight).into_iter().zip(columns.iter_mut()) {
            turned.write(&mut column[piece.start..]);
        }
    }
}
