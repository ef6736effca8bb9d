//! The choice of each row's token: the most likely one, or one drawn from the most likely ones.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
mod metal;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::batch::Overwrite;
use crate::device::numbers;

/// Stands for a row that leaves nothing to choose from.
pub const NOTHING: u32 = u32::MAX;

/// The index of the largest of the first `limit` values of each row, the lowest of equal ones; [`NOTHING`] for a row with
/// NaN or +inf among them, or with nothing finite.
///
/// `x` `[n, V]` in f32, f16 or bf16. Returns `[n]` in u32. On CUDA and Metal nothing waits for the result.
///
/// # Errors
///
/// `x` has another rank or dtype, or `limit` is not from 1 to `V`.
///
/// Devices: CUDA, Metal; elsewhere on the host.
pub fn argmax(x: &Tensor, limit: usize) -> Result<Tensor> {
    let (n, _) = check("argmax", x, limit)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = x.device() {
        return cuda::argmax(device, &x.contiguous()?, limit);
    }
    on_metal!(x, backend => metal::argmax(backend, &x.contiguous()?, limit));
    let indices: Vec<u32> = rows(x, limit)?.iter().map(|row| largest(row)).collect();
    Tensor::from_vec(indices, n, x.device())
}

/// Largest [`Draw::top_k`].
pub const MAX_K: usize = 64;

/// How one row's token is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; above 0.
    pub temperature: f32,
    /// Most likely tokens that take part, 1 to [`MAX_K`].
    pub top_k: usize,
    /// Of those, the most likely up to and including the one that brings their probability to this.
    pub top_p: f32,
    /// Of those, the ones at least so many times as likely as the most likely one.
    pub min_p: f32,
    /// From 0 to below 1: where the draw falls in the probabilities, laid end to end by index.
    pub position: f32,
}

impl Draw {
    /// The most likely token.
    pub const MOST_LIKELY: Self = Self { temperature: 1.0, top_k: 1, top_p: 1.0, min_p: 0.0, position: 0.0 };

    const WORDS: usize = 5;

    fn words(&self) -> [u32; Self::WORDS] {
        let &Self { temperature, top_k, top_p, min_p, position } = self;
        [temperature.to_bits(), top_k as u32, top_p.to_bits(), min_p.to_bits(), position.to_bits()]
    }
}

/// The draws of a step's rows, on their device.
#[derive(Debug)]
pub struct Draws {
    /// `[n * WORDS]` u32
    words: Tensor,
    host: Vec<Draw>,
}

impl Draws {
    /// Brings `draws` to `device`.
    ///
    /// # Errors
    ///
    /// A `top_k` is not from 1 to [`MAX_K`], or the device has no memory left.
    pub fn new(draws: &[Draw], device: &Device) -> Result<Self> {
        Ok(Self { words: numbers(Self::words_of(draws)?, device)?, host: draws.to_vec() })
    }

    /// Puts as many others in their place, at the same address.
    ///
    /// # Errors
    ///
    /// As [`Draws::new`]; also if there are more or fewer than before.
    pub fn refill(&mut self, draws: &[Draw]) -> Result<()> {
        if draws.len() != self.host.len() {
            bail!("draws: {} of them, expected {} as before", draws.len(), self.host.len())
        }
        self.words.inplace_op1(&Overwrite(Self::words_of(draws)?))?;
        self.host = draws.to_vec();
        Ok(())
    }

    fn words_of(draws: &[Draw]) -> Result<Vec<u32>> {
        if let Some(draw) = draws.iter().find(|draw| !(1..=MAX_K).contains(&draw.top_k)) {
            bail!("draws: top_k is {}, expected 1 to {MAX_K}", draw.top_k)
        }
        Ok(draws.iter().flat_map(Draw::words).collect())
    }
}

