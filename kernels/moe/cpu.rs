//! Routing and experts on the CPU: experts side by side on the threads, each of them a product over its tokens' rows.

use candle_core::Layout;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::activation::Activation;
use crate::activation::cpu::gated_activation;
use crate::cpu::fill_rows;
use crate::linear;
use crate::quantized::cpu::Before;
use crate::quantized::{self, QuantizedMatrix};
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, load, store};

/// `logits` `[N, num_experts]`; returns experts and weights, `[N, k]`.
pub fn route<T: Stored>(logits: &[T], num_experts: usize, k: usize) -> (Vec<u32>, Vec<T>) {
    let n = logits.len() / num_experts;
    let (mut experts, mut weights) = (vec![0; n * k], vec![T::round(0.0); n * k]);
    experts
        .par_chunks_mut(ROWS * k)
        .zip(weights.par_chunks_mut(ROWS * k))
        .zip(logits.par_chunks(ROWS * num_experts))
        .for_each(|((experts, weights), logits)| {
            let mut p = vec![0.0; num_experts];
            let rows = experts.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k));
            for ((experts, weights), logits) in rows.zip(logits.chunks_exact(num_experts)) {
                softmax(logits, &mut p);
                greatest(&p, experts);
                let sum: f32 = experts.iter().map(|&e| p[e as usize]).sum();
                for (weight, &e) in weights.iter_mut().zip(&*experts) {
                    *weight = T::round(p[e as usize] / sum);
                }
            }
        });
    (experts, weights)
}

/// Rows of a task.
const ROWS: usize = 64;

fn softmax<T: Stored>(logits: &[T], p: &mut [f32]) {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |largest, logit| largest.max(logit.widen()));
    p.iter_mut().zip(logits).for_each(|(p, logit)| *p = (logit.widen() - largest).exp());
    let sum: f32 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= sum);
}

/// The indices of the greatest of `p`, of equal ones the lower first.
fn greatest(p: &[f32], chosen: &mut [u32]) {
    let mut len = 0;
    for (e, value) in p.iter().enumerate() {
        let place = chosen[..len].iter().rposition(|&other| p[other as usize] >= *value).map_or(0, |last| last + 1);
        if len < chosen.len() {
            len += 1;
        }
        if place < len {
            chosen[place..len].rotate_right(1);
            chosen[place] = e as u32;
        }
    }
}

pub struct Experts<'a> {
    /// Matrices `[2 * intermediate, hidden]`.
    pub gate_up: Stack<'a>,
    /// Matrices `[hidden, intermediate]`.
    pub down: Stack<'a>,
    pub num_experts: usize,
    pub hidden: usize,
    pub intermediate: usize,
}

/// The matrices of all experts, one after the other.
pub enum Stack<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    Packed(&'a [QuantizedMatrix]),
}

/// `x` `[N, hidden]`, `ids`, each below the number of experts, and `weights` `[N, k]`; returns `[N, hidden]`.
pub fn sparse_mlp<X: Stored>(x: &[X], ids: &[u32], weights: &[f32], experts: &Experts) -> Vec<X> {
    let hidden = experts.hidden;
    if ids.is_empty() || x.is_empty() {
        return vec![X::round(0.0); x.len()];
    }
    let k = ids.len() * hidden / x.len();
    let groups = groups(ids, experts.num_experts);
    let products_of_row = 3 * hidden * experts.intermediate;
    let results: Vec<Vec<X>> = groups
        .par_iter()
        .with_min_len(MIN_TASK / products_of_row.max(1) + 1)
        .map(|(expert, places)| {
            let rows = places.iter().flat_map(|place| &x[place / k * hidden..][..hidden]);
            experts.mlp(*expert, &rows.copied().collect::<Vec<X>>())
        })
        .collect();
    // Experts come in ascending order, and so do the terms of each token.
    let mut terms: Vec<(f32, &[X])> = vec![(0.0, &[]); ids.len()];
    let mut found = vec![0; x.len() / hidden];
    for ((_, places), result) in groups.iter().zip(&results) {
        for (place, row) in places.iter().zip(result.chunks_exact(hidden)) {
            let token = place / k;
            terms[token * k + found[token]] = (weights[*place], row);
            found[token] += 1;
        }
    }
    fill_rows(x.len(), hidden, |first, out| {
        for (terms, out) in terms[first * k..].chunks_exact(k).zip(out.chunks_exact_mut(hidden)) {
            dispatch(Row { terms, out });
        }
    })
}

/// Products of which a thread should have at least so many, or waking it costs more than it does.
const MIN_TASK: usize = 1 << 16;

/// The experts that have tokens, ascending, each with its places in `ids`.
fn groups(ids: &[u32], num_experts: usize) -> Vec<(usize, Vec<usize>)> {
    let mut places = vec![vec![]; num_experts];
    ids.iter().enumerate().for_each(|(place, &id)| places[id as usize].push(place));
    places.into_iter().enumerate().filter(|(_, places)| !places.is_empty()).collect()
}

impl Experts<'_> {
    /// `x` `[rows, hidden]`; returns `[rows, hidden]`.
    fn mlp<X: Stored>(&self, expert: usize, x: &[X]) -> Vec<X> {
        let &Self { hidden, intermediate, .. } = self;
        let gate_up = self.gate_up.product(expert, x, (hidden, 2 * intermediate));
        if let Stack::Packed(down) = &self.down {
            return quantized::cpu::linear(&gate_up, Before::Gate(Activation::Silu), &down[expert], None);
        }
        let layout = Layout::contiguous((x.len() / hidden, 2 * intermediate));
        let activated = gated_activation(&gate_up, &layout, Activation::Silu).expect("rows of even width");
        self.down.product(expert, &activated, (intermediate, hidden))
    }
}

impl Stack<'_> {
    /// `x` `[rows, inner]`; returns `[rows, outer]`.
    fn product<X: Stored>(&self, expert: usize, x: &[X], (inner, outer): (usize, usize)) -> Vec<X> {
        fn dense<X: Stored, W: Stored>(x: &[X], weights: &[W], expert: usize, shape: (usize, usize, usize)) -> Vec<X> {
            let size = shape.1 * shape.2;
            linear::cpu::linear(x, &weights[expert * size..][..size], None, shape)
        }
        let shape = (x.len() / inner, inner, outer);
        match self {
            Self::F32(weights) => dense(x, weights, expert, shape),
            Self::F16(weights) => dense(x, weights, expert, shape),
            Self::BF16(weights) => dense(x, weights, expert, shape),
            Self::Packed(matrices) => quantized::cpu::linear(x, Before::Nothing, &matrices[expert], None),
        }
    }
}

/// One token's sum.
struct Row<'a, X> {
    terms: &'a [(f32, &'a [X])],
    out: &'a mut [X],
}

impl<X: Stored> Kernel for Row<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        for (i, out) in self.out.chunks_mut(LANES).enumerate() {
            let mut sum = V::splat(0.0);
            for (weight, row) in self.terms {
                let row: V = load(&row[i * LANES..][..out.len()]);
                sum = sum.add(row.mul(V::splat(*weight)));
            }
            store(sum, out);
        }
    }
}
