//! The two gates of a Gated DeltaNet layer, from what it projects and its learned constants.

use candle_core::{DType, Device, Result, Tensor, bail};

#[cfg(any(feature = "cuda", feature = "metal", feature = "emulator", test))]
use crate::cpu::as_rows;
use crate::cpu::{Operand, Shared, share_pieces};

/// The decay and the strength of the gated delta rule's updates:
///
/// ```text
/// g = -exp(a_log) softplus(a + dt_bias)          softplus(x) = x above 20, else ln(1 + e^x)
/// beta = sigmoid(b)
/// ```
///
/// `a`, `b` `[N, Hv]` in f32, f16 or bf16; `a_log`, `dt_bias` `[Hv]` in f32. Returns `g` and `beta`, `[N, Hv]` in f32.
///
/// # Errors
///
/// Shapes disagree, or `a_log` or `dt_bias` is not f32.
///
/// Devices: CPU, CUDA, Metal.
///
/// Source: Yang et al., "Gated Delta Networks", <https://arxiv.org/abs/2412.06464>.
pub fn gates(a: &Tensor, b: &Tensor, a_log: &Tensor, dt_bias: &Tensor) -> Result<(Tensor, Tensor)> {
    let (_, hv) = a.dims2()?;
    if b.dims() != a.dims() {
        bail!("gates: b is {:?}, expected {:?} like a", b.dims(), a.dims())
    }
    for (name, constant) in [("a_log", a_log), ("dt_bias", dt_bias)] {
        if constant.dims() != [hv] || constant.dtype() != DType::F32 {
            bail!("gates: {name} is {:?} {:?}, expected f32 [{hv}]", constant.dims(), constant.dtype())
        }
    }
    on_metal!(a, backend => {
        let constants = [&a_log.contiguous()?, &dt_bias.contiguous()?];
        let both = metal::gates(backend, &as_rows(a)?, &as_rows(b)?, constants)?;
        Ok((both.get(0)?, both.get(1)?))
    });
    match a.device() {
        Device::Cpu => cpu(a, b, a_log, dt_bias),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let both = cuda::gates(device, &as_rows(a)?, &as_rows(b)?, &a_log.contiguous()?, &dt_bias.contiguous()?)?;
            Ok((both.get(0)?, both.get(1)?))
        }
        other => bail!("gates: no kernel for {:?}", other.location()),
    }
}

fn cpu(a: &Tensor, b: &Tensor, a_log: &Tensor, dt_bias: &Tensor) -> Result<(Tensor, Tensor)> {
    let operands = [a.contiguous()?, b.contiguous()?, a_log.contiguous()?, dt_bias.contiguous()?];
    let [a_values, b_values, a_log, dt_bias] = operands.each_ref().map(Operand::new);
    let (a_log, dt_bias) = (a_log.f32()?, dt_bias.f32()?);
    let rates: Vec<f32> = a_log.iter().map(|a_log| -a_log.exp()).collect();
    let hv = rates.len();
    let (mut g, mut beta) = (a_values.f32()?.into_owned(), b_values.f32()?.into_owned());
    let task = (ROWS * hv).max(1);
    let (all_g, all_beta) = (Shared::new(&mut g), Shared::new(&mut beta));
    share_pieces(0..a_values.layout.shape().elem_count(), task, |piece| {
        // SAFETY: pieces do not overlap.
        let (g, beta) = unsafe { (all_g.part(piece.start, piece.len()), all_beta.part(piece.start, piece.len())) };
        for row in g.chunks_mut(hv) {
            for ((g, bias), rate) in row.iter_mut().zip(dt_bias.iter()).zip(&rates) {
                *g = rate * softplus(*g + bias);
            }
        }
        beta.iter_mut().for_each(|beta| *beta = (1.0 + (-*beta).exp()).recip());
    });
    Ok((Tensor::from_vec(g, a.shape(), a.device())?, Tensor::from_vec(beta, a.shape(), a.device())?))
}

