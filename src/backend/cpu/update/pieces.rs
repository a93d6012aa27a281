//! The arena cut into pieces, and sums of squares over them.

use std::ops::Range;

use crate::optim::UpdatePlan;
use crate::real::Real;

/// The same elements of every arena; a slot that the rule does not keep is empty.
pub(super) struct Arrays<'a, R> {
    pub theta: &'a mut [R],
    pub gradient: &'a mut [R],
    pub first: &'a mut [R],
    pub second: &'a mut [R],
}

impl<'a, R> Arrays<'a, R> {
    /// All of it, borrowed again.
    pub fn all(&mut self) -> Arrays<'_, R> {
        Arrays { theta: self.theta, gradient: self.gradient, first: self.first, second: self.second }
    }

    /// The first `len` elements, and the rest.
    pub fn split_at(self, len: usize) -> (Arrays<'a, R>, Arrays<'a, R>) {
        let (theta, rest_theta) = self.theta.split_at_mut(len);
        let (gradient, rest_gradient) = self.gradient.split_at_mut(len);
        let (first, rest_first) = self.first.split_at_mut(len.min(self.first.len()));
        let (second, rest_second) = self.second.split_at_mut(len.min(self.second.len()));
        let rest = Arrays { theta: rest_theta, gradient: rest_gradient, first: rest_first, second: rest_second };
        (Arrays { theta, gradient, first, second }, rest)
    }

    /// Runs of `len` elements, the last of what is left.
    pub fn chunks(self, len: usize) -> impl Iterator<Item = Arrays<'a, R>> {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let arrays = rest.take().filter(|arrays| !arrays.theta.is_empty())?;
            let len = len.min(arrays.theta.len());
            let (chunk, left) = arrays.split_at(len);
            rest = Some(left);
            Some(chunk)
        })
    }
}

/// A part of a tensor, at most a piece long (one unit long, where the adaptive clip meets larger units).
pub(super) struct Piece<'a, R> {
    /// Index of the tensor in the plan.
    pub tensor: usize,
    pub arrays: Arrays<'a, R>,
}

/// The pieces of the arena within `elements`, which the arrays hold, in arena order, without the padding.
pub(super) fn cut<'a, R>(arrays: Arrays<'a, R>, plan: &UpdatePlan, elements: &Range<usize>) -> Vec<Piece<'a, R>> {
    let mut pieces = Vec::with_capacity(2 * plan.tensors.len());
    let (mut rest, mut start) = (arrays, elements.start);
    for (tensor, piece) in plan.pieces(elements) {
        let (_, from_piece) = rest.split_at(piece.start - start);
        let (arrays, after) = from_piece.split_at(piece.len());
        pieces.push(Piece { tensor, arrays });
        (rest, start) = (after, piece.end);
    }
    pieces
}

/// Values whose squares are added up together.
const SPAN: usize = 2048;
/// Sums that a span's squares are added up in.
const LANES: usize = 128;

/// `sum of f(x)^2` over the elements of slices of the same length, in f64. No square of an f32 overflows it.
///
/// Spans of 2048 elements in their order; within a span, element i belongs to lane `i % 128`, each lane takes its elements in
/// order, and halves of the lanes are added at the end: the same bits at any vector width, and on any device.
#[inline(always)]
pub(super) fn squares<R: Real, const N: usize>(slices: [&[R]; N], f: impl Fn([R; N]) -> R) -> f64 {
    let len = slices.iter().map(|slice| slice.len()).min().unwrap_or(0);
    let mut total = 0.0;
    for start in (0..len).step_by(SPAN) {
        let end = len.min(start + SPAN);
        total += span(slices.map(|slice| &slice[start..end]), &f);
    }
    total
}

#[inline(always)]
fn span<R: Real, const N: usize>(slices: [&[R]; N], f: &impl Fn([R; N]) -> R) -> f64 {
    let len = slices.iter().map(|slice| slice.len()).min().unwrap_or(0);
    let mut lanes = [0.0f64; LANES];
    let split = slices.map(|slice| slice.as_chunks::<LANES>());
    for row in 0..len / LANES {
        let rows = split.map(|(rows, _)| &rows[row]);
        for (lane, total) in lanes.iter_mut().enumerate() {
            let x = f(rows.map(|row| row[lane])).f64();
            *total = x.mul_add(x, *total);
        }
    }
    for (lane, total) in lanes.iter_mut().enumerate().take(len % LANES) {
        let x = f(split.map(|(_, tail)| tail[lane])).f64();
        *total = x.mul_add(x, *total);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}
