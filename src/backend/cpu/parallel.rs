//! Cutting work into pieces of fixed size, and running a piece with the widest vectors that the processor has.

use rayon::prelude::*;

use crate::real::Real;

/// Elements in a piece of elementwise work: 64 KiB of f32, so that a piece stays in the first-level cache or near it.
pub(super) const PIECE: usize = 1 << 14;

/// Runs `f` with the widest vector instructions that the processor has. `f` and what it calls must be inlined into it
/// (`#[inline(always)]`) to gain: closures within it, such as those of `for_each`, are not where they are long, so that a loop around
/// a function that is handed over is a `for`.
#[inline(always)]
pub(super) fn vectorize<T>(f: impl FnOnce() -> T) -> T {
    struct Run<F>(F);
    impl<T, F: FnOnce() -> T> pulp::NullaryFnOnce for Run<F> {
        type Output = T;
        #[inline(always)]
        fn call(self) -> T {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Run(f))
}

/// How many rows of `width` elements make a piece.
pub(super) fn rows_in_piece(width: usize) -> usize {
    (PIECE / width.max(1)).max(1)
}

/// `y[i] = f(x[i])`, `=`.
pub(super) fn map<R: Real>(y: &mut [R], x: &[R], f: impl Fn(R) -> R + Sync) {
    let piece = |(y, x): (&mut [R], &[R])| {
        vectorize(
            #[inline(always)]
            || {
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = f(x);
                }
            },
        )
    };
    if y.len() <= PIECE {
        piece((y, x));
    } else {
        y.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(piece);
    }
}

/// `y[i] = f(a[i], b[i])`, `=`.
pub(super) fn map2<R: Real>(y: &mut [R], a: &[R], b: &[R], f: impl Fn(R, R) -> R + Sync) {
    let piece = |((y, a), b): ((&mut [R], &[R]), &[R])| {
        vectorize(
            #[inline(always)]
            || {
                for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
                    *y = f(a, b);
                }
            },
        )
    };
    if y.len() <= PIECE {
        piece(((y, a), b));
    } else {
        y.par_chunks_mut(PIECE).zip(a.par_chunks(PIECE)).zip(b.par_chunks(PIECE)).for_each(piece);
    }
}

/// `y[i] = f(a[i], y[i])`.
pub(super) fn update<R: Real>(y: &mut [R], a: &[R], f: impl Fn(R, R) -> R + Sync) {
    let piece = |(y, a): (&mut [R], &[R])| {
        vectorize(
            #[inline(always)]
            || {
                for (y, &a) in y.iter_mut().zip(a) {
                    *y = f(a, *y);
                }
            },
        )
    };
    if y.len() <= PIECE {
        piece((y, a));
    } else {
        y.par_chunks_mut(PIECE).zip(a.par_chunks(PIECE)).for_each(piece);
    }
}

/// `x += bias` on every row `[rows, width]`, and `y = f(x)` while the row is in the cache.
pub(super) fn apply_to_rows<R: Real>(
    y: &mut [R],
    x: &mut [R],
    bias: Option<&[R]>,
    width: usize,
    f: impl Fn(R) -> R + Sync,
) {
    let width = width.max(1);
    let rows = rows_in_piece(width);
    let piece = |(y, x): (&mut [R], &mut [R])| {
        vectorize(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact_mut(width)) {
                    if let Some(bias) = bias {
                        x.iter_mut().zip(bias).for_each(|(x, &b)| *x += b);
                    }
                    for (y, &mut x) in y.iter_mut().zip(x) {
                        *y = f(x);
                    }
                }
            },
        )
    };
    if y.len() <= PIECE {
        piece((y, x));
    } else {
        y.par_chunks_mut(rows * width).zip(x.par_chunks_mut(rows * width)).for_each(piece);
    }
}

/// `y = f(y + bias)` on every row `[rows, width]`.
pub(super) fn apply_in_place<R: Real>(y: &mut [R], bias: Option<&[R]>, width: usize, f: impl Fn(R) -> R + Sync) {
    let width = width.max(1);
    let rows = rows_in_piece(width);
    let piece = |y: &mut [R]| {
        vectorize(
            #[inline(always)]
            || {
                for row in y.chunks_exact_mut(width) {
                    match bias {
                        Some(bias) => {
                            for (y, &b) in row.iter_mut().zip(bias) {
                                *y = f(*y + b);
                            }
                        }
                        None => {
                            for y in row {
                                *y = f(*y);
                            }
                        }
                    }
                }
            },
        )
    };
    if y.len() <= PIECE {
        piece(y);
    } else {
        y.par_chunks_mut(rows * width).for_each(piece);
    }
}

/// Adds `bias` to every row of `y` `[rows, bias.len()]`, `+=`.
pub(super) fn add_to_rows<R: Real>(y: &mut [R], bias: &[R]) {
    let width = bias.len().max(1);
    let rows = rows_in_piece(width);
    let piece = |y: &mut [R]| {
        vectorize(
            #[inline(always)]
            || {
                for row in y.chunks_exact_mut(width) {
                    row.iter_mut().zip(bias).for_each(|(y, &b)| *y += b);
                }
            },
        )
    };
    if y.len() <= PIECE {
        piece(y);
    } else {
        y.par_chunks_mut(rows * width).for_each(piece);
    }
}

