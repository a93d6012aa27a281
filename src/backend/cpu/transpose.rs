//! Matrices turned on their side, in blocks that registers hold.

use ndarray::{ArrayView2, ArrayViewMut2, Axis};

use super::parallel::vectorize;
use crate::real::Real;

/// Rows and columns of a block: a register of f32 with AVX.
const SIDE: usize = 8;

type Block<R> = [[R; SIDE]; SIDE];

/// `to = from^T`, or `to += from^T` with `accumulate`: `[rows, columns] -> [columns, rows]`, on the calling thread. The rows of
/// both lie in one piece, with any distance between them.
///
/// # Panics
/// Shapes that do not fit, or rows that lie apart: mistakes of the caller.
pub(super) fn transpose<R: Real>(to: ArrayViewMut2<'_, R>, from: ArrayView2<'_, R>, accumulate: bool) {
    assert_eq!(to.dim(), from.t().dim(), "the shape of a transpose");
    if accumulate {
        with_processor(
            to,
            from,
            #[inline(always)]
            |to, value| *to += value,
        )
    } else {
        with_processor(
            to,
            from,
            #[inline(always)]
            |to, value| *to = value,
        )
    }
}

fn with_processor<R: Real>(to: ArrayViewMut2<'_, R>, from: ArrayView2<'_, R>, put: impl Fn(&mut R, R)) {
    #[cfg(target_arch = "x86_64")]
    if std::any::TypeId::of::<R>() == std::any::TypeId::of::<f32>()
        && let Some(processor) = pulp::x86::V3::try_new()
    {
        return vectorize(
            #[inline(always)]
            || {
                in_blocks(
                    to,
                    from,
                    #[inline(always)]
                    |block: Block<R>| bytemuck::cast(avx::turn(processor, bytemuck::cast(block))),
                    put,
                );
            },
        );
    }
    vectorize(
        #[inline(always)]
        || in_blocks(to, from, turn, put),
    );
}

/// One block, in a form for any processor and any type.
#[inline(always)]
fn turn<R: Real>(block: Block<R>) -> Block<R> {
    std::array::from_fn(|column| std::array::from_fn(|row| block[row][column]))
}

/// Block by block with `turn`, and what is left at the edges value by value; each to its place with `put`.
#[inline(always)]
fn in_blocks<R: Real>(
    mut to: ArrayViewMut2<'_, R>,
    from: ArrayView2<'_, R>,
    turn: impl Fn(Block<R>) -> Block<R>,
    put: impl Fn(&mut R, R),
) {
    let lines: Vec<&[R]> = from.axis_iter(Axis(0)).map(|row| in_one_piece(row.to_slice())).collect();
    let (eights, rest) = lines.as_chunks::<SIDE>();
    for (i, mut to) in to.axis_chunks_iter_mut(Axis(0), SIDE).enumerate() {
        let mut columns = to.axis_iter_mut(Axis(0)).map(|row| in_one_piece(row.into_slice()));
        let first = i * SIDE;
        if columns.len() == SIDE {
            let mut columns: [&mut [R]; SIDE] = std::array::from_fn(|_| columns.next().unwrap_or_default());
            for (j, lines) in eights.iter().enumerate() {
                // No closure here either: see `avx::turn`.
                let mut block = [[R::zero(); SIDE]; SIDE];
                for (row, line) in block.iter_mut().zip(lines) {
                    *row = *in_one_piece(line[first..].first_chunk());
                }
                for (column, values) in columns.iter_mut().zip(turn(block)) {
                    let column = &mut column[j * SIDE..(j + 1) * SIDE];
                    column.iter_mut().zip(values).for_each(|(to, value)| put(to, value));
                }
            }
            for (column, place) in columns.iter_mut().zip(first..) {
                let left = &mut column[eights.len() * SIDE..];
                left.iter_mut().zip(rest).for_each(|(to, line)| put(to, line[place]));
            }
        } else {
            for (column, place) in columns.zip(first..) {
                column.iter_mut().zip(&lines).for_each(|(to, line)| put(to, line[place]));
            }
        }
    }
}

