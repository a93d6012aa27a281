//! Values of the types that libraries compute with.

use half::{bf16, f16};

use crate::fault::Fault;
use crate::memory::Memory;

/// A type of stored values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    F32,
    F16,
    Bf16,
}

impl Type {
    /// `cudaDataType`.
    pub fn from_cuda(number: i32) -> Option<Self> {
        match number {
            0 => Some(Type::F32),
            2 => Some(Type::F16),
            14 => Some(Type::Bf16),
            _ => None,
        }
    }

    pub fn bytes(self) -> usize {
        if self == Type::F32 { 4 } else { 2 }
    }
}

/// Reads `len` values; every one must have been written.
pub(super) fn read(ty: Type, address: u64, len: usize) -> Result<Vec<f32>, Fault> {
    let place = Memory::global().check(address, len * ty.bytes(), false)?;
    // SAFETY: `check` found as many bytes.
    let bytes = unsafe { std::slice::from_raw_parts(place, len * ty.bytes()) };
    Ok(match ty {
        Type::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Type::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Type::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
    })
}

/// Writes values, rounded to the type.
pub(super) fn write(ty: Type, address: u64, values: &[f32]) -> Result<(), Fault> {
    let bytes: Vec<u8> = match ty {
        Type::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Type::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        Type::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
    };
    Memory::global().copy_in(address, &bytes)
}

/// `out = left right` for column-major matrices `[m, k]` and `[k, n]`, each with the strides of its rows and columns.
pub(super) fn product(size: [usize; 3], left: (&[f32], [usize; 2]), right: (&[f32], [usize; 2])) -> Vec<f32> {
    let [m, k, n] = size;
    let mut out = vec![0.0f32; m * n];
    let last = |(values, [row, column]): (&[f32], [usize; 2]), rows: usize, columns: usize| {
        assert!(rows * columns == 0 || (rows - 1) * row + (columns - 1) * column < values.len(), "a matrix too short");
    };
    last(left, m, k);
    last(right, k, n);
    // SAFETY: the assertions above hold every element that is read; `out` has m n elements.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            m as isize,
            1,
            false,
            left.0.as_ptr(),
            left.1[1] as isize,
            left.1[0] as isize,
            right.0.as_ptr(),
            right.1[1] as isize,
            right.1[0] as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
    out
}
