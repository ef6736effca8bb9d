//! The choice of tokens on Metal, in two launches each.

use candle_core::{DType, Result, Tensor};

use super::MAX_K;
use crate::cpu::Operand;
use crate::metal::{self, Argument, Backend, Launch, Source, float, source};

pub(super) static ARGMAX: Source = source!("argmax", "key.h");
pub(super) static SAMPLING: Source = source!("sampling", "key.h");

const LANES: usize = 32;
/// Of a threadgroup.
const THREADS: usize = 256;
/// Of a row of [`argmax`] at most.
const MAX_THREADGROUPS: usize = 64;

/// In a threadgroup of [`sample`], as in the kernels.
const SIMDGROUPS: usize = 8;
/// Of a row of [`sample`] at most.
const MAX_SORTING_THREADGROUPS: usize = 16;

/// `x` `[n, V]` contiguous.
pub fn argmax<B: Backend>(backend: &B, x: &Tensor, limit: usize) -> Result<Tensor> {
    let ((n, width), dtype) = (x.dims2()?, x.dtype());
    let threadgroups = limit.div_ceil(8 * THREADS).clamp(1, MAX_THREADGROUPS);
    let x = Operand::new(x);
    // Keys of 64 bits, as pairs.
    let keys = metal::output(backend, (n, threadgroups, 2), DType::U32, |keys| {
        backend.launch(Launch {
            source: &ARGMAX,
            kernel: "argmax",
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [threadgroups, n, 1],
            threads: [THREADS, 1, 1],
            arguments: vec![
                Argument::Write(keys, 0),
                x.metal::<B>()?,
                Argument::Words([width, limit, threadgroups].map(|size| size as u32).to_vec()),
            ],
        })
    })?;
    metal::output(backend, n, DType::U32, |indices| {
        let keys = Operand::new(&keys);
        backend.launch(Launch {
            source: &ARGMAX,
            kernel: "argmax_of_threadgroups",
            variant: "",
            constants: vec![],
            threadgroups: [n, 1, 1],
            threads: [LANES, 1, 1],
            arguments: vec![
                Argument::Write(indices, 0),
                keys.metal::<B>()?,
                Argument::Words(vec![threadgroups as u32]),
            ],
        })
    })
}

/// `x` `[n, V]` contiguous, `draws` the words of `n` of them.
pub fn sample<B: Backend>(backend: &B, x: &Tensor, limit: usize, draws: &Tensor) -> Result<Tensor> {
    let ((n, width), dtype) = (x.dims2()?, x.dtype());
    let threadgroups = limit.div_ceil(SIMDGROUPS * MAX_K).min(MAX_SORTING_THREADGROUPS);
    let runs = threadgroups * SIMDGROUPS;
    let (x, draws) = (Operand::new(x), Operand::new(draws));
    // Keys of 64 bits, as pairs.
    let keys = metal::output(backend, (n, runs * MAX_K, 2), DType::U32, |keys| {
        backend.launch(Launch {
            source: &SAMPLING,
            kernel: "best_of_simdgroups",
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [threadgroups, n, 1],
            threads: [SIMDGROUPS * LANES, 1, 1],
            arguments: vec![
                Argument::Write(keys, 0),
                x.metal::<B>()?,
                Argument::Words([width, limit, runs].map(|size| size as u32).to_vec()),
            ],
        })
    })?;
    metal::output(backend, n, DType::U32, |indices| {
        let keys = Operand::new(&keys);
        backend.launch(Launch {
            source: &SAMPLING,
            kernel: "draw_of_best",
            variant: "",
            constants: vec![],
            threadgroups: [n, 1, 1],
            threads: [SIMDGROUPS * LANES, 1, 1],
            arguments: vec![
                Argument::Write(indices, 0),
                keys.metal::<B>()?,
                draws.metal::<B>()?,
                Argument::Words(vec![runs as u32]),
            ],
        })
    })
}
