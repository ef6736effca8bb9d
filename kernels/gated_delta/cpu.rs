//! The gated delta rule on the CPU: the recurrence, with vectors along K and heads on threads.
//!
//! A row of the state reads no other row, so heads may be cut into pieces for threads and into row blocks for the
//! cache without a change in any result; along K the order of each sum is fixed.

use std::marker::PhantomData;
use std::ops::Range;

use crate::Batch;
use crate::cpu::{RowStarts, Shared, share, zeros};
use crate::linear::tile::{OnLines, pieces};
#[cfg(target_arch = "x86_64")]
use crate::simd::Instructions;
use crate::simd::{
    Kernel, LANES, Lanes, Stored, Vector, dispatch, instructions, load, prefetch, prefetch_at, store, sum_of_squares,
};

/// Operands and sizes: `q`, `k` `[N, hk, kd]`; `v` `[N, hv, vd]`; `g`, `beta` `[N, hv]`.
pub struct Inputs<'a, T> {
    pub q: (&'a [T], RowStarts),
    pub k: (&'a [T], RowStarts),
    pub v: (&'a [T], RowStarts),
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
    let mut out = zeros(batch.num_tokens() * hv * vd);
    let (shared_out, shared_state) = (Shared::new(&mut out), Shared::new(state));
    let parts = (2 * rayon::current_num_threads()).div_ceil(batch.num_sequences() * hv);
    let rows = vd.div_ceil(parts).next_multiple_of(GROUP);
    let parts = vd.div_ceil(rows);
    share(batch.num_sequences() * hv * parts, |task| {
        let sequence = &batch.host[task / (hv * parts)];
        let head = task / parts % hv;
        let first = task % parts * rows;
        let rows = first..vd.min(first + rows);
        // SAFETY: no two tasks have the same rows of the same head and sequence, nor two sequences one slot.
        let state = unsafe { shared_state.part(((sequence.slot * hv + head) * vd + first) * kd, rows.len() * kd) };
        if sequence.is_fresh() {
            state.fill(0.0);
        }
        let task = Task { inputs, tokens: sequence.tokens.clone(), head, rows, state, out: &shared_out };
        match instructions() {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => dispatch(Grouped::<_, Wide, 8, GROUP>(task, PhantomData)),
            _ => dispatch(Grouped::<_, Narrow, 4, 4>(task, PhantomData)),
        }
    });
    out
}

/// Rows that go together in the widest group.
const GROUP: usize = 16;
/// Rows of the state that stay in the first-level cache, 16 KiB at K = 128, while a block of tokens passes.
const ROWS: usize = 32;
/// Tokens whose keys and queries stay in the second-level cache, 128 KiB at K = 128.
const TOKENS: usize = 128;
/// Fewer tokens meet rows of the state as they lie: bringing them side by side and back takes longer then.
const MANY: usize = 8;
/// Tokens whose operands and outputs, rows of which lie far apart, are asked for before their turn.
const AHEAD: usize = 2;

/// The tokens of one sequence on some rows of one head's state.
struct Task<'a, T> {
    inputs: &'a Inputs<'a, T>,
    tokens: Range<usize>,
    head: usize,
    rows: Range<usize>,
    state: &'a mut [f32],
    out: &'a Shared<'a, T>,
}

/// `N` rows of the state in `P` registers, eight values of each.
trait Group<const P: usize, const N: usize> {
    type Register<V: Lanes>: Vector;

    /// Where a row's values lie among those of a column.
    fn place(row: usize) -> usize;
    /// For every row the same.
    fn repeat<V: Lanes>(values: V) -> Self::Register<V>;
    /// For every row its own.
    fn spread<V: Lanes>(values: &[f32; N]) -> [Self::Register<V>; P];
    /// The sum of the lanes of every row.
    fn sums<V: Lanes>(rows: [Self::Register<V>; P]) -> [f32; N];
}

/// A row in a register: with four, eight sums, four factors and the decay leave three of AVX2's sixteen.
struct Narrow;

impl Group<4, 4> for Narrow {
    type Register<V: Lanes> = V;

    #[inline(always)]
    fn place(row: usize) -> usize {
        row
    }
    #[inline(always)]
    fn repeat<V: Lanes>(values: V) -> V {
        values
    }
    #[inline(always)]
    fn spread<V: Lanes>(&[a, b, c, d]: &[f32; 4]) -> [V; 4] {
        [V::splat(a), V::splat(b), V::splat(c), V::splat(d)]
    }
    #[inline(always)]
    fn sums<V: Lanes>(rows: [V; 4]) -> [f32; 4] {
        V::sums(rows)
    }
}

/// Two rows in a register, `r` and `r + 4`.
#[cfg(target_arch = "x86_64")]
struct Wide;

#[cfg(target_arch = "x86_64")]
impl Group<8, GROUP> for Wide {
    type Register<V: Lanes> = V::Pair;

    #[inline(always)]
    fn place(row: usize) -> usize {
        row / 8 * 8 + row % 4 * 2 + row / 4 % 2
    }
    #[inline(always)]
    fn repeat<V: Lanes>(values: V) -> V::Pair {
        values.pair(values)
    }
    #[inline(always)]
    fn spread<V: Lanes>(values: &[f32; GROUP]) -> [V::Pair; 8] {
        let [a, b, c, d] = V::read(&values[..LANES]).spread();
        let [e, f, g, h] = V::read(&values[LANES..]).spread();
        [a, b, c, d, e, f, g, h]
    }
    #[inline(always)]
    fn sums<V: Lanes>([a, b, c, d, e, f, g, h]: [V::Pair; 8]) -> [f32; GROUP] {
        let mut sums = [0.0; GROUP];
        V::sums_of_halves([a, b, c, d]).write(&mut sums[..LANES]);
        V::sums_of_halves([e, f, g, h]).write(&mut sums[LANES..]);
        sums
    }
}

/// Eight values along K, of `N` rows.
type Column<const N: usize> = OnLines<[[f32; LANES]; N]>;

/// A task, `N` rows at a time.
struct Grouped<'a, T, G, const P: usize, const N: usize>(Task<'a, T>, PhantomData<G>);

