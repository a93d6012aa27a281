//! Layer normalization and root-mean-square normalization (kernels/layer_norm.cu).

use super::launch::{Grid, args};
use super::{Cuda, Storage};
use crate::backend::ops::{LayerNorm, LayerNormBackward, LayerNormForward, RmsNormBackward, RmsNormForward, RowSum};
use crate::backend::{Act, Grad, Memory, Param, StepContext};
use crate::error::{Error, Result};

const FILE: &str = "layer_norm";
/// Rows of more columns than this are worked on by a block, not a warp.
const NARROW: usize = 1024;
/// Rows of at most so many columns leave registers for more warps in a backward.
const SLIM: usize = 768;
/// Blocks of a backward, until each has [`MOST_ROWS`] rows: each leaves a sum of its own, so there should not be many.
const BLOCKS: usize = 1024;
/// Rows that a block of a backward takes at the most, so that the last ones do not run alone for long.
const MOST_ROWS: usize = 64;

/// What the two normalizations have in common; RMS norm has no means and no bias.
struct Forward {
    x: Act,
    sum: Option<RowSum>,
    weight: Param,
    bias: Option<Param>,
    y: Act,
    means: Option<Act>,
    scales: Act,
    size: [usize; 2],
    epsilon: f64,
}

/// Likewise for the gradients.
struct Backward {
    x: Act,
    dy: Act,
    residual: Option<Act>,
    weight: Param,
    means: Option<Act>,
    scales: Act,
    dx: Option<Act>,
    dweight: Grad,
    dbias: Option<Grad>,
    size: [usize; 2],
}

/// The kernels' form for rows of this width, and how many rows a block works on at once, forward and backward.
fn form<S>(width: usize) -> (&'static str, [usize; 2]) {
    let aligned = width.is_multiple_of(16 / size_of::<S>());
    match (aligned, width <= NARROW) {
        (true, true) => ("narrow", [8, 4]),
        (true, false) => ("wide", [1, 1]),
        (false, _) => ("odd", [1, 1]),
    }
}

/// How the rows of a backward are parted: by the shape alone, so that sums have the same order on every device.
pub(super) struct Parts {
    width: usize,
    count: usize,
    /// Rows of each.
    rows: usize,
}

impl Parts {
    pub fn new<S>([rows, width]: [usize; 2]) -> Self {
        let (_, [_, rows_at_once]) = form::<S>(width);
        let each = rows.div_ceil(BLOCKS).clamp(1, MOST_ROWS).next_multiple_of(2 * rows_at_once);
        Parts { width, count: rows.div_ceil(each).max(1), rows: each }
    }

    /// Bytes of the sums of each part, of weights alone or of biases too.
    pub fn scratch(&self, kinds: usize) -> usize {
        kinds * self.count * self.width * size_of::<f32>()
    }
}

/// The kernels count columns in `int`.
fn columns(width: usize) -> Result<i32> {
    i32::try_from(width).map_err(|_| Error::shape("layer norm", "a width below 2^31", width.to_string()))
}

impl<S: Storage> Cuda<S> {
    fn norm_forward(&self, memory: &Memory<'_, Self>, norm: &Forward) -> Result<()> {
        let [rows, width] = norm.size;
        let [x, y, scales] = [norm.x, norm.y, norm.scales].map(|act| Self::act(memory, act));
        let (other, sum) = (norm.sum.map(|sum| sum.other), norm.sum.map(|sum| sum.sum));
        let [other, sum, means] = [other, sum, norm.means].map(|act| Self::act_or_null(memory, act));
        let (weight, bias) = (Self::param(memory, norm.weight), Self::param_or_null(memory, norm.bias));
        let (form, [rows_at_once, _]) = form::<S>(width);
        let grid = Grid::new(rows.div_ceil(rows_at_once), 256);
        let epsilon = norm.epsilon as f32;
        let list = args![x, other, sum, weight, bias, y, means, scales, rows, columns(width)?, epsilon];
        // SAFETY: x, other, sum and y hold `rows * width` values, weight and bias `width`, the statistics `rows` f32.
        unsafe { self.launch(FILE, &format!("norm_forward_{form}"), grid, list) }
    }