/// Draws a token of each row:
///
/// ```text
/// best   = the top_k largest of the first `limit` values above -inf, the lowest index first of equal ones
/// w[i]   = exp((x[i] - max) / temperature)                       of the best
/// kept   = the best ones until their weight reaches top_p of all, of which w >= min_p
/// y      = the kept index, ascending, in which position * sum(w of the kept) falls
/// ```
///
/// `x` `[n, V]` in f32, f16 or bf16; `draws` for `n` rows. Returns `[n]` in u32, [`NOTHING`] where [`argmax`] says so. On
/// CUDA and Metal nothing waits for the result. Weights are f32; their sums are f64, on Metal two f32.
///
/// # Errors
///
/// As [`argmax`], or `draws` is for another number of rows.
///
/// Devices: CUDA, Metal; elsewhere on the host.
pub fn sample(x: &Tensor, limit: usize, draws: &Draws) -> Result<Tensor> {
    let (n, _) = check("sample", x, limit)?;
    if draws.host.len() != n {
        bail!("sample: draws for {} rows, x is {:?}", draws.host.len(), x.dims())
    }
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = x.device()
        && samples_on(x.device(), limit)
    {
        return cuda::sample(device, &x.contiguous()?, limit, &draws.words);
    }
    on_metal!(x, backend => metal::sample(backend, &x.contiguous()?, limit, &draws.words));
    let indices: Vec<u32> = rows(x, limit)?.iter().zip(&draws.host).map(|(row, draw)| drawn(row, draw)).collect();
    Tensor::from_vec(indices, n, x.device())
}

/// Whether [`sample`] of the first `limit` values runs on `device`, and not on the host.
pub fn samples_on(device: &Device, limit: usize) -> bool {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return limit <= cuda::MAX_LIMIT;
    }
    let _ = limit;
    device.is_metal()
}

fn check(op: &str, x: &Tensor, limit: usize) -> Result<(usize, usize)> {
    let (n, width) = x.dims2()?;
    if limit == 0 || limit > width || !matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        bail!("{op}: {limit} values of x {:?} {:?}, expected 1 to {width} floats", x.dims(), x.dtype())
    }
    Ok((n, width))
}

fn rows(x: &Tensor, limit: usize) -> Result<Vec<Vec<f32>>> {
    x.narrow(1, 0, limit)?.to_dtype(DType::F32)?.to_vec2::<f32>()
}

fn largest(row: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, NOTHING);
    for (index, &value) in (0..).zip(row) {
        if value.is_nan() || value == f32::INFINITY {
            return NOTHING;
        }
        if value > best.0 {
            best = (value, index);
        }
    }
    best.1
}

fn drawn(row: &[f32], draw: &Draw) -> u32 {
    let best = largest(row);
    let Some(&max) = row.get(best as usize) else { return NOTHING };
    let mut kept: Vec<(u32, f32)> =
        (0..).zip(row.iter().copied()).filter(|&(_, value)| value > f32::NEG_INFINITY).collect();
    kept.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0)));
    kept.truncate(draw.top_k);
    kept.iter_mut().for_each(|(_, value)| *value = ((*value - max) / draw.temperature).exp());
    let mass = |kept: &[(u32, f32)]| kept.iter().map(|&(_, weight)| f64::from(weight)).sum::<f64>();
    if draw.top_p < 1.0 {
        let (wanted, mut held) = (f64::from(draw.top_p) * mass(&kept), 0.0);
        kept.retain(|&(_, weight)| {
            let is_wanted = held == 0.0 || held < wanted;
            held += f64::from(weight);
            is_wanted
        });
    }
    kept.retain(|&(_, weight)| weight >= draw.min_p && weight > 0.0);
    kept.sort_by_key(|&(index, _)| index);
    let (target, mut reached) = (f64::from(draw.position) * mass(&kept), 0.0);
    let fallen = kept.iter().find(|&&(_, weight)| {
        reached += f64::from(weight);
        reached > target
    });
    fallen.or(kept.last()).map_or(best, |&(index, _)| index)
}
