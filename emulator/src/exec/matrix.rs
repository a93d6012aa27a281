//! `mma.sync`: products of a warp, by the layouts of fragments in the PTX ISA.
//!
//! Products are exact and summed in f64 with the addend, and the sum is rounded once; hardware keeps fewer bits between.

use half::{bf16, f16};

use super::warp::Warp;
use crate::ptx::{Lanes, Matrix, MatrixType};

fn value(factors: MatrixType, registers: &[Lanes], index: usize, lane: usize) -> f64 {
    let half = |bits: u64| match factors {
        MatrixType::F16 => f16::from_bits(bits as u16).to_f64(),
        _ => bf16::from_bits(bits as u16).to_f64(),
    };
    match factors {
        MatrixType::Tf32 => f64::from(f32::from_bits(truncated(registers[index][lane]) as u32)),
        _ => half(registers[index / 2][lane] >> (16 * (index % 2))),
    }
}

/// Products take the upper 19 bits of what they are given.
fn truncated(bits: u64) -> u64 {
    bits & 0xffff_e000
}

pub(super) fn multiply(warp: &mut Warp, matrix: Matrix, d: &[u32], a: &[u32], b: &[u32], c: &[u32]) {
    let take = |registers: &[u32]| -> Vec<Lanes> {
        registers.iter().map(|&register| warp.registers[register as usize]).collect()
    };
    let (a, b, c) = (take(a), take(b), take(c));
    let k = usize::from(matrix.k);
    let mut left = [[0.0; 16]; 16];
    let mut right = [[0.0; 8]; 16];
    for lane in 0..32 {
        let (group, inside) = (lane / 4, lane % 4);
        if matrix.factors == MatrixType::Tf32 {
            for index in 0..k / 2 {
                left[group + 8 * (index % 2)][inside + 4 * (index / 2)] = value(matrix.factors, &a, index, lane);
            }
            for index in 0..k / 4 {
                right[inside + 4 * index][group] = value(matrix.factors, &b, index, lane);
            }
        } else {
            for index in 0..k / 2 {
                let row = group + 8 * (index / 2 % 2);
                left[row][2 * inside + index % 2 + 8 * (index / 4)] = value(matrix.factors, &a, index, lane);
            }
            for index in 0..k / 4 {
                right[2 * inside + index % 2 + 8 * (index / 2)][group] = value(matrix.factors, &b, index, lane);
            }
        }
    }
    let mut out = vec![[0u64; 32]; d.len()];
    for lane in 0..32 {
        for index in 0..4 {
            let (row, column) = (lane / 4 + 8 * (index / 2), 2 * (lane % 4) + index % 2);
            let sum: f64 = (0..k).map(|i| left[row][i] * right[i][column]).sum();
            if matrix.half_sums {
                let (register, shift) = (index / 2, 16 * (index % 2));
                let start = f16::from_bits((c[register][lane] >> shift) as u16).to_f64();
                out[register][lane] |= u64::from(f16::from_f64(start + sum).to_bits()) << shift;
            } else {
                let start = f64::from(f32::from_bits(c[index][lane] as u32));
                out[index][lane] = u64::from(((start + sum) as f32).to_bits());
            }
        }
    }
    for (register, values) in d.iter().zip(&out) {
        warp.registers[*register as usize] = *values;
    }
}
