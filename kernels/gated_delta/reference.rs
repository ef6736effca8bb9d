//! The definition of the gated delta rule, token by token in f32; a second one, in chunks; that of the gates.

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

/// The rule, read from a state and written to it: `state` `[S, hv, vd, kd]`; returns `[N, hv, vd]`.
pub type Definition = fn(&Inputs, &mut [f32], &Batch) -> Vec<f32>;

/// A [`Definition`], token by token.
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

/// Tokens that [`chunked`] takes at once.
pub const CHUNK: usize = 64;

/// A [`Definition`], with products of matrices over `CHUNK` tokens. Within a chunk, with `G` the running sum of `g`
/// and `D[i, j] = exp(G[i] - G[j])` for `i >= j`, else 0:
///
/// ```text
/// A = strictly_lower(beta (k k^T) D)
/// U = (I + A)^-1 beta v          W = (I + A)^-1 beta exp(G) k
/// V = U - W S^T
/// y = exp(G) q S^T + ((q k^T) D) V
/// S = exp(G[last]) S + V^T (exp(G[last] - G) k)
/// ```
pub fn chunked(inputs: &Inputs, state: &mut [f32], batch: &Batch) -> Vec<f32> {
    let &Inputs { q, k, v, g, beta, hk, hv, kd, vd } = inputs;
    let mut out = vec![0.0; v.len()];
    for sequence in &batch.host {
        let state = &mut state[sequence.slot * hv * vd * kd..][..hv * vd * kd];
        if sequence.is_fresh() {
            state.fill(0.0);
        }
        for start in sequence.tokens.clone().step_by(CHUNK) {
            let tokens: Vec<usize> = (start..sequence.tokens.end.min(start + CHUNK)).collect();
            for h in 0..hv {
                let state = &mut state[h * vd * kd..][..vd * kd];
                let row = |t: usize| (t * hk + h * hk / hv) * kd;
                let q: Vec<_> =
                    tokens.iter().map(|&t| normalised(&q[row(t)..][..kd], (kd as f32).sqrt().recip())).collect();
                let k: Vec<_> = tokens.iter().map(|&t| normalised(&k[row(t)..][..kd], 1.0)).collect();
                let beta: Vec<f32> = tokens.iter().map(|&t| beta[t * hv + h]).collect();
                // In f64, lest the difference of two large sums lose the small gates between them.
                let sums: Vec<f64> = tokens
                    .iter()
                    .scan(0.0, |sum, &t| {
                        *sum += f64::from(g[t * hv + h]);
                        Some(*sum)
                    })
                    .collect();
                let decay = |i: usize, j: usize| (sums[i] - sums[j]).exp() as f32;
                let decay_from_start = |i: usize| sums[i].exp() as f32;
                let last = tokens.len() - 1;

                // The rows of U and W side by side, solved from the top.
                let mut solved: Vec<Vec<f32>> = Vec::new();
                for (i, &t) in tokens.iter().enumerate() {
                    let u = v[(t * hv + h) * vd..][..vd].iter().map(|v| beta[i] * v);
                    let mut right: Vec<f32> = u.chain(k[i].iter().map(|k| beta[i] * decay_from_start(i) * k)).collect();
                    for (j, solved) in solved.iter().enumerate() {
                        let a = beta[i] * dot(&k[i], &k[j]) * decay(i, j);
                        right.iter_mut().zip(solved).for_each(|(right, solved)| *right -= a * solved);
                    }
                    solved.push(right);
                }
                for c in 0..vd {
                    let s = &mut state[c * kd..][..kd];
                    let values: Vec<f32> = solved.iter().map(|row| row[c] - dot(&row[vd..], s)).collect();
                    for (i, &t) in tokens.iter().enumerate() {
                        let within: f32 = (0..=i).map(|j| dot(&q[i], &k[j]) * decay(i, j) * values[j]).sum();
                        out[(t * hv + h) * vd + c] = decay_from_start(i) * dot(&q[i], s) + within;
                    }
                    s.iter_mut().for_each(|s| *s *= decay_from_start(last));
                    for (j, value) in values.iter().enumerate() {
                        s.iter_mut().zip(&k[j]).for_each(|(s, k)| *s += decay(last, j) * value * k);
                    }
                }
            }
        }
    }
    out
}

/// `a`, `b` `[N, hv]`; `a_log`, `dt_bias` `[hv]`. Returns `g` and `beta`, in f64 until the last rounding.
pub fn gates(a: &[f32], b: &[f32], a_log: &[f32], dt_bias: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let hv = a_log.len();
    let g = a.iter().enumerate().map(|(i, &a)| {
        let x = f64::from(a) + f64::from(dt_bias[i % hv]);
        let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
        (-f64::from(a_log[i % hv]).exp() * softplus) as f32
    });
    let beta = b.iter().map(|&b| (1.0 / (1.0 + (-f64::from(b)).exp())) as f32);
    (g.collect(), beta.collect())
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn normalised(x: &[f32], scale: f32) -> Vec<f32> {
    let norm = scale / (x.iter().map(|x| x * x).sum::<f32>() + 1e-6).sqrt();
    x.iter().map(|x| x * norm).collect()
}
