//! Convolution of several samples as one product, for weights that are many and planes that are small.
//!
//! A product for each sample would read all weights once more for a few positions. Here the columns of so many samples lie side by
//! side that weights which come from memory are read for a few hundred positions, and the threads share each product: its rows
//! are the filters or the taps. The gradient of the weights is added to where it belongs as it comes out of its product.

use std::ops::Range;

use ndarray::ArrayViewMut3;
use rayon::prelude::*;

use super::linear::{matrix, matrix_mut};
use super::parallel::vectorize;
use super::product::{HORIZONTAL, product};
use super::windows::{POSITIONS, Windows};
use crate::backend::ops::Conv2dGeometry;
use crate::error::{Error, Result};
use crate::real::Real;

/// Weights of a group from which on they do not stay in a cache from one sample to the next. Measured.
const WEIGHTS: usize = 1 << 19;

/// A sample with more positions than this has enough of them for products of its own.
const MANY: usize = 4 * POSITIONS;

/// One convolution, some samples at a time.
pub(super) struct Joint<'g> {
    g: &'g Conv2dGeometry,
    windows: Windows<'g>,
    /// Samples of a product, at most.
    samples: usize,
    /// Filters and channels of a group.
    filters: usize,
    channels: usize,
}

impl<'g> Joint<'g> {
    /// The convolution of this geometry, where its weights are so many that products of several samples serve it better than one a sample.
    /// It says the same for any batch, and every value is one sum in the same order, however many samples there are: in another order the
    /// library adds products that are too small, or of one column.
    ///
    /// # Errors
    /// A kernel that does not fit into the padded input.
    pub fn of(g: &'g Conv2dGeometry) -> Result<Option<Self>> {
        Ok(Self::of_weights(g)?
            .filter(|own| own.windows.taps.min(own.filters) > HORIZONTAL && own.windows.positions > 1))
    }

    /// The same for the gradient of the weights alone.
    ///
    /// # Errors
    /// Those of [`Self::of`].
    pub fn of_weights(g: &'g Conv2dGeometry) -> Result<Option<Self>> {
        let own = Self::new(g)?;
        Ok((own.windows.taps * own.filters >= WEIGHTS && own.windows.positions <= MANY).then_some(own))
    }

    fn new(g: &'g Conv2dGeometry) -> Result<Self> {
        let windows = Windows::of(g)?;
        let samples = POSITIONS.div_ceil(windows.positions.max(1)).min(g.batch).max(1);
        Ok(Joint { g, windows, samples, filters: g.filters / g.groups, channels: g.channels / g.groups })
    }

    /// Values of memory that it needs: the columns of some samples, and as many positions of all filters.
    pub fn room(&self) -> usize {
        (self.windows.taps + self.filters) * self.samples * self.windows.positions
    }

