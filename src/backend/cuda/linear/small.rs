//! Affine maps that are too small to fill the device with a library's tiles (kernels/linear_small.cu): one launch forward and one
//! backward, with the function, its slope and the bias.

use bytemuck::{Pod, Zeroable};

use super::super::activation::number;
use super::super::context::SmallProducts;
use super::super::launch::{Arg, Grid};
use super::super::product::SMALL;
use super::super::ways::Way;
use super::super::{Cuda, Storage};
use super::{Backward, Forward};
use crate::error::Result;

const FILE: &str = "linear_small";

/// `struct Forward` of kernels/linear_small.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ForwardArgs {
    x: u64,
    weight: u64,
    bias: u64,
    y: u64,
    kept: u64,
    rows: i32,
    inputs: i32,
    outputs: i32,
    kind: i32,
}

const _: () = assert!(size_of::<ForwardArgs>() == 56 && std::mem::offset_of!(ForwardArgs, kind) == 52);

/// `struct Backward`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BackwardArgs {
    x: u64,
    weight: u64,
    dy: u64,
    slope_of: u64,
    dx: u64,
    dweight: u64,
    dbias: u64,
    rows: i32,
    inputs: i32,
    outputs: i32,
    kind: i32,
    add_weight: i32,
    add_bias: i32,
}

const _: () = assert!(size_of::<BackwardArgs>() == 80 && std::mem::offset_of!(BackwardArgs, add_bias) == 76);

/// Sides of the tiles: rows of y and dx, of dweight, and columns of all.
const ROWS: usize = 16;
const WEIGHT_ROWS: usize = 32;
const COLUMNS: usize = 32;
/// Places of the inner dimension that a warp takes before it waits for them.
const PLACES: usize = 32;
/// The longest side of a map that the kernels' places, which are `int`, are sure to hold.
const MOST_SIDE: usize = 1 << 24;
/// Bytes that a gradient's address is a multiple of in an arena.
const ALIGNMENT: usize = 512;
/// Warps of a block, at most.
const FORWARD_WARPS: usize = 16;
const BACKWARD_WARPS: usize = 8;

/// So many warps that each has its part of the inner dimension under way at once, if there can be.
fn threads(depth: usize, most: usize) -> u32 {
    32 * depth.div_ceil(PLACES).clamp(1, most) as u32
}

impl<S: Storage> Cuda<S> {
    /// Whether a map of this size, known by `what` besides, is done the second way.
    fn takes_second(&self, size: [usize; 3], what: &str, bytes: usize, ways: [Way<'_>; 2]) -> Result<bool> {
        let in_type = S::HAS_MASTER || self.device().options().tf32;
        let can = in_type
            && !size.contains(&0)
            && size.iter().product::<usize>() <= SMALL
            && size.iter().all(|&side| side <= MOST_SIDE);
        match self.device().options().small_products {
            SmallProducts::Measured if can => {
                self.device().second_is_faster(&format!("{what} {} {size:?}", S::NAME), bytes, ways)
            }
            taken => Ok(can && taken == SmallProducts::Always),
        }
    }

    pub(super) fn takes_small_forward(&self, of: &Forward) -> Result<bool> {
        let function = of.activation.map(|(kind, kept)| (kind, kept.is_some()));
        let what = format!("linear_forward {} {function:?}", of.bias.is_some());
        // Both write y and what is kept `=`.
        let ways: [Way<'_>; 2] = [&|_| self.forward_by_library(of), &|_| self.small_forward(of)];
        self.takes_second([of.rows, of.inputs, of.outputs], &what, 0, ways)
    }

    pub(super) fn takes_small_backward(&self, of: &Backward) -> Result<bool> {
        let Backward { rows, inputs, outputs, dx, slope, dbias, .. } = *of;
        let function = slope.map(|(kind, _)| kind);
        let what = format!("linear_backward {} {} {function:?}", dx.is_some(), dbias.is_some());
        // Gradients may be added to: what is measured goes elsewhere, `=`.
        let weight = (outputs * inputs * size_of::<f32>()).next_multiple_of(ALIGNMENT);
        let to = |room| Backward { dweight: room, dbias: dbias.map(|_| room + weight as u64), add: [false; 2], ..*of };
        let ways: [Way<'_>; 2] = [&|room| self.backward_by_library(&to(room)), &|room| self.small_backward(&to(room))];
        self.takes_second([rows, inputs, outputs], &what, weight + outputs * size_of::<f32>(), ways)
    }

    pub(super) fn small_forward(&self, of: &Forward) -> Result<()> {
        let Forward { rows, inputs, outputs, activation, .. } = *of;
        let list = ForwardArgs {
            x: of.x,
            weight: of.weight,
            bias: of.bias.unwrap_or(0),
            y: of.y,
            kept: activation.and_then(|(_, kept)| kept).unwrap_or(0),
            rows: rows as i32,
            inputs: inputs as i32,
            outputs: outputs as i32,
            kind: activation.map_or(-1, |(kind, _)| number(kind)),
        };
        let blocks = rows.div_ceil(ROWS) * outputs.div_ceil(COLUMNS);
        let grid = Grid::new(blocks, threads(inputs, FORWARD_WARPS));
        // SAFETY: activations and parameters of the sizes that the operation says.
        unsafe { self.launch(FILE, "linear_small", grid, &mut [Arg::of(&list)]) }
    }

    pub(super) fn small_backward(&self, of: &Backward) -> Result<()> {
        let Backward { rows, inputs, outputs, slope, add: [add_weight, add_bias], .. } = *of;
        let list = BackwardArgs {
            x: of.x,
            weight: of.weight,
            dy: of.dy,
            slope_of: slope.map_or(0, |(_, of)| of),
            dx: of.dx.unwrap_or(0),
            dweight: of.dweight,
            dbias: of.dbias.unwrap_or(0),
            rows: rows as i32,
            inputs: inputs as i32,
            outputs: outputs as i32,
            kind: slope.map_or(-1, |(kind, _)| number(kind)),
            add_weight: add_weight.into(),
            add_bias: add_bias.into(),
        };
        let across = inputs.div_ceil(COLUMNS);
        let of_dx = if of.dx.is_some() { rows.div_ceil(ROWS) * across } else { 0 };
        let blocks = of_dx + outputs.div_ceil(WEIGHT_ROWS) * across;
        let depth = if of.dx.is_some() { rows.max(outputs) } else { rows };
        let grid = Grid::new(blocks, threads(depth, BACKWARD_WARPS));
        // SAFETY: as above; the gradients hold f32, and none is read by the launch besides the one of dx's blocks.
        unsafe { self.launch(FILE, "linear_small_backward", grid, &mut [Arg::of(&list)]) }
    }
}
