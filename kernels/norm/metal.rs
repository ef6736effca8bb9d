//! The norms on Metal: chooses the threads of a row.

use candle_core::backend::BackendStorage;
use candle_core::{Layout, Result, Tensor};

use crate::cpu::Operand as Locked;
use crate::metal::{self, Argument, Backend, Launch, Rows, Source, float, source};

pub(super) static SOURCE: Source = source!("norm");
pub(super) static LAYER_SOURCE: Source = source!("layer_norm");

/// Neighbours that a thread takes at once, as in the kernel.
const TAKES: usize = 4;
const LANES: usize = 32;
/// Of a threadgroup at most, so that several share a core.
const SIMDGROUPS: usize = 8;

type Operand<'a, B> = (&'a <B as Backend>::Storage, &'a Layout);

/// `x` and `gate` `[.., D]` in rows, `weight` `[D]` contiguous.
pub fn rms_norm<B: Backend>(
    backend: &B,
    (x, xl): Operand<B>,
    gate: Option<Operand<B>>,
    (weight, wl): Operand<B>,
    eps: f32,
) -> Result<B::Storage> {
    let (dtype, d) = (x.dtype(), wl.shape().elem_count());
    let rows: usize = xl.dims()[..xl.dims().len() - 1].iter().product();
    let mut out = backend.allocate(rows * d, dtype)?;
    let x_rows = Rows::new(dtype, xl)?;
    let gate_rows = gate.map(|(_, layout)| Rows::new(dtype, layout)).transpose()?;
    let mut sizes = [x_rows.words(), gate_rows.unwrap_or(x_rows).words()].concat();
    sizes.extend([rows as u32, d as u32, eps.to_bits()]);

    let simdgroups = d.div_ceil(TAKES * LANES).clamp(1, SIMDGROUPS);
    let rows_of_threadgroup = if simdgroups == 1 { SIMDGROUPS } else { 1 };
    let mut arguments = vec![
        Argument::Read(x, x_rows.start),
        Argument::read(weight, wl)?,
        Argument::Write(&mut out, 0),
        Argument::Words(sizes),
    ];
    arguments.extend(gate.zip(gate_rows).map(|((gate, _), rows)| Argument::Read(gate, rows.start)));
    backend.launch(Launch {
        source: &SOURCE,
        kernel: "rms_norm",
        variant: float(dtype)?,
        constants: vec![gate.is_some()],
        threadgroups: [rows.div_ceil(rows_of_threadgroup), 1, 1],
        threads: [simdgroups * LANES, rows_of_threadgroup, 1],
        arguments,
    })?;
    Ok(out)
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
    let (operands, constants) = ([x, residual].map(Locked::new), constants.map(Locked::new));
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
