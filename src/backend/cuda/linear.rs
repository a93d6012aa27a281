//! The affine map: products by cuBLASLt. Biases are added in their epilogues; functions of single values, their slopes and the
//! gradients of biases go with them where the device is faster for it, otherwise each is a pass of our own.

use super::launch::{Grid, args};
use super::product::{Epilogue, Matrix, Product};
use super::{Cuda, Storage};
use crate::backend::ops::{ActivationKind, FusedActivation, FusedSlope, Linear, LinearBackward, LinearForward};
use crate::backend::{Memory, StepContext};
use crate::error::Result;

const FILE: &str = "linear";

impl<S: Storage> Linear for Cuda<S> {
    fn linear_forward(&self, memory: &mut Memory<'_, Self>, args: &LinearForward, _: &StepContext) -> Result<()> {
        let LinearForward { rows, inputs, outputs, .. } = *args;
        let y = Self::act(memory, args.y);
        let bias = args.bias.map(|bias| Self::param(memory, bias));
        let product = |out, epilogue| Product {
            left: Matrix::rows(Self::act(memory, args.x), inputs),
            right: Matrix::rows(Self::param(memory, args.weight), inputs).transposed(),
            out: Matrix::rows(out, outputs),
            size: [rows, inputs, outputs],
            add: false,
            epilogue,
            types: [S::NAME, S::NAME],
        };
        let plain = bias.map_or(Epilogue::None, Epilogue::Bias);
        let Some(FusedActivation { kind, kept }) = args.activation else {
            // SAFETY: activations and parameters of the sizes that the operation says.
            return unsafe { self.device().product(NAME_FORWARD, &product(y, plain)) };
        };
        let kept = kept.map(|kept| Self::act(memory, kept));
        // ReLU's kept matrix would be a mask of bits in the library, which is not what operations name.
        let epilogue = match (kind, kept) {
            (ActivationKind::GeluTanh, kept) => Some(Epilogue::Gelu { bias, kept }),
            (ActivationKind::Relu, None) => Some(Epilogue::Relu { bias }),
            _ => None,
        };
        if let Some(epilogue) = epilogue {
            // SAFETY: as above; what is kept has the size of y.
            if unsafe { self.device().fused_product("linear_forward_activation", &product(y, epilogue))? } {
                return Ok(());
            }
        }
        // The bias goes with the product anyway, so what is left is one pass over the values.
        let before = kept.unwrap_or(y);
        // SAFETY: as above.
        unsafe { self.device().product(NAME_FORWARD, &product(before, plain))? };
        self.apply(kind, before, y, rows * outputs)
    }

    fn linear_backward(&self, memory: &mut Memory<'_, Self>, args: &LinearBackward, step: &StepContext) -> Result<()> {
        if let Some(dx) = args.dx {
            let dx = Self::act(memory, dx);
            self.input_gradient(memory, args, dx)?;
        }
        self.parameter_gradients(memory, args, step)
    }
}

const NAME_FORWARD: &str = "linear_forward";

impl<S: Storage> Cuda<S> {
    /// `dx = (dy W) f'(u)`.
    fn input_gradient(&self, memory: &Memory<'_, Self>, args: &LinearBackward, dx: u64) -> Result<()> {
        let LinearBackward { rows, inputs, outputs, .. } = *args;
        let product = |epilogue| Product {
            left: Matrix::rows(Self::act(memory, args.dy), outputs),
            right: Matrix::rows(Self::param(memory, args.weight), inputs),
            out: Matrix::rows(dx, inputs),
            size: [rows, outputs, inputs],
            add: false,
            epilogue,
            types: [S::NAME, S::NAME],
        };
        let slope = args.slope.map(|FusedSlope { kind, of }| (kind, Self::act(memory, of)));
        // DGELU alone: with BGRAD besides, the bias gradient of the layer before would come in the type of dx, not in f32.
        if let Some((ActivationKind::GeluTanh, of)) = slope {
            // SAFETY: activations and parameters of the sizes that the operation says.
            let fused = unsafe {
                self.device().fused_product("linear_backward_input_slope", &product(Epilogue::GeluSlope { of }))?
            };
            if fused {
                return Ok(());
            }
        }
        // SAFETY: as above.
        unsafe { self.device().product("linear_backward_input", &product(Epilogue::None))? };
        slope.map_or(Ok(()), |(kind, of)| self.apply_slope(kind, of, dx, dx, rows * inputs))
    }

