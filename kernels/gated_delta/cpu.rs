//! The gated delta rule on the CPU: the recurrence, with vectors along K and heads on threads.
//!
//! A row of the state reads no other row, so heads may be cut into pieces for threads and into row blocks for the
//! cache without a change in any result; along K the order of each sum is fixed.

use std::ops::Range;

use rayon::prelude::*;

use crate::Batch;
use crate::cpu::{Element, Rows, Shared};
use crate::lanes::{self, Kernel, Lanes};

/// Operands and sizes: `q`, `k` `[N, hk, kd]`; `v` `[N, hv, vd]`; `g`, `beta` `[N, hv]`.
pub struct Inputs<'a, T> {
    pub q: Rows<'a, T>,
    pub k: Rows<'a, T>,
    pub v: Rows<'a, T>,
    pub g: &'a [f32],
    pub beta: &'a [f32],
    pub hk: usize,
    pub hv: usize,
    pub kd: usize,
    pub vd: usize,
}

/// `state` `[S, hv, vd, kd]`; returns `[N, hv, vd]`.
pub fn gated_delta_rule<T: Element>(inputs: &Inputs<T>, state: &mut [f32], batch: &Batch) -> Vec<T> {
    let &Inputs { hv, kd, vd, .. } = inputs;
    let mut out = vec![T::zero(); batch.num_tokens() * hv * vd];
    let (shared_out, shared_state) = (Shared::new(&mut out), Shared::new(state));
    let pieces = (2 * rayon::current_num_threads()).div_ceil(batch.num_sequences() * hv);
    let rows = vd.div_ceil(pieces).next_multiple_of(GROUP);
    let pieces = vd.div_ceil(rows);
    (0..batch.num_sequences() * hv * pieces).into_par_iter().for_each(|task| {
        let sequence = &batch.host[task / (hv * pieces)];
        let head = task / pieces % hv;
        let first = task % pieces * rows;
        let rows = first..vd.min(first + rows);
        // SAFETY: no two tasks have the same rows of the same head and sequence, nor two sequences one slot.
        let state = unsafe { shared_state.part(((sequence.slot * hv + head) * vd + first) * kd, rows.len() * kd) };
        if sequence.is_fresh() {
            state.fill(0.0);
        }
        lanes::run(Task { inputs, tokens: sequence.tokens.clone(), head, rows, state, out: &shared_out });
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

impl<T: Element> Kernel for Task<'_, T> {
    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        // SAFETY: promised by the caller; every machine has single floats.
        unsafe { if self.inputs.kd.is_multiple_of(V::N) { self.recur::<V>() } else { self.recur::<f32>() } }
    }
}

impl<T: Element> Task<'_, T> {
    /// # Safety
    ///
    /// The machine has the instructions of `V`, and K is a multiple of its lanes.
    #[inline(always)]
    unsafe fn recur<V: Lanes>(self) {
        let Self { inputs: &Inputs { q, k, v, g, beta, hk, hv, kd, vd }, tokens, head, rows, state, out } = self;
        let block = tokens.len().min(TOKENS);
        let mut scratch = vec![0.0; block * (2 * kd + rows.len())];
        let (queries, rest) = scratch.split_at_mut(block * kd);
        // Values on the way in, outputs on the way out.
        let (keys, values) = rest.split_at_mut(block * kd);
        let mut decays = [0.0; TOKENS];

        for start in tokens.clone().step_by(TOKENS) {
            let block = start..tokens.end.min(start + TOKENS);
            for (i, t) in block.clone().enumerate() {
                let (query, key) = (&mut queries[i * kd..][..kd], &mut keys[i * kd..][..kd]);
                T::widen_all(q.part(t, head * hk / hv * kd, kd), query);
                T::widen_all(k.part(t, head * hk / hv * kd, kd), key);
                // SAFETY: promised by the caller.
                unsafe {
                    normalise::<V>(query, (kd as f32).sqrt().recip());
                    normalise::<V>(key, 1.0);
                }
                T::widen_all(
                    v.part(t, head * vd + rows.start, rows.len()),
                    &mut values[i * rows.len()..][..rows.len()],
                );
                decays[i] = g[t * hv + head].exp();
            }
            for (state, first) in state.chunks_mut(ROWS * kd).zip((0..).step_by(ROWS)) {
                for (i, t) in block.clone().enumerate() {
                    let token = Token {
                        query: &queries[i * kd..][..kd],
                        key: &keys[i * kd..][..kd],
                        decay: decays[i],
                        beta: beta[t * hv + head],
                    };
                    let values = &mut values[i * rows.len() + first..][..state.len() / kd];
                    let (groups, rest) = values.as_chunks_mut::<GROUP>();
                    let (state, last) = state.split_at_mut(groups.len() * GROUP * kd);
                    // SAFETY: promised by the caller.
                    unsafe {
                        for (state, values) in state.chunks_exact_mut(GROUP * kd).zip(groups) {
                            token.update::<V, GROUP>(state, values);
                        }
                        for (state, value) in last.chunks_exact_mut(kd).zip(rest.as_chunks_mut::<1>().0) {
                            token.update::<V, 1>(state, value);
                        }
                    }
                }
            }
            for (i, t) in block.enumerate() {
                // SAFETY: no other task has these rows of this head at this token.
                let out = unsafe { out.part((t * hv + head) * vd + rows.start, rows.len()) };
                T::round_all(&values[i * rows.len()..][..rows.len()], out);
            }
        }
    }
}

