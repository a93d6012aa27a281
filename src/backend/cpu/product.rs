//! Matrix products.

#[cfg(target_arch = "x86_64")]
use std::any::TypeId;
use std::cell::Cell;
use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use gemm::Parallelism;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::tiles::{self, Place};
use super::transpose::transpose;
use crate::real::Real;

/// Products of fewer multiplications than this are not worth a second thread. (One that waits for tens of microseconds goes to sleep,
/// and is missed in what comes next: a few short operations in a row are shared for that too.)
const PARALLEL_FROM: usize = 1 << 17;

/// Stripes are a multiple of so many rows or columns: whole vectors.
const WHOLE: usize = 16;

/// The inner dimension is cut into parts of no more than this, which are summed one after the other. Left to itself the library
/// cuts it by the sizes of the product as well, and the bits would depend on who has which part of it.
const DEPTH: usize = 512;

/// Up to so many values of a product, the library adds along vectors where both factors lie along the inner dimension: in another
/// order, so that a larger product has no stripe as small as that.
pub(super) const HORIZONTAL: usize = 256;

/// Columns of a product for which the rows of a factor are transposed at a time: they stay in the second-level cache.
const COLUMNS: usize = 64;

/// The part of a product `c` `[m, n]` that a thread has for its own.
///
/// Left to share a product among threads by itself, the library lets one of them rearrange a factor while the others wait:
/// 60 % of the speed at 128 x 784 x 256 with two threads.
struct Stripe {
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Stripe {
    /// Cuts a product `a b` `[m, k] x [k, n]` into as many stripes as there are threads in the pool, or fewer; one where it is
    /// small. The product's bits do not depend on how many these are.
    fn cut<R>(a: ArrayView2<'_, R>, b: ArrayView2<'_, R>) -> Vec<Self> {
        let ((m, k), n) = (a.dim(), b.ncols());
        let work = m.saturating_mul(n).saturating_mul(k);
        let threads = if work < PARALLEL_FROM { 1 } else { rayon::current_num_threads() };
        let by_rows = Self::by_rows(a, b);
        let (long, short) = if by_rows { (m, n) } else { (n, m) };
        let least = (HORIZONTAL / short.max(1) + 1).next_multiple_of(WHOLE);
        let height = long.div_ceil(threads).next_multiple_of(WHOLE).max(least);
        // The last one takes what would be too little for one of its own.
        let count = long.saturating_sub(least) / height + 1;
        let stripe = |i: usize| {
            let part = i * height..if i + 1 == count { long } else { (i + 1) * height };
            if by_rows { Stripe { rows: part, columns: 0..n } } else { Stripe { rows: 0..m, columns: part } }
        };
        (0..count).map(stripe).collect()
    }

    /// Whether stripes of rows serve better than stripes of columns: the longer side is cut, but for a factor that the library
    /// has to rearrange, which every stripe along the other side would do once more. The weights of that were measured.
    fn by_rows<R>(a: ArrayView2<'_, R>, b: ArrayView2<'_, R>) -> bool {
        let (m, n) = (a.nrows(), b.ncols());
        if a.strides()[1] != 1 {
            4 * m > n
        } else if b.strides()[1] != 1 {
            2 * m > 3 * n
        } else {
            m > n
        }
    }

    /// Takes a matrix of the product's size apart.
    fn split<'v, R>(stripes: &[Self], matrix: ArrayViewMut2<'v, R>) -> Vec<ArrayViewMut2<'v, R>> {
        let mut parts = Vec::with_capacity(stripes.len());
        let mut rest = matrix;
        for Stripe { rows, columns } in stripes {
            let (axis, len) = if rows.len() < rest.nrows() { (Axis(0), rows.len()) } else { (Axis(1), columns.len()) };
            let (part, others) = rest.split_at(axis, len);
            parts.push(part);
            rest = others;
        }
        parts
    }

    /// This part of `c = a b`, on the calling thread; `+=` with `accumulate`.
    fn multiply<R: Real>(
        &self,
        part: ArrayViewMut2<'_, R>,
        a: ArrayView2<'_, R>,
        b: ArrayView2<'_, R>,
        accumulate: bool,
    ) {
        product_here(part, a.slice(s![self.rows.clone(), ..]), b.slice(s![.., self.columns.clone()]), accumulate);
    }
}

