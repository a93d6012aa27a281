//! Matrix products.

use gemm::Parallelism;
use ndarray::{ArrayView2, ArrayViewMut2};

use crate::real::Real;

/// Products of fewer multiplications than this are not worth a second thread.
const PARALLEL_FROM: usize = 1 << 16;

/// `c = a b`, or `c += a b` with `accumulate`: `[m, k] x [k, n] -> [m, n]`, any strides, with all threads of the pool.
///
/// # Panics
/// Shapes that do not fit: a mistake of the calling operation.
pub(super) fn product<R: Real>(c: ArrayViewMut2<'_, R>, a: ArrayView2<'_, R>, b: ArrayView2<'_, R>, accumulate: bool) {
    let work = c.nrows().saturating_mul(c.ncols()).saturating_mul(a.ncols());
    let parallelism =
        if work < PARALLEL_FROM { Parallelism::None } else { Parallelism::Rayon(rayon::current_num_threads()) };
    run(c, a, b, accumulate, parallelism);
}

/// As [`product`], on the calling thread: for products that are themselves pieces of parallel work.
pub(super) fn product_here<R: Real>(
    c: ArrayViewMut2<'_, R>,
    a: ArrayView2<'_, R>,
    b: ArrayView2<'_, R>,
    accumulate: bool,
) {
    run(c, a, b, accumulate, Parallelism::None);
}

fn run<R: Real>(
    mut c: ArrayViewMut2<'_, R>,
    a: ArrayView2<'_, R>,
    b: ArrayView2<'_, R>,
    accumulate: bool,
    parallelism: Parallelism,
) {
    let ((m, k), n) = (a.dim(), b.ncols());
    assert_eq!(b.nrows(), k, "inner dimensions");
    assert_eq!(c.dim(), (m, n), "outer dimensions");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            c.fill(R::zero());
        }
        return;
    }
    let (c_strides, a_strides, b_strides) = (strides(c.strides()), strides(a.strides()), strides(b.strides()));
    // SAFETY: the pointers and strides are those of live views whose shapes were checked above to be m x n, m x k and
    // k x n, so every element that gemm touches lies within them; `c` is borrowed mutably, so it overlaps neither `a` nor
    // `b`; gemm supports f32 and f64, the only two `Real` types.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            c_strides[1],
            c_strides[0],
            accumulate,
            a.as_ptr(),
            a_strides[1],
            a_strides[0],
            b.as_ptr(),
            b_strides[1],
            b_strides[0],
            R::one(),
            R::one(),
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn strides(strides: &[isize]) -> [isize; 2] {
    [strides[0], strides[1]]
}