/// Rows of a task.
const ROWS: usize = 64;

fn softplus(x: f32) -> f32 {
    // Above 20, ln(1 + e^x) rounds to x, and e^x would overflow in the end.
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::{CudaDevice, DType, Layout, Result, Shape, Tensor, bail};

    use crate::cpu::Operand;
    use crate::cuda::{self, EarlyLaunch, Floats, floats};

    static GATES: Floats = floats!(GATES, "gated_delta_gates");

    const THREADS: usize = 128;

    /// `g` and `beta` as `[2, N, Hv]`, of rows `a` and `b`.
    pub fn gates(device: &CudaDevice, a: &Tensor, b: &Tensor, a_log: &Tensor, dt_bias: &Tensor) -> Result<Tensor> {
        let ((n, hv), dtype) = (a.dims2()?, a.dtype());
        if b.dtype() != dtype {
            bail!("gates: b is {:?}, the cuda kernel takes {dtype:?} like a", b.dtype())
        }
        let stream = device.cuda_stream();
        let shape = Shape::from((2, n, hv));
        let [a, b, a_log, dt_bias] = [a, b, a_log, dt_bias].map(Operand::new);
        let (a, b) = (a.cuda_rows(&stream)?, b.cuda_rows(&stream)?);
        let (a_log, dt_bias) = (a_log.cuda(&stream)?, dt_bias.cuda(&stream)?);
        cuda::output(device, shape.clone(), DType::F32, |gates| {
            let gates = cuda::write(gates, &Layout::contiguous(&shape), &stream)?;
            let config = cuda::grid((n * hv).div_ceil(THREADS), (THREADS, 1))?;
            let (n, hv) = (n as u32, hv as u32);
            let mut launch = EarlyLaunch::new(device, GATES.of(dtype)?)?;
            for rows in [&a, &b] {
                launch.arg(&rows.address.value).arg(&rows.strides[0]);
            }
            launch.arg(&a_log.value).arg(&dt_bias.value).arg(&gates.value).arg(&n).arg(&hv);
            // SAFETY: the arguments are the kernel's, in its order, and the public function has compared their shapes.
            unsafe { launch.launch(config) }
        })
    }
}

#[cfg(any(test, feature = "metal", feature = "emulator"))]
pub(super) mod metal {
    use candle_core::{DType, Result, Tensor, bail};

    use crate::cpu::Operand;
    use crate::metal::{self, Argument, Backend, Launch, Source, float, source};

    pub(crate) static SOURCE: Source = source!("gates");

    /// Of a threadgroup.
    const THREADS: usize = 128;

    /// `g` and `beta` as `[2, N, Hv]`, of rows `a` and `b`; `constants` `a_log` and `dt_bias` contiguous.
    pub fn gates<B: Backend>(backend: &B, a: &Tensor, b: &Tensor, constants: [&Tensor; 2]) -> Result<Tensor> {
        let ((n, hv), dtype) = (a.dims2()?, a.dtype());
        if b.dtype() != dtype {
            bail!("gates: b is {:?}, the metal kernel takes {dtype:?} like a", b.dtype())
        }
        let (operands, constants) = ([a, b].map(Operand::new), constants.map(Operand::new));
        let [(a, a_rows), (b, b_rows)] = [operands[0].metal_rows::<B>()?, operands[1].metal_rows::<B>()?];
        metal::output(backend, (2, n, hv), DType::F32, |gates| {
            backend.launch(Launch {
                source: &SOURCE,
                kernel: "gates",
                variant: float(dtype)?,
                constants: vec![],
                threadgroups: [(n * hv).div_ceil(THREADS), 1, 1],
                threads: [THREADS, 1, 1],
                arguments: vec![
                    Argument::Write(gates, 0),
                    a,
                    b,
                    constants[0].metal::<B>()?,
                    constants[1].metal::<B>()?,
                    Argument::Words([&a_rows.words()[..], &b_rows.words(), &[n as u32, hv as u32]].concat()),
                ],
            })
        })
    }
}