/// `c = a b`, or `c += a b` with `accumulate`: `[m, k] x [k, n] -> [m, n]`, any strides, with all threads of the pool.
///
/// # Panics
/// Shapes that do not fit: a mistake of the calling operation.
pub(super) fn product<R: Real>(c: ArrayViewMut2<'_, R>, a: ArrayView2<'_, R>, b: ArrayView2<'_, R>, accumulate: bool) {
    let stripes = Stripe::cut(a, b);
    if stripes.len() == 1 {
        return product_here(c, a, b, accumulate);
    }
    let parts = Stripe::split(&stripes, c);
    stripes.par_iter().zip(parts).for_each(|(stripe, part)| stripe.multiply(part, a, b, accumulate));
}

/// As [`product`], on the calling thread: for products that are themselves pieces of parallel work.
///
/// # Panics
/// Shapes that do not fit: a mistake of the calling operation.
pub(super) fn product_here<R: Real>(
    c: ArrayViewMut2<'_, R>,
    a: ArrayView2<'_, R>,
    b: ArrayView2<'_, R>,
    accumulate: bool,
) {
    by_parts(c, a, b, accumulate, false);
}

/// As [`product_here`], for factors and products that lie in the second-level cache: there tiles of our own serve better than the
/// library at any size. Every value is one sum in the order of the inner dimension, which the library's small products are not.
///
/// # Panics
/// Shapes that do not fit: a mistake of the calling operation.
pub(super) fn product_in_cache<R: Real>(
    c: ArrayViewMut2<'_, R>,
    a: ArrayView2<'_, R>,
    b: ArrayView2<'_, R>,
    accumulate: bool,
) {
    by_parts(c, a, b, accumulate, true);
}

fn by_parts<R: Real>(
    mut c: ArrayViewMut2<'_, R>,
    a: ArrayView2<'_, R>,
    b: ArrayView2<'_, R>,
    accumulate: bool,
    cached: bool,
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
    let depth = k.div_ceil(k.div_ceil(DEPTH));
    for (i, (a, b)) in a.axis_chunks_iter(Axis(1), depth).zip(b.axis_chunks_iter(Axis(0), depth)).enumerate() {
        add_part(c.view_mut(), a, b, accumulate || i > 0, cached);
    }
}

/// The part of a product that [`DEPTH`] or less of the inner dimension makes; no size is 0.
fn add_part<R: Real>(
    c: ArrayViewMut2<'_, R>,
    a: ArrayView2<'_, R>,
    b: ArrayView2<'_, R>,
    accumulate: bool,
    cached: bool,
) {
    #[cfg(target_arch = "x86_64")]
    let Some(c) = in_tiles(c, a, b, accumulate, cached) else { return };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = cached;
    in_the_library(c, a, b, accumulate);
}

/// Does what [`add_part`] is to do by the library.
fn in_the_library<R: Real>(c: ArrayViewMut2<'_, R>, a: ArrayView2<'_, R>, b: ArrayView2<'_, R>, accumulate: bool) {
    let lies = |strides: &[isize]| strides[1] == 1;
    if c.len() > HORIZONTAL && lies(c.strides()) && lies(a.strides()) && lies(b.t().strides()) && !lies(b.strides()) {
        both_along(c, a, b.reversed_axes(), accumulate);
    } else {
        run(c, a, b, accumulate);
    }
}

/// Does what [`add_part`] is to do where tiles of our own serve better than the library, as they do where all of it is `cached`; gives
/// c back where they do not.
#[cfg(target_arch = "x86_64")]
fn in_tiles<'c, R: Real>(
    mut c: ArrayViewMut2<'c, R>,
    a: ArrayView2<'_, R>,
    b: ArrayView2<'_, R>,
    accumulate: bool,
    cached: bool,
) -> Option<ArrayViewMut2<'c, R>> {
    let [c_strides, a_strides, b_strides] = [strides(c.strides()), strides(a.strides()), strides(b.strides())];
    let lies = c_strides[1] == 1 && b_strides.contains(&1);
    if TypeId::of::<R>() != TypeId::of::<f32>() || !lies || c.len() <= HORIZONTAL {
        return Some(c);
    }
    let factor = |start: *const R, strides| Place { start: start.cast(), strides };
    let product = tiles::Product {
        sizes: [a.nrows(), a.ncols(), b.ncols()],
        c: Place { start: c.as_mut_ptr().cast(), strides: c_strides },
        a: factor(a.as_ptr(), a_strides),
        b: factor(b.as_ptr(), b_strides),
        accumulate,
    };
    if !(product.is_for() || cached && tiles::can_run()) {
        return Some(c);
    }
    with_scratch(product.memory(), |memory| {
        // SAFETY: `is_for` or `can_run` found that the processor has what it takes. The pointers and strides are those of live views of f32 whose
        // shapes `product_here` checked; `c` is borrowed mutably, so it overlaps neither factor; and they lie as was asked above.
        unsafe { product.run(memory) };
    });
    None
}

