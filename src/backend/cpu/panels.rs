//! Products with a factor that is packed once, in the order in which the processor goes through it, and used by many rows; parts
//! of them that are not needed cost nothing.
//!
//! Every value of a product is one sum in the order of the inner dimension, by fused multiplications and additions: it has the
//! same bits on any processor and for any number of threads.

use std::any::TypeId;
use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::parallel::{LANES, Lanes, vectorize};
use super::transpose::{in_one_piece, transpose};
use crate::real::Real;

/// Rows that are worked on at once at most: parts of a product begin at multiples of it.
const TILE: usize = 8;

/// A right factor `[depth, width]` in panels of [`LANES`] columns, each in one piece, with zeros beyond the last column.
pub(super) struct Panels<'m, R> {
    values: &'m [Lanes<R>],
    depth: usize,
}

/// How much memory a factor `[depth, width]` takes.
pub(super) fn room(depth: usize, width: usize) -> usize {
    depth * width.div_ceil(LANES)
}

/// What is wanted of some rows of a product.
pub(super) struct Part {
    /// Of the inner dimension: what lies outside counts as zero.
    pub depth: Range<usize>,
    /// Columns; those beyond may be left as they were.
    pub width: usize,
}

impl<'m, R: Real> Panels<'m, R> {
    /// Packs a factor `[depth, width]` whose rows lie in one piece into [`room`] for it, which may hold anything.
    pub fn pack(memory: &'m mut [Lanes<R>], from: ArrayView2<'_, R>) -> Self {
        let depth = from.nrows();
        for (row, from) in from.axis_iter(Axis(0)).enumerate() {
            let (whole, rest) = in_one_piece(from.to_slice()).as_chunks::<LANES>();
            let mut places = memory.iter_mut().skip(row).step_by(depth);
            for (from, place) in whole.iter().zip(&mut places) {
                *place = *from;
            }
            if let Some(place) = places.next().filter(|_| !rest.is_empty()) {
                let (inside, beyond) = place.split_at_mut(rest.len());
                inside.copy_from_slice(rest);
                beyond.fill(R::zero());
            }
        }
        Panels { values: memory, depth }
    }

    /// The same with the transpose of `[width, depth]`, whose rows lie in one piece.
    pub fn pack_transposed(memory: &'m mut [Lanes<R>], from: ArrayView2<'_, R>) -> Self {
        let depth = from.ncols();
        let panels = memory.chunks_exact_mut(depth.max(1));
        for (panel, from) in panels.zip(from.axis_chunks_iter(Axis(0), LANES)) {
            let panel = panel.as_flattened_mut();
            if from.nrows() < LANES {
                panel.fill(R::zero());
            }
            let panel = ArrayViewMut2::from_shape((depth, LANES), panel).expect("a panel is as deep as its factor");
            transpose(panel.slice_move(s![.., ..from.nrows()]), from, false);
        }
        Panels { values: memory, depth }
    }

    /// `c = a b`, or `c += a b` with `accumulate`: `[m, k] x [k, n] -> [m, n]`, b being the rows of this factor from `first` on. `part`
    /// tells what is wanted of a range of rows. a's rows or its columns lie in one piece, c's rows do. `shared` by the threads
    /// of the pool, or on the calling one.
    ///
    /// # Panics
    /// Shapes that do not fit: a mistake of the calling operation.
    pub fn multiply(
        &self,
        c: ArrayViewMut2<'_, R>,
        a: ArrayView2<'_, R>,
        first: usize,
        part: impl Fn(Range<usize>) -> Part + Sync,
        [accumulate, shared]: [bool; 2],
    ) {
        assert_eq!(c.nrows(), a.nrows(), "outer dimensions");
        assert!(first + a.ncols() <= self.depth, "inner dimensions");
        assert!(c.ncols().div_ceil(LANES) * self.depth <= self.values.len(), "outer dimensions");
        if TypeId::of::<R>() == TypeId::of::<f32>() {
            let b = &bytemuck::cast_slice::<Lanes<R>, Lanes<f32>>(self.values)[first..];
            let whole = Product { a: Factor::<f32>::of(a), b, depth: self.depth, part, accumulate };
            whole.run(c, shared, |rows| pulp::Arch::new().dispatch(rows));
        } else {
            let b = &self.values[first..];
            let whole = Product { a: Factor::<R>::of(a), b, depth: self.depth, part, accumulate };
            whole.run(c, shared, |rows| rows.one_by_one());
        }
    }
}

