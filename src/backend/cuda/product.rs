//! Products of matrices by cuBLASLt, with what is done to them on their way out, the algorithm chosen once a shape.
//!
//! cuBLASLt is column-major; a row-major matrix is its transpose there. So `C = A B` in rows is computed as `C' = B' A'`.

use std::sync::PoisonError;

use super::blas::{Described, blas_error, candidates, multiply};
use super::choice::choose;
use super::context::{Device, Fusion};
use crate::error::{Error, Result};

/// A row-major matrix in device memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    pub address: u64,
    /// Values from one row to the next.
    pub stride: usize,
    pub is_transposed: bool,
}

impl Matrix {
    /// A matrix whose rows start `stride` values apart.
    pub fn rows(address: u64, stride: usize) -> Self {
        Matrix { address, stride, is_transposed: false }
    }

    /// Its transpose, without moving anything.
    pub fn transposed(self) -> Self {
        Matrix { is_transposed: !self.is_transposed, ..self }
    }
}

/// What is done to a product on its way out. Vectors and matrices are given by their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Epilogue {
    None,
    /// A vector is added to every row, in the type of `out`.
    Bias(u64),
    /// `out = max(u, 0)`, u the product and a bias.
    Relu {
        bias: Option<u64>,
    },
    /// `out = gelu(u)`, u the product and a bias; u itself may be kept, laid out as `out` is. The library's GELU is the tanh form.
    Gelu {
        bias: Option<u64>,
        kept: Option<u64>,
    },
    /// `out = product * gelu'(u)`, u laid out as `out` is.
    GeluSlope {
        of: u64,
    },
    /// Besides the product, `sums = sum of left over its columns`, m values in the type of `out`, always `=`: the library has no
    /// `+=` for it. `left` is given transposed.
    LeftSums(u64),
}

impl Epilogue {
    /// Address of the vector.
    pub fn vector(self) -> Option<u64> {
        match self {
            Epilogue::None | Epilogue::GeluSlope { .. } => None,
            Epilogue::Bias(vector) | Epilogue::LeftSums(vector) => Some(vector),
            Epilogue::Relu { bias } | Epilogue::Gelu { bias, .. } => bias,
        }
    }

    /// Address of the matrix that is kept, or read.
    pub fn matrix(self) -> Option<u64> {
        match self {
            Epilogue::Gelu { kept, .. } => kept,
            Epilogue::GeluSlope { of } => Some(of),
            Epilogue::None | Epilogue::Bias(_) | Epilogue::Relu { .. } | Epilogue::LeftSums(_) => None,
        }
    }

    /// Whether every version of the library has it, on every device, at no cost worth a thought.
    fn is_plain(self) -> bool {
        matches!(self, Epilogue::None | Epilogue::Bias(_))
    }
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

/// All that an algorithm is chosen for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub types: [&'static str; 2],
    pub size: [usize; 3],
    pub strides: [usize; 3],
    pub transposed: [bool; 2],
    pub add: bool,
    /// `cublasLtEpilogue_t`.
    pub epilogue: u32,
    pub tf32: bool,
    /// Bytes that the addresses of left, right, out, the epilogue's vector and its matrix are multiples of: algorithms ask for
    /// more or less.
    pub alignments: [u32; 5],
}

/// The largest alignment that is told apart: what algorithms ask for at the most. More would make the choice depend on where memory
/// happens to lie, and with the choice the bits.
const MOST_ALIGNMENT: u32 = 16;

fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(MOST_ALIGNMENT.trailing_zeros())
}

impl Shape {
    fn of(product: &Product, tf32: bool) -> Self {
        let Product { left, right, out, size, add, epilogue, types } = *product;
        let [vector, matrix] = [epilogue.vector(), epilogue.matrix()].map(|address| address.unwrap_or(0));
        Shape {
            types,
            size,
            strides: [left.stride, right.stride, out.stride],
            transposed: [left.is_transposed, right.is_transposed],
            add,
            epilogue: epilogue.number() as u32,
            tf32: tf32 && types[0] == "f32",
            alignments: [left.address, right.address, out.address, vector, matrix].map(alignment),
        }
    }
}

