//! cuBLASLt itself: its handle and workspace, descriptions of products, the algorithms it offers, and the call.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtMatmulAlgo_t, cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreferenceAttributes_t as Preference, cublasLtReductionScheme_t,
    cudaDataType,
};

use super::context::{Device, LESS_MEMORY};
use super::product::{Epilogue, Matrix, Product, Shape};
use crate::error::{Error, Result};

type Called<T> = std::result::Result<T, CublasError>;

/// cuBLASLt, its workspace, and the algorithms that were chosen; none where it has none.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    pub chosen: Mutex<HashMap<Shape, Option<cublasLtMatmulAlgo_t>>>,
}

// SAFETY: NVIDIA documents the handle as usable from several threads at once.
unsafe impl Send for Blas {}
// SAFETY: as above; the table is behind a lock.
unsafe impl Sync for Blas {}

/// What NVIDIA recommends on Hopper.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

pub(super) fn blas_error(what: &str, error: CublasError) -> Error {
    let told = format!("cuBLASLt: cannot {what}: {:?}", error.0);
    match error.0 {
        sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Error::Device(format!("{told}: {LESS_MEMORY}")),
        _ => Error::DeviceFailed(told),
    }
}

impl Blas {
    pub fn open(device: &Device) -> Result<Self> {
        // SAFETY: asks whether a library of this name loads; nothing of it is called.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Device(
                "cuBLASLt was not found (libcublasLt.so): install NVIDIA's CUDA toolkit, or `pip install nvidia-cublas` and \
                 name its folder in LD_LIBRARY_PATH; `warpstep doctor` tells what is there"
                    .into(),
            ));
        }
        device.bind()?;
        let handle = result::create_handle().map_err(|error| blas_error("start", error))?;
        Ok(Blas { handle, workspace: device.allocate(WORKSPACE_BYTES)?, chosen: Mutex::default() })
    }

    /// The library's own version.
    pub fn version(&self) -> usize {
        // SAFETY: the library is loaded: `open` found it.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// Frees what the device holds for it.
    pub fn close(&self, device: &Device) {
        device.release(self.workspace);
        // SAFETY: the handle came from `create_handle` and is not used again: the device that owns it is being dropped.
        let closed = unsafe { result::destroy_handle(self.handle) };
        // A library that does not close leaves nothing to be done.
        let _ = closed;
    }
}

impl Epilogue {
    /// What the library calls it. Its A is our right matrix, its B our left one.
    pub fn number(self) -> cublasLtEpilogue_t {
        match self {
            Epilogue::None => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
            Epilogue::Bias(_) => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            Epilogue::Relu { bias: None } => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_RELU,
            Epilogue::Relu { bias: Some(_) } => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_RELU_BIAS,
            Epilogue::Gelu { bias: None, kept: None } => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU,
            Epilogue::Gelu { bias: Some(_), kept: None } => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_BIAS,
            Epilogue::Gelu { bias: None, kept: Some(_) } => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_AUX,
            Epilogue::Gelu { bias: Some(_), kept: Some(_) } => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
            Epilogue::GeluSlope { .. } => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DGELU,
            Epilogue::LeftSums(_) => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BGRADB,
        }
    }
}

/// Descriptions that cuBLASLt keeps of one product, freed with it.
pub(super) struct Described {
    operation: sys::cublasLtMatmulDesc_t,
    layouts: Vec<sys::cublasLtMatrixLayout_t>,
}

impl Drop for Described {
    fn drop(&mut self) {
        for &layout in &self.layouts {
            // SAFETY: created by `new`, destroyed once.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        // SAFETY: as above.
        let _ = unsafe { result::destroy_matmul_desc(self.operation) };
    }
}

fn data_type(name: &str) -> cudaDataType {
    match name {
        "bf16" => cudaDataType::CUDA_R_16BF,
        "f16" => cudaDataType::CUDA_R_16F,
        _ => cudaDataType::CUDA_R_32F,
    }
}

impl Described {
    pub fn new(shape: &Shape, product: &Product) -> Called<Self> {
        let compute = match shape.tf32 {
            true => cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            false => cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let operation = result::create_matmul_desc(compute, cudaDataType::CUDA_R_32F)?;
        let mut described = Described { operation, layouts: Vec::new() };
        let [m, k, n] = shape.size;
        // A row-major matrix that is not transposed is its transpose there, with as many rows as ours has columns.
        let stored = |matrix: &Matrix, rows: usize, columns: usize| {
            if matrix.is_transposed { (rows, columns) } else { (columns, rows) }
        };
        let (input, output) = (data_type(shape.types[0]), data_type(shape.types[1]));
        let sides = [
            (input, stored(&product.right, k, n), product.right.stride),
            (input, stored(&product.left, m, k), product.left.stride),
            (output, (n, m), product.out.stride),
        ];
        for (of, (rows, columns), stride) in sides {
            described.layouts.push(result::create_matrix_layout(of, rows as u64, columns as u64, stride as i64)?);
        }
        described.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(product.right.is_transposed))?;
        described.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(product.left.is_transposed))?;
        described.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &product.epilogue.number())?;
        // Vectors and matrices of epilogues are of the type of `out` unless told otherwise.
        if let Some(vector) = product.epilogue.vector() {
            described.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &vector)?;
        }
        if let Some(matrix) = product.epilogue.matrix() {
            described.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &matrix)?;
            described.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &(product.out.stride as i64))?;
        }
        Ok(described)
    }

    fn set<T>(&self, attribute: Attribute, value: &T) -> Called<()> {
        // SAFETY: the description lives; the value is read before the call returns, and is of the attribute's type.
        unsafe {
            result::set_matmul_desc_attribute(
                self.operation,
                attribute,
                std::ptr::from_ref(value).cast::<c_void>(),
                size_of::<T>(),
            )
        }
    }
}

