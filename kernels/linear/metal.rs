//! Products on Metal: of few rows with what surrounds them, and of many with weights that are unpacked or gathered by
//! expert on the way.

use candle_core::{DType, Result, Tensor};

use super::Around;
use crate::activation::Activation;
use crate::cpu::{Operand, as_rows};
use crate::metal::{self, Argument, Backend, Launch, Rows, Source, float, source};

pub(super) static SOURCE: Source = source!("linear", "../products.h");
pub(crate) static PRODUCTS: Source = source!("products", "../products.h");

const LANES: usize = 32;
/// Of a threadgroup that has few rows: its threads, and outputs.
const THREADS: usize = 128;
const OUTPUTS: usize = 16;
/// Rows that share one pass over the weights, at most.
const MAX_ROWS: usize = 8;
/// Rows and outputs of a threadgroup that has many rows.
pub(crate) const TILE_ROWS: usize = 32;
const TILE_OUTPUTS: usize = 64;

/// Rows, inner dimension, outputs.
pub(crate) type Sizes = [usize; 3];

/// How rows go to the matrices of experts.
pub(crate) struct Routed<'a, S> {
    pub matrices: usize,
    /// Rows that share a row of `x`.
    pub divisor: usize,
    /// The expert of each row, for few; or the rows by expert, for many.
    pub by: [Argument<'a, S>; 2],
}

fn words<S>(x: Rows, sizes: Sizes, routed: Option<&Routed<S>>) -> Vec<u32> {
    let mut words = x.words().to_vec();
    words.extend(sizes.map(|size| size as u32));
    words.extend(routed.map_or([1, 1], |routed| [routed.matrices, routed.divisor]).map(|size| size as u32));
    words
}

/// As the public function; `None` for what candle's product does as well: more rows, or mixed dtypes.
pub fn linear<B: Backend>(
    backend: &B,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    around: Around,
) -> Result<Option<Tensor>> {
    let ((n, inner), (outer, _), dtype) = (x.dims2()?, weight.dims2()?, x.dtype());
    let gated = usize::from(around.gate.is_some());
    let outer = outer >> gated;
    let takes = |x: &Tensor| x.dtype() == dtype && x.dims() == [n, outer];
    if n > MAX_ROWS
        || weight.dtype() != dtype
        || weight.dim(0)? != outer << gated
        || (bias.is_some() && gated == 1)
        || !around.onto.is_none_or(takes)
    {
        return Ok(None);
    }
    let x = match around.norm {
        Some(norm) => norm.apply(x)?,
        None => x.clone(),
    };
    let (x, weight) = (as_rows(&x)?, weight.contiguous()?);
    let extras = [bias, around.onto].map(|extra| extra.map(Tensor::contiguous).transpose());
    let [bias, onto] = extras;
    let (bias, onto) = (bias?, onto?);
    let operands = [&x, &weight].map(Operand::new);
    let [bias, onto] = [&bias, &onto].map(|extra| extra.as_ref().map(Operand::new));
    metal::output(backend, (n, outer), dtype, |y| {
        let read = |extra: &Option<Operand>| extra.is_some();
        let (x, x_rows) = operands[0].metal_rows::<B>()?;
        let weight = operands[1].metal::<B>()?;
        let constants = [false, gated == 1, around.gate == Some(Activation::GeluTanh), read(&bias), read(&onto)];
        let extras =
            [bias.as_ref(), onto.as_ref()].map(|extra| extra.map_or(Ok(Argument::Absent), Operand::metal::<B>));
        let [bias, onto] = extras;
        few(backend, (x, x_rows), weight, [n, inner, outer], constants, [bias?, onto?], None, (y, dtype))
    })
    .map(Some)
}

/// Each of the rows, `[rows, inner]`, times its expert's matrix `[outer, inner]`, of one dtype.
pub(crate) fn few_routed<B: Backend>(
    backend: &B,
    x: (&B::Storage, usize),
    weight: (&B::Storage, usize),
    [rows, inner, outer]: Sizes,
    routed: Routed<B::Storage>,
    y: (&mut B::Storage, DType),
) -> Result<()> {
    let x_rows = Rows { heads: 1, strides: [inner as u32, 0], start: x.1 };
    let x = (Argument::Read(x.0, x.1), x_rows);
    let weight = Argument::Read(weight.0, weight.1);
    let extras = [Argument::Absent, Argument::Absent];
    few(backend, x, weight, [rows, inner, outer], [true, false, false, false, false], extras, Some(routed), y)
}

#[expect(clippy::too_many_arguments, reason = "a launch, whose parts its callers have")]
fn few<B: Backend>(
    backend: &B,
    (x, x_rows): (Argument<B::Storage>, Rows),
    weight: Argument<B::Storage>,
    [rows, inner, outer]: Sizes,
    constants: [bool; 5],
    [bias, onto]: [Argument<B::Storage>; 2],
    routed: Option<Routed<B::Storage>>,
    (y, dtype): (&mut B::Storage, DType),
) -> Result<()> {
    let pack = 4 * dtype.size_in_bytes();
    let is_weight_aligned = matches!(&weight, Argument::Read(_, start) if start.is_multiple_of(pack));
    let is_exact = inner.is_multiple_of(4) && is_weight_aligned && x_rows.are_aligned(pack, dtype);
    let (kernel, shared) = match rows {
        _ if !is_exact => ("linear_any", 1),
        _ if routed.is_some() => ("linear_1", 1),
        1 => ("linear_1", 1),
        2 => ("linear_2", 2),
        3..=4 => ("linear_4", 4),
        _ => ("linear_8", 8),
    };
    let sizes = words(x_rows, [rows, inner, outer], routed.as_ref());
    let experts = routed.map_or(Argument::Absent, |routed| {
        let [experts, _] = routed.by;
        experts
    });
    backend.launch(Launch {
        source: &SOURCE,
        kernel,
        variant: float(dtype)?,
        constants: constants.to_vec(),
        threadgroups: [outer.div_ceil(OUTPUTS), rows.div_ceil(shared), 1],
        threads: [THREADS, 1, 1],
        arguments: vec![Argument::Write(y, 0), x, weight, Argument::Words(sizes), bias, onto, experts],
    })
}

/// Products of many rows with weights in `format`: `dense`, `q8` or `q4`.
pub(crate) fn many<B: Backend>(
    backend: &B,
    (x, x_rows): (Argument<B::Storage>, Rows),
    (weight, kernel): (Argument<B::Storage>, &'static str),
    [rows, inner, outer]: Sizes,
    routed: Option<Routed<B::Storage>>,
    (y, dtype): (&mut B::Storage, DType),
) -> Result<()> {
    let sizes = words(x_rows, [rows, inner, outer], routed.as_ref());
    // Each expert has room for as many tiles as its rows may need.
    let tiles = match &routed {
        Some(routed) => rows / TILE_ROWS + routed.matrices,
        None => rows.div_ceil(TILE_ROWS),
    };
    let is_routed = routed.is_some();
    let [starts, order] = routed.map_or([Argument::Absent, Argument::Absent], |routed| routed.by);
    backend.launch(Launch {
        source: &PRODUCTS,
        kernel,
        variant: float(dtype)?,
        constants: vec![is_routed],
        threadgroups: [outer.div_ceil(TILE_OUTPUTS), tiles, 1],
        threads: [4 * LANES, 1, 1],
        arguments: vec![Argument::Write(y, 0), x, weight, Argument::Words(sizes), starts, order],
    })
}
