//! Convolution by kernels of 3 x 3, a step at a time, in 2.25 times fewer multiplications (Winograd 1980; Lavin and Gray 2016,
//! F(2 x 2, 3 x 3)).
//!
//! The output is cut into tiles of 2 x 2, each of which sees a patch of 4 x 4 of the input. Patches, tiles and kernels are turned into
//! 16 values each by additions (and halves), so that what a convolution sums over taps and channels becomes 16 products of matrices,
//! one for each of these values: of kernels `[filters, channels]` by patches `[channels, tiles]` forward, and of tiles
//! `[filters, tiles]` by patches on their side for the gradient of the kernels. The gradient of the input is a convolution of that of
//! the output by the kernels turned about. A block of tiles is worked on at a time, so that all of this stays in the cache.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

use super::linear::{matrix, matrix_mut};
use super::parallel::vectorize;
use super::product::product_in_cache;
use super::transpose::transpose;
use super::windows::{join, part};
use crate::backend::ops::Conv2dGeometry;
use crate::error::Result;
use crate::real::Real;

/// Values that a kernel, a patch or a tile becomes.
const POINTS: usize = 16;

/// Tiles that are worked on together.
const LANES: usize = 8;

/// Tiles of a block, or few more.
const BLOCK: usize = 64;

/// Filters whose products are kept before they are turned into outputs.
const FILTERS: usize = 64;

/// Values between those of one point and those of the next, so that the 16 of a tile do not meet in one set of a cache.
const BESIDE: usize = 16;

/// What is done around products is paid for where they are of so many channels and filters (the harmonic mean of both), and, where a row
/// has no more tiles than are worked on together, of twice as many. Measured.
const PLANES: usize = 32;

/// Sums of kernels' gradients larger than this, in values, do not stay in the cache: then a sample has to have so many tiles.
const SUMS: usize = 1 << 17;
const TILES: usize = 128;

/// One convolution: of planes `input` to planes `output` large.
#[derive(Clone, Copy, Debug)]
pub(super) struct Winograd {
    channels: usize,
    filters: usize,
    input: [usize; 2],
    output: [usize; 2],
    padding: [usize; 2],
    /// Rows of tiles, and tiles of a row, with those beyond the output that make them a multiple of [`LANES`].
    rows: usize,
    pitch: usize,
}

type Lanes<R> = [R; LANES];

#[inline(always)]
fn load<R: Real>(values: &[R], at: usize) -> Lanes<R> {
    *values[at..].first_chunk().expect("as many values as a block of tiles has")
}

#[inline(always)]
fn store<R: Real>(values: &mut [R], at: usize, lanes: Lanes<R>) {
    *values[at..].first_chunk_mut().expect("as many values as a block of tiles has") = lanes;
}

/// Those at `first`, and thrice `step` values further on.
#[inline(always)]
fn load_four<R: Real>(values: &[R], first: usize, step: usize) -> [Lanes<R>; 4] {
    [load(values, first), load(values, first + step), load(values, first + 2 * step), load(values, first + 3 * step)]
}

#[inline(always)]
fn add<R: Real>(mut a: Lanes<R>, b: Lanes<R>) -> Lanes<R> {
    for i in 0..LANES {
        a[i] += b[i];
    }
    a
}

#[inline(always)]
fn subtract<R: Real>(mut a: Lanes<R>, b: Lanes<R>) -> Lanes<R> {
    for i in 0..LANES {
        a[i] -= b[i];
    }
    a
}

#[inline(always)]
fn negate<R: Real>(a: Lanes<R>) -> Lanes<R> {
    subtract([R::zero(); LANES], a)
}

#[inline(always)]
fn halve<R: Real>(mut a: Lanes<R>) -> Lanes<R> {
    let half = R::from_f64(0.5);
    for value in &mut a {
        *value *= half;
    }
    a
}

