//! The definition of the gated delta rule, token by token in f32.

use crate::Batch;

/// Operands and sizes: `q`, `k` `[N, hk, kd]`; `v` `[N, hv, vd]`; `g`, `beta` `[N, hv]`.
pub struct Inputs<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub g: &'a [f32],
    pub beta: &'a [f32],
    pub hk: usize,
    pub hv: usize,
    pub kd: usize,
    pub vd: usize,
}

/// `state` `[S, hv, vd, kd]`; returns `[N, hv, vd]`.
pub fn recurrent(inputs: &Inputs, state: &mut [f32], batch: &Batch) -> Vec<f32> {
    let &Inputs { q, k, v, g, beta, hk, hv, kd, vd } = inputs;
    let mut out = vec![0.0; v.len()];
    for sequence in &batch.host {
        let state = &mut state[sequence.slot * hv * vd * kd..][..hv * vd * kd];
        if sequence.is_fresh() {
            state.fill(0.0);
        }
        for t in sequence.tokens.clone() {
            for h in 0..hv {
                let row = (t * hk + h * hk / hv) * kd;
                let q = normalised(&q[row..][..kd], (kd as f32).sqrt().recip());
                let k = normalised(&k[row..][..kd], 1.0);
                let decay = g[t * hv + h].exp();
                for i in 0..vd {
                    let s = &mut state[(h * vd + i) * kd..][..kd];
                    s.iter_mut().for_each(|s| *s *= decay);
                    let memory: f32 = s.iter().zip(&k).map(|(s, k)| s * k).sum();
                    let delta = beta[t * hv + h] * (v[(t * hv + h) * vd + i] - memory);
                    s.iter_mut().zip(&k).for_each(|(s, k)| *s += delta * k);
                    out[(t * hv + h) * vd + i] = s.iter().zip(&q).map(|(s, q)| s * q).sum();
                }
            }
        }
    }
    out
}

fn normalised(x: &[f32], scale: f32) -> Vec<f32> {
    let norm = scale / (x.iter().map(|x| x * x).sum::<f32>() + 1e-6).sqrt();
    x.iter().map(|x| x * norm).collect()
}
