//! The gated delta rule on the CPU: the recurrence, with vectors along K and heads on threads.
//!
//! A row of the state reads no other row, so heads may be cut into pieces for threads and into row blocks for the
//! cache without a change in any result; along K the order of each sum is fixed.

use std::ops::Range;

use crate::Batch;
use crate::cpu::{RowStarts, Shared, share};
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, load, store, sum_of_squares};

/// Operands and sizes: `q`, `k` `[N, hk, kd]`; `v` `[N, hv, vd]`; `g`, `beta` `[N, hv]`.
pub struct Inputs<'a, T> {
    pub q: (&'a [T], RowStarts<'a>),
    pub k: (&'a [T], RowStarts<'a>),
    pub v: (&'a [T], RowStarts<'a>),
    pub g: &'a [f32],
    pub beta: &'a [f32],
    pub hk: usize,
    pub hv: usize,
    pub kd: usize,
    pub vd: usize,
}

/// `state` `[S, hv, vd, kd]`; returns `[N, hv, vd]`.
pub fn gated_delta_rule<T: Stored>(inputs: &Inputs<T>, state: &mut [f32], batch: &Batch) -> Vec<T> {
    let &Inputs { hv, kd, vd, .. } = inputs;
    let mut out = vec![T::round(0.0); batch.num_tokens() * hv * vd];
    let (shared_out, shared_state) = (Shared::new(&mut out), Shared::new(state));
    let pieces = (2 * rayon::current_num_threads()).div_ceil(batch.num_sequences() * hv);
    let rows = vd.div_ceil(pieces).next_multiple_of(GROUP);
    let pieces = vd.div_ceil(rows);
    share(batch.num_sequences() * hv * pieces, |task| {
        let sequence = &batch.host[task / (hv * pieces)];
        let head = task / pieces % hv;
        let first = task % pieces * rows;
        let rows = first..vd.min(first + rows);
        // SAFETY: no two tasks have the same rows of the same head and sequence, nor two sequences one slot.
        let state = unsafe { shared_state.part(((sequence.slot * hv + head) * vd + first) * kd, rows.len() * kd) };
        if sequence.is_fresh() {
            state.fill(0.0);
        }
        dispatch(Task { inputs, tokens: sequence.tokens.clone(), head, rows, state, out: &shared_out });
    });
    out
}

/// Rows that share the loads of a key and a query.
const GROUP: usize = 8;
/// Rows that stay in the first-level cache, 16 KiB at K = 128, while a block of tokens passes.
const ROWS: usize = 32;
/// Tokens whose keys and queries stay in the second-level cache, 64 KiB at K = 128.
const TOKENS: usize = 64;

/// The tokens of one sequence on some rows of one head's state.
struct Task<'a, T> {
    inputs: &'a Inputs<'a, T>,
    tokens: Range<usize>,
    head: usize,
    rows: Range<usize>,
    state: &'a mut [f32],
    out: &'a Shared<'a, T>,
}

impl<T: Stored> Kernel for Task<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let kd = self.inputs.kd;
        let state = std::mem::take(&mut self.state);
        match state.as_chunks_mut() {
            // The size of every published checkpoint: known to the compiler, it saves a fifth of the time.
            (state, []) if kd == 16 * LANES => self.recur::<V, 16>(state),
            (state, []) if kd.is_multiple_of(LANES) => self.recur::<V, 0>(state),
            _ => {
                let mut padded = vec![[0.0; LANES]; self.rows.len() * kd.div_ceil(LANES)];
                let rows = padded.chunks_exact_mut(kd.div_ceil(LANES)).map(|row| &mut row.as_flattened_mut()[..kd]);
                rows.zip(state.chunks_exact(kd)).for_each(|(padded, row)| padded.copy_from_slice(row));
                self.recur::<V, 0>(&mut padded);
                let rows = padded.chunks_exact(kd.div_ceil(LANES)).map(|row| &row.as_flattened()[..kd]);
                rows.zip(state.chunks_exact_mut(kd)).for_each(|(padded, row)| row.copy_from_slice(padded));
            }
        }
    }
}