/// `c = a b^T` of factors that both lie along the inner dimension, `[m, k]` and `[n, k]`.
///
/// The library would rearrange b value by value, and take twice the time where its rows lie whole multiples of 1 KiB apart. So
/// it is given b's transpose, or that of a, where this is much the smaller one: c's transpose comes out of that.
fn both_along<R: Real>(c: ArrayViewMut2<'_, R>, a: ArrayView2<'_, R>, b: ArrayView2<'_, R>, accumulate: bool) {
    let ((m, k), n) = (a.dim(), b.nrows());
    // The last ones take what is left: a single column would be summed in another order.
    let count = (n / COLUMNS).max(1);
    let turns_a = m * (k + n) < n * k;
    let widest = n - (count - 1) * COLUMNS;
    let len = if turns_a { m * (k + widest) } else { widest * k };
    with_scratch(len, |scratch| {
        let (factor, result) = scratch.split_at_mut(if turns_a { m * k } else { len });
        if turns_a {
            transpose(matrix_mut(factor, m), a, false);
        }
        let (mut rest_of_b, mut rest_of_c) = (b, c);
        for i in 0..count {
            let width = if i + 1 < count { COLUMNS } else { widest };
            let (b, others) = rest_of_b.split_at(Axis(0), width);
            rest_of_b = others;
            let (c, others) = rest_of_c.split_at(Axis(1), width);
            rest_of_c = others;
            if turns_a {
                let mut result = matrix_mut(&mut result[..b.nrows() * m], m);
                run(result.view_mut(), b, matrix(factor, m), false);
                transpose(c, result.view(), accumulate);
            } else {
                let factor = &mut factor[..b.len()];
                transpose(matrix_mut(factor, b.nrows()), b, false);
                run(c, a, matrix(factor, b.nrows()), accumulate);
            }
        }
    });
}

/// Values as rows of `width`, which is not 0.
fn matrix<R>(values: &[R], width: usize) -> ArrayView2<'_, R> {
    ArrayView2::from_shape((values.len() / width, width), values).expect("as many values as rows times width")
}

/// As [`matrix`], to be written.
fn matrix_mut<R>(values: &mut [R], width: usize) -> ArrayViewMut2<'_, R> {
    ArrayViewMut2::from_shape((values.len() / width, width), values).expect("as many values as rows times width")
}

/// A line of the caches.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Runs `f` with so many values of memory that the thread keeps for it, from a multiple of 64 bytes on, which may hold anything.
pub(super) fn with_scratch<R: Real>(len: usize, f: impl FnOnce(&mut [R])) {
    let mut memory = SCRATCH.take();
    let needed = (len * size_of::<R>()).div_ceil(size_of::<Line>());
    if memory.len() < needed {
        memory.resize(needed, Line::zeroed());
    }
    f(&mut bytemuck::cast_slice_mut(&mut memory[..needed])[..len]);
    SCRATCH.set(memory);
}

/// The library's product.
fn run<R: Real>(mut c: ArrayViewMut2<'_, R>, a: ArrayView2<'_, R>, b: ArrayView2<'_, R>, accumulate: bool) {
    let ((m, k), n) = (a.dim(), b.ncols());
    let (c_strides, a_strides, b_strides) = (strides(c.strides()), strides(a.strides()), strides(b.strides()));
    // SAFETY: the pointers and strides are those of live views whose shapes `product_here` checked to be m x n, m x k and
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
            Parallelism::None,
        );
    }
}

