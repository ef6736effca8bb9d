//! A sparse MLP: a router picks a few of many experts for each token, and only these run.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
mod metal;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::cell::OnceCell;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor, WithDType, bail};

use crate::cpu::{Operand, dtype_of, tensor, view};
use crate::quantized::{Quantization, QuantizedMatrix};
use crate::simd::Stored;

/// Which experts each token goes to, and how much each of them counts.
#[derive(Clone, Debug)]
pub struct Routing {
    /// `[N, k]` u32, no expert twice in a row.
    pub experts: Tensor,
    /// `[N, k]` in the activations' dtype.
    pub weights: Tensor,
}

/// Picks the `k` most probable of `E` experts for each token:
///
/// ```text
/// p = softmax(logits)                          in f32, over all experts
/// e = the k greatest of p, greatest first, of equal ones that of the lower index first
/// w = cast(p[e] / sum(p[e]))
/// ```
///
/// `logits` `[N, E]` in f32, f16 or bf16. Weights have their dtype. A row that holds NaN gets some experts, with
/// weights of NaN.
///
/// # Errors
///
/// `k` is 0 or more than `E`.
///
/// Devices: CPU; CUDA and Metal, up to 1024 experts.
///
/// Source: Shazeer et al., "Outrageously Large Neural Networks", <https://arxiv.org/abs/1701.06538>; softmax before
/// selection and weights that add up to one as in Qwen3.5.
pub fn route(logits: &Tensor, k: usize) -> Result<Routing> {
    let (n, num_experts) = logits.dims2()?;
    if k == 0 || k > num_experts {
        bail!("route: {k} of {num_experts} experts, expected 1 to {num_experts}")
    }
    on_metal!(logits, backend => {
        let (experts, weights) = metal::route(backend, &logits.contiguous()?, k)?;
        Ok(Routing { experts, weights })
    });
    let op = Route { k, weights: OnceCell::new() };
    let experts = logits.contiguous()?.apply_op1_no_bwd(&op)?;
    let weights = op.weights.into_inner().expect("set by every backend");
    Ok(Routing { experts, weights: tensor(weights, (n, k)) })
}

struct Route {
    k: usize,
    weights: OnceCell<Storage>,
}

impl CustomOp1 for Route {
    fn name(&self) -> &'static str {
        "route"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, num_experts) = layout.shape().dims2()?;
        let (experts, weights) = match logits {
            CpuStorage::F32(logits) => routed(cpu::route(view(logits, layout)?, num_experts, self.k)),
            CpuStorage::F16(logits) => routed(cpu::route(view(logits, layout)?, num_experts, self.k)),
            CpuStorage::BF16(logits) => routed(cpu::route(view(logits, layout)?, num_experts, self.k)),
            other => bail!("route: logits are {:?}, expected f32, f16 or bf16", dtype_of(other)),
        };
        self.weights.set(Storage::Cpu(weights)).expect("runs once");
        Ok((experts, (n, self.k).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, logits: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (experts, weights) = cuda::route(logits, layout, self.k)?;
        self.weights.set(Storage::Cuda(weights)).expect("runs once");
        Ok((experts, (layout.shape().dims2()?.0, self.k).into()))
    }
}

fn routed<T: WithDType>((experts, weights): (Vec<u32>, Vec<T>)) -> (CpuStorage, CpuStorage) {
    (CpuStorage::U32(experts), T::to_cpu_storage_owned(weights))
}

/// The gated MLPs of a layer's experts.
pub struct Experts {
    /// Matrices `[2 I, H]`, the gate's rows first.
    gate_up: Stack,
    /// Matrices `[H, I]`.
    down: Stack,
    num_experts: usize,
    /// `H`
    hidden: usize,
    /// `I`
    intermediate: usize,
}

/// One matrix `[O, I]` for each of `E` experts.
pub enum Stack {
    /// `[E, O, I]`, contiguous, in f32, f16 or bf16 whatever the activations are.
    Dense(Tensor),
    Packed(Vec<QuantizedMatrix>),
    /// The packed matrices one after the other, on an accelerator: what [`Experts::new`] makes of them.
    OnDevice {
        format: Quantization,
        words: Tensor,
        dims: [usize; 3],
    },
}

