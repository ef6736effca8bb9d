//! The definition of the activations: gated ones in f32, the error function in f64.

use super::Activation;

/// `gate_up` `[N, 2 * width]`.
pub fn gated_activation(gate_up: &[f32], width: usize, activation: Activation) -> Vec<f32> {
    let mut out = Vec::with_capacity(gate_up.len() / 2);
    for row in gate_up.chunks_exact(2 * width) {
        let (gate, up) = row.split_at(width);
        out.extend(gate.iter().zip(up).map(|(&gate, up)| activate(gate, activation) * up));
    }
    out
}

fn activate(x: f32, activation: Activation) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = std::f32::consts::FRAC_2_PI.sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
    }
}

/// `x` and `gate` of one shape.
pub fn sigmoid_gated(x: &[f32], gate: &[f32]) -> Vec<f32> {
    x.iter().zip(gate).map(|(&x, &gate)| x / (1.0 + (-gate).exp())).collect()
}

/// `x` of any shape.
pub fn gelu(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| (0.5 * f64::from(x) * (1.0 + erf(f64::from(x) / std::f64::consts::SQRT_2))) as f32).collect()
}

/// The integral `2 / sqrt(pi) * exp(-t^2)` from 0 to `x`: its Taylor series near zero, and further out the continued
/// fraction of what is missing to one.
fn erf(x: f64) -> f64 {
    let z = x.abs();
    let value = if z < 3.0 {
        let mut term = z;
        let mut sum = z;
        for n in 1..120 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let mut fraction = z;
        for n in (1..80).rev() {
            fraction = z + f64::from(n) / 2.0 / fraction;
        }
        1.0 - (-z * z).exp() / fraction / std::f64::consts::PI.sqrt()
    };
    value.copysign(x)
}
