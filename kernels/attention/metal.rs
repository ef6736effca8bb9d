//! Writing keys and values into their pages on Metal: chooses the word that rows are copied by.

use candle_core::backend::BackendStorage;
use candle_core::{Layout, Result, bail};

use crate::Batch;
use crate::cpu::Operand;
use crate::metal::{Argument, Backend, Launch, Rows, Source, source};

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
