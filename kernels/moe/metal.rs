//! Routing and experts on Metal: few pairs of token and expert one by one, many by expert.

use candle_core::{DType, Result, Tensor, bail};

use super::{Experts, Stack};
use crate::activation::{Activation, gated_activation};
use crate::cpu::Operand;
use crate::linear::metal::{Routed, few_routed, many};
use crate::metal::{self, Argument, Backend, Launch, Rows, Source, float, source};
use crate::quantized;

pub(super) static SOURCE: Source = source!("moe");

/// A lane has 32 bits for its experts.
const MAX_EXPERTS: usize = 1024;
const LANES: usize = 32;
/// Of a threadgroup that routes, as in the kernel.
const SIMDGROUPS: usize = 4;
/// Of other threadgroups.
const THREADS: usize = 128;
/// Tokens whose pairs are not worth grouping.
const FEW: usize = 4;

/// Experts u32 and weights, `[N, k]`; `logits` contiguous.
pub fn route<B: Backend>(backend: &B, logits: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    let ((n, num_experts), dtype) = (logits.dims2()?, logits.dtype());
    if num_experts > MAX_EXPERTS {
        bail!("route: {num_experts} experts, the metal kernels take at most {MAX_EXPERTS}")
    }
    let logits = Operand::new(logits);
    let mut weights = backend.allocate(n * k, dtype)?;
    let experts = metal::output(backend, (n, k), DType::U32, |experts| {
        backend.launch(Launch {
            source: &SOURCE,
            kernel: "moe_route",
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [n.div_ceil(SIMDGROUPS), 1, 1],
            threads: [SIMDGROUPS * LANES, 1, 1],
            arguments: vec![
                Argument::Write(experts, 0),
                Argument::Write(&mut weights, 0),
                logits.metal::<B>()?,
                Argument::Words([n, num_experts, k].map(|size| size as u32).to_vec()),
            ],
        })
    })?;
    Ok((experts, crate::cpu::tensor(B::wrap(weights), (n, k))))
}

/// `x` `[N, H]`, `ids` and `weights` `[N, k]`, all contiguous.
pub fn sparse_mlp<B: Backend>(
    backend: &B,
    x: &Tensor,
    ids: &Tensor,
    weights: &Tensor,
    experts: &Experts,
) -> Result<Tensor> {
    let ((n, hidden), (_, k), dtype) = (x.dims2()?, ids.dims2()?, x.dtype());
    let (num_experts, pairs) = (experts.num_experts, n * k);
    let grouped = if n <= FEW || pairs < num_experts { None } else { Some(group(backend, ids, num_experts)?) };
    let width = 2 * experts.intermediate;
    let product = |x: &Tensor, stack: &Stack, sizes, divisor| {
        products(backend, x, stack, sizes, (ids, grouped.as_ref()), (num_experts, divisor))
    };
    let gate_up = product(x, &experts.gate_up, [pairs, hidden, width], k)?;
    let activated = gated_activation(&gate_up, Activation::Silu)?;
    let terms = product(&activated, &experts.down, [pairs, experts.intermediate, hidden], 1)?;

    let operands = [&terms, ids, weights].map(Operand::new);
    metal::output(backend, (n, hidden), dtype, |y| {
        let mut arguments = vec![Argument::Write(y, 0)];
        for operand in &operands {
            arguments.push(operand.metal::<B>()?);
        }
        arguments.push(Argument::Words([hidden, k, num_experts].map(|size| size as u32).to_vec()));
        backend.launch(Launch {
            source: &SOURCE,
            kernel: "moe_combine",
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [hidden.div_ceil(THREADS), n, 1],
            threads: [THREADS, 1, 1],
            arguments,
        })
    })
}

/// Where each expert's pairs begin, `[E + 1]`, and the pairs by expert, `[pairs]`.
fn group<B: Backend>(backend: &B, ids: &Tensor, num_experts: usize) -> Result<[Tensor; 2]> {
    let pairs = ids.elem_count();
    let ids = Operand::new(ids);
    let mut order = backend.allocate(pairs, DType::U32)?;
    let starts = metal::output(backend, num_experts + 1, DType::U32, |starts| {
        backend.launch(Launch {
            source: &SOURCE,
            kernel: "moe_group",
            variant: "",
            constants: vec![],
            threadgroups: [(num_experts + 1).div_ceil(LANES), 1, 1],
            threads: [LANES, 1, 1],
            arguments: vec![
                Argument::Write(starts, 0),
                Argument::Write(&mut order, 0),
                ids.metal::<B>()?,
                Argument::Words([pairs, num_experts].map(|size| size as u32).to_vec()),
            ],
        })
    })?;
    Ok([starts, crate::cpu::tensor(B::wrap(order), pairs)])
}

/// Each pair's row of `x`, of which `divisor` share one, times its expert's matrix.
fn products<B: Backend>(
    backend: &B,
    x: &Tensor,
    stack: &Stack,
    [pairs, inner, outer]: [usize; 3],
    (ids, grouped): (&Tensor, Option<&[Tensor; 2]>),
    (matrices, divisor): (usize, usize),
) -> Result<Tensor> {
    let dtype = x.dtype();
    let (weight, format) = match stack {
        Stack::Dense(weight) if weight.dtype() == dtype => (weight, None),
        Stack::Dense(weight) => bail!("sparse_mlp: experts are {:?}, the metal kernels take {dtype:?}", weight.dtype()),
        Stack::OnDevice { format, words, .. } => (words, Some(*format)),
        Stack::Packed(_) => bail!("sparse_mlp: experts are on the cpu, x is not"),
    };
    let (x, weight, ids) = (Operand::new(x), Operand::new(weight), Operand::new(ids));
    let grouped = grouped.map(|grouped| grouped.each_ref().map(Operand::new));
    metal::output(backend, (pairs, outer), dtype, |y| {
        let sizes = [pairs, inner, outer];
        let by = match &grouped {
            Some([starts, order]) => [starts.metal::<B>()?, order.metal::<B>()?],
            None => [ids.metal::<B>()?, Argument::Absent],
        };
        let routed = Routed { matrices, divisor, by };
        let start = |operand: &Operand, dtype| metal::start(dtype, operand.layout);
        let x_start = start(&x, dtype)?;
        let rows = Rows { heads: 1, strides: [inner as u32, 0], start: x_start };
        match (&grouped, format) {
            (None, None) => {
                let x = (B::storage(&x.storage)?, x_start);
                let weight = (B::storage(&weight.storage)?, start(&weight, dtype)?);
                few_routed(backend, x, weight, sizes, routed, (y, dtype))
            }
            (None, Some(format)) => {
                let weight = (weight.metal::<B>()?, format);
                quantized::metal::few(backend, (x.metal::<B>()?, rows), weight, sizes, Some(routed), (y, dtype))
            }
            (Some(_), format) => {
                let weight = (weight.metal::<B>()?, format.map_or("product_dense", quantized::metal::product));
                many(backend, (x.metal::<B>()?, rows), weight, sizes, Some(routed), (y, dtype))
            }
        }
    })
}