/// What four values in a row of a patch become.
#[inline(always)]
fn of_patch<R: Real>([a, b, c, d]: [Lanes<R>; 4]) -> [Lanes<R>; 4] {
    [subtract(a, c), add(b, c), subtract(c, b), subtract(b, d)]
}

/// What two values in a row of a tile's gradient become.
#[inline(always)]
fn of_tile<R: Real>([a, b]: [Lanes<R>; 2]) -> [Lanes<R>; 4] {
    [a, add(a, b), subtract(a, b), negate(b)]
}

/// The two values of a tile that four products in a row become.
#[inline(always)]
fn of_products<R: Real>([a, b, c, d]: [Lanes<R>; 4]) -> [Lanes<R>; 2] {
    [add(add(a, b), c), subtract(subtract(b, c), d)]
}

/// What four points in a row of a kernel's gradient make of three weights'.
#[inline(always)]
fn of_sums<R: Real>([a, b, c, d]: [Lanes<R>; 4]) -> [Lanes<R>; 3] {
    let (sum, difference) = (halve(add(b, c)), halve(subtract(b, c)));
    [add(a, sum), difference, add(sum, d)]
}

/// Rows and columns changed about.
#[inline(always)]
fn turned<T: Copy, const N: usize, const M: usize>(rows: [[T; N]; M]) -> [[T; M]; N] {
    let mut columns = [[rows[0][0]; M]; N];
    for (i, row) in rows.iter().enumerate() {
        for (j, &value) in row.iter().enumerate() {
            columns[j][i] = value;
        }
    }
    columns
}

impl Winograd {
    /// The convolution of this geometry, where this method serves it better than columns do. It says the same for any batch, so that
    /// a sample's numbers do not depend on those beside it.
    pub fn of(g: &Conv2dGeometry) -> Option<Self> {
        let fits = g.kernel == [3, 3] && g.stride == [1, 1] && g.groups == 1 && g.padding.iter().all(|&side| side <= 2);
        if !fits {
            return None;
        }
        let own = Self::new([g.channels, g.filters], g.input, g.output()?, g.padding);
        let planes = if own.pitch > LANES { PLANES } else { 2 * PLANES };
        // Tiles at the edges that are not whole, and beyond them, cost what all others do.
        let spares = 9 * own.output[0] * own.output[1] >= 14 * own.rows * own.pitch;
        (spares && 2 * g.channels * g.filters >= planes * (g.channels + g.filters)).then_some(own)
    }

    /// Whether the gradient of the kernels is served by it too.
    pub fn serves_weights(&self) -> bool {
        self.kernels() <= SUMS || self.rows * self.pitch >= TILES
    }

    fn new([channels, filters]: [usize; 2], input: [usize; 2], output: [usize; 2], padding: [usize; 2]) -> Self {
        let rows = output[0].div_ceil(2);
        let pitch = output[1].div_ceil(2).next_multiple_of(LANES);
        Winograd { channels, filters, input, output, padding, rows, pitch }
    }

    /// The convolution that makes the gradient of the input of that of the output.
    pub fn of_gradient(&self) -> Self {
        Self::new([self.filters, self.channels], self.output, self.input, self.padding.map(|side| 2 - side))
    }

    /// Rows of tiles in a block.
    fn block(&self) -> usize {
        (BLOCK / self.pitch).max(1)
    }

    /// Tiles of a block.
    fn tiles(&self) -> usize {
        self.block() * self.pitch
    }

    /// From a point's values for so many planes to the next point's.
    fn point(&self, planes: usize) -> usize {
        planes * self.tiles() + BESIDE
    }

    /// Values that all kernels become.
    pub fn kernels(&self) -> usize {
        POINTS * self.channels * self.filters
    }

    /// Values at even places of a padded row, with as many beyond it as are read together; those at odd places are as many.
    fn half_line(&self) -> usize {
        self.pitch + LANES
    }

    /// Values of what lies between input and patches: the padded rows of a block of them.
    fn between(&self) -> usize {
        8 * self.block() * self.half_line()
    }

