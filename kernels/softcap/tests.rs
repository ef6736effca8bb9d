//! The softcap against the reference, by hand, and at extreme inputs.

use candle_core::{DType, Device};

use super::*;
use crate::metal::emulator::emulated;
use crate::simd::tests::portable;
use crate::testing::{Random, assert_close, devices, op_limit, values};

fn run(device: &Device) -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for shape in [&[1][..], &[7, 9], &[2, 65, 3], &[3, 40_000]] {
            for cap in [0.5, 30.0] {
                let x = Random::new(shape.len() as u64).tensor(shape, 2.0 * cap, dtype, device)?;
                let got = softcap(&x, cap)?;
                assert_eq!((got.dims(), got.dtype()), (shape, dtype));
                let name = format!("softcap {shape:?} {cap} {dtype:?} {device:?}");
                assert_close(&name, &values(&got)?, &reference::softcap(&values(&x)?, cap), op_limit(dtype));
            }
        }
    }
    Ok(())
}

#[test]
fn softcap_is_the_reference() -> Result<()> {
    devices().iter().try_for_each(run)
}

#[test]
fn metal_kernel_is_the_reference() -> Result<()> {
    emulated(|| {
        run(&Device::Cpu)?;
        hand_computed()
    })
}

#[test]
fn portable_lanes_are_the_reference() -> Result<()> {
    portable(|| run(&Device::Cpu))
}

#[test]
fn hand_computed() -> Result<()> {
    let x = [0.0, 15.0, -30.0, 1e30, -1e30, f32::INFINITY];
    let got = values(&softcap(&Tensor::new(&x, &Device::Cpu)?, 30.0)?)?;
    // 30 tanh(1/2) and 30 tanh(-1), in 30 digits.
    assert_close("softcap", &got, &[0.0, 13.863_514, -22.847_825, 30.0, -30.0, 30.0], 1e-6);
    let nan = Tensor::new(&[f32::NAN], &Device::Cpu)?;
    assert!(values(&softcap(&nan, 30.0)?)?[0].is_nan());
    Ok(())
}

#[test]
fn refuses_other_caps() -> Result<()> {
    let x = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(softcap(&x, cap).is_err());
    }
    Ok(())
}