/// A row of a matrix as a slice.
///
/// # Panics
/// Its values lie apart: a mistake of the caller.
pub(super) fn in_one_piece<T>(piece: Option<T>) -> T {
    piece.expect("the rows of a matrix lie in one piece")
}

#[cfg(target_arch = "x86_64")]
mod avx {
    use std::arch::x86_64::__m256;

    use pulp::x86::V3;

    use super::Block;

    /// Pairs of rows are interleaved by value, then by pair, and halves are put together. No closures: they would be compiled
    /// without these instructions.
    #[inline(always)]
    pub fn turn(processor: V3, block: Block<f32>) -> Block<f32> {
        let avx = processor.avx;
        let [a, b, c, d, e, f, g, h]: [__m256; 8] = bytemuck::cast(block);
        let (ab, ab_high) = (avx._mm256_unpacklo_ps(a, b), avx._mm256_unpackhi_ps(a, b));
        let (cd, cd_high) = (avx._mm256_unpacklo_ps(c, d), avx._mm256_unpackhi_ps(c, d));
        let (ef, ef_high) = (avx._mm256_unpacklo_ps(e, f), avx._mm256_unpackhi_ps(e, f));
        let (gh, gh_high) = (avx._mm256_unpacklo_ps(g, h), avx._mm256_unpackhi_ps(g, h));
        // Columns c and c + 4 of the first four rows, and of the last.
        let (upper_0, upper_1) = (low_pairs(processor, ab, cd), high_pairs(processor, ab, cd));
        let (upper_2, upper_3) = (low_pairs(processor, ab_high, cd_high), high_pairs(processor, ab_high, cd_high));
        let (lower_0, lower_1) = (low_pairs(processor, ef, gh), high_pairs(processor, ef, gh));
        let (lower_2, lower_3) = (low_pairs(processor, ef_high, gh_high), high_pairs(processor, ef_high, gh_high));
        bytemuck::cast([
            avx._mm256_permute2f128_ps::<0x20>(upper_0, lower_0),
            avx._mm256_permute2f128_ps::<0x20>(upper_1, lower_1),
            avx._mm256_permute2f128_ps::<0x20>(upper_2, lower_2),
            avx._mm256_permute2f128_ps::<0x20>(upper_3, lower_3),
            avx._mm256_permute2f128_ps::<0x31>(upper_0, lower_0),
            avx._mm256_permute2f128_ps::<0x31>(upper_1, lower_1),
            avx._mm256_permute2f128_ps::<0x31>(upper_2, lower_2),
            avx._mm256_permute2f128_ps::<0x31>(upper_3, lower_3),
        ])
    }

    #[inline(always)]
    fn low_pairs(processor: V3, a: __m256, b: __m256) -> __m256 {
        processor.avx._mm256_shuffle_ps::<0b01_00_01_00>(a, b)
    }

    #[inline(always)]
    fn high_pairs(processor: V3, a: __m256, b: __m256) -> __m256 {
        processor.avx._mm256_shuffle_ps::<0b11_10_11_10>(a, b)
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::*;

    fn turns<R: Real>(rows: usize, columns: usize, apart: usize) {
        let whole = Array2::from_shape_fn((rows, columns + apart), |(i, j)| R::from_f64((i * 1000 + j) as f64));
        let from = whole.slice(s![.., ..columns]);
        let mut whole = Array2::from_elem((columns, rows + apart), R::from_f64(0.5));
        for times in 1..=2 {
            transpose(whole.slice_mut(s![.., ..rows]), from, times == 2);
            for ((j, i), &value) in whole.indexed_iter() {
                let expected = if i < rows { R::from_f64(times as f64) * from[(i, j)] } else { R::from_f64(0.5) };
                assert_eq!(value, expected, "{rows} x {columns}, {apart} apart: row {i}, column {j}");
            }
        }
    }

    #[test]
    fn a_transpose_is_one_at_every_tail() {
        for rows in [0, 1, 7, 8, 9, 16, 33] {
            for columns in [0, 1, 7, 8, 9, 16, 33] {
                for apart in [0, 5] {
                    turns::<f32>(rows, columns, apart);
                    turns::<f64>(rows, columns, apart);
                }
            }
        }
    }
}
