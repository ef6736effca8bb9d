//! What every op's tests share: the devices present, poisoned buffers, deterministic inputs, one comparison.

use candle_core::{DType, Device, Result, Tensor};

#[cfg(feature = "emulator")]
pub use crate::metal::emulator::{emulated, is_thorough, launched};

/// Asserts that `got` is `want` up to `limit`: the RMS of the difference over the RMS of `want`, and no
/// element off by more than `20 * limit * max|want|`. NaN never passes.
///
/// # Panics
///
/// With the name, both figures, and the worst element's index and values.
pub fn assert_close(name: &str, got: &[f32], want: &[f32], limit: f32) {
    assert_eq!(got.len(), want.len(), "{name}: {} values, expected {}", got.len(), want.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let norm: f64 = want.iter().map(|&w| square(w)).sum();
    let error: f64 = got.iter().zip(want).map(|(&g, &w)| square(g - w)).sum();
    let ratio = (error / norm.max(f64::MIN_POSITIVE)).sqrt();
    let largest = want.iter().fold(0f32, |m, w| m.max(w.abs()));
    let (index, worst) = got
        .iter()
        .zip(want)
        .map(|(g, w)| (g - w).abs())
        .enumerate()
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .unwrap_or((0, 0.0));
    let close = error == 0.0 || (ratio <= f64::from(limit) && worst <= 20.0 * limit * largest);
    assert!(
        close,
        "{name}: rms error {ratio:.2e} of limit {limit:.0e}; worst at {index}: got {}, expected {}",
        got[index], want[index]
    );
}

/// The limit of `assert_close` for one op with operands of `dtype`.
pub fn op_limit(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 1e-3,
        _ => 5e-3,
    }
}

/// Every device that this build and machine can run.
pub fn devices() -> Vec<Device> {
    #[allow(unused_mut)] // grows only in builds with an accelerator
    let mut devices = vec![Device::Cpu];
    #[cfg(feature = "cuda")]
    match crate::device::cuda() {
        Ok(device) => devices.push(device),
        Err(error) => eprintln!("cuda: no kernel was tested: {error}"),
    }
    #[cfg(feature = "metal")]
    match crate::device::metal() {
        Ok(device) => devices.push(device),
        Err(error) => eprintln!("metal: no kernel was tested on a gpu: {error}"),
    }
    devices
}

/// A tensor of NaN: what caches hold before a test, so that reading an unwritten element shows.
pub fn poisoned(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::full(f32::NAN, shape, device)?.to_dtype(dtype)
}

/// Deterministic pseudo-random numbers for inputs (SplitMix64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next_u64() % bound as u64) as usize
    }

    /// Roughly normal with the given deviation.
    pub fn normal(&mut self, deviation: f32) -> f32 {
        let sum: f32 = (0..12).map(|_| (self.next_u64() >> 40) as f32 / (1u64 << 24) as f32).sum();
        (sum - 6.0) * deviation
    }

    /// `shape` filled with `normal(deviation)`, rounded to `dtype`.
    pub fn tensor(&mut self, shape: &[usize], deviation: f32, dtype: DType, device: &Device) -> Result<Tensor> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.normal(deviation)).collect();
        Tensor::from_vec(values, shape, device)?.to_dtype(dtype)
    }

    /// The numbers `0..len` in random order.
    pub fn permutation(&mut self, len: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..len as u32).collect();
        for i in (1..len).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

/// The values of a tensor of any float dtype on any device.
pub fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}
