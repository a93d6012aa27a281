//! Products of matrices by cuBLASLt, the algorithm chosen once a shape.
//!
//! cuBLASLt is column-major; a row-major matrix is its transpose there. So `C = A B` in rows is computed as `C' = B' A'`.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtMatmulAlgo_t, cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreferenceAttributes_t, cudaDataType,
};

use super::context::Device;
use crate::error::{Error, Result};

/// A row-major matrix in device memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    address: u64,
    /// Values from one row to the next.
    stride: usize,
    transposed: bool,
}

impl Matrix {
    /// A matrix whose rows start `stride` values apart.
    pub fn rows(address: u64, stride: usize) -> Self {
        Matrix { address, stride, transposed: false }
    }

    /// Its transpose, without moving anything.
    pub fn transposed(self) -> Self {
        Matrix { transposed: !self.transposed, ..self }
    }
}

/// What is done to a product on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Epilogue {
    None,
    /// A vector is added to every row: its address, in the type of `out`.
    Bias(u64),
}

/// `out = left right`, or `out += left right`: `[m, k]` times `[k, n]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub left: Matrix,
    pub right: Matrix,
    pub out: Matrix,
    /// m, k, n.
    pub size: [usize; 3],
    pub add: bool,
    pub epilogue: Epilogue,
    /// Types of the inputs, and of `out`: `f32`, `bf16` or `f16`.
    pub types: [&'static str; 2],
}

/// What an algorithm is chosen for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Shape {
    types: [&'static str; 2],
    size: [usize; 3],
    strides: [usize; 3],
    transposed: [bool; 2],
    bias: bool,
    tf32: bool,
}

/// cuBLASLt, its workspace, and the algorithms that were chosen.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    chosen: Mutex<HashMap<Shape, cublasLtMatmulAlgo_t>>,
}

// SAFETY: NVIDIA documents the handle as usable from several threads at once.
unsafe impl Send for Blas {}
// SAFETY: as above; the table is behind a lock.
unsafe impl Sync for Blas {}

/// What NVIDIA recommends on Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

fn blas_error(what: &str, error: CublasError) -> Error {
    Error::Device(format!("cuBLASLt: cannot {what}: {:?}", error.0))
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

    /// Frees what the device holds for it.
    pub fn close(&self, device: &Device) {
        device.release(self.workspace);
        // SAFETY: the handle came from `create_handle` and is not used again: the device that owns it is being dropped.
        let closed = unsafe { result::destroy_handle(self.handle) };
        // A library that does not close leaves nothing to be done.
        let _ = closed;
    }
}

/// Descriptions that cuBLASLt keeps of one product, freed with it.
struct Described {
    operation: sys::cublasLtMatmulDesc_t,
    layouts: Vec<sys::cublasLtMatrixLayout_t>,
}

