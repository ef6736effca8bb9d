//! The device memory behind pages and slots.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

/// What one layer keeps between steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheSpec {
    /// Keys and values, in pages: of every token, or with `Some(window)` of the last `window` tokens.
    KeyValue { num_kv_heads: usize, head_dim: usize, window: Option<usize> },
    /// The last `conv_width - 1` inputs of a convolution over `conv_dim` channels, and a `[value_dim, key_dim]`
    /// state per head, in slots.
    Recurrent { conv_dim: usize, conv_width: usize, num_heads: usize, value_dim: usize, key_dim: usize },
    /// Nothing: the layer reads another layer's pages, or needs none.
    None,
}

/// How much memory a cache takes, and in what form.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    pub num_blocks: usize,
    /// Of layers with a window, which have blocks of their own.
    pub num_window_blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
    pub num_slots: usize,
    /// Of keys and values; convolution windows and states are f32.
    pub dtype: DType,
    pub device: Device,
}

/// Every layer's pages and slots. Blocks and slots are only numbers here: who owns them is decided elsewhere,
/// and nothing is ever cleared, because a sequence's first step ignores what its slot and blocks hold.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<LayerCache>,
    config: CacheConfig,
}

#[derive(Debug)]
enum LayerCache {
    KeyValue { kv: Tensor, windowed: bool },
    Recurrent { conv: Tensor, state: Tensor },
    None,
}

/// Zeros, of which the CPU's take no memory before they are first written: candle writes those of 16 bits at once.
fn zeros(shape: (usize, usize, usize, usize, usize), dtype: DType, device: &Device) -> Result<Tensor> {
    let count = Shape::from(shape).elem_count();
    match dtype {
        DType::F16 if device.is_cpu() => Tensor::from_vec(vec![0u16; count].reinterpret_into::<f16>(), shape, device),
        DType::BF16 if device.is_cpu() => Tensor::from_vec(vec![0u16; count].reinterpret_into::<bf16>(), shape, device),
        _ => Tensor::zeros(shape, dtype, device),
    }
}

/// What a cache tensor holds along its first or second dimension.
enum Kind {
    Blocks,
    WindowBlocks,
    Slots,
}