    /// Values that a thread needs to convolve blocks: patches, products and what lies between.
    pub fn room(&self) -> usize {
        POINTS * (self.point(self.channels) + self.point(self.filters.min(FILTERS))) + self.between()
    }

    /// Values that a thread needs for the gradient of kernels: its sums, patches, tiles and what lies between.
    pub fn gradient_room(&self) -> usize {
        self.kernels() + POINTS * (self.point(self.channels) + self.point(self.filters)) + self.between()
    }

    /// `kernels` `[16, filters, channels]` of `weight` `[filters, channels, 9]`, or of `[channels, filters, 9]` turned about, by
    /// `memory` for as many values as those are.
    pub fn kernels_of<R: Real>(&self, weight: &[R], turned: bool, kernels: &mut [R], memory: &mut [R]) -> Result<()> {
        const CENTERS: [[f64; 3]; 4] = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]];
        let (channels, filters) = (self.channels, self.filters);
        // Each tap's values as rows of channels: `[9, filters, channels]`, or `[filters, 9, channels]` where they lie the other way.
        let [rows, columns] = if turned { [channels, 9 * filters] } else { [channels * filters, 9] };
        let from = matrix(weight, rows, columns, "conv2d weight")?;
        transpose(matrix_mut(memory, columns, rows, "conv2d weight")?, from, false);
        let taps = &*memory;
        let row_of = |tap: usize, filter: usize| {
            let row = if turned { filter * 9 + 8 - tap } else { tap * filters + filter };
            &taps[row * channels..(row + 1) * channels]
        };
        kernels.par_chunks_exact_mut(channels * filters).enumerate().for_each(|(point, kernels)| {
            let (vertical, horizontal) = (CENTERS[point / 4], CENTERS[point % 4]);
            vectorize(
                #[inline(always)]
                || {
                    for (filter, kernel) in kernels.chunks_exact_mut(channels).enumerate() {
                        kernel.fill(R::zero());
                        for tap in 0..9 {
                            let share = R::from_f64(vertical[tap / 3] * horizontal[tap % 3]);
                            if share != R::zero() {
                                kernel.iter_mut().zip(row_of(tap, filter)).for_each(|(k, &w)| *k += share * w);
                            }
                        }
                    }
                },
            );
        });
        Ok(())
    }

    /// `patches` `[16, channels, tiles]`, `=`, of rows of tiles of some samples' `x`.
    fn patches_of<R: Real>(&self, x: &[R], rows: Range<usize>, patches: &mut [R], between: &mut [R]) {
        let ([height, width], half, tiles) = (self.input, self.half_line(), self.tiles());
        let point = self.point(self.channels);
        let (plane, [above, left]) = (height * width, self.padding);
        // What lies left and right of the input stays 0, as does what lies beyond a row's last patch.
        let padded = &mut between[..self.between()];
        padded.fill(R::zero());
        vectorize(
            #[inline(always)]
            || {
                for channel in 0..self.channels {
                    let mut filled = 0;
                    for (number, row) in rows.clone().enumerate() {
                        let (sample, down) = (row / self.rows, row % self.rows);
                        let x = &x[(sample * self.channels + channel) * plane..][..plane];
                        // Two rows are those that the row of patches above has seen already.
                        let seen = if number > 0 && down > 0 { 2 } else { 0 };
                        let first = filled - seen;
                        for at in seen..4 {
                            let line = &mut padded[(first + at) * 2 * half..][..2 * half];
                            let Some(at) = (2 * down + at).checked_sub(above).filter(|&at| at < height) else {
                                line.fill(R::zero());
                                continue;
                            };
                            let (even, odd) = line.split_at_mut(half);
                            let x = &x[at * width..(at + 1) * width];
                            match left {
                                1 => part(x, odd, &mut even[1..]),
                                _ => part(x, &mut even[left / 2..], &mut odd[left / 2..]),
                            }
                        }
                        filled = first + 4;
                        let padded = &padded[first * 2 * half..filled * 2 * half];
                        for tile in (0..self.pitch).step_by(LANES) {
                            let lines = turned([
                                of_patch(load_four(padded, tile, 2 * half)),
                                of_patch(load_four(padded, half + tile, 2 * half)),
                                of_patch(load_four(padded, tile + 1, 2 * half)),
                                of_patch(load_four(padded, half + tile + 1, 2 * half)),
                            ]);
                            for (i, line) in lines.into_iter().enumerate() {
                                for (j, values) in of_patch(line).into_iter().enumerate() {
                                    let at = (4 * i + j) * point + channel * tiles;
                                    store(patches, at + number * self.pitch + tile, values);
                                }
                            }
                        }
                    }
                }
            },
        );
    }

    /// Rows of tiles of some samples' `y`, `=`, of `products` `[16, filters, tiles]` for these filters.
    fn outputs_of<R: Real>(
        &self,
        products: &[R],
        filters: Range<usize>,
        rows: Range<usize>,
        bias: Option<&[R]>,
        (y, lines): (&mut [R], &mut [R]),
    ) {
        let ([height, width], pitch, tiles) = (self.output, self.pitch, self.tiles());
        let plane = height * width;
        let lines = &mut lines[..4 * pitch];
        vectorize(
            #[inline(always)]
            || {
                for (at, filter) in filters.clone().enumerate() {
                    let bias = [bias.map_or(R::zero(), |bias| bias[filter]); LANES];
                    for (number, row) in rows.clone().enumerate() {
                        for tile in (0..pitch).step_by(LANES) {
                            // A point's values lie so far from those of the next.
                            let point = self.point(filters.len());
                            let first = at * tiles + number * pitch + tile;
                            let both = turned([
                                of_products(load_four(products, first, 4 * point)),
                                of_products(load_four(products, first + point, 4 * point)),
                                of_products(load_four(products, first + 2 * point, 4 * point)),
                                of_products(load_four(products, first + 3 * point, 4 * point)),
                            ]);
                            for (down, values) in both.into_iter().enumerate() {
                                for (across, values) in of_products(values).into_iter().enumerate() {
                                    store(lines, (2 * down + across) * pitch + tile, add(values, bias));
                                }
                            }
                        }
                        let (sample, down) = (row / self.rows, row % self.rows);
                        let y = &mut y[(sample * self.filters + filter) * plane..][..plane];
                        let y = y[2 * down * width..].chunks_exact_mut(width);
                        for (y, line) in y.zip(lines.chunks_exact(2 * pitch)) {
                            let (even, odd) = line.split_at(pitch);
                            join(
                                y,
                                even,
                                odd,
                                #[inline(always)]
                                |y, value| *y = value,
                            );
                        }
                    }
                }
            },
        );
    }

    /// `tiles` `[16, filters, tiles]`, `=`, of rows of tiles of some samples' `dy`.
    fn tiles_of<R: Real>(&self, dy: &[R], rows: Range<usize>, values: &mut [R], lines: &mut [R]) {
        let ([height, width], pitch, tiles) = (self.output, self.pitch, self.tiles());
        let (plane, point) = (height * width, self.point(self.filters));
        // What lies beyond the output stays 0.
        let lines = &mut lines[..4 * pitch];
        lines.fill(R::zero());
        vectorize(
            #[inline(always)]
            || {
                for filter in 0..self.filters {
                    for (number, row) in rows.clone().enumerate() {
                        let (sample, down) = (row / self.rows, row % self.rows);
                        let dy = &dy[(sample * self.filters + filter) * plane..][..plane];
                        for (at, line) in lines.chunks_exact_mut(2 * pitch).enumerate() {
                            let (even, odd) = line.split_at_mut(pitch);
                            match dy.get((2 * down + at) * width..(2 * down + at + 1) * width) {
                                Some(dy) => part(dy, even, odd),
                                None => line.fill(R::zero()),
                            }
                        }
                        for tile in (0..pitch).step_by(LANES) {
                            let rows = turned([
                                of_tile([load(lines, tile), load(lines, 2 * pitch + tile)]),
                                of_tile([load(lines, pitch + tile), load(lines, 3 * pitch + tile)]),
                            ]);
                            for (i, row) in rows.into_iter().enumerate() {
                                for (j, points) in of_tile(row).into_iter().enumerate() {
                                    let at = (4 * i + j) * point + filter * tiles;
                                    store(values, at + number * pitch + tile, points);
                                }
                            }
                        }
                    }
                }
            },
        );
    }

    /// `weights` `[9, filters * channels]`, `=`: what kernels of gradients `sums` `[16, filters * channels]` make of weights.
    fn weights_of<R: Real>(&self, sums: &[R], weights: &mut [R]) {
        let len = self.channels * self.filters;
        vectorize(
            #[inline(always)]
            || {
                // As many planes are at least, and so many values of each; the last ones once more where they do not fill their lanes.
                for at in (0..len).step_by(LANES) {
                    let at = at.min(len - LANES);
                    let down = turned([
                        of_sums(load_four(sums, at, 4 * len)),
                        of_sums(load_four(sums, len + at, 4 * len)),
                        of_sums(load_four(sums, 2 * len + at, 4 * len)),
                        of_sums(load_four(sums, 3 * len + at, 4 * len)),
                    ]);
                    for (row, points) in down.into_iter().enumerate() {
                        for (column, values) in of_sums(points).into_iter().enumerate() {
                            store(weights, (3 * row + column) * len + at, values);
                        }
                    }
                }
            },
        );
    }

    /// A point's values for so many planes, `[planes, tiles]`.
    fn matrix<'v, R>(&self, values: &'v [R], planes: usize) -> Result<ArrayView2<'v, R>> {
        matrix(&values[..planes * self.tiles()], planes, self.tiles(), "conv2d")
    }

    /// As [`Self::matrix`], to be written.
    fn matrix_mut<'v, R>(&self, values: &'v mut [R], planes: usize) -> Result<ArrayViewMut2<'v, R>> {
        matrix_mut(&mut values[..planes * self.tiles()], planes, self.tiles(), "conv2d")
    }

    /// y, `=`, of some samples' x.
    pub fn convolve<R: Real>(
        &self,
        kernels: &[R],
        bias: Option<&[R]>,
        x: &[R],
        y: &mut [R],
        room: &mut [R],
    ) -> Result<()> {
        let samples = x.len() / (self.channels * self.input[0] * self.input[1]);
        let (patches, room) = room.split_at_mut(POINTS * self.point(self.channels));
        let (products, between) = room.split_at_mut(POINTS * self.point(self.filters.min(FILTERS)));
        for first in (0..samples * self.rows).step_by(self.block()) {
            let rows = first..(first + self.block()).min(samples * self.rows);
            self.patches_of(x, rows.clone(), patches, between);
            for first in (0..self.filters).step_by(FILTERS) {
                let filters = first..(first + FILTERS).min(self.filters);
                let products = &mut products[..POINTS * self.point(filters.len())];
                let of_point = products.chunks_exact_mut(self.point(filters.len()));
                let given = kernels.chunks_exact(self.channels * self.filters);
                let given = given.zip(patches.chunks_exact(self.point(self.channels)));
                for (products, (kernels, patches)) in of_point.zip(given) {
                    let kernels = &kernels[filters.start * self.channels..filters.end * self.channels];
                    product_in_cache(
                        self.matrix_mut(products, filters.len())?,
                        matrix(kernels, filters.len(), self.channels, "conv2d weight")?,
                        self.matrix(patches, self.channels)?,
                        false,
                    );
                }
                self.outputs_of(products, filters, rows.clone(), bias, (&mut *y, &mut *between));
            }
        }
        Ok(())
    }

    /// `weights` `[9, filters * channels]`, `=`: the gradient by some samples' x and dy.
    pub fn weight_gradient<R: Real>(&self, x: &[R], dy: &[R], weights: &mut [R], room: &mut [R]) -> Result<()> {
        let samples = x.len() / (self.channels * self.input[0] * self.input[1]);
        let (sums, room) = room.split_at_mut(self.kernels());
        let (patches, room) = room.split_at_mut(POINTS * self.point(self.channels));
        let (tiles, between) = room.split_at_mut(POINTS * self.point(self.filters));
        for first in (0..samples * self.rows).step_by(self.block()) {
            let rows = first..(first + self.block()).min(samples * self.rows);
            let used = rows.len() * self.pitch;
            self.patches_of(x, rows.clone(), patches, between);
            self.tiles_of(dy, rows, tiles, between);
            let of_point = sums.chunks_exact_mut(self.channels * self.filters);
            let given = tiles.chunks_exact(self.point(self.filters));
            let given = given.zip(patches.chunks_exact(self.point(self.channels)));
            for (sums, (tiles, patches)) in of_point.zip(given) {
                let [tiles, patches] = [self.matrix(tiles, self.filters)?, self.matrix(patches, self.channels)?];
                let [tiles, patches] = [tiles, patches].map(|values| values.slice_move(ndarray::s![.., ..used]));
                let sums = matrix_mut(sums, self.filters, self.channels, "conv2d weight gradient")?;
                product_in_cache(sums, tiles, patches.reversed_axes(), first > 0);
            }
        }
        self.weights_of(sums, weights);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ways([channels, filters]: [usize; 2], input: [usize; 2], padding: [usize; 2]) -> [bool; 2] {
        let geometry =
            Conv2dGeometry { batch: 2, channels, input, filters, kernel: [3, 3], stride: [1, 1], padding, groups: 1 };
        let own = Winograd::of(&geometry);
        assert_eq!(own.is_some(), Winograd::of(&Conv2dGeometry { batch: 100, ..geometry }).is_some());
        for other in [
            Conv2dGeometry { stride: [1, 2], ..geometry },
            Conv2dGeometry { kernel: [3, 5], ..geometry },
            Conv2dGeometry { padding: [1, 3], ..geometry },
            Conv2dGeometry { groups: 2, ..geometry },
        ] {
            assert!(Winograd::of(&other).is_none(), "{other:?}");
        }
        [own.is_some(), own.is_some_and(|own| own.serves_weights())]
    }

    #[test]
    fn convolutions_of_many_planes_take_it_where_it_pays() {
        // ResNet-18's, stage by stage.
        assert_eq!(ways([64, 64], [56, 56], [1, 1]), [true, true]);
        assert_eq!(ways([128, 128], [28, 28], [1, 1]), [true, true]);
        assert_eq!(ways([256, 256], [14, 14], [1, 1]), [true, false]);
        assert_eq!(ways([512, 512], [7, 7], [1, 1]), [false, false]);
        // A small CNN's second, and a CIFAR network's.
        assert_eq!(ways([32, 64], [14, 14], [1, 1]), [false, false]);
        assert_eq!(ways([32, 32], [32, 32], [1, 1]), [true, true]);
        assert_eq!(ways([16, 16], [32, 32], [1, 1]), [false, false]);
        // Those by which it is held to the definition (tests/twins/conv.rs).
        assert_eq!(ways([64, 65], [4, 15], [1, 1]), [true, true]);
        assert_eq!(ways([32, 33], [13, 19], [0, 2]), [true, true]);
        assert_eq!(ways([34, 70], [9, 33], [2, 0]), [true, true]);
        assert_eq!(ways([32, 32], [4, 150], [1, 1]), [true, true]);
        assert_eq!(ways([92, 91], [14, 14], [1, 1]), [true, false]);
    }
}
