//! The gated delta rule on Metal: long sequences by chunks, and for the others the kernel of their key size.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, Result, bail};

use super::GatedDeltaRule;
use crate::cpu::Operand;
use crate::metal::{Argument, Backend, Launch, Source, float, source};

pub(super) static SOURCE: Source = source!("gated_delta");
pub(super) static CHUNKS: Source = source!("chunks");

const MAX_K: usize = 256;
/// Of a threadgroup.
const THREADS: usize = 128;

/// Tokens of a sequence that are worth chunks.
const CHUNKED: usize = 24;
/// Tokens of a chunk, the key size that goes by chunks, rows of the state and threads of a threadgroup, and f32 values
/// that are prepared for a head's chunk: as in the kernels.
const CHUNK: usize = 64;
const CHUNK_K: usize = 128;
const SLICE: usize = 32;
const CHUNK_THREADS: usize = 128;
const PREPARED: usize = 2 * CHUNK * CHUNK + 4 * CHUNK;

impl GatedDeltaRule<'_> {
    pub(super) fn run_metal<B: Backend>(
        &self,
        backend: &B,
        state: &mut B::Storage,
        layout: &Layout,
    ) -> Result<B::Storage> {
        let (_, _, vd, kd) = layout.shape().dims4()?;
        if kd > MAX_K {
            bail!("gated_delta_rule: K is {kd}, the metal kernels take at most {MAX_K}")
        }
        let (batch, dtype) = (self.batch, self.v.dtype());
        let mut out = backend.allocate(self.v.elem_count(), dtype)?;
        let takes_chunks = kd == CHUNK_K && vd.is_multiple_of(SLICE);
        let chunked = if takes_chunks { CHUNKED } else { usize::MAX };
        let lengths = || batch.host.iter().map(|sequence| sequence.tokens.len());
        if lengths().any(|length| length < chunked) {
            self.recur(backend, state, layout, chunked, &mut out)?;
        }
        let longest = lengths().max().unwrap_or(0);
        if longest >= chunked {
            self.go_by_chunks(backend, state, layout, longest, &mut out)?;
        }
        Ok(out)
    }

    /// The sequences of fewer than `chunked` tokens, token by token.
    fn recur<B: Backend>(
        &self,
        backend: &B,
        state: &mut B::Storage,
        layout: &Layout,
        chunked: usize,
        out: &mut B::Storage,
    ) -> Result<()> {
        let ((_, hv, vd, kd), batch, hk) = (layout.shape().dims4()?, self.batch, self.q.dim(1)?);
        let rows = [self.q, self.k, self.v].map(Operand::new);
        let arrays = [self.g, self.beta, &batch.cu_seqlens, &batch.context_lens, &batch.state_slots].map(Operand::new);
        let is_aligned = (layout.start_offset() * state.dtype().size_in_bytes()).is_multiple_of(16);
        let (kernel, parts) = match kd {
            32 if is_aligned => ("gated_delta_rule_k32", 8),
            64 if is_aligned => ("gated_delta_rule_k64", 8),
            128 if is_aligned => ("gated_delta_rule_k128", 8),
            _ => ("gated_delta_rule_any", 32),
        };
        let mut arguments = vec![Argument::write(state, layout)?, Argument::Write(out, 0)];
        let mut sizes = Vec::new();
        for operand in &rows {
            let (argument, rows) = operand.metal_rows::<B>()?;
            arguments.push(argument);
            sizes.extend(rows.words());
        }
        for array in &arrays {
            arguments.push(array.metal::<B>()?);
        }
        sizes.extend([hk, hv, kd, vd, chunked.min(u32::MAX as usize)].map(|size| size as u32));
        arguments.push(Argument::Words(sizes));
        backend.launch(Launch {
            source: &SOURCE,
            kernel,
            variant: float(self.v.dtype())?,
            constants: vec![],
            threadgroups: [vd.div_ceil(THREADS / parts), hv, batch.num_sequences()],
            threads: [THREADS, 1, 1],
            arguments,
        })
    }

    /// The sequences of [`CHUNKED`] tokens and more, of which one has `longest`.
    fn go_by_chunks<B: Backend>(
        &self,
        backend: &B,
        state: &mut B::Storage,
        layout: &Layout,
        longest: usize,
        out: &mut B::Storage,
    ) -> Result<()> {
        let ((_, hv, vd, _), batch, hk) = (layout.shape().dims4()?, self.batch, self.q.dim(1)?);
        let (sequences, variant) = (batch.num_sequences(), float(self.v.dtype())?);
        let operands = [self.q, self.k, self.v].map(Operand::new);
        let [gates @ .., cu_seqlens, context_lens, state_slots] =
            [self.g, self.beta, &batch.cu_seqlens, &batch.context_lens, &batch.state_slots].map(Operand::new);
        let [q, k, v] = operands.each_ref().map(Operand::metal_rows::<B>);
        let ((q, q_rows), (k, k_rows), (v, v_rows)) = (q?, k?, v?);
        let mut sizes = [q_rows.words(), k_rows.words(), v_rows.words()].concat();
        sizes.extend([hk, hv, vd, CHUNKED].map(|size| size as u32));

        // Chunks of a sequence begin where those of the ones before have room enough.
        let chunks = batch.num_tokens() / CHUNK + sequences;
        let mut prepared = backend.allocate(chunks * hv * PREPARED, DType::F32)?;
        backend.launch(Launch {
            source: &CHUNKS,
            kernel: "gated_delta_prepare",
            variant,
            constants: vec![],
            threadgroups: [longest.div_ceil(CHUNK), hv, sequences],
            threads: [CHUNK_THREADS, 1, 1],
            arguments: vec![
                Argument::Write(&mut prepared, 0),
                q,
                k,
                gates[0].metal::<B>()?,
                gates[1].metal::<B>()?,
                cu_seqlens.metal::<B>()?,
                Argument::Words(sizes.clone()),
            ],
        })?;
        backend.launch(Launch {
            source: &CHUNKS,
            kernel: "gated_delta_scan",
            variant,
            constants: vec![],
            threadgroups: [vd / SLICE, hv, sequences],
            threads: [CHUNK_THREADS, 1, 1],
            arguments: vec![
                Argument::write(state, layout)?,
                Argument::Write(out, 0),
                Argument::Read(&prepared, 0),
                operands[0].metal_rows::<B>()?.0,
                operands[1].metal_rows::<B>()?.0,
                v,
                cu_seqlens.metal::<B>()?,
                context_lens.metal::<B>()?,
                state_slots.metal::<B>()?,
                Argument::Words(sizes),
            ],
        })
    }
}