    fn norm_backward(&self, memory: &Memory<'_, Self>, norm: &Backward, step: &StepContext) -> Result<()> {
        let [rows, width] = norm.size;
        let [x, dy, scales] = [norm.x, norm.dy, norm.scales].map(|act| Self::act(memory, act));
        let [residual, means, dx] = [norm.residual, norm.means, norm.dx].map(|act| Self::act_or_null(memory, act));
        let weight = Self::param(memory, norm.weight);
        let (form, _) = form::<S>(width);
        let of_rows = Parts::new::<S>(norm.size);
        let (parts, rows_a_block) = (of_rows.count, of_rows.rows);
        let kinds = 1 + usize::from(norm.dbias.is_some());
        let scratch = self.device().scratch(of_rows.scratch(kinds))?;
        let dweights = scratch.address();
        let dbiases = norm.dbias.map_or(0, |_| dweights + (parts * width * size_of::<f32>()) as u64);
        let form = if form == "narrow" && width <= SLIM { "slim" } else { form };
        let grid = Grid::new(parts, if matches!(form, "narrow" | "slim") { 128 } else { 256 });
        let columns = columns(width)?;
        let list = args![x, dy, residual, weight, means, scales, dx, dweights, dbiases, rows, columns, rows_a_block];
        let (gradient, bias) =
            (Self::grad(memory, norm.dweight), norm.dbias.map_or(0, |grad| Self::grad(memory, grad)));
        let add = !step.overwrites(norm.dweight);
        let add_bias = norm.dbias.is_some_and(|grad| !step.overwrites(grad));
        let finish = args![dweights, dbiases, gradient, bias, parts, width, add, add_bias];
        let mut finish_grid = Grid::new(width.div_ceil(32), 1024);
        finish_grid.blocks[1] = kinds as u32;
        // SAFETY: x, dy, residual and dx hold `rows * width` values, weight `width`, the statistics `rows` f32; scratch holds
        // `parts * width` f32 of each kind, the gradients `width`.
        unsafe {
            self.launch(FILE, &format!("norm_backward_{form}"), grid, list)?;
            self.device().launch(FILE, "finish_norm_gradients", finish_grid, finish)
        }
    }
}

impl<S: Storage> LayerNorm for Cuda<S> {
    fn layer_norm_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &LayerNormForward,
        _: &StepContext,
    ) -> Result<()> {
        let LayerNormForward { x, sum, weight, bias, y, mean, reciprocal_std, rows, width, epsilon } = *args;
        let (means, scales, size) = (Some(mean), reciprocal_std, [rows, width]);
        self.norm_forward(memory, &Forward { x, sum, weight, bias, y, means, scales, size, epsilon })
    }

    fn layer_norm_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &LayerNormBackward,
        step: &StepContext,
    ) -> Result<()> {
        let LayerNormBackward { x, dy, weight, residual, dx, dweight, dbias, .. } = *args;
        let (means, scales, size) = (Some(args.mean), args.reciprocal_std, [args.rows, args.width]);
        let norm = Backward { x, dy, residual, weight, means, scales, dx, dweight, dbias, size };
        self.norm_backward(memory, &norm, step)
    }

    fn rms_norm_forward(&self, memory: &mut Memory<'_, Self>, args: &RmsNormForward, _: &StepContext) -> Result<()> {
        let RmsNormForward { x, sum, weight, y, reciprocal_rms: scales, rows, width, epsilon } = *args;
        let (bias, means, size) = (None, None, [rows, width]);
        self.norm_forward(memory, &Forward { x, sum, weight, bias, y, means, scales, size, epsilon })
    }

    fn rms_norm_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &RmsNormBackward,
        step: &StepContext,
    ) -> Result<()> {
        let RmsNormBackward { x, dy, weight, reciprocal_rms: scales, residual, dx, dweight, rows, width } = *args;
        let (means, dbias, size) = (None, None, [rows, width]);
        let norm = Backward { x, dy, residual, weight, means, scales, dx, dweight, dbias, size };
        self.norm_backward(memory, &norm, step)
    }
}
