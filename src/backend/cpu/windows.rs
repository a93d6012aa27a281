//! The windows of a convolution's input as columns of matrices, and back: some rows of the output at a time.
//!
//! Of a channel, each tap of the kernel has a line with a value for each position of these rows. Lines lie a distance apart that the caller
//! chooses, so that a matrix can hold the columns of one piece of a sample, or those of several samples side by side.

use std::ops::Range;

use super::parallel::vectorize;
use super::product::with_scratch;
use crate::backend::ops::Conv2dGeometry;
use crate::error::{Error, Result};
use crate::real::Real;

/// Columns of a piece, in values, at most, where these are not very few positions: they stay in the second-level cache.
const PIECE: usize = 1 << 16;

/// So many positions a product has, or few more, where there are as many: for them all weights are read once.
pub(super) const POSITIONS: usize = 256;

/// What follows from a geometry about windows.
#[derive(Clone, Copy)]
pub(super) struct Windows<'g> {
    g: &'g Conv2dGeometry,
    /// Height and width of the output, and its positions.
    pub output: [usize; 2],
    pub positions: usize,
    /// Values under the kernel, in one group.
    pub taps: usize,
    /// Output rows of a piece.
    pub piece: usize,
}

/// Values at even places to the one, those at odd places to the other, until one of these is full.
#[inline(always)]
pub(super) fn part<R: Copy>(values: &[R], even: &mut [R], odd: &mut [R]) {
    let (pairs, rest) = values.as_chunks::<2>();
    for ((pair, even), odd) in pairs.iter().zip(&mut *even).zip(odd) {
        (*even, *odd) = (pair[0], pair[1]);
    }
    if let ([last], Some(even)) = (rest, even.get_mut(pairs.len())) {
        *even = *last;
    }
}

/// The opposite of [`part`]: `put(value, what lay there)` with those of the one to even places, with those of the other to odd ones.
#[inline(always)]
pub(super) fn join<R: Copy>(values: &mut [R], even: &[R], odd: &[R], put: impl Fn(&mut R, R)) {
    let (pairs, rest) = values.as_chunks_mut::<2>();
    for (([first, second], &even), &odd) in pairs.iter_mut().zip(even).zip(odd) {
        put(first, even);
        put(second, odd);
    }
    if let [last] = rest {
        put(last, even[pairs.len()]);
    }
}

impl<'g> Windows<'g> {
    /// # Errors
    /// A kernel that does not fit into the padded input.
    pub fn of(g: &'g Conv2dGeometry) -> Result<Self> {
        let output = g.output().ok_or_else(|| {
            Error::shape("conv2d", "a kernel that fits the padded input", format!("{:?} in {:?}", g.kernel, g.input))
        })?;
        let taps = g.channels / g.groups * g.kernel[0] * g.kernel[1];
        let most = ((PIECE / taps.max(1)).max(POSITIONS) / output[1].max(1)).max(1);
        // Pieces of one size, or nearly so.
        let piece = output[0].div_ceil(output[0].div_ceil(most).max(1)).max(1);
        Ok(Windows { g, output, positions: output[0] * output[1], taps, piece })
    }