/// A left factor as slices.
enum Factor<'a, T> {
    /// Its rows.
    Along(Vec<&'a [T]>),
    /// Its columns.
    Across(Vec<&'a [T]>),
}

impl<'a, T: Real> Factor<'a, T> {
    fn of<R: Real>(a: ArrayView2<'a, R>) -> Self {
        let lines = |a: ArrayView2<'a, R>| {
            a.into_outer_iter().map(|line| bytemuck::cast_slice(in_one_piece(line.to_slice()))).collect()
        };
        // The stride of an axis with one element may be anything.
        if a.strides()[1] == 1 || a.ncols() <= 1 {
            Factor::Along(lines(a))
        } else {
            Factor::Across(lines(a.reversed_axes()))
        }
    }
}

/// Everything about a product but where it goes.
struct Product<'a, T, P> {
    a: Factor<'a, T>,
    /// From the first row of the factor on.
    b: &'a [Lanes<T>],
    /// Distance of panels.
    depth: usize,
    part: P,
    accumulate: bool,
}

/// Rows of a product, the first of which is row `first`.
struct Rows<'p, 'c, 'a, T, P> {
    product: &'p Product<'a, T, P>,
    c: &'p mut [&'c mut [T]],
    first: usize,
}

impl<T: Real, P: Fn(Range<usize>) -> Part + Sync> Product<'_, T, P> {
    fn run<R: Real>(
        &self,
        mut c: ArrayViewMut2<'_, R>,
        shared: bool,
        on_this_thread: impl Fn(Rows<'_, '_, '_, T, P>) + Sync,
    ) {
        let lines = c.axis_iter_mut(Axis(0)).map(|line| bytemuck::cast_slice_mut(in_one_piece(line.into_slice())));
        let mut lines: Vec<&mut [T]> = lines.collect();
        if shared {
            let height = lines.len().div_ceil(rayon::current_num_threads()).next_multiple_of(TILE).max(TILE);
            let pieces = lines.par_chunks_mut(height).enumerate();
            pieces.for_each(|(i, c)| on_this_thread(Rows { product: self, c, first: i * height }));
        } else {
            on_this_thread(Rows { product: self, c: &mut lines, first: 0 });
        }
    }
}

impl<T: Real, P: Fn(Range<usize>) -> Part + Sync> Rows<'_, '_, '_, T, P> {
    /// Calls `tile(rows of c, which they are, b's panel from where it is wanted, the part of the inner dimension, columns)` for
    /// `rows` rows at a time, panel by panel.
    #[inline(always)]
    fn each_tile(self, rows: usize, tile: impl Fn(&mut [&mut [T]], usize, &[Lanes<T>], Range<usize>, Range<usize>)) {
        let Product { b, depth, part, .. } = self.product;
        let columns = self.c.first().map_or(0, |line| line.len());
        for column in (0..columns).step_by(LANES) {
            let panel = &b[column / LANES * depth..];
            for (i, c) in self.c.chunks_mut(rows).enumerate() {
                let from = self.first + i * rows;
                let part = part(from..from + c.len());
                if column < part.width {
                    let end = (column + LANES).min(columns);
                    tile(c, from, &panel[part.depth.clone()], part.depth, column..end);
                }
            }
        }
    }

    /// In a form for any type and any processor.
    fn one_by_one(self) {
        let Product { a, accumulate, .. } = self.product;
        vectorize(
            #[inline(always)]
            || {
                self.each_tile(
                    1,
                    #[inline(always)]
                    |c, row, panel, depth, columns| {
                        let mut sums = [T::zero(); LANES];
                        for (b, l) in panel.iter().zip(depth) {
                            let a = match a {
                                Factor::Along(rows) => rows[row][l],
                                Factor::Across(columns) => columns[l][row],
                            };
                            sums.iter_mut().zip(b).for_each(|(sum, &b)| *sum = a.mul_add(b, *sum));
                        }
                        put(&mut c[0][columns], &sums, *accumulate);
                    },
                );
            },
        );
    }
}