/// How many algorithms are compared.
const CANDIDATES: usize = 8;

/// Limits of the search for an algorithm, freed with it.
struct Limits(sys::cublasLtMatmulPreference_t);

impl Limits {
    fn new(shape: &Shape) -> Called<Self> {
        let limits = Limits(result::create_matmul_pref()?);
        limits.set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        // Where k is split, the parts are added in f32 and in order: neither rounded to 16 bits between, nor in the order in
        // which they happen to be done.
        let schemes = cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        limits.set(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)?;
        let [left, right, out, ..] = shape.alignments;
        limits.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &right)?;
        limits.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &left)?;
        limits.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out)?;
        limits.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out)?;
        Ok(limits)
    }

    fn set<T>(&self, attribute: Preference, value: &T) -> Called<()> {
        // SAFETY: the object lives; the value is read before the call returns, and is of the attribute's type.
        unsafe {
            result::set_matmul_pref_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
        }
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// The algorithms that the library thinks fastest, best first; empty where it has none.
pub(super) fn candidates(blas: &Blas, shape: &Shape, described: &Described) -> Called<Vec<cublasLtMatmulAlgo_t>> {
    let limits = Limits::new(shape)?;
    let [a, b, c] = [described.layouts[0], described.layouts[1], described.layouts[2]];
    let mut found = vec![std::mem::MaybeUninit::<cublasLtMatmulHeuristicResult_t>::zeroed(); CANDIDATES];
    let mut count = 0;
    // SAFETY: all descriptions live; there is room for as many results as are asked for.
    let status = unsafe {
        sys::cublasLtMatmulAlgoGetHeuristic(
            blas.handle,
            described.operation,
            a,
            b,
            c,
            c,
            limits.0,
            CANDIDATES as i32,
            found.as_mut_ptr().cast(),
            &mut count,
        )
    };
    if status == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
        return Ok(Vec::new());
    }
    status.result()?;
    found.truncate(usize::try_from(count).unwrap_or(0));
    // SAFETY: the library filled `count` results; zeros are valid values of all fields besides.
    let found = found.into_iter().map(|result| unsafe { result.assume_init() });
    Ok(found
        .filter(|found| found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS)
        .map(|found| found.algo)
        .collect())
}

/// Whether an algorithm that was kept fits this product, on this device.
pub(super) fn fits(blas: &Blas, described: &Described, algorithm: &cublasLtMatmulAlgo_t) -> bool {
    let [a, b, c] = [described.layouts[0], described.layouts[1], described.layouts[2]];
    let mut found = std::mem::MaybeUninit::<cublasLtMatmulHeuristicResult_t>::zeroed();
    // SAFETY: all descriptions live; there is room for one result.
    let status = unsafe {
        sys::cublasLtMatmulAlgoCheck(blas.handle, described.operation, a, b, c, c, algorithm, found.as_mut_ptr())
    };
    // SAFETY: zeros are valid values of all fields that the library did not fill.
    let found = unsafe { found.assume_init() };
    status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && found.workspaceSize <= WORKSPACE_BYTES
}

/// Queues a product whose values go to `to`, laid out as `product.out`; what it adds to is read from `product.out`.
///
/// # Safety
/// As [`Device::product`], and `to` has room for what `product.out` has.
pub(super) unsafe fn multiply(
    device: &Device,
    blas: &Blas,
    described: &Described,
    product: &Product,
    to: u64,
    algorithm: &cublasLtMatmulAlgo_t,
) -> Called<()> {
    let (alpha, beta) = (1.0f32, if product.add { 1.0f32 } else { 0.0 });
    let [a, b, c] = [described.layouts[0], described.layouts[1], described.layouts[2]];
    // SAFETY: the descriptions live, the scalars are read before the call returns, the matrices are as the caller promises,
    // and the workspace is of the size that was named as the most.
    unsafe {
        result::matmul(
            blas.handle,
            described.operation,
            std::ptr::from_ref(&alpha).cast(),
            std::ptr::from_ref(&beta).cast(),
            product.right.address as *const c_void,
            a,
            product.left.address as *const c_void,
            b,
            product.out.address as *const c_void,
            c,
            to as *mut c_void,
            c,
            algorithm,
            blas.workspace as *mut c_void,
            WORKSPACE_BYTES,
            device.stream().cu_stream().cast(),
        )
    }
}
