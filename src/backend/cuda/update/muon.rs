//! Muon's matrices, one after another, each by products in f32.

use std::ops::Range;

use super::plan::Pass;
use super::{Arrays, Prepared};
use crate::backend::Workspace;
use crate::backend::cuda::blas::WORKSPACE_BYTES;
use crate::backend::cuda::launch::{Arg, Grid, args};
use crate::backend::cuda::product::{Epilogue, Matrix, Product};
use crate::backend::cuda::scratch::ALIGNMENT;
use crate::error::Result;
use crate::optim::{Rule, TensorPlan, UpdatePlan};

const FILE: &str = "update_muon";

/// Newton and Schulz's quintic iteration (Jordan 2024).
const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// Values of a piece of a sum of squares.
const PIECE: usize = 1 << 14;

/// Memory for one matrix, by address.
struct Room {
    direction: u64,
    gram: u64,
    square: u64,
    next: u64,
    squares: u64,
}

/// The matrices under Muon among the elements that are updated here, with their numbers.
fn matrices<'p>(plan: &'p UpdatePlan, elements: &Range<usize>) -> Vec<(u32, &'p TensorPlan, Rule)> {
    let all = plan.tensors.iter().enumerate();
    all.map(|(index, tensor)| (index as u32, tensor, plan.groups[usize::from(tensor.group)].rule))
        .filter(|(_, tensor, rule)| matches!(rule, Rule::Muon { .. }) && elements.contains(&tensor.offset))
        .collect()
}

/// Bytes of the parts of the room for the largest of these matrices, in the order of [`Room`].
fn sizes(matrices: &[(u32, &TensorPlan, Rule)]) -> [usize; 5] {
    let (mut values, mut side) = (0, 0);
    for (_, tensor, _) in matrices {
        values = values.max(tensor.len);
        side = side.max(tensor.units.min(tensor.unit()));
    }
    let sizes = [values * 4, side * side * 4, side * side * 4, values * 4, values.div_ceil(PIECE) * 8];
    sizes.map(|bytes| bytes.next_multiple_of(ALIGNMENT))
}

/// What updates of these elements take of the device's memory besides tables.
pub(super) fn workspace(plan: &UpdatePlan, elements: &Range<usize>) -> Workspace {
    let matrices = matrices(plan, elements);
    if matrices.is_empty() {
        return Workspace::default();
    }
    Workspace { scratch: sizes(&matrices).iter().sum(), libraries: WORKSPACE_BYTES, is_bound: false }
}

impl Prepared {
    /// Queues the update of every matrix under Muon that is updated here.
    pub(super) fn queue_muon(&self, arrays: &Arrays, pass: &Pass) -> Result<()> {
        let device = &self.device;
        let matrices = matrices(&self.plan, &self.elements);
        let sizes = sizes(&matrices);
        let scratch = device.scratch(sizes.iter().sum())?;
        let mut at = scratch.address();
        let [direction, gram, square, next, squares] = sizes.map(|bytes| {
            at += bytes as u64;
            at - bytes as u64
        });
        let room = Room { direction, gram, square, next, squares };
        let form = arrays.form();
        for (index, tensor, rule) in matrices {
            let Rule::Muon { nesterov, steps, scale, .. } = rule else { continue };
            let grid = Grid::elements(device, tensor.len, 1);
            let [parameters, first] = [arrays.parameters, arrays.slots[0]];
            let list = args![parameters, arrays.gradients, first, room.direction, index, nesterov, Arg::of(pass)];
            // SAFETY: the arrays are laid out as the plan says; the room holds the largest matrix.
            unsafe { device.launch(FILE, &format!("muon_direction_{form}"), grid, list)? };
            self.orthogonalize(&room, [tensor.units, tensor.unit()], steps)?;
            let factor = scale.factor(tensor.units, tensor.unit());
            let list = args![parameters, arrays.copy, room.direction, index, factor, Arg::of(pass)];
            // SAFETY: as above.
            unsafe { device.launch(FILE, &format!("muon_apply_{form}"), grid, list)? };
        }
        Ok(())
    }

    /// The iteration, on `room.direction`, in place: `[rows, columns]`. Gram matrices are of the shorter side.
    fn orthogonalize(&self, room: &Room, [rows, columns]: [usize; 2], steps: u32) -> Result<()> {
        let device = &self.device;
        let len = rows * columns;
        let pieces = len.div_ceil(PIECE);
        let grid = Grid::elements(device, len, 1);
        // SAFETY: the room holds `len` values and as many sums as pieces.
        unsafe {
            let list = args![room.direction, len, room.squares];
            device.launch(FILE, "squares_f32", Grid::new(pieces.div_ceil(8), 256), list)?;
            let list = args![room.direction, len, room.squares, pieces as u32];
            device.launch(FILE, "muon_normalize", grid, list)?;
        }
        let tall = rows > columns;
        let side = rows.min(columns);
        let x = Matrix::rows(room.direction, columns);
        let square = |address| Matrix::rows(address, side);
        let multiply = |left, right, out, size| {
            let product =
                Product { left, right, out, size, add: false, epilogue: Epilogue::None, types: ["f32", "f32"] };
            // SAFETY: the room holds matrices of these sizes.
            unsafe { device.product("muon_product", &product) }
        };
        let [a, b, c] = COEFFICIENTS;
        for _ in 0..steps {
            let (left, right, size) =
                if tall { (x.transposed(), x, [side, rows, side]) } else { (x, x.transposed(), [side, columns, side]) };
            multiply(left, right, square(room.gram), size)?;
            multiply(square(room.gram), square(room.gram), square(room.square), [side; 3])?;
            let list = args![room.gram, room.square, b, c, side * side];
            // SAFETY: two matrices of `side * side` values.
            unsafe { device.launch(FILE, "combine", Grid::elements(device, side * side, 1), list)? };
            let next = Matrix::rows(room.next, columns);
            if tall {
                multiply(x, square(room.gram), next, [rows, side, side])?;
            } else {
                multiply(square(room.gram), x, next, [side, side, columns])?;
            }
            // SAFETY: two matrices of `len` values.
            unsafe { device.launch(FILE, "combine", grid, args![room.direction, room.next, a, 1.0f32, len])? };
        }
        Ok(())
    }
}
