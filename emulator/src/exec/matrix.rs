//! `mma.sync`: products of a warp, by the layouts of fragments in the PTX ISA.
//!
//! Products are exact and summed in f64 with the addend, and the sum is rounded once; hardware keeps fewer bits between.

use half::f16;

use super::warp::Warp;
use crate::ptx::{Lanes, Matrix, MatrixType};

/// A factor of two in a register, lower first.
fn halves(factors: MatrixType, bits: u64) -> [f64; 2] {
    let of = |bits: u16| match factors {
        MatrixType::F16 => f64::from(from_f16(bits)),
        _ => f64::from(f32::from_bits(u32::from(bits) << 16)),
    };
    [of(bits as u16), of((bits >> 16) as u16)]
}

/// The value of an f16: by a shift of its exponent, which f32 has room for.
fn from_f16(bits: u16) -> f32 {
    if bits & 0x7c00 == 0x7c00 {
        return f16::from_bits(bits).to_f32();
    }
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

/// Products of tf32 take the upper 19 bits of what they are given.
fn single(bits: u64) -> f64 {
    f64::from(f32::from_bits(bits as u32 & 0xffff_e000))
}

pub(super) fn multiply(warp: &mut Warp, matrix: Matrix, d: &[u32], a: &[u32], b: &[u32], c: &[u32]) {
    let (k, factors) = (usize::from(matrix.k), matrix.factors);
    let value = |register: u32, lane: usize| warp.registers[register as usize][lane];
    let (mut left, mut right) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
    for lane in 0..32 {
        let (group, inside) = (lane / 4, lane % 4);
        for (index, &register) in a.iter().enumerate() {
            let (row, part, bits) = (group + 8 * (index % 2), index / 2, value(register, lane));
            if factors == MatrixType::Tf32 {
                left[row][inside + 4 * part] = single(bits);
            } else {
                [left[row][2 * inside + 8 * part], left[row][2 * inside + 8 * part + 1]] = halves(factors, bits);
            }
        }
        for (index, &register) in b.iter().enumerate() {
            let bits = value(register, lane);
            if factors == MatrixType::Tf32 {
                right[inside + 4 * index][group] = single(bits);
            } else {
                let [low, high] = halves(factors, bits);
                right[2 * inside + 8 * index][group] = low;
                right[2 * inside + 8 * index + 1][group] = high;
            }
        }
    }
    let mut sums = [[0.0; 8]; 16];
    for (sums, left) in sums.iter_mut().zip(&left) {
        for (&factor, right) in left[..k].iter().zip(&right) {
            sums.iter_mut().zip(right).for_each(|(sum, value)| *sum += factor * value);
        }
    }
    let mut out = [[0u64; 32]; 4];
    for lane in 0..32 {
        for index in 0..4 {
            let sum = sums[lane / 4 + 8 * (index / 2)][2 * (lane % 4) + index % 2];
            if matrix.half_sums {
                let (register, shift) = (index / 2, 16 * (index % 2));
                let start = from_f16((value(c[register], lane) >> shift) as u16);
                out[register][lane] |= u64::from(f16::from_f64(f64::from(start) + sum).to_bits()) << shift;
            } else {
                let start = f64::from(f32::from_bits(value(c[index], lane) as u32));
                out[index][lane] = u64::from(((start + sum) as f32).to_bits());
            }
        }
    }
    for (register, values) in d.iter().zip(&out) {
        warp.registers[*register as usize] = *values;
    }
}

/// A warp's 16 rows of `wgmma`: the left factor is in registers as `mma`'s is, the sums as those of its products side by side;
/// `right(k, column)` gives the bits of the other.
pub(super) fn multiply_group(
    warp: &mut Warp,
    factors: MatrixType,
    [d, a]: [&[u32]; 2],
    right: impl Fn(usize, usize) -> u16,
    add: bool,
) {
    let mut left = [[0.0; 16]; 16];
    for lane in 0..32 {
        let (group, inside) = (lane / 4, lane % 4);
        for (index, &register) in a.iter().enumerate() {
            let (row, at) = (group + 8 * (index % 2), 2 * inside + 8 * (index / 2));
            [left[row][at], left[row][at + 1]] = halves(factors, warp.registers[register as usize][lane]);
        }
    }
    for (tile, registers) in d.chunks(4).enumerate() {
        let factor = |k: usize, column: usize| halves(factors, u64::from(right(k, 8 * tile + column)))[0];
        let right: [[f64; 8]; 16] = std::array::from_fn(|k| std::array::from_fn(|column| factor(k, column)));
        for (index, &register) in registers.iter().enumerate() {
            let sums = &mut warp.registers[register as usize];
            for (lane, sum) in sums.iter_mut().enumerate() {
                let (row, column) = (lane / 4 + 8 * (index / 2), 2 * (lane % 4) + index % 2);
                let start = if add { f64::from(f32::from_bits(*sum as u32)) } else { 0.0 };
                let product: f64 = left[row].iter().zip(&right).map(|(left, right)| left * right[column]).sum();
                *sum = u64::from(((start + product) as f32).to_bits());
            }
        }
    }
}

/// `movmatrix`: lane 4i + j holds values 2j and 2j + 1 of row i, and gets them of column i.
pub(super) fn transpose(a: &Lanes) -> Lanes {
    let value = |row: usize, column: usize| a[4 * row + column / 2] >> (16 * (column % 2)) & 0xffff;
    std::array::from_fn(|lane| {
        let (row, column) = (lane / 4, 2 * (lane % 4));
        value(column, row) | value(column + 1, row) << 16
    })
}
