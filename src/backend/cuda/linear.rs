//! The affine map: products by cuBLASLt, or where it is small and that is faster, by kernels of our own (small.rs). Biases are added in their epilogues; functions of single values, their slopes and the
//! gradients of biases go with them where the device is faster for it, otherwise each is a pass of our own.

mod small;

use super::launch::{Grid, args};
use super::product::{Epilogue, Matrix, Product};
use super::scratch::Scratch;
use super::{Cuda, Storage};
use crate::backend::ops::{ActivationKind, FusedActivation, FusedSlope, Linear, LinearBackward, LinearForward};
use crate::backend::{Memory, StepContext};
use crate::error::Result;

const FILE: &str = "linear";

/// An affine map by its addresses.
#[derive(Clone, Copy)]
struct Forward {
    x: u64,
    weight: u64,
    bias: Option<u64>,
    y: u64,
    /// The function, and where what goes into it is kept.
    activation: Option<(ActivationKind, Option<u64>)>,
    rows: usize,
    inputs: usize,
    outputs: usize,
}

/// Its gradients by their addresses.
#[derive(Clone, Copy)]
struct Backward {
    x: u64,
    weight: u64,
    dy: u64,
    dx: Option<u64>,
    /// The function that made x, and what its slope is taken of.
    slope: Option<(ActivationKind, u64)>,
    dweight: u64,
    dbias: Option<u64>,
    /// Whether the gradients of weight and bias are added to.
    add: [bool; 2],
    rows: usize,
    inputs: usize,
    outputs: usize,
}

/// Bytes that a backward leaves between its kernels, gradients of biases being added to.
pub(super) fn scratch(args: &LinearBackward) -> usize {
    let LinearBackward { rows, outputs, .. } = *args;
    args.dbias.map_or(0, |_| sums_scratch([rows, outputs]))
}

/// Bytes that a sum over rows leaves between its kernels, the sums being added to.
pub(super) fn sums_scratch([rows, width]: [usize; 2]) -> usize {
    parts(rows) * width * size_of::<f32>()
}

/// Parts of the rows that are summed.
fn parts(rows: usize) -> usize {
    rows.div_ceil(ROWS_PER_BLOCK).clamp(1, 256)
}

impl<S: Storage> Linear for Cuda<S> {
    fn linear_forward(&self, memory: &mut Memory<'_, Self>, args: &LinearForward, _: &StepContext) -> Result<()> {
        let LinearForward { rows, inputs, outputs, .. } = *args;
        let of = Forward {
            x: Self::act(memory, args.x),
            weight: Self::param(memory, args.weight),
            bias: args.bias.map(|bias| Self::param(memory, bias)),
            y: Self::act(memory, args.y),
            activation: args
                .activation
                .map(|FusedActivation { kind, kept }| (kind, kept.map(|kept| Self::act(memory, kept)))),
            rows,
            inputs,
            outputs,
        };
        if self.takes_small_forward(&of)? { self.small_forward(&of) } else { self.forward_by_library(&of) }
    }

    fn linear_backward(&self, memory: &mut Memory<'_, Self>, args: &LinearBackward, step: &StepContext) -> Result<()> {
        let LinearBackward { rows, inputs, outputs, .. } = *args;
        let of = Backward {
            x: Self::act(memory, args.x),
            weight: Self::param(memory, args.weight),
            dy: Self::act(memory, args.dy),
            dx: args.dx.map(|dx| Self::act(memory, dx)),
            slope: args.slope.map(|FusedSlope { kind, of }| (kind, Self::act(memory, of))),
            dweight: Self::grad(memory, args.dweight),
            dbias: args.dbias.map(|dbias| Self::grad(memory, dbias)),
            add: [!step.overwrites(args.dweight), args.dbias.is_some_and(|dbias| !step.overwrites(dbias))],
            rows,
            inputs,
            outputs,
        };
        if self.takes_small_backward(&of)? { self.small_backward(&of) } else { self.backward_by_library(&of) }
    }
}

const NAME_FORWARD: &str = "linear_forward";

impl<S: Storage> Cuda<S> {
    fn forward_by_library(&self, of: &Forward) -> Result<()> {
        let Forward { x, weight, bias, y, activation, rows, inputs, outputs } = *of;
        let product = |out, epilogue| Product {
            left: Matrix::rows(x, inputs),
            right: Matrix::rows(weight, inputs).transposed(),
            out: Matrix::rows(out, outputs),
            size: [rows, inputs, outputs],
            add: false,
            epilogue,
            types: [S::NAME, S::NAME],
        };
        let plain = bias.map_or(Epilogue::None, Epilogue::Bias);
        let Some((kind, kept)) = activation else {
            // SAFETY: activations and parameters of the sizes that the operation says.
            return unsafe { self.device().product(NAME_FORWARD, &product(y, plain)) };
        };
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

    fn backward_by_library(&self, of: &Backward) -> Result<()> {
        if let Some(dx) = of.dx {
            self.input_gradient(of, dx)?;
        }
        self.parameter_gradients(of)
    }

    /// `dx = (dy W) f'(u)`.
    fn input_gradient(&self, of: &Backward, dx: u64) -> Result<()> {
        let Backward { rows, inputs, outputs, slope, .. } = *of;
        let product = |epilogue| Product {
            left: Matrix::rows(of.dy, outputs),
            right: Matrix::rows(of.weight, inputs),
            out: Matrix::rows(dx, inputs),
            size: [rows, outputs, inputs],
            add: false,
            epilogue,
            types: [S::NAME, S::NAME],
        };
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
    fn parameter_gradients(&self, of: &Backward) -> Result<()> {
        let Backward { rows, inputs, outputs, dy, add: [add_weight, add], .. } = *of;
        let product = |epilogue| Product {
            left: Matrix::rows(dy, outputs).transposed(),
            right: Matrix::rows(of.x, inputs),
            out: Matrix::rows(of.dweight, inputs),
            size: [outputs, rows, inputs],
            add: add_weight,
            epilogue,
            types: [S::NAME, "f32"],
        };
        let Some(sums) = of.dbias else {
            // SAFETY: activations and parameters of the sizes that the operation says; the gradient holds f32.
            return unsafe { self.device().product(NAME_WEIGHT, &product(Epilogue::None)) };
        };
        // The product's sums are f32, as its values are, and `=`: what is to be added goes through a vector besides.
        let scratch = add.then(|| self.device().scratch(outputs * size_of::<f32>())).transpose()?;
        let direct = scratch.as_ref().map_or(sums, Scratch::address);
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
        let parts = parts(rows);
        // One part alone is the sum.
        let whole = parts == 1 && !add;
        let scratch = (!whole).then(|| self.device().scratch(sums_scratch([rows, width]))).transpose()?;
        let partial = scratch.as_ref().map_or(sums, Scratch::address);
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
