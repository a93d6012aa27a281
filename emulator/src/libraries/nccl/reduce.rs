//! Types and operations of reductions. Sums go in the order of ranks; those of 16-bit floats are taken in f32 and rounded once.

use half::{bf16, f16};

const NAMES: [&str; 10] = ["i8", "u8", "i32", "u32", "i64", "u64", "f16", "f32", "f64", "bf16"];

/// Sum, product, largest, least, mean.
pub(super) const OPERATIONS: u8 = 5;
pub(super) const SUM: u8 = 0;
const PRODUCT: u8 = 1;
const MOST: u8 = 2;
const LEAST: u8 = 3;

/// The name of an `ncclDataType_t`.
pub(super) fn name(ty: u8) -> &'static str {
    NAMES.get(usize::from(ty)).copied().unwrap_or("values of no type")
}

/// Bytes of a value; none where the type is not known.
pub(super) fn bytes(ty: u8) -> Option<usize> {
    Some(match ty {
        0 | 1 => 1,
        6 | 9 => 2,
        2 | 3 | 7 => 4,
        4 | 5 | 8 => 8,
        _ => return None,
    })
}

/// A type that sums are taken in.
trait Sum: Copy {
    fn with(self, other: Self, op: u8) -> Self;
    fn over(self, ranks: usize) -> Self;
}

macro_rules! floats {
    ($($t:ty),*) => {$(
        impl Sum for $t {
            fn with(self, other: Self, op: u8) -> Self {
                match op {
                    PRODUCT => self * other,
                    MOST => self.max(other),
                    LEAST => self.min(other),
                    _ => self + other,
                }
            }
            fn over(self, ranks: usize) -> Self {
                self / ranks as $t
            }
        }
    )*};
}
floats!(f32, f64);

macro_rules! whole {
    ($($t:ty),*) => {$(
        impl Sum for $t {
            fn with(self, other: Self, op: u8) -> Self {
                match op {
                    PRODUCT => self.wrapping_mul(other),
                    MOST => self.max(other),
                    LEAST => self.min(other),
                    _ => self.wrapping_add(other),
                }
            }
            fn over(self, ranks: usize) -> Self {
                self / ranks as $t
            }
        }
    )*};
}
whole!(i8, u8, i32, u32, i64, u64);

fn combine<S: Sum, const N: usize>(
    parts: &[&[u8]],
    op: u8,
    read: impl Fn([u8; N]) -> S,
    write: impl Fn(S) -> [u8; N],
) -> Vec<u8> {
    let len = parts[0].len() / N;
    let value = |part: &[u8], i: usize| {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&part[i * N..(i + 1) * N]);
        read(bytes)
    };
    let mut out = Vec::with_capacity(len * N);
    for i in 0..len {
        let mut sum = value(parts[0], i);
        for part in &parts[1..] {
            sum = sum.with(value(part, i), op);
        }
        if op >= OPERATIONS - 1 {
            sum = sum.over(parts.len());
        }
        out.extend(write(sum));
    }
    out
}

/// The values of all ranks, as long as each other, into one.
pub(super) fn reduce(ty: u8, op: u8, parts: &[&[u8]]) -> Vec<u8> {
    match ty {
        0 => combine(parts, op, i8::from_le_bytes, i8::to_le_bytes),
        1 => combine(parts, op, u8::from_le_bytes, u8::to_le_bytes),
        2 => combine(parts, op, i32::from_le_bytes, i32::to_le_bytes),
        3 => combine(parts, op, u32::from_le_bytes, u32::to_le_bytes),
        4 => combine(parts, op, i64::from_le_bytes, i64::to_le_bytes),
        5 => combine(parts, op, u64::from_le_bytes, u64::to_le_bytes),
        6 => combine(parts, op, |b| f16::from_le_bytes(b).to_f32(), |x: f32| f16::from_f32(x).to_le_bytes()),
        7 => combine(parts, op, f32::from_le_bytes, f32::to_le_bytes),
        8 => combine(parts, op, f64::from_le_bytes, f64::to_le_bytes),
        _ => combine(parts, op, |b| bf16::from_le_bytes(b).to_f32(), |x: f32| bf16::from_f32(x).to_le_bytes()),
    }
}

/// Every value times a factor of its type, as `ncclRedOpCreatePreMulSum` has it.
pub(super) fn scale(ty: u8, data: &mut [u8], factor: &[u8]) {
    let size = factor.len();
    for value in data.chunks_exact_mut(size) {
        let product = reduce(ty, PRODUCT, &[value, factor]);
        value.copy_from_slice(&product);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_go_in_the_order_of_ranks_and_round_once() {
        let f32s = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        // 1e8 + 1 - 1e8 is 0 in this order, and 1 in others.
        let parts = [f32s(&[1e8]), f32s(&[1.0]), f32s(&[-1e8])];
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        assert_eq!(reduce(7, SUM, &parts), f32s(&[0.0]));
        // 2048 + 1 + 1 is 2050 where f16 rounds once; 2048 where it rounds twice.
        let halves = [2048.0, 1.0, 1.0].map(|x| f16::from_f32(x).to_le_bytes());
        let halves: Vec<&[u8]> = halves.iter().map(|b| &b[..]).collect();
        assert_eq!(reduce(6, SUM, &halves), f16::from_f32(2050.0).to_le_bytes());
        assert_eq!(reduce(5, MOST, &[&3u64.to_le_bytes(), &7u64.to_le_bytes()]), 7u64.to_le_bytes());
        assert_eq!(reduce(2, 4, &[&3i32.to_le_bytes(), &6i32.to_le_bytes()]), 4i32.to_le_bytes());
        let mut data = f32s(&[2.0, 3.0]);
        scale(7, &mut data, &0.5f32.to_le_bytes());
        assert_eq!(data, f32s(&[1.0, 1.5]));
    }
}