impl Drop for Described {
    fn drop(&mut self) {
        for &layout in &self.layouts {
            // SAFETY: created by `describe`, destroyed once.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        // SAFETY: as above.
        let _ = unsafe { result::destroy_matmul_desc(self.operation) };
    }
}

impl Described {
    fn set<T>(&self, attribute: Attribute, value: &T) -> std::result::Result<(), CublasError> {
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

fn data_type(name: &str) -> cudaDataType {
    match name {
        "bf16" => cudaDataType::CUDA_R_16BF,
        "f16" => cudaDataType::CUDA_R_16F,
        _ => cudaDataType::CUDA_R_32F,
    }
}

impl Device {
    /// Queues a product.
    ///
    /// # Safety
    /// The matrices hold what `size`, their strides and `types` say.
    pub(super) unsafe fn product(&self, name: &str, product: &Product) -> Result<()> {
        let device = self;
        let blas = device.blas()?;
        let Product { left, right, out, size, .. } = *product;
        let shape = Shape {
            types: product.types,
            size,
            strides: [left.stride, right.stride, out.stride],
            transposed: [left.transposed, right.transposed],
            bias: product.epilogue != Epilogue::None,
            tf32: device.options().tf32,
        };
        let described = describe(&shape, product).map_err(|error| blas_error(&format!("describe {shape:?}"), error))?;
        let mut chosen = blas.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        let algorithm = match chosen.get(&shape) {
            Some(algorithm) => *algorithm,
            None => {
                let found = candidates(blas, &described)
                    .map_err(|error| blas_error(&format!("find an algorithm for {shape:?}"), error))?;
                // SAFETY: as the caller promises.
                let algorithm = unsafe { choose(device, blas, &described, product, &found) }
                    .map_err(|error| blas_error(&format!("multiply {shape:?}"), error))?;
                chosen.insert(shape.clone(), algorithm);
                algorithm
            }
        };
        drop(chosen);
        device.timed(name, || {
            // SAFETY: as the caller promises.
            unsafe { multiply(device, blas, &described, product, &algorithm) }
                .map_err(|error| blas_error(&format!("multiply {shape:?}"), error))
        })
    }
}

fn describe(shape: &Shape, product: &Product) -> std::result::Result<Described, CublasError> {
    let compute = match (shape.types[0], shape.tf32) {
        ("f32", true) => cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let operation = result::create_matmul_desc(compute, cudaDataType::CUDA_R_32F)?;
    let mut described = Described { operation, layouts: Vec::new() };
    let [m, k, n] = shape.size;
    // The library's A is our right matrix, its B our left one. A row-major matrix that is not transposed is its transpose
    // there, with as many rows as ours has columns.
    let stored = |matrix: &Matrix, rows: usize, columns: usize| {
        if matrix.transposed { (rows, columns) } else { (columns, rows) }
    };
    let (input, output) = (data_type(shape.types[0]), data_type(shape.types[1]));
    let right = stored(&product.right, k, n);
    let left = stored(&product.left, m, k);
    let sides = [
        (input, right, product.right.stride),
        (input, left, product.left.stride),
        (output, (n, m), product.out.stride),
    ];
    for (of, (rows, columns), stride) in sides {
        described.layouts.push(result::create_matrix_layout(of, rows as u64, columns as u64, stride as i64)?);
    }
    described.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(product.right.transposed))?;
    described.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(product.left.transposed))?;
    if let Epilogue::Bias(address) = product.epilogue {
        described.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
        described.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &address)?;
    }
    Ok(described)
}

/// How many algorithms are compared.
const CANDIDATES: usize = 8;

/// The algorithms that the library thinks fastest, best first.
fn candidates(
    blas: &Blas,
    described: &Described,
) -> std::result::Result<Vec<cublasLtMatmulHeuristicResult_t>, CublasError> {
    let preference = result::create_matmul_pref()?;
    let [a, b, c] = [described.layouts[0], described.layouts[1], described.layouts[2]];
    let mut found = vec![std::mem::MaybeUninit::<cublasLtMatmulHeuristicResult_t>::zeroed(); CANDIDATES];
    let mut count = 0;
    // SAFETY: all descriptions live; there is room for as many results as are asked for.
    let status = unsafe {
        result::set_matmul_pref_attribute(
            preference,
            cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            std::ptr::from_ref(&WORKSPACE_BYTES).cast(),
            size_of::<usize>(),
        )
        .and_then(|()| {
            sys::cublasLtMatmulAlgoGetHeuristic(
                blas.handle,
                described.operation,
                a,
                b,
                c,
                c,
                preference,
                CANDIDATES as i32,
                found.as_mut_ptr().cast(),
                &mut count,
            )
            .result()
        })
    };
    // SAFETY: created above, destroyed once.
    unsafe { result::destroy_matmul_pref(preference)? };
    status?;
    found.truncate(usize::try_from(count).unwrap_or(0));
    // SAFETY: the library filled `count` results; zeros are valid values of all fields besides.
    let found = found.into_iter().map(|result| unsafe { result.assume_init() });
    let usable: Vec<_> = found.filter(|result| result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS).collect();
    if usable.is_empty() { Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) } else { Ok(usable) }
}

/// The algorithm to use from now on.
///
/// # Safety
/// As [`Device::product`].
unsafe fn choose(
    _device: &Device,
    _blas: &Blas,
    _described: &Described,
    _product: &Product,
    found: &[cublasLtMatmulHeuristicResult_t],
) -> std::result::Result<cublasLtMatmulAlgo_t, CublasError> {
    Ok(found[0].algo)
}

/// # Safety
/// As [`Device::product`].
unsafe fn multiply(
    device: &Device,
    blas: &Blas,
    described: &Described,
    product: &Product,
    algorithm: &cublasLtMatmulAlgo_t,
) -> std::result::Result<(), CublasError> {
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
            product.out.address as *mut c_void,
            c,
            algorithm,
            blas.workspace as *mut c_void,
            WORKSPACE_BYTES,
            device.stream().cu_stream().cast(),
        )
    }
}
