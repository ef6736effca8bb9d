//! The norms on Metal: chooses the threads of a row.

use candle_core::{Result, Tensor};

use super::Then;
use crate::cpu::{Operand, with_heads};
use crate::metal::{self, Argument, Backend, Launch, Source, float, source};

pub(super) static SOURCE: Source = source!("norm");
pub(super) static LAYER_SOURCE: Source = source!("layer_norm");

/// Neighbours that a thread takes at once, as in the kernel.
const TAKES: usize = 4;
const LANES: usize = 32;
/// Of a threadgroup at most, so that several share a core.
const SIMDGROUPS: usize = 8;

/// `x` `[.., D]` in rows, `weight` `[D]` contiguous.
pub fn rms_norm<B: Backend>(backend: &B, x: &Tensor, weight: &Tensor, eps: f32, then: Then) -> Result<Tensor> {
    let (shape, dtype, d) = (x.shape(), x.dtype(), weight.elem_count());
    let rows = shape.elem_count() / d.max(1);
    let (other, is_gated, factor) = match then {
        Then::Nothing => (None, false, 1.0),
        Then::Gate(gate) => (Some(Operand::new(gate)), true, 1.0),
        Then::Add(to, factor) => (Some(Operand::new(to)), false, factor),
    };
    let other_layout = other.as_ref().map(|other| with_heads(other.layout, shape));
    let other = other.zip(other_layout.as_ref()).map(|(other, layout)| Operand { layout, ..other });
    let (x, weight) = (Operand::new(x), Operand::new(weight));
    let (x, x_rows) = x.metal_rows::<B>()?;
    let (other, other_rows) = other.as_ref().map(Operand::metal_rows::<B>).transpose()?.unzip();
    let mut sizes = [x_rows.words(), other_rows.unwrap_or(x_rows).words()].concat();
    sizes.extend([rows as u32, d as u32, eps.to_bits(), factor.to_bits()]);

    let simdgroups = d.div_ceil(TAKES * LANES).clamp(1, SIMDGROUPS);
    let rows_of_threadgroup = if simdgroups == 1 { SIMDGROUPS } else { 1 };
    let constants = vec![other.is_some(), is_gated];
    metal::output(backend, shape, dtype, |y| {
        let mut arguments = vec![Argument::Write(y, 0), x, weight.metal::<B>()?, Argument::Words(sizes)];
        arguments.extend(other);
        backend.launch(Launch {
            source: &SOURCE,
            kernel: "rms_norm",
            variant: float(dtype)?,
            constants,
            threadgroups: [rows.div_ceil(rows_of_threadgroup), 1, 1],
            threads: [simdgroups * LANES, rows_of_threadgroup, 1],
            arguments,
        })
    })
}

/// `x` and `residual` `[.., D]` in rows; `weight` and `bias` `[D]` contiguous.
pub fn add_layer_norm<B: Backend>(
    backend: &B,
    [x, residual]: [&Tensor; 2],
    constants: [&Tensor; 2],
    eps: f32,
) -> Result<Tensor> {
    let (dtype, d) = (x.dtype(), constants[0].elem_count());
    let rows = x.elem_count() / d.max(1);
    let (operands, constants) = ([x, residual].map(Operand::new), constants.map(Operand::new));
    let [(x, x_rows), (residual, residual_rows)] = [operands[0].metal_rows::<B>()?, operands[1].metal_rows::<B>()?];
    metal::output(backend, operands[0].layout.shape().clone(), dtype, |y| {
        backend.launch(Launch {
            source: &LAYER_SOURCE,
            kernel: "add_layer_norm",
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [rows, 1, 1],
            threads: [d.div_ceil(TAKES * LANES).clamp(1, SIMDGROUPS) * LANES, 1, 1],
            arguments: vec![
                Argument::Write(y, 0),
                x,
                residual,
                constants[0].metal::<B>()?,
                constants[1].metal::<B>()?,
                Argument::Words([&x_rows.words()[..], &residual_rows.words(), &[d as u32, eps.to_bits()]].concat()),
            ],
        })
    })
}
