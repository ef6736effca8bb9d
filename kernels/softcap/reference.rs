//! The definition of the softcap, in f32.

pub fn softcap(x: &[f32], cap: f32) -> Vec<f32> {
    x.iter().map(|x| cap * (x / cap).tanh()).collect()
}
