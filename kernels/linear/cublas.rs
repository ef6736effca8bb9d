//! Products of many rows on CUDA, by cuBLASLt, which adds the bias and the residual stream before its one rounding.
//!
//! What it needs to know of a product is made once for each shape and kept.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t;
use candle_core::cuda_backend::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys::{
    self, cublasComputeType_t as ComputeType, cublasLtEpilogue_t as Epilogue,
    cublasLtMatmulDescAttributes_t as Attribute, cublasLtMatmulPreferenceAttributes_t as Preference,
    cudaDataType_t as DataType,
};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::{CudaDevice, DType, Error, Layout, Result, Shape, Tensor};

use crate::cpu::{Operand, as_rows};
use crate::cuda::{self, PerGpu};

/// What the library may use for itself, as much as it asks for on compute capability 9.0.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Shapes that are kept. A step may have any number of tokens, so they are forgotten all at once and found again.
const MAX_PLANS: usize = 4096;

/// `y = x weight^T + bias + onto`: `x` `[N, I]` in rows, `weight` `[O, I]` contiguous, `bias` `[O]`, `onto` `[N, O]` in
/// rows, all of one dtype. `None` where the library does not take it.
pub fn linear(
    device: &CudaDevice,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    onto: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let ((rows, inner), (outer, _), dtype) = (x.dims2()?, weight.dims2()?, x.dtype());
    let shape = Shape::from((rows, outer));
    let takes = weight.dtype() == dtype
        && weight.is_contiguous()
        && shape.elem_count() > 0
        && inner > 0
        && onto.is_none_or(|onto| onto.shape() == &shape && onto.dtype() == dtype);
    let Some(data_type) = data_type(dtype).filter(|_| takes) else { return Ok(None) };
    let (x, bias, onto) = (as_rows(x)?, bias.map(Tensor::contiguous).transpose()?, onto.map(as_rows).transpose()?);
    let stream = device.cuda_stream();
    let (x, weight) = (Operand::new(&x), Operand::new(weight));
    let [bias, onto] = [&bias, &onto].map(|tensor| tensor.as_ref().map(Operand::new));
    let (x, weight) = (x.cuda_rows(&stream)?, weight.cuda(&stream)?);
    let bias = bias.as_ref().map(|bias| bias.cuda(&stream)).transpose()?;
    let onto = onto.as_ref().map(|onto| onto.cuda_rows(&stream)).transpose()?;
    if bias.as_ref().is_some_and(|bias| !bias.is_aligned(16)) {
        return Ok(None);
    }

    static LIBRARIES: PerGpu<Mutex<Library>> = PerGpu::new();
    let library = LIBRARIES.get(device, || {
        stream.context().bind_to_thread().w()?;
        Library::new().map(Mutex::new)
    })?;
    // A panic elsewhere leaves nothing half done: plans are whole or not there.
    let mut library = library.lock().unwrap_or_else(PoisonError::into_inner);
    let key = Key {
        data_type,
        sizes: [rows, inner, outer],
        strides: [x.strides[0], onto.as_ref().map_or(0, |onto| onto.strides[0])],
        has_bias: bias.is_some(),
        has_onto: onto.is_some(),
        alignments: [weight.value, x.address.value, onto.as_ref().map_or(0, |onto| onto.address.value)].map(alignment),
    };
    let (handle, workspace) = (library.handle.0, library.workspace(device)?);
    let Some(plan) = library.plan(key)? else { return Ok(None) };
    if let Some(bias) = &bias {
        plan.product.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.value).map_err(failed)?;
    }
    let y = cuda::output(device, shape.clone(), dtype, |y| {
        let y = cuda::write(y, &Layout::contiguous(&shape), &stream)?;
        let (one, beta) = (1f32, if onto.is_some() { 1f32 } else { 0f32 });
        let onto = onto.as_ref().map_or(y.value, |onto| onto.address.value);
        // SAFETY: the layouts describe the operands, whose addresses are held until the launch is queued; the workspace
        // belongs to this stream alone.
        unsafe {
            result::matmul(
                handle,
                plan.product.0,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                weight.value as *const c_void,
                plan.weight.0,
                x.address.value as *const c_void,
                plan.x.0,
                onto as *const c_void,
                plan.onto.0,
                y.value as *mut c_void,
                plan.y.0,
                &plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.cu_stream().cast(),
            )
        }
        .map_err(failed)
    })?;
    Ok(Some(y))
}

fn data_type(dtype: DType) -> Option<DataType> {
    match dtype {
        DType::F32 => Some(DataType::CUDA_R_32F),
        DType::F16 => Some(DataType::CUDA_R_16F),
        DType::BF16 => Some(DataType::CUDA_R_16BF),
        _ => None,
    }
}

/// What the address is known to be a multiple of. No more than the kernels need, so that a product takes the same one
/// wherever its operands lie.
fn alignment(address: u64) -> u32 {
    const NEEDED: u32 = 16;
    (1 << address.trailing_zeros().min(8)).min(NEEDED)
}

fn failed(error: CublasError) -> Error {
    Error::Msg(format!("cublasLt: {error}"))
}

