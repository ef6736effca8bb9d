//! The most likely token on Metal, in two launches.

use candle_core::{DType, Result, Tensor};

use crate::cpu::Operand;
use crate::metal::{self, Argument, Backend, Launch, Source, float, source};

pub(super) static SOURCE: Source = source!("argmax");

const LANES: usize = 32;
/// Of a threadgroup.
const THREADS: usize = 256;
/// Of a row at most.
const MAX_THREADGROUPS: usize = 64;

/// `x` `[n, V]` contiguous.
pub fn argmax<B: Backend>(backend: &B, x: &Tensor, limit: usize) -> Result<Tensor> {
    let ((n, width), dtype) = (x.dims2()?, x.dtype());
    let threadgroups = limit.div_ceil(8 * THREADS).clamp(1, MAX_THREADGROUPS);
    let x = Operand::new(x);
    // Keys of 64 bits, as pairs.
    let keys = metal::output(backend, (n, threadgroups, 2), DType::U32, |keys| {
        backend.launch(Launch {
            source: &SOURCE,
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
            source: &SOURCE,
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