    /// `dW (+)= dy^T x`, `db (+)= sum of dy over rows`, both f32.
    fn parameter_gradients(&self, memory: &Memory<'_, Self>, args: &LinearBackward, step: &StepContext) -> Result<()> {
        let LinearBackward { rows, inputs, outputs, .. } = *args;
        let dy = Self::act(memory, args.dy);
        let product = |epilogue| Product {
            left: Matrix::rows(dy, outputs).transposed(),
            right: Matrix::rows(Self::act(memory, args.x), inputs),
            out: Matrix::rows(Self::grad(memory, args.dweight), inputs),
            size: [outputs, rows, inputs],
            add: !step.overwrites(args.dweight),
            epilogue,
            types: [S::NAME, "f32"],
        };
        let Some(dbias) = args.dbias else {
            // SAFETY: activations and parameters of the sizes that the operation says; the gradient holds f32.
            return unsafe { self.device().product(NAME_WEIGHT, &product(Epilogue::None)) };
        };
        let (add, sums) = (!step.overwrites(dbias), Self::grad(memory, dbias));
        // The product's sums are f32, as its values are, and `=`: what is to be added goes through a vector besides.
        let direct = if add { self.device().scratch(outputs * size_of::<f32>())? } else { sums };
        // SAFETY: as above; there is room for `outputs` sums.
        let fused =
            unsafe { self.device().fused_product("linear_backward_parameters", &product(Epilogue::LeftSums(direct)))? };
        if fused {
            return if add { self.finish_sums(direct, sums, [1, outputs], true) } else { Ok(()) };
        }
        // SAFETY: as above.
        unsafe { self.device().product(NAME_WEIGHT, &product(Epilogue::None))? };
        self.sum_rows(dy, sums, [rows, outputs], add)
    }
}

const NAME_WEIGHT: &str = "linear_backward_weight";

/// Rows that a block of the first stage of a sum over rows takes (kernels/linear.cu).
const ROWS_PER_BLOCK: usize = 128;
/// Columns of a block.
const COLUMNS: usize = 32;

impl<S: Storage> Cuda<S> {
    /// `sums[column] (+)= sum over rows of x`, x: `[rows, width]` in `S`, sums: `[width]` in f32; in a fixed order.
    pub(super) fn sum_rows(&self, x: u64, sums: u64, [rows, width]: [usize; 2], add: bool) -> Result<()> {
        let parts = rows.div_ceil(ROWS_PER_BLOCK).clamp(1, 256);
        // One part alone is the sum.
        let whole = parts == 1 && !add;
        let partial = if whole { sums } else { self.device().scratch(parts * width * size_of::<f32>())? };
        let mut grid = Grid::new(width.div_ceil(COLUMNS), 256);
        grid.blocks[1] = parts as u32;
        // SAFETY: x holds `rows * width` values, the scratch `parts * width`.
        unsafe { self.launch(FILE, "sum_rows_partial", grid, args![x, partial, rows, width])? };
        if whole {
            return Ok(());
        }
        self.finish_sums(partial, sums, [parts, width], add)
    }

    /// `sums[column] (+)= sum over the parts`, partial: `[parts, width]`, both f32.
    pub(super) fn finish_sums(&self, partial: u64, sums: u64, [parts, width]: [usize; 2], add: bool) -> Result<()> {
        let grid = Grid::new(width.div_ceil(256), 256);
        // SAFETY: the callers hand on `parts * width` values and room for `width`.
        unsafe { self.device().launch(FILE, "sum_rows_finish", grid, args![partial, sums, parts, width, add]) }
    }
}
