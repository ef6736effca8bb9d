//! Attention on Metal: chooses the word that rows are copied by, which sequences go in tiles, and how many threadgroups
//! share a query of the others.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, Result, bail};

use super::{AttentionParams, Mask};
use crate::Batch;
use crate::cpu::Operand;
use crate::metal::{self, Argument, Backend, Launch, Rows, Source, float, source};

pub(super) static SOURCE: Source = source!("attention", "attention.h");
pub(super) static TILES: Source = source!("tiles", "attention.h");

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
/// Of a threadgroup that has one query, as in the kernel.
const SIMDGROUPS: usize = 4;
const MAX_D: usize = 512;
/// Threadgroups that keep a GPU busy without sharing a query's keys.
const ENOUGH_THREADGROUPS: usize = 512;
/// Keys of a part at least, and parts at most.
const KEYS_OF_PART: usize = 256;
const PARTS: usize = 32;
/// Tokens of a sequence that are worth a tile.
const TILED: usize = 16;
/// Rows of a strip.
const STRIP: usize = 8;

/// Where keys and values lie.
pub struct KeysAndValues<'a, S> {
    k: (&'a S, Rows),
    v: (&'a S, Rows),
    /// Of pages.
    block_size: Option<usize>,
}

impl<'a, S: BackendStorage> KeysAndValues<'a, S> {
    /// `kv` `[2, blocks, block_size, Hk, D]` contiguous.
    pub fn paged(kv: &'a S, layout: &Layout) -> Result<Self> {
        let (_, blocks, block_size, heads, d) = layout.shape().dims5()?;
        let (dtype, strides) = (kv.dtype(), [heads * d, d].map(|stride| stride as u32));
        let plane = blocks * block_size * heads * d * dtype.size_in_bytes();
        let start = metal::start(dtype, layout)?;
        let rows = |start| Rows { heads: heads as u32, strides, start };
        Ok(Self { k: (kv, rows(start)), v: (kv, rows(start + plane)), block_size: Some(block_size) })
    }

    /// `k` and `v` `[N, Hk, D]` in rows.
    pub fn of_tokens((k, kl): (&'a S, &Layout), (v, vl): (&'a S, &Layout)) -> Result<Self> {
        let rows = [Rows::new(k.dtype(), kl)?, Rows::new(v.dtype(), vl)?];
        Ok(Self { k: (k, rows[0]), v: (v, rows[1]), block_size: None })
    }
}

/// `q` `[N, Hq, D]` in rows.
pub fn attention<B: Backend>(
    backend: &B,
    (q, ql): (&B::Storage, &Layout),
    kv: KeysAndValues<B::Storage>,
    batch: &Batch,
    params: AttentionParams,
) -> Result<B::Storage> {
    let ((n, hq, d), dtype) = (ql.shape().dims3()?, q.dtype());
    let KeysAndValues { k: (k, k_rows), v: (v, v_rows), block_size } = kv;
    let hk = k_rows.heads as usize;
    if d > MAX_D {
        bail!("attention: D is {d}, the metal kernels take at most {MAX_D}")
    }
    let q_rows = Rows::new(dtype, ql)?;
    // Kernel of tiles, and strips of a tile.
    let tiles = match d {
        64 => Some(("attention_tiles_d64", 4, 1)),
        128 => Some(("attention_tiles_d128", 4, 1)),
        256 => Some(("attention_tiles_d256", 4, 2)),
        512 => Some(("attention_tiles_d512", 2, 4)),
        _ => None,
    };
    let is_aligned = [k_rows, v_rows].iter().all(|rows| rows.are_aligned(4 * dtype.size_in_bytes(), dtype));
    let tiles = tiles.filter(|_| is_aligned);
    let tiled = if tiles.is_some() { TILED } else { usize::MAX };
    let few = || batch.host.iter().filter(|sequence| sequence.tokens.len() < tiled);
    let longest = batch.host.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(0);

    let context = few().map(|sequence| sequence.context_len).max().unwrap_or(1);
    let keys = params.window.map_or(context, |window| context.min(window));
    let queries = few().map(|sequence| sequence.tokens.len()).sum::<usize>();
    let splits = if queries * hq < ENOUGH_THREADGROUPS { keys.div_ceil(KEYS_OF_PART).clamp(1, PARTS) } else { 1 };

    let word = |size: usize| size.min(u32::MAX as usize) as u32;
    let mut sizes = [q_rows.words(), k_rows.words(), v_rows.words()].concat();
    sizes.extend([batch.num_sequences(), hq, hk, d, block_size.unwrap_or(1)].map(word));
    sizes.extend([batch.block_tables.dim(1)?, splits].map(word));
    sizes.extend([u32::from(params.mask == Mask::Causal), params.window.map_or(u32::MAX, word), word(tiled)]);
    sizes.extend([params.scale.to_bits(), params.softcap.unwrap_or(0.0).to_bits()]);

    let mut out = backend.allocate(n * hq * d, dtype)?;
    let mut partial = match splits {
        1 => None,
        _ => Some(backend.allocate(n * hq * splits * (2 + d), DType::F32)?),
    };
    let arrays = [&batch.cu_seqlens, &batch.context_lens, &batch.block_tables].map(Operand::new);
    let run = |source,
               kernel,
               constants,
               threadgroups,
               threads,
               out: &mut B::Storage,
               partial: Option<&mut B::Storage>| {
        let mut arguments = vec![
            Argument::Write(out, 0),
            Argument::Read(q, q_rows.start),
            Argument::Read(k, k_rows.start),
            Argument::Read(v, v_rows.start),
        ];
        for array in &arrays {
            arguments.push(array.metal::<B>()?);
        }
        arguments.push(Argument::Words(sizes.clone()));
        arguments.extend(partial.map(|partial| Argument::Write(partial, 0)));
        let variant = float(dtype)?;
        backend.launch(Launch { source, kernel, variant, constants, threadgroups, threads: [threads, 1, 1], arguments })
    };
    if let Some((kernel, strips, shares)) = tiles.filter(|_| longest >= tiled) {
        let groups = (longest * (hq / hk)).div_ceil(strips * STRIP);
        let (threadgroups, threads) = ([groups, hk, batch.num_sequences()], strips * shares * LANES);
        run(&TILES, kernel, vec![block_size.is_some()], threadgroups, threads, &mut out, None)?;
    }
    if queries > 0 {
        let kernel = match d {
            64 => "attention_rows_d64",
            128 => "attention_rows_d128",
            256 => "attention_rows_d256",
            _ => "attention_rows_any",
        };
        let constants = vec![block_size.is_some(), splits > 1];
        run(&SOURCE, kernel, constants, [hq, n, splits], SIMDGROUPS * LANES, &mut out, partial.as_mut())?;
    }
    if let Some(partial) = &partial {
        backend.launch(Launch {
            source: &SOURCE,
            kernel: "attention_merge",
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [hq, n, 1],
            threads: [d.next_multiple_of(LANES).min(SIMDGROUPS * LANES), 1, 1],
            arguments: vec![
                Argument::Write(&mut out, 0),
                Argument::Read(partial, 0),
                arrays[0].metal::<B>()?,
                Argument::Words([batch.num_sequences(), hq, splits, d, tiled].map(word).to_vec()),
            ],
        })?;
    }
    Ok(out)
}