impl<T: Stored, G: Group<P, N>, const P: usize, const N: usize> Kernel for Grouped<'_, T, G, P, N> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let (state, kd) = (std::mem::take(&mut self.0.state), self.0.inputs.kd);
        let Task { inputs, ref tokens, head, ref rows, .. } = self.0;
        let width = kd.div_ceil(LANES);
        let fits_in_place = kd.is_multiple_of(LANES) && rows.len().is_multiple_of(4);
        let mut block = Block::new(width, tokens.len().min(TOKENS));
        let mut columns: Vec<Column<N>> = Vec::new();
        for tokens in pieces(tokens.clone(), TOKENS) {
            block.fill::<V, T>(inputs, head, tokens.clone());
            let is_in_place = fits_in_place && tokens.len() < MANY;
            for (rows, state) in pieces(rows.clone(), ROWS).zip(state.chunks_mut(ROWS * kd)) {
                let groups = if is_in_place { 0 } else { rows.len().div_ceil(N) };
                columns.resize_with(groups * width, || OnLines([[0.0; LANES]; N]));
                self.advance::<V>(&block, tokens.clone(), rows, state, &mut columns);
            }
        }
    }
}

/// A step of four rows of the state as they lie, in two passes, while those behind them are asked for. `values` become the
/// output.
#[inline(always)]
fn in_place<V: Lanes>(state: &mut [[f32; LANES]], step: Step, values: &mut [f32; 4]) {
    let width = state.len() / 4;
    // Lengths that let the compiler drop the checks of every index below.
    let (key, query, state) = (&step.key[..width], &step.query[..width], &mut state[..4 * width]);
    let [mut memory, mut read] = [[V::splat(0.0); 4]; 2];
    for j in 0..width {
        prefetch_at(state.as_ptr().wrapping_add(4 * (width + j)), 4);
        let (key, query) = (V::load(&key[j]), V::load(&query[j]));
        for r in 0..4 {
            let state = V::load(&state[r * width + j]);
            memory[r] = state.mul_add(key, memory[r]);
            read[r] = state.mul_add(query, read[r]);
        }
    }
    let mut deltas = [0.0; 4];
    step.gates.apply([V::sums(memory), V::sums(read)], values, &mut deltas);
    let decay = V::splat(step.gates.decay);
    for (row, delta) in state.chunks_exact_mut(width).zip(deltas) {
        let delta = V::splat(delta);
        for (state, key) in row.iter_mut().zip(key) {
            delta.mul_add(V::load(key), decay.mul(V::load(state))).store(state);
        }
    }
}