impl<T: Stored> Task<'_, T> {
    /// `state` in rows of `W` vectors, or of what K needs if `W` is 0.
    #[inline(always)]
    fn recur<V: Lanes, const W: usize>(self, state: &mut [[f32; LANES]]) {
        let Self { inputs: Inputs { q, k, v, g, beta, hk, hv, kd, .. }, tokens, head, rows, out, .. } = self;
        let width = if W == 0 { kd.div_ceil(LANES) } else { W };
        let block = tokens.len().min(TOKENS);
        let (mut queries, mut keys) = (vec![[0.0; LANES]; block * width], vec![[0.0; LANES]; block * width]);
        // Of `v` on the way in, of the output on the way out.
        let mut values = vec![0.0; block * rows.len()];
        let mut decays = [0.0; TOKENS];

        for start in tokens.clone().step_by(TOKENS) {
            let block = start..tokens.end.min(start + TOKENS);
            for (i, t) in block.clone().enumerate() {
                let row = t * hk + head * hk / hv;
                let scale = (*kd as f32).sqrt().recip();
                normalise::<V, T>(&q.0[q.1.start(row)..][..*kd], scale, &mut queries[i * width..][..width]);
                normalise::<V, T>(&k.0[k.1.start(row)..][..*kd], 1.0, &mut keys[i * width..][..width]);
                let v = &v.0[v.1.start(t * hv + head)..][rows.clone()];
                let values = &mut values[i * rows.len()..][..rows.len()];
                for (v, value) in v.chunks(LANES).zip(values.chunks_mut(LANES)) {
                    store(load::<V, T>(v), value);
                }
                decays[i] = g[t * hv + head].exp();
            }
            for (state, first) in state.chunks_mut(ROWS * width).zip((0..).step_by(ROWS)) {
                for (i, t) in block.clone().enumerate() {
                    let token = Token {
                        query: &queries[i * width..][..width],
                        key: &keys[i * width..][..width],
                        decay: decays[i],
                        beta: beta[t * hv + head],
                    };
                    let values = &mut values[i * rows.len() + first..][..state.len() / width];
                    let (groups, rest) = values.as_chunks_mut::<GROUP>();
                    let (grouped, last) = state.split_at_mut(groups.len() * GROUP * width);
                    for (state, values) in grouped.chunks_exact_mut(GROUP * width).zip(groups) {
                        token.update::<V, W, GROUP>(state, values);
                    }
                    for (state, value) in last.chunks_exact_mut(width).zip(rest.as_chunks_mut().0) {
                        token.update::<V, W, 1>(state, value);
                    }
                }
            }
            for (i, t) in block.enumerate() {
                // SAFETY: no other task has these rows of this head at this token.
                let out = unsafe { out.part((t * hv + head) * self.inputs.vd + rows.start, rows.len()) };
                for (value, out) in values[i * rows.len()..].chunks(LANES).zip(out.chunks_mut(LANES)) {
                    store(load::<V, f32>(value), out);
                }
            }
        }
    }
}

/// What one token brings to one head: query and key normalised, `exp(g)`, `beta`.
struct Token<'a> {
    query: &'a [[f32; LANES]],
    key: &'a [[f32; LANES]],
    decay: f32,
    beta: f32,
}

impl Token<'_> {
    /// Updates `R` rows of the state; `values` holds their part of `v`, then of the output.
    #[inline(always)]
    fn update<V: Lanes, const W: usize, const R: usize>(&self, state: &mut [[f32; LANES]], values: &mut [f32; R]) {
        let width = if W == 0 { self.key.len() } else { W };
        // Lengths that let the compiler drop the checks of every index below.
        let (key, query, state) = (&self.key[..width], &self.query[..width], &mut state[..R * width]);

        // The product with the state before its decay: that saves a pass.
        let mut memory = [V::splat(0.0); R];
        for j in 0..width {
            let key = V::load(&key[j]);
            for r in 0..R {
                memory[r] = V::load(&state[r * width + j]).mul_add(key, memory[r]);
            }
        }
        let memory = sums(memory);
        let mut delta = [V::splat(0.0); R];
        for r in 0..R {
            delta[r] = V::splat(self.beta * (values[r] - self.decay * memory[r]));
        }
        let decay = V::splat(self.decay);
        let mut out = [V::splat(0.0); R];
        for j in 0..width {
            let (key, query) = (V::load(&key[j]), V::load(&query[j]));
            for r in 0..R {
                let updated = delta[r].mul_add(key, decay.mul(V::load(&state[r * width + j])));
                updated.store(&mut state[r * width + j]);
                out[r] = updated.mul_add(query, out[r]);
            }
        }
        *values = sums(out);
    }
}

/// The sum of the lanes of each.
#[inline(always)]
fn sums<V: Lanes, const R: usize>(lanes: [V; R]) -> [f32; R] {
    let mut sums = [0.0; R];
    let (fours, rest) = lanes.as_chunks();
    for (four, sums) in fours.iter().zip(sums.as_chunks_mut().0) {
        *sums = V::sums(*four);
    }
    for (lanes, sum) in rest.iter().zip(sums.as_chunks_mut::<4>().1) {
        *sum = lanes.sum();
    }
    sums
}

/// `out = x * scale / sqrt(sum(x^2) + 1e-6)`, zero past the end of `x`.
#[inline(always)]
fn normalise<V: Lanes, T: Stored>(x: &[T], scale: f32, out: &mut [[f32; LANES]]) {
    let factor = V::splat(scale / (sum_of_squares::<V, T>(x) + 1e-6).sqrt());
    for (x, out) in x.chunks(LANES).zip(out) {
        load::<V, T>(x).mul(factor).store(out);
    }
}
