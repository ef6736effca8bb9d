//! Products of few rows on CUDA: chooses the kernel by rows, dtype and what surrounds the product.

use candle_core::{CudaDevice, DType, Layout, Result, Shape, Tensor, bail};

use super::Around;
use crate::activation::Activation;
use crate::cpu::{Operand, as_rows};
use crate::cuda::{self, EarlyLaunch, Floats, Kernel, floats, modules};

/// A product of some number of rows: with one or two outputs a warp, or a gate and what it multiplies.
struct Kinds {
    one: Floats,
    two: Floats,
    gated: Floats,
}

/// By rows, from one.
static STREAM: [Kinds; 4] = [
    Kinds {
        one: floats!(LINEAR, "linear_1", "_one"),
        two: floats!(LINEAR, "linear_1", "_two"),
        gated: floats!(LINEAR, "linear_1", "_gated"),
    },
    Kinds {
        one: floats!(LINEAR, "linear_2", "_one"),
        two: floats!(LINEAR, "linear_2", "_two"),
        gated: floats!(LINEAR, "linear_2", "_gated"),
    },
    Kinds {
        one: floats!(LINEAR, "linear_3", "_one"),
        two: floats!(LINEAR, "linear_3", "_two"),
        gated: floats!(LINEAR, "linear_3", "_gated"),
    },
    Kinds {
        one: floats!(LINEAR, "linear_4", "_one"),
        two: floats!(LINEAR, "linear_4", "_two"),
        gated: floats!(LINEAR, "linear_4", "_gated"),
    },
];

/// With a norm of `x`, by rows.
static NORMED: [Kinds; 2] = [
    Kinds {
        one: floats!(LINEAR, "linear_1", "_one_normed"),
        two: floats!(LINEAR, "linear_1", "_two_normed"),
        gated: floats!(LINEAR, "linear_1", "_gated_normed"),
    },
    Kinds {
        one: floats!(LINEAR, "linear_2", "_one_normed"),
        two: floats!(LINEAR, "linear_2", "_two_normed"),
        gated: floats!(LINEAR, "linear_2", "_gated_normed"),
    },
];

/// On the matrix units: up to 8 and 16 rows, plain and gated.
static TILES_F16: [[Kernel; 2]; 2] = [
    [Kernel::new(&modules::LINEAR, "linear_tiles_f16_8"), Kernel::new(&modules::LINEAR, "linear_tiles_f16_8_gated")],
    [Kernel::new(&modules::LINEAR, "linear_tiles_f16_16"), Kernel::new(&modules::LINEAR, "linear_tiles_f16_16_gated")],
];
static TILES_BF16: [[Kernel; 2]; 2] = [
    [Kernel::new(&modules::LINEAR, "linear_tiles_bf16_8"), Kernel::new(&modules::LINEAR, "linear_tiles_bf16_8_gated")],
    [
        Kernel::new(&modules::LINEAR, "linear_tiles_bf16_16"),
        Kernel::new(&modules::LINEAR, "linear_tiles_bf16_16_gated"),
    ],
];

/// Of a block, as in the kernels.
const WARPS: usize = 8;
/// Outputs of a block on the matrix units.
const TILE: usize = 16;
const MAX_ROWS: usize = 16;
/// From this many outputs on there are enough warps with two each.
const MANY_OUTPUTS: usize = 8192;

