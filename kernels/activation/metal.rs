//! Activations on Metal.

use candle_core::backend::BackendStorage;
use candle_core::{Layout, Result, Tensor};

use super::Activation;
use crate::cpu::Operand;
use crate::metal::{self, Argument, Backend, Launch, Rows, Source, float, source};

pub(crate) static SOURCE: Source = source!("activation");

/// Of a threadgroup.
const THREADS: usize = 256;

/// `gate_up` `[N, 2 I]` in rows.
pub fn gated_activation<B: Backend>(
    backend: &B,
    gate_up: &B::Storage,
    layout: &Layout,
    activation: Activation,
) -> Result<B::Storage> {
    let (n, width) = layout.shape().dims2()?;
    let (dtype, width) = (gate_up.dtype(), width / 2);
    let rows = Rows::new(dtype, layout)?;
    let mut out = backend.allocate(n * width, dtype)?;
    backend.launch(Launch {
        source: &SOURCE,
        kernel: "gated_activation",
        variant: float(dtype)?,
        constants: vec![activation == Activation::GeluTanh],
        threadgroups: [width.div_ceil(THREADS), n, 1],
        threads: [THREADS, 1, 1],
        arguments: vec![
            Argument::Write(&mut out, 0),
            Argument::Read(gate_up, rows.start),
            Argument::Words([&rows.words()[..], &[width as u32]].concat()),
        ],
    })?;
    Ok(out)
}

/// `x` and `gate` in rows, of one shape.
pub fn sigmoid_gated<B: Backend>(backend: &B, x: &Tensor, gate: &Tensor) -> Result<Tensor> {
    let (dtype, width) = (x.dtype(), x.dims().last().copied().unwrap_or(1));
    let rows = x.elem_count() / width.max(1);
    let operands = [x, gate].map(Operand::new);
    let [(x, x_rows), (gate, gate_rows)] = [operands[0].metal_rows::<B>()?, operands[1].metal_rows::<B>()?];
    metal::output(backend, operands[0].layout.shape().clone(), dtype, |y| {
        backend.launch(Launch {
            source: &SOURCE,
            kernel: "sigmoid_gated",
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [width.div_ceil(THREADS), rows, 1],
            threads: [THREADS, 1, 1],
            arguments: vec![
                Argument::Write(y, 0),
                x,
                gate,
                Argument::Words([&x_rows.words()[..], &gate_rows.words(), &[width as u32]].concat()),
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