impl<P: Fn(Range<usize>) -> Part + Sync> WithSimd for Rows<'_, '_, '_, f32, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            16 => in_tiles::<S, P, TILE, 1>(simd, self),
            8 => in_tiles::<S, P, { TILE / 2 }, 2>(simd, self),
            4 => in_tiles::<S, P, { TILE / 2 }, 4>(simd, self),
            _ => self.one_by_one(),
        }
    }
}

/// `ROWS` rows at a time, of a panel that is `VECTORS` vectors wide; sums stay in registers.
#[inline(always)]
fn in_tiles<S: Simd, P: Fn(Range<usize>) -> Part + Sync, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    rows: Rows<'_, '_, '_, f32, P>,
) {
    let Product { a, accumulate, .. } = rows.product;
    rows.each_tile(
        ROWS,
        #[inline(always)]
        |c, first, panel, depth, columns| {
            let panel = S::as_simd_f32s(panel.as_flattened()).0;
            if c.len() == ROWS {
                let sums = tile::<S, ROWS, VECTORS>(simd, a, first, depth, panel);
                for (line, sums) in c.iter_mut().zip(&sums) {
                    put_vectors(simd, &mut line[columns.clone()], sums, *accumulate);
                }
            } else {
                for (line, row) in c.iter_mut().zip(first..) {
                    let [sums] = tile::<S, 1, VECTORS>(simd, a, row, depth.clone(), panel);
                    put_vectors(simd, &mut line[columns.clone()], &sums, *accumulate);
                }
            }
        },
    );
}

/// Loops, and no closures: these would be compiled without the processor's instructions.
#[inline(always)]
fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    a: &Factor<'_, f32>,
    first: usize,
    depth: Range<usize>,
    panel: &[S::f32s],
) -> [[S::f32s; VECTORS]; ROWS] {
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
    let (panel, _) = panel.as_chunks::<VECTORS>();
    match a {
        Factor::Along(lines) => {
            let mut rows = [&[][..]; ROWS];
            for r in 0..ROWS {
                rows[r] = &lines[first + r][depth.clone()][..panel.len()];
            }
            for (l, b) in panel.iter().enumerate() {
                for r in 0..ROWS {
                    let a = simd.splat_f32s(rows[r][l]);
                    for v in 0..VECTORS {
                        sums[r][v] = simd.mul_add_f32s(a, b[v], sums[r][v]);
                    }
                }
            }
        }
        Factor::Across(lines) => {
            for (b, line) in panel.iter().zip(&lines[depth]) {
                let line = &line[first..first + ROWS];
                for r in 0..ROWS {
                    let a = simd.splat_f32s(line[r]);
                    for v in 0..VECTORS {
                        sums[r][v] = simd.mul_add_f32s(a, b[v], sums[r][v]);
                    }
                }
            }
        }
    }
    sums
}

/// Sums to their place, as many as there is place for.
#[inline(always)]
fn put_vectors<S: Simd, const VECTORS: usize>(simd: S, to: &mut [f32], sums: &[S::f32s; VECTORS], accumulate: bool) {
    match S::as_mut_simd_f32s(to) {
        (vectors, []) if vectors.len() == VECTORS => {
            for v in 0..VECTORS {
                vectors[v] = if accumulate { simd.add_f32s(vectors[v], sums[v]) } else { sums[v] };
            }
        }
        _ => put(to, bytemuck::cast_slice(sums), accumulate),
    }
}

