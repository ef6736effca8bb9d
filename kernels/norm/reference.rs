//! The definition of the norms, row by row in f32.

/// `x` `[rows, D]`, `weight` `[D]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let scale = inverse_rms(row, eps);
        out.extend(row.iter().zip(weight).map(|(x, w)| x * scale * w));
    }
    out
}

/// `x`, `gate` `[rows, D]`, `weight` `[D]`.
pub fn rms_norm_gated(x: &[f32], gate: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = rms_norm(x, weight, eps);
    for (out, gate) in out.iter_mut().zip(gate) {
        *out *= gate / (1.0 + (-gate).exp());
    }
    out
}

/// `x`, `residual` `[rows, D]`, `weight`, `bias` `[D]`.
pub fn add_layer_norm(x: &[f32], residual: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    let sum: Vec<f32> = x.iter().zip(residual).map(|(x, residual)| x + residual).collect();
    let mut out = Vec::with_capacity(x.len());
    for row in sum.chunks_exact(weight.len()) {
        let mean = row.iter().sum::<f32>() / row.len() as f32;
        let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / row.len() as f32;
        let scale = 1.0 / (variance + eps).sqrt();
        out.extend(row.iter().zip(weight.iter().zip(bias)).map(|(x, (w, b))| (x - mean) * scale * w + b));
    }
    out
}

fn inverse_rms(row: &[f32], eps: f32) -> f32 {
    let mean = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
    1.0 / (mean + eps).sqrt()
}