    /// Memory for the columns of so many samples, and for their filters' positions.
    fn split<'r, R>(&self, room: &'r mut [R], samples: usize) -> [&'r mut [R]; 2] {
        let positions = samples * self.windows.positions;
        let (columns, rest) = room.split_at_mut(self.windows.taps * positions);
        [columns, &mut rest[..self.filters * positions]]
    }

    /// Values of a sample, of the input and of the output.
    fn sizes(&self) -> [usize; 2] {
        [self.g.channels * self.plane(), self.g.filters * self.windows.positions]
    }

    /// Values of a channel's plane.
    fn plane(&self) -> usize {
        self.g.input[0] * self.g.input[1]
    }

    /// The columns of one group of some samples, `[taps, samples * positions]`, `=`.
    fn columns_of<R: Real>(&self, group: usize, x: &[R], columns: &mut [R]) {
        let samples = x.len() / self.sizes()[0];
        let (pitch, rows) = (samples * self.windows.positions, 0..self.windows.output[0]);
        let lines = columns.par_chunks_exact_mut(self.windows.taps / self.channels * pitch);
        lines.enumerate().for_each(|(channel, columns)| {
            for (sample, x) in x.chunks_exact(self.sizes()[0]).enumerate() {
                let plane = &x[(group * self.channels + channel) * self.plane()..][..self.plane()];
                self.windows.write_channel(plane, &rows, &mut columns[sample * self.windows.positions..], pitch);
            }
        });
    }

    /// `side` `[filters, samples * positions]`, `=`, of one group of some samples' `dy`.
    fn side_by_side<R: Real>(&self, group: usize, dy: &[R], side: &mut [R]) {
        let samples = dy.len() / self.sizes()[1];
        let lines = side.par_chunks_exact_mut(samples * self.windows.positions);
        lines.enumerate().for_each(|(filter, line)| {
            let planes =
                dy.chunks_exact(self.windows.positions).skip(group * self.filters + filter).step_by(self.g.filters);
            line.chunks_exact_mut(self.windows.positions).zip(planes).for_each(|(line, dy)| line.copy_from_slice(dy));
        });
    }

    fn weights_of(&self, group: usize) -> Range<usize> {
        let len = self.filters * self.windows.taps;
        group * len..(group + 1) * len
    }

    /// y, `=`, of some samples' x.
    pub fn forward<R: Real>(
        &self,
        weight: &[R],
        bias: Option<&[R]>,
        x: &[R],
        y: &mut [R],
        room: &mut [R],
    ) -> Result<()> {
        let [input, output] = self.sizes();
        for (x, y) in x.chunks(self.samples * input).zip(y.chunks_mut(self.samples * output)) {
            let samples = x.len() / input;
            let positions = samples * self.windows.positions;
            let [columns, side] = self.split(room, samples);
            for group in 0..self.g.groups {
                self.columns_of(group, x, columns);
                product(
                    matrix_mut(side, self.filters, positions, "conv2d")?,
                    matrix(&weight[self.weights_of(group)], self.filters, self.windows.taps, "conv2d weight")?,
                    matrix(columns, self.windows.taps, positions, "conv2d columns")?,
                    false,
                );
                let side = &*side;
                y.par_chunks_exact_mut(output).enumerate().for_each(|(sample, y)| {
                    let planes = y.chunks_exact_mut(self.windows.positions).enumerate().skip(group * self.filters);
                    for ((filter, y), line) in planes.zip(side.chunks_exact(positions)) {
                        let line = &line[sample * self.windows.positions..][..self.windows.positions];
                        match bias {
                            None => y.copy_from_slice(line),
                            Some(bias) => vectorize(
                                #[inline(always)]
                                || y.iter_mut().zip(line).for_each(|(y, &line)| *y = line + bias[filter]),
                            ),
                        }
                    }
                });
            }
        }
        Ok(())
    }

    /// `gradient` of the weights, `=` or `+=` with `accumulate`, by all samples' x and dy.
    pub fn weight_gradient<R: Real>(
        &self,
        x: &[R],
        dy: &[R],
        gradient: &mut [R],
        accumulate: bool,
        room: &mut [R],
    ) -> Result<()> {
        let [input, output] = self.sizes();
        let pieces = x.chunks(self.samples * input).zip(dy.chunks(self.samples * output));
        for (number, (x, dy)) in pieces.enumerate() {
            let samples = x.len() / input;
            let positions = samples * self.windows.positions;
            let [columns, side] = self.split(room, samples);
            for group in 0..self.g.groups {
                self.columns_of(group, x, columns);
                self.side_by_side(group, dy, side);
                let gradient = &mut gradient[self.weights_of(group)];
                let columns = matrix(columns, self.windows.taps, positions, "conv2d columns")?;
                product(
                    matrix_mut(gradient, self.filters, self.windows.taps, "conv2d weight gradient")?,
                    matrix(side, self.filters, positions, "conv2d gradient")?,
                    columns.reversed_axes(),
                    accumulate || number > 0,
                );
            }
        }
        Ok(())
    }

    /// dx, `=`, of all samples' dy.
    pub fn input_gradient<R: Real>(&self, weight: &[R], dy: &[R], dx: &mut [R], room: &mut [R]) -> Result<()> {
        let [input, output] = self.sizes();
        let rows = 0..self.windows.output[0];
        for (dy, dx) in dy.chunks(self.samples * output).zip(dx.chunks_mut(self.samples * input)) {
            let samples = dy.len() / output;
            let positions = samples * self.windows.positions;
            let [columns, side] = self.split(room, samples);
            let found = (samples, self.g.channels, self.plane());
            let found_len = dx.len();
            let mut dx = ArrayViewMut3::from_shape(found, dx).map_err(|_| {
                Error::shape("conv2d input gradient", format!("{found:?}"), format!("{found_len} elements"))
            })?;
            let mut planes: Vec<_> = dx.axis_iter_mut(ndarray::Axis(1)).collect();
            for (group, planes) in planes.chunks_exact_mut(self.channels).enumerate() {
                self.side_by_side(group, dy, side);
                let weight = matrix(&weight[self.weights_of(group)], self.filters, self.windows.taps, "conv2d weight")?;
                product(
                    matrix_mut(columns, self.windows.taps, positions, "conv2d columns")?,
                    weight.reversed_axes(),
                    matrix(side, self.filters, positions, "conv2d gradient")?,
                    false,
                );
                let lines = columns.par_chunks_exact_mut(self.windows.taps / self.channels * positions);
                lines.zip(planes.par_iter_mut()).for_each(|(columns, planes)| {
                    for (sample, plane) in planes.outer_iter_mut().enumerate() {
                        if let Some(plane) = plane.into_slice() {
                            plane.fill(R::zero());
                            self.windows.add_channel(
                                &mut columns[sample * self.windows.positions..],
                                positions,
                                &rows,
                                plane,
                            );
                        }
                    }
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::columns::Columns;
    use super::super::random;
    use super::*;

    fn values(len: usize, stream: u32) -> Vec<f64> {
        random(1, len, stream).into_raw_vec_and_offset().0
    }

    fn is_near(found: &[f64], expected: &[f64], what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((found - expected).abs() < 1e-12, "{what}, value {i}: {found}, expected {expected}");
        }
    }

    #[test]
    fn products_of_several_samples_are_those_of_each() {
        let case = |batch, [channels, filters, groups]: [usize; 3], input, kernel, stride, padding| Conv2dGeometry {
            batch,
            channels,
            input,
            filters,
            kernel,
            stride,
            padding,
            groups,
        };
        // Several products of several samples, with fewer in the last one; one product; a sample in each.
        for g in [
            case(13, [4, 6, 2], [9, 7], [3, 3], [1, 1], [1, 1]),
            case(11, [3, 5, 1], [13, 16], [3, 2], [2, 2], [1, 0]),
            case(7, [6, 3, 3], [5, 4], [1, 1], [1, 1], [0, 0]),
            case(2, [2, 4, 1], [18, 17], [3, 5], [1, 1], [1, 2]),
        ] {
            let [oh, ow] = g.output().unwrap();
            let (joint, columns) = (Joint::new(&g).unwrap(), Columns::of(&g).unwrap());
            let (inputs, outputs) = (g.batch * g.channels * g.input[0] * g.input[1], g.batch * g.filters * oh * ow);
            let [x, dy] = [values(inputs, 0), values(outputs, 1)];
            let [weight, bias] = [values(g.weights(), 2), values(g.filters, 3)];
            // Memory holds anything.
            let mut room = vec![f64::NAN; joint.room().max(columns.room())];

            let [mut y, mut expected] = [vec![f64::NAN; outputs], vec![f64::NAN; outputs]];
            joint.forward(&weight, Some(&bias), &x, &mut y, &mut room).unwrap();
            columns.forward(&weight, Some(&bias), &x, &mut expected, &mut room).unwrap();
            is_near(&y, &expected, &format!("y of {g:?}"));

            let [mut dx, mut expected] = [vec![f64::NAN; inputs], vec![f64::NAN; inputs]];
            joint.input_gradient(&weight, &dy, &mut dx, &mut room).unwrap();
            columns.input_gradient(&weight, &dy, &mut expected, &mut room).unwrap();
            is_near(&dx, &expected, &format!("dx of {g:?}"));

            let mut sums = vec![f64::NAN; g.weights()];
            columns.weight_gradient(&x, &dy, &mut sums, &mut room).unwrap();
            let [taps, filters] = columns.weights();
            let expected: Vec<f64> = (0..g.weights())
                .map(|at| (at / (taps * filters), at / taps % filters, at % taps))
                .map(|(group, filter, tap)| sums[(group * taps + tap) * filters + filter])
                .collect();
            for accumulate in [false, true] {
                let before = values(g.weights(), 4);
                let mut found = before.clone();
                joint.weight_gradient(&x, &dy, &mut found, accumulate, &mut room).unwrap();
                let expected = expected.iter().zip(&before);
                let expected: Vec<_> = expected.map(|(new, old)| if accumulate { new + old } else { *new }).collect();
                is_near(&found, &expected, &format!("dweight of {g:?}, {accumulate}"));
            }
        }
    }

    #[test]
    fn a_sample_has_the_same_bits_beside_any_others() {
        for (input, kernel) in [([1, 2], [1, 1]), ([1, 3], [1, 1]), ([2, 2], [2, 3]), ([5, 7], [1, 2])] {
            let of = |batch: usize| {
                let (channels, filters) = (520, 300);
                let (stride, padding) = ([1, 1], [kernel[0] / 2, kernel[1] / 2]);
                let g = Conv2dGeometry { batch, channels, input, filters, kernel, stride, padding, groups: 1 };
                let [oh, ow] = g.output().unwrap();
                let (joint, weight) = (Joint::new(&g).unwrap(), random::<f32>(1, g.weights(), 0));
                let [inputs, outputs] = [channels * input[0] * input[1], filters * oh * ow];
                let (x, dy) = (random::<f32>(9, inputs, 1), random::<f32>(9, outputs, 2));
                let [x, dy] = [&x.as_slice().unwrap()[..batch * inputs], &dy.as_slice().unwrap()[..batch * outputs]];
                let weight = weight.as_slice().unwrap();
                let mut room = vec![0.0; joint.room()];
                let [mut y, mut dx] = [vec![0.0; dy.len()], vec![0.0; x.len()]];
                joint.forward(weight, None, x, &mut y, &mut room).unwrap();
                joint.input_gradient(weight, dy, &mut dx, &mut room).unwrap();
                (y, dx)
            };
            let (y, dx) = of(9);
            for batch in 1..9 {
                let (fewer_y, fewer_dx) = of(batch);
                assert!(
                    y[..fewer_y.len()] == fewer_y && dx[..fewer_dx.len()] == fewer_dx,
                    "{input:?}, {batch} samples"
                );
            }
        }
    }

    #[test]
    fn convolutions_of_many_weights_take_it() {
        let ways = |[channels, filters]: [usize; 2], input: [usize; 2], side: usize, groups: usize| {
            let (kernel, padding) = ([side; 2], [side / 2; 2]);
            let g = Conv2dGeometry { batch: 3, channels, input, filters, kernel, stride: [1, 1], padding, groups };
            let own = [Joint::of(&g).unwrap().is_some(), Joint::of_weights(&g).unwrap().is_some()];
            let more = Conv2dGeometry { batch: 300, ..g };
            assert_eq!(own, [Joint::of(&more).unwrap().is_some(), Joint::of_weights(&more).unwrap().is_some()]);
            own
        };
        // ResNet-18's, stage by stage.
        assert_eq!(ways([64, 64], [56, 56], 3, 1), [false, false]);
        assert_eq!(ways([128, 128], [28, 28], 3, 1), [false, false]);
        assert_eq!(ways([256, 256], [14, 14], 3, 1), [false, true]);
        assert_eq!(ways([512, 512], [7, 7], 3, 1), [true, true]);
        assert_eq!(ways([512, 512], [7, 7], 3, 8), [false, false]);
        assert_eq!(ways([512, 1100], [1, 1], 1, 1), [false, true]);
        assert_eq!(ways([512, 512], [32, 32], 3, 1), [true, true]);
        assert_eq!(ways([512, 512], [32, 33], 3, 1), [false, false]);
        // Those by which it is held to the definition (tests/twins/conv.rs).
        assert_eq!(ways([256, 257], [5, 6], 3, 1), [true, true]);
        assert_eq!(ways([512, 1100], [3, 2], 1, 1), [true, true]);
    }
}
