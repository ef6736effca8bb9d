//! Rotary position embedding on Metal.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, Result, Tensor};

use crate::cpu::Operand;
use crate::metal::{self, Argument, Backend, Launch, Rows, Source, float, source};

pub(super) static SOURCE: Source = source!("rope");

/// Of a threadgroup.
const THREADS: usize = 256;

/// `x` `[N, heads, D]` in rows; `cos` and `sin` `[N, R/2]` contiguous.
pub fn rope<B: Backend>(
    backend: &B,
    (x, xl): (&B::Storage, &Layout),
    (cos, cl): (&B::Storage, &Layout),
    (sin, sl): (&B::Storage, &Layout),
) -> Result<B::Storage> {
    let ((n, heads, d), (_, half)) = (xl.shape().dims3()?, cl.shape().dims2()?);
    let (dtype, rows) = (x.dtype(), Rows::new(x.dtype(), xl)?);
    let mut out = backend.allocate(n * heads * d, dtype)?;
    let threads = (d - half).next_power_of_two().min(THREADS);
    let rows_of_threadgroup = THREADS / threads;
    let sizes = [n * heads, d, half].map(|size| size as u32);
    backend.launch(Launch {
        source: &SOURCE,
        kernel: "rope",
        variant: float(dtype)?,
        constants: vec![],
        threadgroups: [(n * heads).div_ceil(rows_of_threadgroup), 1, 1],
        threads: [threads, rows_of_threadgroup, 1],
        arguments: vec![
            Argument::Write(&mut out, 0),
            Argument::Read(x, rows.start),
            Argument::read(cos, cl)?,
            Argument::read(sin, sl)?,
            Argument::Words([rows.words(), sizes].concat()),
        ],
    })?;
    Ok(out)
}

/// Cosines and sines as `[2, N, R/2]`, of contiguous operands.
pub fn rotations<B: Backend>(backend: &B, positions: &Tensor, inv_freq: &Tensor) -> Result<Tensor> {
    let (n, half) = (positions.dims1()?, inv_freq.dims1()?);
    let operands = [positions, inv_freq].map(Operand::new);
    metal::output(backend, (2, n, half), DType::F32, |both| {
        backend.launch(Launch {
            source: &SOURCE,
            kernel: "rotations",
            variant: "",
            constants: vec![],
            threadgroups: [(n * half).div_ceil(THREADS), 1, 1],
            threads: [THREADS, 1, 1],
            arguments: vec![
                Argument::Write(both, 0),
                operands[0].metal::<B>()?,
                operands[1].metal::<B>()?,
                Argument::Words(vec![n as u32, half as u32]),
            ],
        })
    })
}