impl<T: Stored, G: Group<P, N>, const P: usize, const N: usize> Grouped<'_, T, G, P, N> {
    /// Takes some rows of the state past the tokens of a block: side by side in `columns`, of any content, or where they lie
    /// if that is empty.
    #[inline(always)]
    fn advance<V: Lanes>(
        &self,
        block: &Block,
        tokens: Range<usize>,
        rows: Range<usize>,
        state: &mut [f32],
        columns: &mut [Column<N>],
    ) {
        let &Inputs { ref v, hv, kd, vd, .. } = self.0.inputs;
        let (width, head) = (block.width, self.0.head);
        let of_rows = |t: usize| {
            let (v_start, start) = (v.1.start(t * hv + head), (t * hv + head) * vd);
            (&v.0[v_start + rows.start..v_start + rows.end], start + rows.start..start + rows.end)
        };
        for (state, columns) in state.chunks(N * kd).zip(columns.chunks_exact_mut(width)) {
            Self::gather::<V>(state, kd, columns);
        }
        let mut deltas = [0.0; ROWS];
        for (i, t) in tokens.clone().enumerate() {
            if t + AHEAD < tokens.end {
                let (v, out) = of_rows(t + AHEAD);
                prefetch(v);
                self.0.out.fetch(out);
            }
            let (v, out) = of_rows(t);
            let mut values = [0.0; ROWS];
            for (v, values) in v.chunks(LANES).zip(values.as_chunks_mut().0) {
                load::<V, T>(v).store(values);
            }
            if columns.is_empty() {
                let groups = state.as_chunks_mut().0.chunks_exact_mut(4 * width);
                for (state, values) in groups.zip(values.as_chunks_mut().0) {
                    in_place::<V>(state, block.step(i), values);
                }
            }
            let of_groups = values.as_chunks_mut().0.iter_mut().zip(deltas.as_chunks_mut().0);
            for (columns, (values, deltas)) in columns.chunks_exact_mut(width).zip(of_groups) {
                let products = match i.checked_sub(1) {
                    Some(before) => Self::pass::<V>(columns, deltas, block.step(before), block.step(i)),
                    None => Self::products::<V>(columns, block.step(i)),
                };
                block.gates[i].apply(products, values, deltas);
            }
            // SAFETY: no other task has these rows of this head at this token.
            let out = unsafe { self.0.out.part(out.start, out.len()) };
            for (value, out) in values.as_chunks().0.iter().zip(out.chunks_mut(LANES)) {
                store(V::load(value), out);
            }
        }
        let groups = columns.chunks_exact(width).zip(deltas.as_chunks().0);
        for (state, (columns, deltas)) in state.chunks_mut(N * kd).zip(groups) {
            Self::scatter::<V>(columns, deltas, block.step(tokens.len() - 1), state, kd);
        }
    }

    /// Rows of the state side by side; missing ones are zero.
    #[inline(always)]
    fn gather<V: Lanes>(state: &[f32], kd: usize, columns: &mut [Column<N>]) {
        for (r, row) in (0..N).zip(state.chunks(kd).chain(std::iter::repeat(&[][..]))) {
            for (j, OnLines(column)) in columns.iter_mut().enumerate() {
                let values = &row[row.len().min(j * LANES)..row.len().min((j + 1) * LANES)];
                load::<V, f32>(values).store(&mut column[G::place(r)]);
            }
        }
    }

    /// The state back, after the last step.
    #[inline(always)]
    fn scatter<V: Lanes>(columns: &[Column<N>], deltas: &[f32; N], step: Step, state: &mut [f32], kd: usize) {
        let decay = V::splat(step.gates.decay);
        for (r, row) in state.chunks_mut(kd).enumerate() {
            let delta = V::splat(deltas[r]);
            for ((OnLines(column), key), target) in columns.iter().zip(step.key).zip(row.chunks_mut(LANES)) {
                let updated = delta.mul_add(V::load(key), decay.mul(V::load(&column[G::place(r)])));
                store(updated, target);
            }
        }
    }

    /// The products of the state with the step's key and query.
    #[inline(always)]
    fn products<V: Lanes>(columns: &[Column<N>], step: Step) -> [[f32; N]; 2] {
        let [mut memory, mut read] = [[G::Register::<V>::splat(0.0); P]; 2];
        for ((OnLines(column), key), query) in columns.iter().zip(step.key).zip(step.query) {
            let (key, query) = (G::repeat(V::load(key)), G::repeat(V::load(query)));
            for p in 0..P {
                let state = G::Register::<V>::read(&column.as_flattened()[p * G::Register::<V>::WIDTH..]);
                memory[p] = state.mul_add(key, memory[p]);
                read[p] = state.mul_add(query, read[p]);
            }
        }
        [G::sums::<V>(memory), G::sums::<V>(read)]
    }

    /// Applies the step before to the state, and returns its [`Self::products`] with the next: one pass for both.
    #[inline(always)]
    fn pass<V: Lanes>(columns: &mut [Column<N>], deltas: &[f32; N], before: Step, next: Step) -> [[f32; N]; 2] {
        let width = columns.len();
        // Lengths that let the compiler drop the checks of every index below.
        let (before_key, key, query) = (&before.key[..width], &next.key[..width], &next.query[..width]);
        let decay = G::Register::<V>::splat(before.gates.decay);
        let deltas = G::spread::<V>(deltas);
        let [mut memory, mut read] = [[G::Register::<V>::splat(0.0); P]; 2];
        for j in 0..width {
            let before = G::repeat(V::load(&before_key[j]));
            let (key, query) = (G::repeat(V::load(&key[j])), G::repeat(V::load(&query[j])));
            for p in 0..P {
                let state = &mut columns[j].0.as_flattened_mut()[p * G::Register::<V>::WIDTH..];
                let updated = deltas[p].mul_add(before, decay.mul(G::Register::<V>::read(state)));
                updated.write(state);
                memory[p] = updated.mul_add(key, memory[p]);
                read[p] = updated.mul_add(query, read[p]);
            }
        }
        [G::sums::<V>(memory), G::sums::<V>(read)]
    }
}