    /// Rows of the output, a piece at a time.
    pub fn pieces(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, piece) = (self.output[0], self.piece);
        (0..rows).step_by(piece).map(move |first| first..(first + piece).min(rows))
    }

    /// Whether the input is its own matrix of columns: a 1 x 1 kernel at every position.
    pub fn is_pointwise(&self) -> bool {
        self.g.kernel == [1, 1] && self.g.stride == [1, 1] && self.g.padding == [0, 0]
    }

    /// Taps of a channel.
    fn channel_taps(&self) -> usize {
        self.g.kernel[0] * self.g.kernel[1]
    }

    /// The columns of some rows of the output for one group of a sample: `columns` `[taps, positions]`, `=`, of `x`
    /// `[channels, height, width]`, the taps' lines `pitch` values apart.
    pub fn write<R: Real>(&self, x: &[R], rows: &Range<usize>, columns: &mut [R], pitch: usize) {
        let planes = x.chunks_exact(self.g.input[0] * self.g.input[1]);
        for (plane, columns) in planes.zip(columns.chunks_mut(self.channel_taps() * pitch)) {
            self.write_channel(plane, rows, columns, pitch);
        }
    }

    /// Adds the columns of some rows of the output for one group of a sample to where they came from: `x` `+=`. Columns that came from
    /// nowhere may be set to 0.
    pub fn add<R: Real>(&self, columns: &mut [R], pitch: usize, rows: &Range<usize>, x: &mut [R]) {
        let planes = x.chunks_exact_mut(self.g.input[0] * self.g.input[1]);
        for (plane, columns) in planes.zip(columns.chunks_mut(self.channel_taps() * pitch)) {
            self.add_channel(columns, pitch, rows, plane);
        }
    }

    /// As [`Self::write`], of one channel's `plane`.
    pub fn write_channel<R: Real>(&self, plane: &[R], rows: &Range<usize>, columns: &mut [R], pitch: usize) {
        let positions = rows.len() * self.output[1];
        if self.lies_as_input() {
            for (tap, line) in columns.chunks_mut(pitch).enumerate() {
                let (line, [_, kx]) = (&mut line[..positions], self.tap(tap));
                let [there, places] = self.shifted(tap, rows);
                line[..there.start].fill(R::zero());
                line[there.end..].fill(R::zero());
                line[there].copy_from_slice(&plane[places]);
                self.clear_edges(kx, line);
            }
            return;
        }
        if self.g.kernel == [1, 1] && self.g.padding == [0, 0] {
            return self.pick(plane, rows, &mut columns[..positions]);
        }
        self.with_lines(rows, |lines| {
            self.part_rows(plane, rows, lines);
            for (tap, line) in columns.chunks_mut(pitch).enumerate() {
                for (number, line) in line[..positions].chunks_exact_mut(self.output[1]).enumerate() {
                    match self.seen(rows, number, tap) {
                        Some(at) => line.copy_from_slice(&lines[at..at + line.len()]),
                        None => line.fill(R::zero()),
                    }
                }
            }
        });
    }

    /// As [`Self::add`], to one channel's `plane`.
    pub fn add_channel<R: Real>(&self, columns: &mut [R], pitch: usize, rows: &Range<usize>, plane: &mut [R]) {
        let positions = rows.len() * self.output[1];
        if self.lies_as_input() {
            for (tap, line) in columns.chunks_mut(pitch).enumerate() {
                let (line, [_, kx]) = (&mut line[..positions], self.tap(tap));
                let [there, places] = self.shifted(tap, rows);
                self.clear_edges(kx, line);
                add_to(&mut plane[places], &line[there]);
            }
            return;
        }
        self.with_lines(rows, |lines| {
            lines.fill(R::zero());
            for (tap, line) in columns.chunks(pitch).enumerate() {
                for (number, line) in line[..positions].chunks_exact(self.output[1]).enumerate() {
                    if let Some(at) = self.seen(rows, number, tap) {
                        add_to(&mut lines[at..at + line.len()], line);
                    }
                }
            }
            self.add_rows(lines, rows, plane);
        });
    }

    /// What kernels of 1 x 1 see.
    fn pick<R: Real>(&self, plane: &[R], rows: &Range<usize>, line: &mut [R]) {
        let ([_, width], [down, across]) = (self.g.input, self.g.stride);
        let seen = plane.chunks_exact(width).skip(rows.start * down).step_by(down);
        vectorize(
            #[inline(always)]
            || {
                for (line, x) in line.chunks_exact_mut(self.output[1]).zip(seen) {
                    line.iter_mut().enumerate().for_each(|(at, line)| *line = x[at * across]);
                }
            },
        );
    }

    /// Row and column of a tap.
    fn tap(&self, tap: usize) -> [usize; 2] {
        [tap / self.g.kernel[1], tap % self.g.kernel[1]]
    }

    /// Whether windows lie one apart, and rows of the output are as wide as those of the input.
    fn lies_as_input(&self) -> bool {
        self.g.stride == [1, 1] && self.output[1] == self.g.input[1]
    }

    /// Where that is so: the positions of these rows, and the places of the input, that a tap brings together in one piece; columns at the
    /// edges apart, which have none.
    fn shifted(&self, tap: usize, rows: &Range<usize>) -> [Range<usize>; 2] {
        let ([height, width], [ky, kx], [above, left]) = (self.g.input, self.tap(tap), self.g.padding);
        let (forth, back) = (ky * width + kx, above * width + left);
        let [start, end] = [rows.start * width, rows.end * width];
        let first = back.saturating_sub(forth).clamp(start, end);
        let last = (height * width + back).saturating_sub(forth).clamp(first, end);
        // A tap that lies beyond the input everywhere has no place there.
        let place = if first < last { first + forth - back } else { 0 };
        [first - start..last - start, place..place + (last - first)]
    }

    /// Sets to 0 what tap column kx finds beyond the sides of the input, in every row of `line`.
    fn clear_edges<R: Real>(&self, kx: usize, line: &mut [R]) {
        let (width, left) = (self.g.input[1], self.g.padding[1]);
        let [left, right] = [left.saturating_sub(kx).min(width), kx.saturating_sub(left).min(width)];
        for row in line.chunks_exact_mut(width) {
            row[..left].fill(R::zero());
            row[width - right..].fill(R::zero());
        }
    }

    /// Rows of the input that windows of these rows see.
    fn input_rows(&self, rows: &Range<usize>) -> Range<usize> {
        let ([height, _], above) = (self.g.input, self.g.padding[0]);
        let first = (rows.start * self.g.stride[0]).saturating_sub(above);
        let end = (rows.end.saturating_sub(1) * self.g.stride[0] + self.g.kernel[0]).saturating_sub(above).min(height);
        first.min(end)..end
    }

    /// Values of a part of a row: those that lie a multiple of the stride from each other, with those beyond the sides.
    fn part_len(&self) -> usize {
        let ([_, width], [_, stride], [_, left]) = (self.g.input, self.g.stride, self.g.padding);
        (self.output[1] + (self.g.kernel[1] - 1) / stride).max((width + left).div_ceil(stride))
    }

    /// Memory for all parts `[rows, stride, part]` of the rows of the input that windows of these rows see.
    fn with_lines<R: Real>(&self, rows: &Range<usize>, f: impl FnOnce(&mut [R])) {
        with_scratch(self.input_rows(rows).len() * self.g.stride[1] * self.part_len(), f);
    }

    /// Where in [`Self::with_lines`] the row of positions `number` of these rows sees a tap; none where that lies above the input or below.
    fn seen(&self, rows: &Range<usize>, number: usize, tap: usize) -> Option<usize> {
        let ([ky, kx], [_, stride]) = (self.tap(tap), self.g.stride);
        let row = ((rows.start + number) * self.g.stride[0] + ky).checked_sub(self.g.padding[0])?;
        let row = row.checked_sub(self.input_rows(rows).start).filter(|_| row < self.g.input[0])?;
        Some((row * stride + kx % stride) * self.part_len() + kx / stride)
    }

    /// The first two values of a row: which part they go to, and where in it.
    fn first_two(&self) -> [[usize; 2]; 2] {
        let (stride, left) = (self.g.stride[1], self.g.padding[1]);
        [left, left + 1].map(|at| [at % stride, at / stride])
    }

    /// The rows of a plane that windows of these rows see, in parts; what lies beyond the sides is 0.
    fn part_rows<R: Real>(&self, plane: &[R], rows: &Range<usize>, lines: &mut [R]) {
        let ([_, width], [_, stride], len) = (self.g.input, self.g.stride, self.part_len());
        let plane = &plane[self.input_rows(rows).start * width..];
        let [[of_first, first], [_, second]] = self.first_two();
        lines.fill(R::zero());
        vectorize(
            #[inline(always)]
            || {
                for (x, line) in plane.chunks_exact(width).zip(lines.chunks_exact_mut(stride * len)) {
                    match (stride, line.split_at_mut(len)) {
                        (1, _) => line[first..first + width].copy_from_slice(x),
                        (2, (zero, one)) if of_first == 0 => part(x, &mut zero[first..], &mut one[second..]),
                        (2, (zero, one)) => part(x, &mut one[first..], &mut zero[second..]),
                        _ => {
                            for (at, &x) in x.iter().enumerate() {
                                let at = at + self.g.padding[1];
                                line[at % stride * len + at / stride] = x;
                            }
                        }
                    }
                }
            },
        );
    }

    /// The opposite of [`Self::part_rows`]: `plane` `+=`.
    fn add_rows<R: Real>(&self, lines: &[R], rows: &Range<usize>, plane: &mut [R]) {
        let ([_, width], [_, stride], len) = (self.g.input, self.g.stride, self.part_len());
        let plane = &mut plane[self.input_rows(rows).start * width..];
        let [[of_first, first], [_, second]] = self.first_two();
        vectorize(
            #[inline(always)]
            || {
                for (x, line) in plane.chunks_exact_mut(width).zip(lines.chunks_exact(stride * len)) {
                    match (stride, line.split_at(len)) {
                        (1, _) => x.iter_mut().zip(&line[first..]).for_each(|(x, &more)| *x += more),
                        (2, (zero, one)) if of_first == 0 => join(x, &zero[first..], &one[second..], add_one),
                        (2, (zero, one)) => join(x, &one[first..], &zero[second..], add_one),
                        _ => {
                            for (at, x) in x.iter_mut().enumerate() {
                                let at = at + self.g.padding[1];
                                *x += line[at % stride * len + at / stride];
                            }
                        }
                    }
                }
            },
        );
    }
}

#[inline(always)]
fn add_one<R: Real>(x: &mut R, more: R) {
    *x += more;
}

/// `x += more`.
fn add_to<R: Real>(x: &mut [R], more: &[R]) {
    vectorize(
        #[inline(always)]
        || x.iter_mut().zip(more).for_each(|(x, &more)| *x += more),
    );
}