fn strides(strides: &[isize]) -> [isize; 2] {
    [strides[0], strides[1]]
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::super::random;
    use super::*;

    /// Rows, inner dimension and columns: tails of stripes, of blocks and of parts; products that are shared and that are not.
    const SIZES: [[usize; 3]; 14] = [
        [1, 1, 1],
        [16, 3, 17],
        [17, 33, 15],
        [65, 2, 300],
        [300, 512, 65],
        [129, 513, 130],
        [64, 1100, 64],
        [1, 1025, 2000],
        [2000, 1025, 1],
        [7, 1300, 600],
        [600, 1300, 7],
        [48, 600, 500],
        [500, 600, 48],
        [256, 256, 272],
    ];

    /// Products of factors that lie along or across the inner dimension, in matrices that are wider than they.
    fn products(m: usize, k: usize, n: usize, threads: usize, accumulate: bool) -> Vec<Array2<f32>> {
        let (a, b) = (random(m, k + 3, 0), random(k, n + 5, 1));
        let (a, b) = (a.slice(s![.., ..k]), b.slice(s![.., ..n]));
        let (across_a, along_b) = (a.t().to_owned(), b.t().to_owned());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let of = |a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>| {
            let mut c = random(m, n + 1, 2);
            pool.install(|| product(c.slice_mut(s![.., ..n]), a, b, accumulate));
            assert_eq!(c.column(n), random::<f32>(m, n + 1, 2).column(n), "what lies beside the product stays");
            c.slice_move(s![.., ..n])
        };
        vec![of(a, b), of(a, along_b.t()), of(across_a.t(), b), of(across_a.t(), along_b.t())]
    }

    /// A random matrix that is a part of a larger one, along its rows or its columns.
    fn part(rows: usize, columns: usize, seed: u32, along: bool) -> Array2<f32> {
        let [rows, columns] = if along { [rows, columns + 5] } else { [columns, rows + 5] };
        let whole = random(rows, columns, seed);
        let part = whole.slice_move(s![.., ..columns - 5]);
        if along { part } else { part.reversed_axes() }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn tiles_have_the_bits_of_the_library() {
        if !is_x86_feature_detected!("avx512f") {
            println!("skipped: a processor without AVX-512: no tiles");
            return;
        }
        let mut compared = 0;
        let sizes = SIZES.iter().map(|&[m, k, n]| [m, k.min(DEPTH), n]);
        for [m, k, n] in sizes.chain([[101, 96, 64], [300, 512, 33], [5, 140, 87], [30, 97, 9], [50, 99, 251]]) {
            for [a_along, b_along, accumulate] in (0..8).map(|i| [i & 1 == 1, i & 2 == 2, i & 4 == 4]) {
                let (a, b) = (part(m, k, 0, a_along), part(k, n, 1, b_along));
                let [mut found, mut expected] = [part(m, n, 2, true), part(m, n, 2, true)];
                if in_tiles(found.view_mut(), a.view(), b.view(), accumulate, false).is_none() {
                    in_the_library(expected.view_mut(), a.view(), b.view(), accumulate);
                    assert!(found == expected, "{m} x {k} x {n}, {a_along}, {b_along}, {accumulate}");
                    compared += 1;
                }
            }
        }
        assert!(compared >= 40, "{compared} products in tiles");
    }

    #[test]
    fn a_product_is_its_definition_and_has_the_same_bits_for_any_number_of_threads() {
        for [m, k, n] in SIZES {
            for accumulate in [false, true] {
                let of_one = products(m, k, n, 1, accumulate);
                let [a, b] = [random::<f32>(m, k + 3, 0), random(k, n + 5, 1)].map(|x| x.mapv(f64::from));
                let mut expected = a.slice(s![.., ..k]).dot(&b.slice(s![.., ..n]));
                if accumulate {
                    expected += &random::<f32>(m, n + 1, 2).slice(s![.., ..n]).mapv(f64::from);
                }
                for (form, found) in of_one.iter().enumerate() {
                    // Values below 1/2: products below 1/4, whose sums of k have roundings of no more than that many units.
                    let most = (k as f64).mul_add(0.25 * f64::from(f32::EPSILON), f64::from(f32::EPSILON));
                    let away = (&found.mapv(f64::from) - &expected).iter().fold(0.0, |most: f64, x| most.max(x.abs()));
                    assert!(away <= most, "{m} x {k} x {n}, form {form}, {accumulate}: {away} away, at most {most}");
                }
                for threads in [2, 3, 5] {
                    let found = products(m, k, n, threads, accumulate);
                    assert!(found == of_one, "{m} x {k} x {n}, {accumulate}: {threads} threads differ from one");
                }
            }
        }
    }
}
