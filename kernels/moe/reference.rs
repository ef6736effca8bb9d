//! The definition in f32, token by token.

/// `logits` `[N, num_experts]`; returns experts and weights, `[N, k]`.
pub fn route(logits: &[f32], num_experts: usize, k: usize) -> (Vec<u32>, Vec<f32>) {
    let (mut experts, mut weights) = (vec![], vec![]);
    for logits in logits.chunks_exact(num_experts) {
        let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let exponents: Vec<f32> = logits.iter().map(|logit| (logit - largest).exp()).collect();
        let sum: f32 = exponents.iter().sum();
        let p: Vec<f32> = exponents.iter().map(|e| e / sum).collect();
        let mut order: Vec<usize> = (0..num_experts).collect();
        // A stable sort: of equals the lower index stays first.
        order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
        let sum: f32 = order[..k].iter().map(|&e| p[e]).sum();
        for &e in &order[..k] {
            experts.push(e as u32);
            weights.push(p[e] / sum);
        }
    }
    (experts, weights)
}

/// One layer's experts: `gate_up` `[E, 2 * intermediate, hidden]`, `down` `[E, hidden, intermediate]`.
pub struct Experts<'a> {
    pub gate_up: &'a [f32],
    pub down: &'a [f32],
    pub hidden: usize,
    pub intermediate: usize,
    /// To the dtype of `x`, after every product.
    pub round: fn(f32) -> f32,
}

/// `x` `[N, hidden]`, `experts` and `weights` `[N, k]`; returns `[N, hidden]`.
pub fn sparse_mlp(x: &[f32], ids: &[u32], weights: &[f32], experts: &Experts) -> Vec<f32> {
    let &Experts { gate_up, down, hidden, intermediate, round } = experts;
    let dot = |a: &[f32], b: &[f32]| round(a.iter().zip(b).map(|(a, b)| a * b).sum());
    let n = x.len() / hidden;
    let k = ids.len() / n;
    let mut out = vec![0.0; n * hidden];
    for (token, out) in out.chunks_exact_mut(hidden).enumerate() {
        let x = &x[token * hidden..][..hidden];
        for j in token * k..(token + 1) * k {
            let e = ids[j] as usize;
            let rows = |row: usize| &gate_up[(e * 2 * intermediate + row) * hidden..][..hidden];
            let activated: Vec<f32> = (0..intermediate)
                .map(|i| {
                    let gate = dot(rows(i), x);
                    round(gate / (1.0 + (-gate).exp()) * dot(rows(intermediate + i), x))
                })
                .collect();
            for (i, out) in out.iter_mut().enumerate() {
                *out += weights[j] * dot(&down[(e * hidden + i) * intermediate..][..intermediate], &activated);
            }
        }
    }
    out
}
