//! Activations on Metal.

use candle_core::{Result, Tensor};

use super::Activation;
use crate::cpu::Operand;
use crate::metal::{self, Argument, Backend, Launch, Source, float, source};

pub(crate) static SOURCE: Source = source!("activation");

/// Of a threadgroup.
const THREADS: usize = 256;

/// `gate_up` `[N, 2 I]` in rows.
pub fn gated_activation<B: Backend>(backend: &B, gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    let width = gate_up.dim(1)? / 2;
    gated_by(backend, &gate_up.narrow(1, 0, width)?, &gate_up.narrow(1, width, width)?, activation)
}

/// `gate` and `up` in rows, of one shape.
pub fn gated_by<B: Backend>(backend: &B, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let kernel = match activation {
        Activation::Silu => "silu_gated",
        Activation::GeluTanh => "gelu_tanh_gated",
    };
    paired(backend, kernel, gate, up)
}

/// `x` and `gate` in rows, of one shape.
pub fn sigmoid_gated<B: Backend>(backend: &B, x: &Tensor, gate: &Tensor) -> Result<Tensor> {
    paired(backend, "sigmoid_gated", x, gate)
}

fn paired<B: Backend>(backend: &B, kernel: &'static str, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (dtype, width) = (a.dtype(), a.dims().last().copied().unwrap_or(1));
    let rows = a.elem_count() / width.max(1);
    let operands = [a, b].map(Operand::new);
    let [(a, a_rows), (b, b_rows)] = [operands[0].metal_rows::<B>()?, operands[1].metal_rows::<B>()?];
    metal::output(backend, operands[0].layout.shape().clone(), dtype, |y| {
        backend.launch(Launch {
            source: &SOURCE,
            kernel,
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [width.div_ceil(THREADS), rows, 1],
            threads: [THREADS, 1, 1],
            arguments: vec![
                Argument::Write(y, 0),
                a,
                b,
                Argument::Words([&a_rows.words()[..], &b_rows.words(), &[width as u32]].concat()),
            ],
        })
    })
}

/// `x` contiguous.
pub fn gelu<B: Backend>(backend: &B, x: &Tensor) -> Result<Tensor> {
    each(backend, "gelu", x, 0.0)
}

/// `x` contiguous.
pub fn softcap<B: Backend>(backend: &B, x: &Tensor, cap: f32) -> Result<Tensor> {
    each(backend, "softcap", x, cap)
}

fn each<B: Backend>(backend: &B, kernel: &'static str, x: &Tensor, parameter: f32) -> Result<Tensor> {
    let (dtype, count) = (x.dtype(), x.elem_count());
    let x = Operand::new(x);
    metal::output(backend, x.layout.shape().clone(), dtype, |y| {
        backend.launch(Launch {
            source: &SOURCE,
            kernel,
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [count.div_ceil(THREADS), 1, 1],
            threads: [THREADS, 1, 1],
            arguments: vec![
                Argument::Write(y, 0),
                x.metal::<B>()?,
                Argument::Words(vec![count as u32, parameter.to_bits()]),
            ],
        })
    })
}
