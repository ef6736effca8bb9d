use candle_core::{DType, Device};

use super::*;
use crate::testing::{Random, devices, values};

/// One rounding of the exact sum, whatever the length and however it is cut into pieces.
#[test]
fn sums_are_rounded_once() -> Result<()> {
    let mut random = Random::new(1);
    for device in devices() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for shape in [vec![0], vec![1], vec![3, 7], vec![5, 8], vec![130, 1000]] {
                let x = random.tensor(&shape, 1.0, dtype, &Device::Cpu)?;
                let y = random.tensor(&shape, 1.0, dtype, &Device::Cpu)?;
                let want: Vec<f32> = values(&x)?.iter().zip(values(&y)?).map(|(x, y)| x + y).collect();
                let want = Tensor::from_vec(want, shape.clone(), &Device::Cpu)?.to_dtype(dtype)?;
                let got = add(&x.to_device(&device)?, &y.to_device(&device)?)?;
                assert_eq!((got.dims(), got.dtype()), (&shape[..], dtype));
                assert_eq!(values(&got)?, values(&want)?, "{shape:?} {dtype:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn views_are_taken_as_they_are() -> Result<()> {
    let x = Tensor::arange(0f32, 24.0, &Device::Cpu)?.reshape((4, 6))?;
    let got = add(&x.narrow(1, 1, 2)?, &x.narrow(1, 4, 2)?)?;
    assert_eq!(got.to_vec2::<f32>()?, [[5.0, 7.0], [17.0, 19.0], [29.0, 31.0], [41.0, 43.0]]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
    assert!(add(&x, &Tensor::zeros((3, 2), DType::F32, &Device::Cpu)?).is_err());
    assert!(add(&x, &Tensor::zeros((2, 3), DType::F16, &Device::Cpu)?).is_err());
    Ok(())
}
