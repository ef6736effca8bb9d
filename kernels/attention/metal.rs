//! Attention over pages on Metal: chooses the word that rows are copied by, and how many threadgroups share a query.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, Result, bail};

use super::{AttentionParams, Mask};
use crate::Batch;
use crate::cpu::Operand;
use crate::metal::{Argument, Backend, Launch, Rows, Source, float, source};

pub(super) static SOURCE: Source = source!("attention");

/// Of a threadgroup.
const THREADS: usize = 256;
/// Bytes of a word and the kernel's variant, widest first.
const WORDS: [(usize, &str); 3] = [(16, "u128"), (4, "u32"), (2, "u16")];

/// `kv` `[2, blocks, block_size, Hk, D]` contiguous, `k` and `v` `[N, Hk, D]` in rows, all of one dtype.
pub fn write_kv<B: Backend>(
    backend: &B,
    kv: &mut B::Storage,
    layout: &Layout,
    (k, kl): (&B::Storage, &Layout),
    (v, vl): (&B::Storage, &Layout),
    batch: &Batch,
) -> Result<()> {
    let (_, blocks, block_size, heads, d) = layout.shape().dims5()?;
    let (dtype, start) = (kv.dtype(), layout.start_offset() * kv.dtype().size_in_bytes());
    let rows = [Rows::new(dtype, kl)?, Rows::new(dtype, vl)?];
    let slot_mapping = Operand::new(&batch.slot_mapping);

    // Heads that lie side by side are one.
    let is_whole = rows.iter().all(|rows| rows.strides[1] as usize == d);
    let (heads, d) = if is_whole { (1, heads * d) } else { (heads, d) };
    let fits = |word: usize| {
        (d * dtype.size_in_bytes()).is_multiple_of(word)
            && start.is_multiple_of(word)
            && rows.iter().all(|rows| rows.are_aligned(word, dtype))
    };
    let Some((word, variant)) = WORDS.into_iter().find(|(word, _)| fits(*word)) else {
        bail!("write_kv: pages of {dtype:?}, expected f32, f16 or bf16")
    };
    let values = word / dtype.size_in_bytes();
    let d = d / values;
    let mut sizes: Vec<u32> = Vec::new();
    for rows in rows {
        let [token, head] = rows.strides.map(|stride| stride / values as u32);
        sizes.extend([heads as u32, token, head]);
    }
    sizes.extend([blocks * block_size, heads, d].map(|size| size as u32));

    let threads = (1 << d.ilog2()).min(THREADS);
    backend.launch(Launch {
        source: &SOURCE,
        kernel: "write_kv",
        variant,
        constants: vec![],
        threadgroups: [batch.num_tokens(), 2, 1],
        threads: [threads, heads.min(THREADS / threads), 1],
        arguments: vec![
            Argument::write(kv, layout)?,
            Argument::Read(k, rows[0].start),
            Argument::Read(v, rows[1].start),
            slot_mapping.metal::<B>()?,
            Argument::Words(sizes),
        ],
    })
}

const LANES: usize = 32;
/// Of a threadgroup, as in the kernel.
const SIMDGROUPS: usize = 4;
const MAX_D: usize = 512;
/// Threadgroups that keep a GPU busy without sharing a query's keys.
const ENOUGH_THREADGROUPS: usize = 512;
/// Keys of a part at least, and parts at most.
const KEYS_OF_PART: usize = 256;
const PARTS: usize = 32;

/// `q` `[N, Hq, D]` in rows, `kv` `[2, blocks, block_size, Hk, D]` contiguous.
pub fn paged_attention<B: Backend>(
    backend: &B,
    (q, ql): (&B::Storage, &Layout),
    (kv, kvl): (&B::Storage, &Layout),
    batch: &Batch,
    params: AttentionParams,
) -> Result<B::Storage> {
    let ((n, hq, d), (_, blocks, block_size, hk, _)) = (ql.shape().dims3()?, kvl.shape().dims5()?);
    if d > MAX_D {
        bail!("paged_attention: D is {d}, the metal kernels take at most {MAX_D}")
    }
    let (dtype, q_rows) = (q.dtype(), Rows::new(q.dtype(), ql)?);
    let kernel = match d {
        64 => "paged_attention_d64",
        128 => "paged_attention_d128",
        256 => "paged_attention_d256",
        _ => "paged_attention_any",
    };
    let context = batch.host.iter().map(|sequence| sequence.context_len).max().unwrap_or(1);
    let keys = params.window.map_or(context, |window| context.min(window));
    let splits = if n * hq < ENOUGH_THREADGROUPS { keys.div_ceil(KEYS_OF_PART).clamp(1, PARTS) } else { 1 };

    let window = params.window.map_or(u32::MAX, |window| window.min(u32::MAX as usize) as u32);
    let mut sizes = q_rows.words().to_vec();
    sizes.extend([batch.num_sequences(), hq, hk, d, block_size].map(|size| size as u32));
    sizes.extend([batch.block_tables.dim(1)?, blocks * block_size, splits].map(|size| size as u32));
    sizes.extend([u32::from(params.mask == Mask::Causal), window]);
    sizes.extend([params.scale.to_bits(), params.softcap.unwrap_or(0.0).to_bits()]);

    let mut out = backend.allocate(n * hq * d, dtype)?;
    let mut partial = match splits {
        1 => None,
        _ => Some(backend.allocate(n * hq * splits * (2 + d), DType::F32)?),
    };
    let arrays = [&batch.cu_seqlens, &batch.context_lens, &batch.block_tables].map(Operand::new);
    let mut arguments = vec![Argument::Write(&mut out, 0), Argument::Read(q, q_rows.start), Argument::read(kv, kvl)?];
    for array in &arrays {
        arguments.push(array.metal::<B>()?);
    }
    arguments.push(Argument::Words(sizes));
    arguments.extend(partial.as_mut().map(|partial| Argument::Write(partial, 0)));
    backend.launch(Launch {
        source: &SOURCE,
        kernel,
        variant: float(dtype)?,
        constants: vec![splits > 1],
        threadgroups: [hq, n, splits],
        threads: [SIMDGROUPS * LANES, 1, 1],
        arguments,
    })?;
    if let Some(partial) = &partial {
        backend.launch(Launch {
            source: &SOURCE,
            kernel: "paged_attention_merge",
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [n * hq, 1, 1],
            threads: [d.next_multiple_of(LANES).min(SIMDGROUPS * LANES), 1, 1],
            arguments: vec![
                Argument::Write(&mut out, 0),
                Argument::Read(partial, 0),
                Argument::Words(vec![splits as u32, d as u32]),
            ],
        })?;
    }
    Ok(out)
}