impl Experts {
    /// Experts of matrices `gate_up` `[2 I, H]`, the gate's rows first, and `down` `[H, I]`.
    ///
    /// # Errors
    ///
    /// There are none, or the shapes do not fit each other.
    pub fn new(gate_up: Stack, down: Stack) -> Result<Self> {
        let [num_experts, hidden, intermediate] = down.dims()?;
        if gate_up.dims()? != [num_experts, 2 * intermediate, hidden] {
            bail!(
                "experts: gate_up is {:?}, expected [{num_experts}, {}, {hidden}] beside down {:?}",
                gate_up.dims()?,
                2 * intermediate,
                down.dims()?
            )
        }
        Ok(Self { gate_up: gate_up.gathered()?, down: down.gathered()?, num_experts, hidden, intermediate })
    }
}

impl Stack {
    fn dims(&self) -> Result<[usize; 3]> {
        let matrices = match self {
            Self::Dense(tensor) => return tensor.dims3().map(Into::into),
            Self::OnDevice { dims, .. } => return Ok(*dims),
            Self::Packed(matrices) => matrices,
        };
        let Some([outer, inner]) = matrices.first().map(QuantizedMatrix::dims) else {
            bail!("experts: there are none")
        };
        if let Some((e, other)) = (0..).zip(matrices).find(|(_, matrix)| matrix.dims() != [outer, inner]) {
            bail!("experts: matrix {e} is {:?}, expected [{outer}, {inner}] like the first", other.dims())
        }
        Ok([matrices.len(), outer, inner])
    }

    /// Matrices on an accelerator in one piece.
    fn gathered(self) -> Result<Self> {
        let dims = self.dims()?;
        let Self::Packed(matrices) = &self else { return Ok(self) };
        let Some(words) = matrices.iter().map(QuantizedMatrix::on_device).collect::<Option<Vec<_>>>() else {
            return Ok(self);
        };
        Ok(Self::OnDevice { format: matrices[0].format(), words: Tensor::cat(&words, 0)?, dims })
    }

    fn lock(&self) -> Locked<'_> {
        match self {
            Self::OnDevice { words, .. } => Locked::Dense(Operand::new(words)),
            Self::Dense(tensor) => Locked::Dense(Operand::new(tensor)),
            Self::Packed(matrices) => Locked::Packed(matrices),
        }
    }
}

/// A stack whose storage is locked for reading.
enum Locked<'a> {
    Dense(Operand<'a>),
    Packed(&'a [QuantizedMatrix]),
}

impl Locked<'_> {
    fn stack(&self) -> Result<cpu::Stack<'_>> {
        let operand = match self {
            Self::Dense(operand) => operand,
            Self::Packed(matrices) => return Ok(cpu::Stack::Packed(matrices)),
        };
        Ok(match &*operand.storage {
            Storage::Cpu(CpuStorage::F32(values)) => cpu::Stack::F32(view(values, operand.layout)?),
            Storage::Cpu(CpuStorage::F16(values)) => cpu::Stack::F16(view(values, operand.layout)?),
            Storage::Cpu(CpuStorage::BF16(values)) => cpu::Stack::BF16(view(values, operand.layout)?),
            Storage::Cpu(other) => bail!("sparse_mlp: experts are {:?}, expected f32, f16 or bf16", dtype_of(other)),
            _ => bail!("sparse_mlp: experts are not on the cpu like x"),
        })
    }
}

