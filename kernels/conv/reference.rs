//! The definition of the convolution, token by token in f32.

use crate::Batch;

/// `x` `[N, channels]`, `weight` `[channels, width]`, `state` `[S, channels, width - 1]`.
pub fn causal_conv1d(
    x: &[f32],
    weight: &[f32],
    state: &mut [f32],
    batch: &Batch,
    channels: usize,
    width: usize,
) -> Vec<f32> {
    let past = width - 1;
    let mut out = vec![0.0; x.len()];
    for sequence in &batch.host {
        let state = &mut state[sequence.slot * channels * past..][..channels * past];
        if sequence.is_fresh() {
            state.fill(0.0);
        }
        for t in sequence.tokens.clone() {
            for c in 0..channels {
                let (window, weight) = (&mut state[c * past..][..past], &weight[c * width..][..width]);
                let new = x[t * channels + c];
                let sum = window.iter().zip(weight).map(|(x, w)| x * w).sum::<f32>() + new * weight[past];
                out[t * channels + c] = sum / (1.0 + (-sum).exp());
                window.rotate_left(1);
                window[past - 1] = new;
            }
        }
    }
    out
}
