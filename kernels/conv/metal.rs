//! The causal convolution on Metal: chooses how many threads share a sequence.

use candle_core::{DType, Layout, Result, bail};

use super::CausalConv1d;
use crate::cpu::Operand;
use crate::metal::{Argument, Backend, Launch, Source, float, source};

pub(super) static SOURCE: Source = source!("conv");

/// Channels of a threadgroup: neighbours in memory.
const CHANNELS: usize = 32;
/// Parts of a sequence at most, and tokens that are worth one.
const PARTS: usize = 8;
const TOKENS_OF_PART: usize = 8;

impl CausalConv1d<'_> {
    pub(super) fn run_metal<B: Backend>(
        &self,
        backend: &B,
        state: &mut B::Storage,
        layout: &Layout,
    ) -> Result<B::Storage> {
        let (batch, (_, channels), dtype) = (self.batch, self.x.dims2()?, self.x.dtype());
        let weight = self.weight.to_dtype(DType::F32)?;
        let kernel = match self.weight.dim(1)? {
            2 => "causal_conv1d_2",
            3 => "causal_conv1d_3",
            4 => "causal_conv1d_4",
            width => bail!("causal_conv1d: a width of {width}, the metal kernels take 2 to 4"),
        };
        let mut out = backend.allocate(self.x.elem_count(), dtype)?;
        let x = Operand::new(self.x);
        let (x, rows) = x.metal_rows::<B>()?;
        let arrays = [&weight, &batch.cu_seqlens, &batch.context_lens, &batch.state_slots].map(Operand::new);

        let longest = batch.host.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(1);
        let mut arguments = vec![Argument::write(state, layout)?, Argument::Write(&mut out, 0), x];
        for array in &arrays {
            arguments.push(array.metal::<B>()?);
        }
        arguments.push(Argument::Words([&rows.words()[..], &[channels as u32]].concat()));
        backend.launch(Launch {
            source: &SOURCE,
            kernel,
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [channels.div_ceil(CHANNELS), batch.num_sequences(), 1],
            threads: [CHANNELS, longest.div_ceil(TOKENS_OF_PART).min(PARTS), 1],
            arguments,
        })?;
        Ok(out)
    }
}