/// `sums = sum over the rows of x` `[rows, sums.len()]`, or `+=` with `accumulate`. Rows are added in their order, in blocks whose
/// sums are added in f64: the error does not grow with the number of rows.
pub(super) fn sum_rows<R: Real>(sums: &mut [R], x: &[R], accumulate: bool) {
    const STRIPE: usize = 64;
    const BLOCK: usize = 256;
    let width = sums.len();
    if width == 0 {
        return;
    }
    let piece = |(stripe, sums): (usize, &mut [R])| {
        vectorize(
            #[inline(always)]
            || {
                let start = stripe * STRIPE;
                let mut totals = [0.0f64; STRIPE];
                for rows in x.chunks(BLOCK * width) {
                    let mut block = [R::zero(); STRIPE];
                    for row in rows.chunks_exact(width) {
                        block.iter_mut().zip(&row[start..start + sums.len()]).for_each(|(t, &x)| *t += x);
                    }
                    totals.iter_mut().zip(block).for_each(|(total, t)| *total += t.f64());
                }
                for (sum, total) in sums.iter_mut().zip(totals) {
                    let total = R::from_f64(total);
                    *sum = if accumulate { *sum + total } else { total };
                }
            },
        )
    };
    if x.len() <= PIECE {
        sums.chunks_mut(STRIPE).enumerate().for_each(piece);
    } else {
        sums.par_chunks_mut(STRIPE).enumerate().for_each(piece);
    }
}

/// Values that are worked on side by side: one vector of f32 on the widest processors.
pub(super) const LANES: usize = 16;

/// One such vector.
pub(super) type Lanes<R> = [R; LANES];

/// The lanes joined by `f`, half with half: the same bits at any vector width.
#[inline(always)]
pub(super) fn fold_lanes<R: Real>(mut lanes: Lanes<R>, f: impl Fn(R, R) -> R) -> R {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// The sum of the lanes.
#[inline(always)]
pub(super) fn sum_lanes<R: Real>(lanes: Lanes<R>) -> R {
    fold_lanes(
        lanes,
        #[inline(always)]
        |a, b| a + b,
    )
}

/// `sum of f(x)`, in lanes.
#[inline(always)]
pub(super) fn sum_of<R: Real>(x: &[R], f: impl Fn(R) -> R) -> R {
    let mut lanes = [R::zero(); LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane += f(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f(x);
    }
    sum_lanes(lanes)
}

/// `sum of a * b`, in lanes.
#[inline(always)]
pub(super) fn dot<R: Real>(a: &[R], b: &[R]) -> R {
    let mut lanes = [R::zero(); LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane = a.mul_add(b, *lane);
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane = a.mul_add(b, *lane);
    }
    sum_lanes(lanes)
}

/// Two sums over three slices of one length, of what `f(a, b, c)` gives, in lanes.
#[inline(always)]
pub(super) fn two_sums<R: Real>([a, b, c]: [&[R]; 3], f: impl Fn(R, R, R) -> (R, R)) -> (R, R) {
    let (mut first, mut second) = ([R::zero(); LANES], [R::zero(); LANES]);
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let (c, c_rest) = c.as_chunks::<LANES>();
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for i in 0..LANES {
            let (x, y) = f(a[i], b[i], c[i]);
            first[i] += x;
            second[i] += y;
        }
    }
    for (i, ((&a, &b), &c)) in a_rest.iter().zip(b_rest).zip(c_rest).enumerate() {
        let (x, y) = f(a, b, c);
        first[i] += x;
        second[i] += y;
    }
    (sum_lanes(first), sum_lanes(second))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Philox, Purpose};

    #[test]
    fn the_error_of_a_sum_of_rows_does_not_grow_with_their_number() {
        const WIDTH: usize = 70;
        let philox = Philox::new(7, Purpose::Sampling, 0);
        for rows in [0usize, 1, 255, 256, 257, 512, 1000, 131_072] {
            let x: Vec<f32> = (0..rows * WIDTH).map(|i| philox.uniform(i as u64) + 0.25).collect();
            for accumulate in [false, true] {
                let mut sums = vec![1.5f32; WIDTH];
                sum_rows(&mut sums, &x, accumulate);
                for (column, sum) in sums.iter().enumerate() {
                    let exact: f64 = x.iter().skip(column).step_by(WIDTH).map(|v| f64::from(*v)).sum();
                    let exact = exact + if accumulate { 1.5 } else { 0.0 };
                    // A block of 256 rows rounds as many times, a share of 2^-24 of what it has summed up so far: half of it, on
                    // average, and in either direction.
                    let bound = 128.0 * f64::from(f32::EPSILON) * exact;
                    assert!((f64::from(*sum) - exact).abs() <= bound / 16.0, "{rows} rows: {sum}, expected {exact}");
                }
            }
        }
    }
}