/// Multiply-adds of a product that takes a few microseconds.
pub(super) const SMALL: usize = 1 << 27;

impl Device {
    /// Queues a product.
    ///
    /// # Safety
    /// The matrices hold what `size`, their strides and `types` say, and so do the epilogue's; none overlaps `out`.
    pub(super) unsafe fn product(&self, name: &str, product: &Product) -> Result<()> {
        // SAFETY: as the caller promises.
        if unsafe { self.queue_product(name, product)? } {
            return Ok(());
        }
        let shape = Shape::of(product, self.options().tf32);
        Err(Error::Device(format!("cuBLASLt: has no algorithm for {shape:?}")))
    }

    /// Queues a product with an epilogue that takes the place of a pass of our own; false, with nothing queued, where the pass is
    /// to be taken: on this device it is faster, or the library cannot do it.
    ///
    /// # Safety
    /// As [`Device::product`].
    pub(super) unsafe fn fused_product(&self, name: &str, product: &Product) -> Result<bool> {
        // SAFETY: as the caller promises.
        Ok(self.fuses(product) && unsafe { self.queue_product(name, product)? })
    }

    fn fuses(&self, product: &Product) -> bool {
        // The kept matrix must be aligned, and so must its rows.
        let fits = product
            .epilogue
            .matrix()
            .is_none_or(|matrix| matrix.is_multiple_of(16) && product.out.stride.is_multiple_of(8));
        let wanted = match self.options().fusion {
            Fusion::Always => true,
            Fusion::Never => false,
            // Server chips run such epilogues within the product; on others the library was seen to write twice or to fall
            // back to slower products. A large product in f32 takes so long that the pass saved is lost in it; a small one
            // takes no longer than the pass's launch.
            Fusion::ByArchitecture => {
                let is_small = product.size.iter().product::<usize>() <= SMALL;
                matches!(self.compute_capability().0, 9 | 10) && (product.types[0] != "f32" || is_small)
            }
        };
        fits && (wanted || product.epilogue.is_plain())
    }

    /// Whether there is an algorithm; the product is queued if so.
    ///
    /// # Safety
    /// As [`Device::product`].
    unsafe fn queue_product(&self, name: &str, product: &Product) -> Result<bool> {
        let [m, k, n] = product.size;
        if m == 0 || n == 0 {
            return Ok(true);
        }
        if k == 0 {
            return Err(Error::shape("product", "an inner size of 1 or more", format!("{m} x 0 x {n}")));
        }
        // Before the lock of what was chosen, which a thread that has claimed the device waits for.
        let _claim = self.claim();
        let blas = self.blas()?;
        let shape = Shape::of(product, self.options().tf32);
        let described =
            Described::new(&shape, product).map_err(|error| blas_error(&format!("describe {shape:?}"), error))?;
        let mut chosen = blas.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        let algorithm = match chosen.get(&shape) {
            Some(algorithm) => *algorithm,
            None => {
                let found = candidates(blas, &shape, &described)
                    .map_err(|error| blas_error(&format!("find an algorithm for {shape:?}"), error))?;
                // SAFETY: as the caller promises.
                let choice = unsafe { choose(self, blas, &shape, &described, product, &found)? };
                if choice.is_final {
                    chosen.insert(shape.clone(), choice.algorithm);
                }
                choice.algorithm
            }
        };
        drop(chosen);
        let Some(algorithm) = algorithm else { return Ok(false) };
        self.timed(name, || {
            // SAFETY: as the caller promises.
            unsafe { multiply(self, blas, &described, product, product.out.address, &algorithm) }
                .map_err(|error| blas_error(&format!("multiply {shape:?}"), error))
        })?;
        Ok(true)
    }
}
