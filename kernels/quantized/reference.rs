//! The definition, in f64 over unpacked weights.

/// `x` `[N, I]`, `weight` `[O, I]`; returns `[N, O]`.
pub fn linear(x: &[f32], weight: &[f32], inner: usize, outer: usize) -> Vec<f32> {
    let rounded: Vec<f64> = x.chunks(inner).flat_map(|row| row.chunks(64).flat_map(round)).collect();
    let product =
        |x: &[f64], o: usize| x.iter().zip(&weight[o * inner..]).map(|(x, &w)| x * f64::from(w)).sum::<f64>() as f32;
    rounded.chunks(inner).flat_map(|x| (0..outer).map(move |o| product(x, o))).collect()
}

/// A group of activations rounded to 8 bits.
fn round(group: &[f32]) -> Vec<f64> {
    let scale = group.iter().fold(0f32, |largest, x| largest.max(x.abs())) / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
    group.iter().map(|x| f64::from((x * inverse).round_ties_even()) * f64::from(scale)).collect()
}
