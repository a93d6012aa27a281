//! Losses, each with its gradient in the same launch (kernels/loss.cu).

use bytemuck::{Pod, Zeroable};

use super::launch::{Arg, Grid, args};
use super::{Cuda, Storage};
use crate::backend::ops::{BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError};
use crate::backend::{Act, Memory, StepContext};
use crate::error::Result;

const FILE: &str = "loss";
/// Bytes of `Counted` in the kernels, kept apart from the f32 that follow it.
const COUNTED: usize = 16;
/// Rows of more classes than these are worked on by a warp rather than a thread, and by a block rather than a warp.
const FEW_CLASSES: usize = 32;
const NARROW: usize = 1024;
/// At most so many rows and values go through one launch.
const FEW_ROWS: usize = 512;
const FEW_VALUES: usize = 1 << 14;
/// Blocks of a loss over single values: their number must not depend on the device.
const PARTS: usize = 256;

/// `struct Classes` of kernels/loss.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Classes {
    logits: u64,
    targets: u64,
    dlogits: u64,
    rows: u64,
    classes: u64,
    smoothing: f32,
    ignore: i32,
    scale: u64,
}

const _: () = assert!(size_of::<Classes>() == 56 && std::mem::offset_of!(Classes, scale) == 48);

/// Bytes that rows of classes leave between kernels: how many count, and of each its loss and whether it is right; none where one
/// launch does all.
pub(super) fn scratch_of_rows([rows, classes]: [usize; 2]) -> usize {
    if is_small(rows, classes) { 0 } else { COUNTED + 8 * rows }
}

fn is_small(rows: usize, classes: usize) -> bool {
    rows <= FEW_ROWS && rows * classes <= FEW_VALUES
}

/// Blocks of a loss over so many single values.
fn blocks(len: usize) -> usize {
    len.div_ceil(256).clamp(1, PARTS)
}

/// Bytes that they leave.
pub(super) fn scratch_of_values(len: usize) -> usize {
    8 * blocks(len)
}

impl<S: Storage> Loss for Cuda<S> {
    /// A target out of range makes the loss not a number: the device cannot return an error.
    fn cross_entropy(&self, memory: &mut Memory<'_, Self>, args: &CrossEntropy, _: &StepContext) -> Result<()> {
        let CrossEntropy { rows, classes, ignore_index, .. } = *args;
        let device = self.device();
        let [logits, metrics] = [args.logits, args.metrics].map(|act| Self::act(memory, act));
        let of = Classes {
            logits,
            targets: Self::indices(memory, args.targets),
            dlogits: Self::act_or_null(memory, args.dlogits),
            rows: rows as u64,
            classes: classes as u64,
            smoothing: args.label_smoothing as f32,
            ignore: ignore_index,
            scale: Self::loss_scale_or_null(memory.arena),
        };
        if is_small(rows, classes) {
            let list = args![Arg::of(&of), metrics];
            // SAFETY: logits and dlogits hold `rows * classes` values, targets `rows`, the metrics four f32.
            return unsafe { self.launch(FILE, "cross_entropy_small", Grid::new(1, 512), list) };
        }
        let scratch = device.scratch(scratch_of_rows([rows, classes]))?;
        let found = scratch.address();
        let (losses, rights) = (found + COUNTED as u64, found + (COUNTED + 4 * rows) as u64);
        let count = args![of.targets, found, rows, classes, ignore_index];
        let list = args![Arg::of(&of), found, losses, rights];
        let (kernel, grid) = if classes <= FEW_CLASSES {
            ("cross_entropy_few", Grid::new(rows.div_ceil(256), 256))
        } else if classes <= NARROW {
            ("cross_entropy_narrow", Grid::new(rows.div_ceil(8), 256))
        } else {
            ("cross_entropy_wide", Grid::new(rows, 512))
        };
        // SAFETY: as above; scratch holds the count and two f32 a row.
        unsafe {
            device.launch(FILE, "count_targets", Grid::new(1, 1024), count)?;
            self.launch(FILE, kernel, grid, list)?;
        }
        self.finish_loss([losses, rights, found, metrics], rows, rows)
    }

    fn mean_squared_error(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &MeanSquaredError,
        _: &StepContext,
    ) -> Result<()> {
        self.pointwise_loss(memory, [args.prediction, args.target, args.metrics], args.dprediction, args.len, false)
    }

    fn binary_cross_entropy(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BinaryCrossEntropy,
        _: &StepContext,
    ) -> Result<()> {
        self.pointwise_loss(memory, [args.logits, args.target, args.metrics], args.dlogits, args.len, true)
    }
}

impl<S: Storage> Cuda<S> {
    fn pointwise_loss(
        &self,
        memory: &Memory<'_, Self>,
        [x, target, metrics]: [Act; 3],
        gradient: Option<Act>,
        len: usize,
        binary: bool,
    ) -> Result<()> {
        let parts = blocks(len);
        let scratch = self.device().scratch(scratch_of_values(len))?;
        let losses = scratch.address();
        let rights = losses + (4 * parts) as u64;
        let [x, target, metrics] = [x, target, metrics].map(|act| Self::act(memory, act));
        let (dx, scale) = (Self::act_or_null(memory, gradient), Self::loss_scale_or_null(memory.arena));
        let list = args![x, target, dx, losses, rights, len, binary, scale];
        // SAFETY: the activations hold `len` values each, scratch two f32 for each block.
        unsafe { self.launch(FILE, "pointwise_loss", Grid::new(parts, 256), list)? };
        self.finish_loss([losses, rights, 0, metrics], parts, len)
    }

    /// Sums what rows or blocks found into the metrics; `addresses` are losses, rights, the count (0: `len`) and the metrics.
    fn finish_loss(&self, [losses, rights, found, metrics]: [u64; 4], parts: usize, len: usize) -> Result<()> {
        let list = args![losses, rights, found, metrics, parts, len];
        // SAFETY: scratch holds `parts` f32 of each kind, the statistic four.
        unsafe { self.device().launch(FILE, "finish_loss", Grid::new(1, 1024), list) }
    }
}
