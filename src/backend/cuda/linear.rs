//! The affine map: products by cuBLASLt, the bias added and its gradient summed in their epilogues where that is possible.

use super::launch::{Grid, args};
use super::product::{Epilogue, Matrix, Product};
use super::{Cuda, Storage};
use crate::backend::ops::{Linear, LinearBackward, LinearForward};
use crate::backend::{Memory, StepContext};
use crate::error::Result;

const FILE: &str = "linear";

impl<S: Storage> Linear for Cuda<S> {
    fn linear_forward(&self, memory: &mut Memory<'_, Self>, args: &LinearForward, _: &StepContext) -> Result<()> {
        let LinearForward { rows, inputs, outputs, .. } = *args;
        let product = Product {
            left: Matrix::rows(Self::act(memory, args.x), inputs),
            right: Matrix::rows(Self::param(memory, args.weight), inputs).transposed(),
            out: Matrix::rows(Self::act(memory, args.y), outputs),
            size: [rows, inputs, outputs],
            add: false,
            epilogue: args.bias.map_or(Epilogue::None, |bias| Epilogue::Bias(Self::param(memory, bias))),
            types: [S::NAME, S::NAME],
        };
        // SAFETY: activations and parameters of the sizes that the operation says.
        unsafe { self.device().product("linear_forward", &product) }
    }

    fn linear_backward(&self, memory: &mut Memory<'_, Self>, args: &LinearBackward, step: &StepContext) -> Result<()> {
        let LinearBackward { rows, inputs, outputs, .. } = *args;
        let [x, dy] = [args.x, args.dy].map(|act| Self::act(memory, act));
        if let Some(dx) = args.dx {
            let product = Product {
                left: Matrix::rows(dy, outputs),
                right: Matrix::rows(Self::param(memory, args.weight), inputs),
                out: Matrix::rows(Self::act(memory, dx), inputs),
                size: [rows, outputs, inputs],
                add: false,
                epilogue: Epilogue::None,
                types: [S::NAME, S::NAME],
            };
            // SAFETY: as above.
            unsafe { self.device().product("linear_backward_input", &product)? };
        }
        let product = Product {
            left: Matrix::rows(dy, outputs).transposed(),
            right: Matrix::rows(x, inputs),
            out: Matrix::rows(Self::grad(memory, args.dweight), inputs),
            size: [outputs, rows, inputs],
            add: !step.overwrites(args.dweight),
            epilogue: Epilogue::None,
            types: [S::NAME, "f32"],
        };
        // SAFETY: as above; the gradient holds f32.
        unsafe { self.device().product("linear_backward_weight", &product)? };
        if let Some(dbias) = args.dbias {
            let add = !step.overwrites(dbias);
            self.sum_rows(dy, Self::grad(memory, dbias), [rows, outputs], add)?;
        }
        Ok(())
    }
}

/// Rows that a block of the first stage of a sum over rows takes (kernels/linear.cu).
const ROWS_PER_BLOCK: usize = 128;
/// Columns of a block.
const COLUMNS: usize = 32;

impl<S: Storage> Cuda<S> {
    /// `sums[column] (+)= sum over rows of x`, x: `[rows, width]` in `S`, sums: `[width]` in f32; in a fixed order.
    pub(super) fn sum_rows(&self, x: u64, sums: u64, [rows, width]: [usize; 2], add: bool) -> Result<()> {
        let parts = rows.div_ceil(ROWS_PER_BLOCK).clamp(1, 256);
        let partial = self.device().scratch(parts * width * size_of::<f32>())?;
        let mut grid = Grid::new(width.div_ceil(COLUMNS), 256);
        grid.blocks[1] = parts as u32;
        // SAFETY: x holds `rows * width` values, the scratch `parts * width`.
        unsafe { self.launch(FILE, "sum_rows_partial", grid, args![x, partial, rows, width])? };
        self.finish_rows(partial, sums, [parts, width], add)
    }

    /// `sums[column] (+)= sum over parts of partial`, partial: `[parts, width]`, sums: `[width]`, in f32; parts in order.
    pub(super) fn finish_rows(&self, partial: u64, sums: u64, [parts, width]: [usize; 2], add: bool) -> Result<()> {
        let grid = Grid::new(width.div_ceil(256), 256);
        // SAFETY: the callers hand on `parts * width` and `width` values.
        unsafe { self.device().launch(FILE, "sum_rows_finish", grid, args![partial, sums, parts, width, add]) }
    }
}
