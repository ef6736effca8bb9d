//! The gated delta rule on Metal: chooses the kernel by the key size.

use candle_core::backend::BackendStorage;
use candle_core::{Layout, Result, bail};

use super::GatedDeltaRule;
use crate::cpu::Operand;
use crate::metal::{Argument, Backend, Launch, Source, float, source};

pub(super) static SOURCE: Source = source!("gated_delta");

const MAX_K: usize = 256;
/// Of a threadgroup.
const THREADS: usize = 128;

impl GatedDeltaRule<'_> {
    pub(super) fn run_metal<B: Backend>(
        &self,
        backend: &B,
        state: &mut B::Storage,
        layout: &Layout,
    ) -> Result<B::Storage> {
        let (_, hv, vd, kd) = layout.shape().dims4()?;
        if kd > MAX_K {
            bail!("gated_delta_rule: K is {kd}, the metal kernels take at most {MAX_K}")
        }
        let (batch, hk, dtype) = (self.batch, self.q.dim(1)?, self.v.dtype());
        let mut out = backend.allocate(self.v.elem_count(), dtype)?;
        let rows = [self.q, self.k, self.v].map(Operand::new);
        let arrays = [self.g, self.beta, &batch.cu_seqlens, &batch.context_lens, &batch.state_slots].map(Operand::new);

        let is_aligned = (layout.start_offset() * state.dtype().size_in_bytes()).is_multiple_of(16);
        let (kernel, parts) = match kd {
            32 if is_aligned => ("gated_delta_rule_k32", 8),
            64 if is_aligned => ("gated_delta_rule_k64", 8),
            128 if is_aligned => ("gated_delta_rule_k128", 8),
            _ => ("gated_delta_rule_any", 32),
        };
        let mut arguments = vec![Argument::write(state, layout)?, Argument::Write(&mut out, 0)];
        let mut sizes = Vec::new();
        for operand in &rows {
            let (argument, rows) = operand.metal_rows::<B>()?;
            arguments.push(argument);
            sizes.extend(rows.words());
        }
        for array in &arrays {
            arguments.push(array.metal::<B>()?);
        }
        sizes.extend([hk, hv, kd, vd].map(|size| size as u32));
        arguments.push(Argument::Words(sizes));
        backend.launch(Launch {
            source: &SOURCE,
            kernel,
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [vd.div_ceil(THREADS / parts), hv, batch.num_sequences()],
            threads: [THREADS, 1, 1],
            arguments,
        })?;
        Ok(out)
    }
}
