//! Losses, each with its gradient in the same launch (kernels/loss.cu).

use super::launch::{Grid, args};
use super::{Cuda, Storage};
use crate::backend::ops::{BinaryCrossEntropy, CrossEntropy, Loss, MeanSquaredError};
use crate::backend::{Act, Memory, StepContext};
use crate::error::Result;

const FILE: &str = "loss";
/// Bytes of `Counted` in the kernels, kept apart from the f32 that follow it.
const COUNTED: usize = 16;
/// Rows of more classes than this are worked on by a block, not a warp.
const NARROW: usize = 1024;
/// Blocks of a loss over single values: their number must not depend on the device.
const PARTS: usize = 256;

impl<S: Storage> Loss for Cuda<S> {
    /// A target out of range makes the loss not a number: the device cannot return an error.
    fn cross_entropy(&self, memory: &mut Memory<'_, Self>, args: &CrossEntropy, _: &StepContext) -> Result<()> {
        let CrossEntropy { rows, classes, ignore_index, .. } = *args;
        let device = self.device();
        let [logits, metrics] = [args.logits, args.metrics].map(|act| Self::act(memory, act));
        let (targets, dlogits) = (Self::indices(memory, args.targets), Self::act_or_null(memory, args.dlogits));
        let found = device.scratch(COUNTED + 8 * rows)?;
        let (losses, rights) = (found + COUNTED as u64, found + (COUNTED + 4 * rows) as u64);
        let count = args![targets, found, rows, classes, ignore_index];
        let smoothing = args.label_smoothing as f32;
        let state = self.loss_scale_state();
        let list =
            args![logits, targets, dlogits, found, losses, rights, rows, classes, smoothing, ignore_index, state];
        let (kernel, rows_a_block) =
            if classes <= NARROW { ("cross_entropy_narrow", 8) } else { ("cross_entropy_wide", 1) };
        // SAFETY: logits and dlogits hold `rows * classes` values, targets `rows`; scratch holds the count and two f32 a row.
        unsafe {
            device.launch(FILE, "count_targets", Grid::new(1, 1024), count)?;
            self.launch(FILE, kernel, Grid::new(rows.div_ceil(rows_a_block), 256), list)?;
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
        let parts = len.div_ceil(256).clamp(1, PARTS);
        let losses = self.device().scratch(8 * parts)?;
        let rights = losses + (4 * parts) as u64;
        let [x, target, metrics] = [x, target, metrics].map(|act| Self::act(memory, act));
        let (dx, state) = (Self::act_or_null(memory, gradient), self.loss_scale_state());
        let list = args![x, target, dx, losses, rights, len, binary, state];
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