/// The product with what surrounds it; `None` where these kernels do not take it.
pub fn linear(
    device: &CudaDevice,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    around: Around,
) -> Result<Option<Tensor>> {
    let ((rows, inner), (weight_rows, _), dtype) = (x.dims2()?, weight.dims2()?, x.dtype());
    let is_gated = around.gate.is_some();
    let on_tiles = rows > STREAM.len();
    let takes = weight.dtype() == dtype
        && (1..=MAX_ROWS).contains(&rows)
        && weight.is_contiguous()
        && !(is_gated && (bias.is_some() || around.onto.is_some() || weight_rows % 2 != 0))
        && match dtype {
            DType::F16 | DType::BF16 => inner.is_multiple_of(if on_tiles { 32 } else { 8 }),
            DType::F32 => !on_tiles && inner.is_multiple_of(4),
            _ => false,
        };
    if !takes || inner == 0 || weight_rows == 0 {
        return Ok(None);
    }
    let outer = if is_gated { weight_rows / 2 } else { weight_rows };
    let shape = Shape::from((rows, outer));
    if let Some(onto) = around.onto
        && (onto.shape() != &shape || onto.dtype() != dtype)
    {
        bail!("linear: onto is {:?} {:?}, expected {dtype:?} {:?}", onto.dims(), onto.dtype(), shape.dims())
    }
    let fused_norm = around.norm.filter(|_| rows <= NORMED.len());
    let x = match (around.norm, fused_norm) {
        (Some(norm), None) => norm.apply(x)?,
        _ => as_rows(x)?,
    };
    let norm_weight = fused_norm.map(|norm| norm.weight.contiguous()).transpose()?;
    let (bias, onto) = (bias.map(Tensor::contiguous).transpose()?, around.onto.map(as_rows).transpose()?);

    let stream = device.cuda_stream();
    let (x, weight) = (Operand::new(&x), Operand::new(weight));
    let [norm_weight, bias, onto] =
        [norm_weight.as_ref(), bias.as_ref(), onto.as_ref()].map(|tensor| tensor.map(Operand::new));
    let (x, weight) = (x.cuda_rows(&stream)?, weight.cuda(&stream)?);
    let norm_weight = norm_weight.as_ref().map(|weight| weight.cuda(&stream)).transpose()?;
    let bias = bias.as_ref().map(|bias| bias.cuda(&stream)).transpose()?;
    let onto = onto.as_ref().map(|onto| onto.cuda_rows(&stream)).transpose()?;
    let is_aligned = weight.is_aligned(16)
        && x.are_aligned(16, dtype)
        && norm_weight.as_ref().is_none_or(|weight| weight.is_aligned(16));
    if !is_aligned {
        return Ok(None);
    }
    let (kernel, outputs_per_block) = if on_tiles {
        let tiles = if dtype == DType::F16 { &TILES_F16 } else { &TILES_BF16 };
        (&tiles[usize::from(rows > 8)][usize::from(is_gated)], TILE)
    } else {
        let kinds = if fused_norm.is_some() { &NORMED[rows - 1] } else { &STREAM[rows - 1] };
        match is_gated {
            true => (kinds.gated.of(dtype)?, WARPS),
            false if outer >= MANY_OUTPUTS => (kinds.two.of(dtype)?, 2 * WARPS),
            false => (kinds.one.of(dtype)?, WARPS),
        }
    };
    let activation = match around.gate {
        None => 0u32,
        Some(Activation::Silu) => 1,
        Some(Activation::GeluTanh) => 2,
    };
    let config = cuda::grid(outer.div_ceil(outputs_per_block), (WARPS * 32, 1))?;
    let eps = fused_norm.map_or(0.0, |norm| norm.eps as f32);
    let [rows, inner, outer] = [rows, inner, outer].map(|size| size as u32);
    let [norm_weight, bias] = [&norm_weight, &bias].map(|address| address.as_ref().map_or(0, |address| address.value));
    let (onto, onto_stride) = onto.as_ref().map_or((0, 0), |onto| (onto.address.value, onto.strides[0]));
    let y = cuda::output(device, shape.clone(), dtype, |y| {
        let y = cuda::write(y, &Layout::contiguous(&shape), &stream)?;
        let mut launch = EarlyLaunch::new(device, kernel)?;
        launch.arg(&x.address.value).arg(&x.strides[0]).arg(&norm_weight).arg(&eps).arg(&weight.value).arg(&bias);
        launch.arg(&onto).arg(&onto_stride).arg(&y.value).arg(&rows).arg(&inner).arg(&outer).arg(&activation);
        // SAFETY: the arguments are the kernel's, in its order; shapes, dtypes and alignment were compared above.
        unsafe { launch.launch(config) }
    })?;
    Ok(Some(y))
}