impl Cache {
    /// Allocates pages `[2, num_blocks, block_size, num_kv_heads, head_dim]` and slots
    /// `[num_slots, conv_dim, conv_width - 1]` and `[num_slots, num_heads, value_dim, key_dim]` for each layer.
    ///
    /// # Errors
    ///
    /// The device has not enough memory.
    pub fn new(specs: &[CacheSpec], config: CacheConfig) -> Result<Self> {
        let CacheConfig { num_blocks, num_window_blocks, block_size, num_slots, dtype, ref device } = config;
        let layers = specs
            .iter()
            .map(|spec| {
                Ok(match *spec {
                    CacheSpec::KeyValue { num_kv_heads, head_dim, window } => {
                        let blocks = if window.is_some() { num_window_blocks } else { num_blocks };
                        let kv = zeros((2, blocks, block_size, num_kv_heads, head_dim), dtype, device)?;
                        LayerCache::KeyValue { kv, windowed: window.is_some() }
                    }
                    CacheSpec::Recurrent { conv_dim, conv_width, num_heads, value_dim, key_dim } => {
                        LayerCache::Recurrent {
                            conv: Tensor::zeros((num_slots, conv_dim, conv_width - 1), DType::F32, device)?,
                            state: Tensor::zeros((num_slots, num_heads, value_dim, key_dim), DType::F32, device)?,
                        }
                    }
                    CacheSpec::None => LayerCache::None,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { layers, config })
    }

    /// How the cache was made.
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// The pages of `layer`.
    ///
    /// # Errors
    ///
    /// The layer keeps none.
    pub fn kv(&self, layer: usize) -> Result<&Tensor> {
        match self.layers.get(layer) {
            Some(LayerCache::KeyValue { kv, .. }) => Ok(kv),
            _ => bail!("cache: layer {layer} keeps no keys and values"),
        }
    }

    /// The convolution windows of `layer`.
    ///
    /// # Errors
    ///
    /// The layer keeps none.
    pub fn conv(&self, layer: usize) -> Result<&Tensor> {
        match self.layers.get(layer) {
            Some(LayerCache::Recurrent { conv, .. }) => Ok(conv),
            _ => bail!("cache: layer {layer} keeps no convolution window"),
        }
    }

    /// The recurrent states of `layer`.
    ///
    /// # Errors
    ///
    /// The layer keeps none.
    pub fn state(&self, layer: usize) -> Result<&Tensor> {
        match self.layers.get(layer) {
            Some(LayerCache::Recurrent { state, .. }) => Ok(state),
            _ => bail!("cache: layer {layer} keeps no recurrent state"),
        }
    }

    /// Copies every layer's window and state from slot `from` to slot `to`: what a checkpoint is made of.
    ///
    /// # Errors
    ///
    /// A slot lies outside the cache.
    pub fn copy_slot(&mut self, from: u32, to: u32) -> Result<()> {
        for layer in &self.layers {
            if let LayerCache::Recurrent { conv, state } = layer {
                for tensor in [conv, state] {
                    tensor.slice_set(&tensor.narrow(0, from as usize, 1)?.copy()?, 0, to as usize)?;
                }
            }
        }
        Ok(())
    }

    /// Copies the keys and values of every layer without a window from block `from` to block `to`.
    ///
    /// # Errors
    ///
    /// A block lies outside the cache.
    pub fn copy_block(&mut self, from: u32, to: u32) -> Result<()> {
        self.copy_pages(false, from, to)
    }

    /// As [`Cache::copy_block`], for the layers with a window.
    ///
    /// # Errors
    ///
    /// A block lies outside the cache.
    pub fn copy_window_block(&mut self, from: u32, to: u32) -> Result<()> {
        self.copy_pages(true, from, to)
    }

    fn copy_pages(&mut self, of_windows: bool, from: u32, to: u32) -> Result<()> {
        for layer in &self.layers {
            match layer {
                LayerCache::KeyValue { kv, windowed } if *windowed == of_windows => {
                    kv.slice_set(&kv.narrow(1, from as usize, 1)?.force_contiguous()?, 1, to as usize)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Copies blocks and slots to the host: `layer.{i}.kv` `[2, blocks, block_size, num_kv_heads, head_dim]`,
    /// `layer.{i}.conv` and `layer.{i}.state` `[slots, ..]`, in the order given. Each block comes with the number of
    /// tokens that are kept of it; the others become zeros, because they may be another sequence's.
    ///
    /// # Errors
    ///
    /// A block or slot lies outside the cache.
    pub fn export(
        &self,
        blocks: &[(u32, usize)],
        window_blocks: &[(u32, usize)],
        slots: &[u32],
    ) -> Result<HashMap<String, Tensor>> {
        let device = &self.config.device;
        let take = |tensor: &Tensor, ids: &[u32], dim| {
            tensor.index_select(&Tensor::new(ids, device)?, dim)?.to_device(&Device::Cpu)
        };
        let take_blocks = |kv: &Tensor, blocks: &[(u32, usize)]| {
            let ids: Vec<u32> = blocks.iter().map(|(id, _)| *id).collect();
            let kv = take(kv, &ids, 1)?;
            let block_size = self.config.block_size;
            for (index, (_, rows)) in blocks.iter().enumerate().filter(|(_, (_, rows))| *rows < block_size) {
                kv.narrow(1, index, 1)?.narrow(2, *rows, block_size - rows)?.zero_set()?;
            }
            Ok::<_, candle_core::Error>(kv)
        };
        let mut tensors = HashMap::new();
        for (name, tensor, kind) in self.named() {
            let tensor = match kind {
                Kind::Blocks if !blocks.is_empty() => take_blocks(tensor, blocks)?,
                Kind::WindowBlocks if !window_blocks.is_empty() => take_blocks(tensor, window_blocks)?,
                Kind::Slots if !slots.is_empty() => take(tensor, slots, 0)?,
                _ => continue,
            };
            tensors.insert(name, tensor);
        }
        Ok(tensors)
    }

    /// Puts back what [`Cache::export`] gave: its block `from` goes to block `to` for each `(from, to)`, slots likewise.
    ///
    /// # Errors
    ///
    /// A tensor is missing or has not the shape and dtype of this cache; a block or slot lies outside.
    pub fn import(
        &mut self,
        tensors: &HashMap<String, Tensor>,
        blocks: &[(u32, u32)],
        window_blocks: &[(u32, u32)],
        slots: &[(u32, u32)],
    ) -> Result<()> {
        for (name, target, kind) in self.named() {
            let (moves, dim) = match kind {
                Kind::Blocks => (blocks, 1),
                Kind::WindowBlocks => (window_blocks, 1),
                Kind::Slots => (slots, 0),
            };
            if moves.is_empty() {
                continue;
            }
            let Some(source) = tensors.get(&name) else { bail!("cache: {name} is missing") };
            let mut expected = target.dims().to_vec();
            expected[dim] = source.dims().get(dim).copied().unwrap_or(0);
            if source.dims() != expected || source.dtype() != target.dtype() {
                bail!(
                    "cache: {name} is {:?} in {}, expected {expected:?} in {}",
                    source.dims(),
                    source.dtype().as_str(),
                    target.dtype().as_str()
                )
            }
            for &(from, to) in moves {
                let part = source.narrow(dim, from as usize, 1)?.force_contiguous()?;
                target.slice_set(&part.to_device(&self.config.device)?, dim, to as usize)?;
            }
        }
        Ok(())
    }

    /// Every tensor with its name and what its rows are.
    fn named(&self) -> impl Iterator<Item = (String, &Tensor, Kind)> {
        self.layers.iter().enumerate().flat_map(|(index, layer)| {
            let named = |part: &str| format!("layer.{index}.{part}");
            match layer {
                LayerCache::KeyValue { kv, windowed: false } => vec![(named("kv"), kv, Kind::Blocks)],
                LayerCache::KeyValue { kv, windowed: true } => vec![(named("kv"), kv, Kind::WindowBlocks)],
                LayerCache::Recurrent { conv, state } => {
                    vec![(named("conv"), conv, Kind::Slots), (named("state"), state, Kind::Slots)]
                }
                LayerCache::None => vec![],
            }
        })
    }

    /// Fills everything with NaN, so that a test sees an element read before it is written.
    ///
    /// # Errors
    ///
    /// The device has not enough memory.
    #[doc(hidden)]
    pub fn poison(&mut self) -> Result<()> {
        for layer in &mut self.layers {
            let nan =
                |tensor: &Tensor| Tensor::full(f32::NAN, tensor.shape(), tensor.device())?.to_dtype(tensor.dtype());
            match layer {
                LayerCache::KeyValue { kv, .. } => *kv = nan(kv)?,
                LayerCache::Recurrent { conv, state } => (*conv, *state) = (nan(conv)?, nan(state)?),
                LayerCache::None => {}
            }
        }
        Ok(())
    }
}

/// Bytes of one block of `block_size` tokens, over all layers without a window.
pub fn bytes_per_block(specs: &[CacheSpec], block_size: usize, dtype: DType) -> usize {
    values_per_token(specs, false) * block_size * dtype.size_in_bytes()
}

/// Bytes of one block of `block_size` tokens, over all layers with a window.
pub fn bytes_per_window_block(specs: &[CacheSpec], block_size: usize, dtype: DType) -> usize {
    values_per_token(specs, true) * block_size * dtype.size_in_bytes()
}

/// Tokens of the widest window, `None` if no layer has one.
pub fn window(specs: &[CacheSpec]) -> Option<usize> {
    let windows = specs.iter().filter_map(|spec| match spec {
        CacheSpec::KeyValue { window, .. } => *window,
        _ => None,
    });
    windows.max()
}

/// Values of one token, over the layers with a window or those without.
fn values_per_token(specs: &[CacheSpec], windowed: bool) -> usize {
    let values = specs.iter().map(|spec| match spec {
        CacheSpec::KeyValue { num_kv_heads, head_dim, window } if window.is_some() == windowed => {
            2 * num_kv_heads * head_dim
        }
        _ => 0,
    });
    values.sum()
}

/// Bytes of one slot, over all layers: f32 windows and states.
pub fn bytes_per_slot(specs: &[CacheSpec]) -> usize {
    let values: usize = specs
        .iter()
        .map(|spec| match spec {
            CacheSpec::Recurrent { conv_dim, conv_width, num_heads, value_dim, key_dim } => {
                conv_dim * (conv_width - 1) + num_heads * value_dim * key_dim
            }
            _ => 0,
        })
        .sum();
    values * DType::F32.size_in_bytes()
}
