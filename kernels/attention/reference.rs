//! The definition of attention, query by query in f32.

use super::AttentionParams;
use crate::Batch;
use crate::cpu::Element;

/// Query heads, key heads, head size.
#[derive(Clone, Copy)]
pub struct Heads {
    pub hq: usize,
    pub hk: usize,
    pub d: usize,
}

/// `q` `[N, hq, d]`; `row(sequence, position)` is where that position's `[hk, d]` keys and values begin.
pub fn attention<T: Element>(
    q: &[f32],
    keys: &[T],
    values: &[T],
    row: impl Fn(usize, usize) -> usize,
    heads: Heads,
    batch: &Batch,
    params: AttentionParams,
) -> Vec<f32> {
    let Heads { hq, hk, d } = heads;
    let mut out = vec![0.0; q.len()];
    for (index, sequence) in batch.host.iter().enumerate() {
        for t in sequence.tokens.clone() {
            let position = sequence.position(t);
            let seen = params.visible(position, sequence.context_len);
            for h in 0..hq {
                let q = &q[(t * hq + h) * d..][..d];
                let head = (h / (hq / hk)) * d;
                let mut scores: Vec<f32> = seen
                    .clone()
                    .map(|p| {
                        let k = &keys[row(index, p) + head..][..d];
                        let dot: f32 = q.iter().zip(k).map(|(q, k)| q * k.widen()).sum();
                        params.softcap.map_or(dot * params.scale, |c| c * (dot * params.scale / c).tanh())
                    })
                    .collect();
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores.iter_mut().for_each(|s| *s = (*s - max).exp());
                let sum: f32 = scores.iter().sum();
                let out = &mut out[(t * hq + h) * d..][..d];
                for (p, score) in seen.clone().zip(&scores) {
                    let v = &values[row(index, p) + head..][..d];
                    out.iter_mut().zip(v).for_each(|(o, v)| *o += score / sum * v.widen());
                }
            }
        }
    }
    out
}
