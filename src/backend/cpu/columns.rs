//! Convolution as products, a sample at a time: the windows of some rows of its output become the columns of a matrix, so few at a time
//! that they stay in the cache.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2, s};

use super::linear::{matrix, matrix_mut};
use super::parallel::vectorize;
use super::product::{product_here, product_in_cache};
use super::windows::Windows;
use crate::backend::ops::Conv2dGeometry;
use crate::error::Result;
use crate::real::Real;

/// Up to so many weights of a group, they and the columns of a piece stay in the second-level cache.
const CACHED: usize = 1 << 17;

/// One convolution, a sample at a time.
#[derive(Clone, Copy)]
pub(super) struct Columns<'g> {
    g: &'g Conv2dGeometry,
    windows: Windows<'g>,
    /// Filters of a group.
    filters: usize,
}

impl<'g> Columns<'g> {
    /// # Errors
    /// A kernel that does not fit into the padded input.
    pub fn of(g: &'g Conv2dGeometry) -> Result<Self> {
        Ok(Columns { g, windows: Windows::of(g)?, filters: g.filters / g.groups })
    }

    /// Values of memory that a thread needs: the columns of a piece; none where the input is that matrix already.
    pub fn room(&self) -> usize {
        if self.windows.is_pointwise() { 0 } else { self.windows.taps * self.windows.piece * self.windows.output[1] }
    }

    /// Rows and columns of the gradient of a group's weights as [`Self::weight_gradient`] leaves it.
    pub fn weights(&self) -> [usize; 2] {
        [self.windows.taps, self.filters]
    }

    fn positions_of(&self, rows: &Range<usize>) -> Range<usize> {
        let width = self.windows.output[1];
        rows.start * width..rows.end * width
    }

    /// Values of a group of a sample, of the input and of the output.
    fn sizes(&self) -> [usize; 2] {
        [self.g.channels / self.g.groups * self.g.input[0] * self.g.input[1], self.filters * self.windows.positions]
    }

    fn product<R: Real>(&self, c: ArrayViewMut2<'_, R>, a: ArrayView2<'_, R>, b: ArrayView2<'_, R>, accumulate: bool) {
        if self.windows.taps * self.filters <= CACHED {
            product_in_cache(c, a, b, accumulate);
        } else {
            product_here(c, a, b, accumulate);
        }
    }

    /// Weights of the group with this number, counted over samples.
    fn weights_of<'w, R>(&self, number: usize, weight: &'w [R]) -> Result<ArrayView2<'w, R>> {
        let (group, len) = (number % self.g.groups, self.filters * self.windows.taps);
        matrix(&weight[group * len..(group + 1) * len], self.filters, self.windows.taps, "conv2d weight")
    }

    /// Calls `work(columns [taps, positions], which positions these are)` for each piece of one group of a sample: columns are written to
    /// `scratch`, or are the input itself.
    fn each_piece<R: Real>(
        &self,
        x: &[R],
        scratch: &mut [R],
        mut work: impl FnMut(ArrayView2<'_, R>, Range<usize>),
    ) -> Result<()> {
        let taps = self.windows.taps;
        if self.windows.is_pointwise() {
            work(matrix(x, taps, self.windows.positions, "conv2d input")?, 0..self.windows.positions);
            return Ok(());
        }
        for rows in self.windows.pieces() {
            let positions = self.positions_of(&rows);
            let columns = &mut scratch[..taps * positions.len()];
            self.windows.write(x, &rows, columns, positions.len());
            work(matrix(columns, taps, positions.len(), "conv2d columns")?, positions);
        }
        Ok(())
    }

    /// y, `=`, of some samples' x.
    pub fn forward<R: Real>(
        &self,
        weight: &[R],
        bias: Option<&[R]>,
        x: &[R],
        y: &mut [R],
        scratch: &mut [R],
    ) -> Result<()> {
        let [input, output] = self.sizes();
        for (number, (x, y)) in x.chunks_exact(input).zip(y.chunks_exact_mut(output)).enumerate() {
            let weight = self.weights_of(number, weight)?;
            let mut all = matrix_mut(y, self.filters, self.windows.positions, "conv2d")?;
            self.each_piece(x, scratch, |columns, positions| {
                self.product(all.slice_mut(s![.., positions]), weight, columns, false);
            })?;
            if let Some(bias) = bias {
                let bias = &bias[number % self.g.groups * self.filters..];
                vectorize(
                    #[inline(always)]
                    || {
                        for (y, &b) in y.chunks_exact_mut(self.windows.positions).zip(bias) {
                            y.iter_mut().for_each(|y| *y += b);
                        }
                    },
                );
            }
        }
        Ok(())
    }

    /// `weights` `[taps, filters]` of each group, `=`: their gradient by some samples' x and dy, on its side. Of the two factors, which
    /// both lie along the sum, the smaller one is rearranged for it.
    pub fn weight_gradient<R: Real>(&self, x: &[R], dy: &[R], weights: &mut [R], scratch: &mut [R]) -> Result<()> {
        let [input, output] = self.sizes();
        let len = self.windows.taps * self.filters;
        for (number, (x, dy)) in x.chunks_exact(input).zip(dy.chunks_exact(output)).enumerate() {
            let group = number % self.g.groups;
            let weights = &mut weights[group * len..(group + 1) * len];
            let mut weights = matrix_mut(weights, self.windows.taps, self.filters, "conv2d weight gradient")?;
            let dy = matrix(dy, self.filters, self.windows.positions, "conv2d gradient")?;
            self.each_piece(x, scratch, |columns, positions| {
                let accumulate = number >= self.g.groups || positions.start > 0;
                self.product(weights.view_mut(), columns, dy.slice(s![.., positions]).reversed_axes(), accumulate);
            })?;
        }
        Ok(())
    }

    /// dx, `=`, of some samples' dy.
    pub fn input_gradient<R: Real>(&self, weight: &[R], dy: &[R], dx: &mut [R], scratch: &mut [R]) -> Result<()> {
        let ([input, output], taps) = (self.sizes(), self.windows.taps);
        for (number, (dy, dx)) in dy.chunks_exact(output).zip(dx.chunks_exact_mut(input)).enumerate() {
            let weight = self.weights_of(number, weight)?.reversed_axes();
            let dy = matrix(dy, self.filters, self.windows.positions, "conv2d gradient")?;
            if self.windows.is_pointwise() {
                self.product(matrix_mut(dx, taps, self.windows.positions, "conv2d")?, weight, dy, false);
                continue;
            }
            dx.fill(R::zero());
            for rows in self.windows.pieces() {
                let positions = self.positions_of(&rows);
                let count = positions.len();
                let columns = &mut scratch[..taps * count];
                let dy = dy.slice(s![.., positions]);
                self.product(matrix_mut(columns, taps, count, "conv2d columns")?, weight, dy, false);
                self.windows.add(columns, count, &rows, dx);
            }
        }
        Ok(())
    }
}