#[inline(always)]
fn put<T: Real>(to: &mut [T], sums: &[T], accumulate: bool) {
    for (to, &sum) in to.iter_mut().zip(sums) {
        *to = if accumulate { *to + sum } else { sum };
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::super::random;
    use super::*;

    /// Rows, inner dimension and columns: tails of tiles and of panels, and none.
    const SIZES: [[usize; 3]; 9] = [
        [1, 1, 1],
        [9, 1, 18],
        [8, 4, 16],
        [7, 33, 15],
        [64, 32, 64],
        [65, 5, 33],
        [19, 64, 17],
        [0, 3, 5],
        [12, 0, 20],
    ];

    /// Causal as far as the sizes let it: row i is a sum over what lies before `i + 2`, in columns before `i + 3`.
    fn part(rows: Range<usize>, k: usize, n: usize) -> Part {
        Part { depth: rows.start.min(1).min(k)..(rows.end + 1).min(k), width: (rows.end + 2).min(n) }
    }

    /// Of all rows and columns, and of some, by the definition: one sum in the order of the inner dimension.
    fn is_its_definition<R: Real>([m, k, n]: [usize; 3], whole: bool, [accumulate, shared]: [bool; 2]) {
        const FIRST: usize = 3;
        // The left factor is 0 where a causal part leaves it out, since a tile takes what the last of its rows takes.
        let mut a = random::<R>(m, k, 0);
        if !whole {
            a.indexed_iter_mut().for_each(|((i, l), a)| *a = if (1..i + 2).contains(&l) { *a } else { R::zero() });
        }
        let b = random::<R>(FIRST + k, n, 1);
        let mut expected = random::<R>(m, n, 2);
        for ((i, j), c) in expected.indexed_iter_mut() {
            let sum = (0..k).fold(R::zero(), |sum, l| a[(i, l)].mul_add(b[(FIRST + l, j)], sum));
            *c = if accumulate { *c + sum } else { sum };
        }
        // Memory holds anything.
        let memory = vec![[R::neg_infinity(); LANES]; room(FIRST + k, n)];
        let [mut straight, mut across] = [memory.clone(), memory];
        let packed = Panels::pack(&mut straight, b.view());
        let turned = Panels::pack_transposed(&mut across, b.t().as_standard_layout().view());
        assert_eq!(packed.values, turned.values, "{m} x {k} x {n}");
        let wanted = |rows: Range<usize>| if whole { Part { depth: 0..k, width: n } } else { part(rows, k, n) };
        for across in [false, true] {
            let columns = a.t().as_standard_layout().into_owned();
            let a = if across { columns.t() } else { a.view() };
            let mut c = random::<R>(m, n, 2);
            packed.multiply(c.view_mut(), a, FIRST, wanted, [accumulate, shared]);
            for ((i, j), &c) in c.indexed_iter() {
                let asked = whole || j < part(i..i + 1, k, n).width;
                assert!(!asked || c == expected[(i, j)], "{m} x {k} x {n}, {across}: row {i}, column {j}");
            }
        }
    }

    #[test]
    fn a_product_with_panels_is_its_definition_to_the_bit_on_any_number_of_threads() {
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for sizes in SIZES {
                for forms in [[false, false], [false, true], [true, false], [true, true]] {
                    for whole in [true, false] {
                        pool.install(|| is_its_definition::<f32>(sizes, whole, forms));
                        pool.install(|| is_its_definition::<f64>(sizes, whole, forms));
                    }
                }
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn narrower_vectors_give_the_same_bits() {
        let Some(processor) = pulp::x86::V3::try_new() else { return };
        let (a, mut memory) = (random::<f32>(21, 40, 0), vec![[0.0; LANES]; room(40, 35)]);
        let b = Panels::pack(&mut memory, random(40, 35, 1).view());
        for across in [false, true] {
            let columns = a.t().as_standard_layout().into_owned();
            let a = if across { columns.t() } else { a.view() };
            let part = |_: Range<usize>| Part { depth: 0..40, width: 35 };
            let (mut wide, mut narrow) = (random::<f32>(21, 35, 2), random::<f32>(21, 35, 2));
            b.multiply(wide.view_mut(), a, 0, part, [true, false]);
            let whole = Product { a: Factor::<f32>::of(a), b: b.values, depth: 40, part, accumulate: true };
            whole.run(narrow.view_mut(), false, |rows| Simd::vectorize(processor, rows));
            assert_eq!(wide, narrow);
        }
    }

    #[test]
    fn columns_that_nobody_wants_are_left_as_they_were() {
        let mut memory = vec![[0.0; LANES]; room(4, 40)];
        let b = Panels::pack(&mut memory, random::<f32>(4, 40, 0).view());
        let mut c = Array2::from_elem((9, 40), 7.0);
        let a = random::<f32>(9, 4, 1);
        b.multiply(c.view_mut(), a.view(), 0, |_| Part { depth: 0..4, width: 17 }, [false, false]);
        assert!(c.slice(s![.., 32..]).iter().all(|&c| c == 7.0));
        assert!(c.slice(s![.., ..32]).iter().all(|&c| c.abs() < 1.1));
    }
}