/// Everything that the choice of an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    data_type: DataType,
    /// Rows, inner, outer.
    sizes: [usize; 3],
    /// From row to row of x and of onto, in values.
    strides: [u32; 2],
    has_bias: bool,
    has_onto: bool,
    /// Of weight, x and onto, in bytes.
    alignments: [u32; 3],
}

struct Library {
    handle: Handle,
    /// `None` for what the library does not take.
    plans: HashMap<Key, Option<Plan>>,
    /// By stream: what runs on one goes in order.
    workspaces: HashMap<usize, CudaSlice<u8>>,
}

impl Library {
    fn new() -> Result<Self> {
        let handle = result::create_handle().map_err(failed)?;
        Ok(Self { handle: Handle(handle), plans: HashMap::new(), workspaces: HashMap::new() })
    }

    fn plan(&mut self, key: Key) -> Result<Option<&Plan>> {
        if self.plans.len() == MAX_PLANS && !self.plans.contains_key(&key) {
            self.plans.clear();
        }
        Ok(match self.plans.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Plan::new(&self.handle, key).map_err(failed)?),
        }
        .as_ref())
    }

    fn workspace(&mut self, device: &CudaDevice) -> Result<u64> {
        let stream = device.cuda_stream();
        let workspace = match self.workspaces.entry(stream.cu_stream() as usize) {
            Entry::Occupied(known) => known.into_mut(),
            // SAFETY: the library writes before it reads.
            Entry::Vacant(new) => new.insert(unsafe { stream.alloc::<u8>(WORKSPACE_BYTES) }.w()?),
        };
        Ok(workspace.device_ptr(&stream).0)
    }
}

/// A product as the library sees it: matrices are stored by columns there, so rows of ours are columns, and
/// `y^T = weight x^T`.
struct Plan {
    product: Product,
    weight: Matrix,
    x: Matrix,
    onto: Matrix,
    y: Matrix,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(handle: &Handle, key: Key) -> std::result::Result<Option<Self>, CublasError> {
        let Key { data_type, sizes: [rows, inner, outer], strides: [x_stride, onto_stride], .. } = key;
        let product = Product(result::create_matmul_desc(ComputeType::CUBLAS_COMPUTE_32F, DataType::CUDA_R_32F)?);
        let transposed = cublasOperation_t::CUBLAS_OP_T;
        product.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
        if key.has_bias {
            product.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &Epilogue::CUBLASLT_EPILOGUE_BIAS)?;
        }
        let matrix = |columns: usize, rows: usize, stride: usize| {
            result::create_matrix_layout(data_type, columns as u64, rows as u64, stride as i64).map(Matrix)
        };
        // A single row may have any stride.
        let x_stride = (x_stride as usize).max(inner);
        let onto_stride = if key.has_onto { (onto_stride as usize).max(outer) } else { outer };
        let (weight, x) = (matrix(inner, outer, inner)?, matrix(inner, rows, x_stride)?);
        let (onto, y) = (matrix(outer, rows, onto_stride)?, matrix(outer, rows, outer)?);
        let preference = Preferences(result::create_matmul_pref()?);
        preference.set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        let [of_weight, of_x, of_onto] = key.alignments;
        let of_y = 16u32;
        preference.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &of_weight)?;
        preference.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &of_x)?;
        let of_onto = if key.has_onto { of_onto } else { of_y };
        preference.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &of_onto)?;
        preference.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &of_y)?;
        // SAFETY: all descriptions are alive.
        let found =
            unsafe { result::get_matmul_algo_heuristic(handle.0, product.0, weight.0, x.0, onto.0, y.0, preference.0) };
        match found {
            Ok(found) => Ok(Some(Self { product, weight, x, onto, y, algorithm: found.algo })),
            // Not of these shapes or alignments.
            Err(_) => Ok(None),
        }
    }
}

/// The library itself, open for as long as the process lives.
struct Handle(sys::cublasLtHandle_t);

struct Matrix(sys::cublasLtMatrixLayout_t);

struct Product(sys::cublasLtMatmulDesc_t);

struct Preferences(sys::cublasLtMatmulPreference_t);

// SAFETY: the library's objects may be used from any thread, one at a time: a mutex is around them.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Send for Matrix {}
// SAFETY: as above.
unsafe impl Send for Product {}

impl Product {
    fn set<T>(&self, attribute: Attribute, value: &T) -> std::result::Result<(), CublasError> {
        // SAFETY: the description is alive, and the library copies the value of the attribute's type.
        unsafe {
            result::set_matmul_desc_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
        }
    }
}

impl Preferences {
    fn set<T>(&self, attribute: Preference, value: &T) -> std::result::Result<(), CublasError> {
        // SAFETY: as for a product.
        unsafe {
            result::set_matmul_pref_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
        }
    }
}

macro_rules! destroyed {
    ($($type:ident $destroy:ident),*) => {$(
        impl Drop for $type {
            fn drop(&mut self) {
                // SAFETY: made by the library, and destroyed nowhere else. It fails for what it does not know alone.
                let _ = unsafe { result::$destroy(self.0) };
            }
        }
    )*};
}
destroyed!(Matrix destroy_matrix_layout, Product destroy_matmul_desc, Preferences destroy_matmul_pref);