/// What some tokens bring to one head.
struct Block {
    /// Vectors of a key.
    width: usize,
    /// Normalised, `[tokens, width]`, as queries are.
    keys: Vec<[f32; LANES]>,
    queries: Vec<[f32; LANES]>,
    gates: [Gates; TOKENS],
}

/// What one of them brings.
#[derive(Clone, Copy)]
struct Step<'a> {
    key: &'a [[f32; LANES]],
    query: &'a [[f32; LANES]],
    gates: Gates,
}

/// `exp(g)`, `beta` and the product of key and query.
#[derive(Clone, Copy, Default)]
struct Gates {
    decay: f32,
    beta: f32,
    product: f32,
}

impl Block {
    fn new(width: usize, tokens: usize) -> Self {
        let empty = vec![[0.0; LANES]; tokens * width];
        Self { width, keys: empty.clone(), queries: empty, gates: [Gates::default(); TOKENS] }
    }

    #[inline(always)]
    fn fill<V: Lanes, T: Stored>(&mut self, inputs: &Inputs<T>, head: usize, tokens: Range<usize>) {
        let &Inputs { ref q, ref k, g, beta, hk, hv, kd, .. } = inputs;
        let of_head = |t: usize| {
            let row = t * hk + head * hk / hv;
            (&q.0[q.1.start(row)..][..kd], &k.0[k.1.start(row)..][..kd])
        };
        let rows = self.queries.chunks_exact_mut(self.width).zip(self.keys.chunks_exact_mut(self.width));
        for ((t, (query, key)), gates) in tokens.clone().zip(rows).zip(&mut self.gates) {
            if t + AHEAD < tokens.end {
                let (q, k) = of_head(t + AHEAD);
                prefetch(q);
                prefetch(k);
            }
            let (q, k) = of_head(t);
            normalise::<V, T>(q, (kd as f32).sqrt().recip(), query);
            normalise::<V, T>(k, 1.0, key);
            let mut product = V::splat(0.0);
            for (query, key) in query.iter().zip(key.iter()) {
                product = V::load(query).mul_add(V::load(key), product);
            }
            let gate = t * hv + head;
            *gates = Gates { decay: g[gate].exp(), beta: beta[gate], product: product.sum() };
        }
    }

    #[inline(always)]
    fn step(&self, i: usize) -> Step<'_> {
        let row = i * self.width..(i + 1) * self.width;
        Step { key: &self.keys[row.clone()], query: &self.queries[row], gates: self.gates[i] }
    }
}

impl Gates {
    /// From the products of rows of the state before the step: `values` become the output, `deltas` what the key is added
    /// times.
    #[inline(always)]
    fn apply<const N: usize>(self, [memory, read]: [[f32; N]; 2], values: &mut [f32; N], deltas: &mut [f32; N]) {
        for r in 0..N {
            deltas[r] = self.beta * (values[r] - self.decay * memory[r]);
            values[r] = self.decay * read[r] + self.product * deltas[r];
        }
    }
}

/// `out = x * scale / sqrt(sum(x^2) + 1e-6)`, zero past the end of `x`.
#[inline(always)]
fn normalise<V: Lanes, T: Stored>(x: &[T], scale: f32, out: &mut [[f32; LANES]]) {
    let factor = V::splat(scale / (sum_of_squares::<V, T>(x) + 1e-6).sqrt());
    for (x, out) in x.chunks(LANES).zip(out) {
        load::<V, T>(x).mul(factor).store(out);
    }
}
