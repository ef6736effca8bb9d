//! The gated delta rule on CUDA: chooses the kernel by the key size.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result, Storage, bail};

use super::GatedDeltaRule;
use crate::cpu::Operand;
use crate::cuda::{self, Floats, floats};

static K32: Floats = floats!(GATED_DELTA, "gated_delta_rule_k32");
static K64: Floats = floats!(GATED_DELTA, "gated_delta_rule_k64");
static K128: Floats = floats!(GATED_DELTA, "gated_delta_rule_k128");
/// Moves the state value by value, a warp for a row.
static ANY: Floats = floats!(GATED_DELTA, "gated_delta_rule_any");

const MAX_K: usize = 256;
/// Of a block, as in the kernels.
const THREADS: usize = 128;

impl GatedDeltaRule<'_> {
    pub(super) fn run_cuda(&self, state: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let (_, hv, vd, kd) = layout.shape().dims4()?;
        if kd > MAX_K {
            bail!("gated_delta_rule: K is {kd}, the cuda kernels take at most {MAX_K}")
        }
        let (hk, dtype, device) = (self.q.dim(1)?, self.v.dtype(), state.device.clone());
        let stream = device.cuda_stream();
        let mut out = cuda::uninit(&device, self.v.shape(), dtype)?;
        let batch = self.batch;
        let rows = [self.q, self.k, self.v].map(Operand::new);
        let arrays = [self.g, self.beta, &batch.cu_seqlens, &batch.context_lens, &batch.state_slots].map(Operand::new);
        let [q, k, v] = rows.each_ref().map(|operand| operand.cuda_rows(&stream));
        let (q, k, v) = (q?, k?, v?);
        let [g, beta, starts, lens, slots] = arrays.each_ref().map(|operand| operand.cuda(&stream));
        let (g, beta, starts, lens, slots) = (g?, beta?, starts?, lens?, slots?);
        let state = cuda::write(state, layout, &stream)?;
        let y = cuda::write(&mut out, &Layout::contiguous(self.v.shape()), &stream)?;

        let is_aligned = state.is_aligned(16);
        let (kernel, lanes) = match kd {
            32 if is_aligned => (&K32, 8),
            64 if is_aligned => (&K64, 8),
            128 if is_aligned => (&K128, 8),
            _ => (&ANY, 32),
        };
        let blocks = batch.num_sequences() * hv * vd.div_ceil(THREADS / lanes);
        let [hk, hv, kd, vd] = [hk, hv, kd, vd].map(|size| size as u32);
        let mut launch = stream.launch_builder(kernel.of(dtype)?.on(&device)?);
        for rows in [&q, &k, &v] {
            launch.arg(&rows.address.value).arg(&rows.strides[0]).arg(&rows.strides[1]);
        }
        for address in [&g, &beta, &state, &y, &starts, &lens, &slots] {
            launch.arg(&address.value);
        }
        launch.arg(&hk).arg(&hv).arg(&kd).arg(&vd);
        // SAFETY: the arguments are the kernel's, in its order; `gated_delta_rule` has compared their shapes and
        // dtypes with each other and the batch's slots with the state.
        unsafe { launch.launch(cuda::grid(blocks, (THREADS, 1))?) }.w()?;
        drop(y);
        self.out.set(Storage::Cuda(out)).expect("run once");
        Ok(())
    }
}
