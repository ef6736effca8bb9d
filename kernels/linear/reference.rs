//! The definition of the product, in f32.

/// `x` `[N, inner]`, `weight` `[outer, inner]`; returns `[N, outer]`.
pub fn linear(x: &[f32], weight: &[f32], inner: usize, outer: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len() / inner * outer);
    for row in x.chunks_exact(inner) {
        out.extend(weight.chunks_exact(inner).map(|w| row.iter().zip(w).map(|(x, w)| x * w).sum::<f32>()));
    }
    out
}