/// The weighted sum of the experts that each token goes to:
///
/// ```text
/// y[n] = cast(sum_j weights[n, j] * down_e cast(silu(gate_e x[n]) * up_e x[n]))        e = experts[n, j]
/// ```
///
/// Products are those of [`linear`](crate::linear::linear) or, for packed experts, of
/// [`quantized::linear`](crate::quantized::linear), each rounded to `x`'s dtype; the sum is in f32, in the order of the
/// experts' indices. `x` `[N, H]` in f32, f16 or bf16, `routing` of `N` tokens with weights in `x`'s dtype. Returns
/// `[N, H]` of the same dtype.
///
/// Tokens are grouped by expert by counting, and an expert without tokens is not read. Beside the result it takes
/// memory for `N k` rows. A row does not depend on the others or on threads.
///
/// # Errors
///
/// Shapes or dtypes disagree, or `routing` names an expert that is not there.
///
/// Devices: CPU; Metal, for experts of `x`'s dtype and packed ones; CUDA. There an expert that is not there counts nothing,
/// lest the host wait; f16 and bf16 use tensor cores where `H` and `I` are multiples of 32 and all are of one dtype; and
/// packed experts are unpacked for many tokens, which takes the memory of a layer's experts in `x`'s dtype.
///
/// Source: Shazeer et al., "Outrageously Large Neural Networks", <https://arxiv.org/abs/1701.06538>.
pub fn sparse_mlp(x: &Tensor, routing: &Routing, experts: &Experts) -> Result<Tensor> {
    let (n, hidden) = x.dims2()?;
    if hidden != experts.hidden {
        bail!("sparse_mlp: x is {:?}, expected [N, {}] for these experts", x.dims(), experts.hidden)
    }
    let Routing { experts: ids, weights } = routing;
    let (rows, k) = ids.dims2()?;
    if rows != n || ids.dtype() != DType::U32 {
        bail!("sparse_mlp: experts are {:?} {:?}, expected u32 [{n}, k]", ids.dims(), ids.dtype())
    }
    if weights.dims() != ids.dims() || weights.dtype() != x.dtype() {
        bail!("sparse_mlp: weights are {:?} {:?}, expected {:?} [{n}, {k}]", weights.dims(), weights.dtype(), x.dtype())
    }
    on_metal!(x, backend => {
        metal::sparse_mlp(backend, &x.contiguous()?, &ids.contiguous()?, &weights.contiguous()?, experts)
    });
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = x.device()
        && let Some(y) = cuda::packed(device, x, routing, experts)?
    {
        return Ok(y);
    }
    let op = SparseMlp { ids: &ids.contiguous()?, weights: &weights.contiguous()?, experts };
    x.contiguous()?.apply_op1_no_bwd(&op)
}

struct SparseMlp<'a> {
    ids: &'a Tensor,
    weights: &'a Tensor,
    experts: &'a Experts,
}

impl CustomOp1 for SparseMlp<'_> {
    fn name(&self) -> &'static str {
        "sparse-mlp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(self.run(view(x, layout)?)?),
            CpuStorage::F16(x) => CpuStorage::F16(self.run(view(x, layout)?)?),
            CpuStorage::BF16(x) => CpuStorage::BF16(self.run(view(x, layout)?)?),
            other => bail!("sparse_mlp: x is {:?}, expected f32, f16 or bf16", dtype_of(other)),
        };
        Ok((out, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((self.run_cuda(x, layout)?, layout.shape().clone()))
    }
}

impl SparseMlp<'_> {
    fn run<X: Stored>(&self, x: &[X]) -> Result<Vec<X>> {
        let &Experts { ref gate_up, ref down, num_experts, hidden, intermediate } = self.experts;
        let (ids, weights) = (Operand::new(self.ids), Operand::new(self.weights));
        let (ids, weights) = (ids.elements::<u32>()?, weights.f32()?);
        if let Some(id) = ids.iter().find(|&&id| id as usize >= num_experts) {
            bail!("sparse_mlp: expert {id}, there are {num_experts}")
        }
        let (gate_up, down) = (gate_up.lock(), down.lock());
        let experts =
            cpu::Experts { gate_up: gate_up.stack()?, down: down.stack()?, num_experts, hidden, intermediate };
        Ok(cpu::sparse_mlp(x, ids, &weights, &experts))
    }
}
