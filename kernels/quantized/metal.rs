//! Packed weights on Metal.

use candle_core::{DType, Result, Tensor, bail};

use super::{Quantization, QuantizedMatrix};
use crate::cpu::{Operand, as_rows};
use crate::linear::metal::{Routed, Sizes, many};
use crate::metal::{self, Argument, Backend, Launch, Rows, Source, float, source};

pub(super) static SOURCE: Source = source!("quantized", "../products.h");

const LANES: usize = 32;
/// Of a threadgroup, as in the kernel.
const SIMDGROUPS: usize = 8;
/// Outputs of a threadgroup.
const PANEL: usize = 32;
/// Rows that share one pass over the weights, at most.
const MAX_ROWS: usize = 8;
/// Of the threadgroup that looks up rows.
const THREADS: usize = 128;

fn words(weight: &QuantizedMatrix) -> Result<&Tensor> {
    match weight.on_device() {
        Some(words) => Ok(words),
        None => bail!("quantized: the weight is on the cpu, x is not"),
    }
}

pub fn linear<B: Backend>(backend: &B, x: &Tensor, weight: &QuantizedMatrix) -> Result<Tensor> {
    let ((n, inner), dtype) = (x.dims2()?, x.dtype());
    let outer = weight.outer;
    let x = as_rows(x)?;
    let (x, words) = (Operand::new(&x), Operand::new(words(weight)?));
    metal::output(backend, (n, outer), dtype, |y| {
        let (x, words) = (x.metal_rows::<B>()?, words.metal::<B>()?);
        if n > MAX_ROWS {
            return many(backend, x, (words, product(weight.format())), [n, inner, outer], None, (y, dtype));
        }
        few(backend, x, (words, weight.format()), [n, inner, outer], None, (y, dtype))
    })
}

/// The kernel of many rows.
pub(crate) fn product(format: Quantization) -> &'static str {
    match format {
        Quantization::Q8 => "product_q8",
        Quantization::Q4 => "product_q4",
    }
}

/// Products of few rows, or of rows with an expert each.
pub(crate) fn few<B: Backend>(
    backend: &B,
    (x, x_rows): (Argument<B::Storage>, Rows),
    (words, format): (Argument<B::Storage>, Quantization),
    [rows, inner, outer]: Sizes,
    routed: Option<Routed<B::Storage>>,
    (y, dtype): (&mut B::Storage, DType),
) -> Result<()> {
    let is_routed = routed.is_some();
    let (matrices, divisor) = routed.as_ref().map_or((1, 1), |routed| (routed.matrices, routed.divisor));
    let shared = if rows == 1 || is_routed { 1 } else { MAX_ROWS };
    let kernel = match (format, shared) {
        (Quantization::Q8, 1) => "quantized_q8_1",
        (Quantization::Q8, _) => "quantized_q8_8",
        (Quantization::Q4, 1) => "quantized_q4_1",
        (Quantization::Q4, _) => "quantized_q4_8",
    };
    let mut sizes = x_rows.words().to_vec();
    sizes.extend([rows, inner, outer, matrices, divisor].map(|size| size as u32));
    let experts = routed.map_or(Argument::Absent, |routed| {
        let [experts, _] = routed.by;
        experts
    });
    backend.launch(Launch {
        source: &SOURCE,
        kernel,
        variant: float(dtype)?,
        constants: vec![is_routed],
        threadgroups: [outer.div_ceil(PANEL), rows.div_ceil(shared), 1],
        threads: [SIMDGROUPS * LANES, 1, 1],
        arguments: vec![Argument::Write(y, 0), x, words, Argument::Words(sizes), experts],
    })
}

/// The rows `ids` `[N]`, as `[N, inner]` in f32; NaN for one that is not there.
pub fn rows<B: Backend>(backend: &B, weight: &QuantizedMatrix, ids: &Tensor) -> Result<Tensor> {
    let (n, [outer, inner]) = (ids.dims1()?, weight.dims());
    let kernel = match weight.format() {
        Quantization::Q8 => "look_up_q8",
        Quantization::Q4 => "look_up_q4",
    };
    let operands = [words(weight)?, ids].map(Operand::new);
    metal::output(backend, (n, inner), DType::F32, |y| {
        backend.launch(Launch {
            source: &SOURCE,
            kernel,
            variant: "",
            constants: vec![false],
            threadgroups: [inner.div_ceil(4 * THREADS), n, 1],
            threads: [THREADS, 1, 1],
            arguments: vec![
                Argument::Write(y, 0),
                operands[0].metal::<B>()?,
                operands[1].metal::<B>()?,
                Argument::Words([inner, outer].map(|size| size as u32).to_vec()),
            ],
        })
    })
}