/// What one token brings to one head: query and key normalised, `exp(g)`, `beta`.
struct Token<'a> {
    query: &'a [f32],
    key: &'a [f32],
    decay: f32,
    beta: f32,
}

impl Token<'_> {
    /// Updates `R` rows of the state; `values` holds their part of `v`, then of the output.
    ///
    /// # Safety
    ///
    /// The machine has the instructions of `V`, and K is a multiple of its lanes.
    #[inline(always)]
    unsafe fn update<V: Lanes, const R: usize>(&self, state: &mut [f32], values: &mut [f32; R]) {
        let kd = self.key.len();
        assert!(self.query.len() == kd && state.len() == R * kd, "rows as long as key and query");
        // SAFETY: by the assertion and the caller's promise each access lies in its slice.
        unsafe {
            let mut memory = [V::splat(0.0); R];
            for j in (0..kd).step_by(V::N) {
                let key = V::load(self.key.as_ptr().add(j));
                for (r, memory) in memory.iter_mut().enumerate() {
                    *memory = V::load(state.as_ptr().add(r * kd + j)).mul_add(key, *memory);
                }
            }
            // The product with the state before its decay saves a pass over it.
            let mut delta = [V::splat(0.0); R];
            for r in 0..R {
                delta[r] = V::splat(self.beta * (values[r] - self.decay * memory[r].sum()));
            }
            let decay = V::splat(self.decay);
            let mut out = [V::splat(0.0); R];
            for j in (0..kd).step_by(V::N) {
                let key = V::load(self.key.as_ptr().add(j));
                let query = V::load(self.query.as_ptr().add(j));
                for r in 0..R {
                    let state = state.as_mut_ptr().add(r * kd + j);
                    let updated = delta[r].mul_add(key, decay.mul(V::load(state)));
                    updated.store(state);
                    out[r] = updated.mul_add(query, out[r]);
                }
            }
            for r in 0..R {
                values[r] = out[r].sum();
            }
        }
    }
}

/// `x * scale / sqrt(sum(x^2) + 1e-6)`.
///
/// # Safety
///
/// As for [`Token::update`].
#[inline(always)]
unsafe fn normalise<V: Lanes>(x: &mut [f32], scale: f32) {
    // SAFETY: the caller promises whole vectors.
    unsafe {
        let mut squares = V::splat(0.0);
        for j in (0..x.len()).step_by(V::N) {
            let x = V::load(x.as_ptr().add(j));
            squares = x.mul_add(x, squares);
        }
        let factor = scale / (squares.sum() + 1e-6).sqrt();
        x.iter_mut().for_each(|x| *x *= factor);
    }
}
