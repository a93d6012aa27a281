//! What operations take of the device's memory besides what they name, by their sizes: known before any of them has run.

use std::any::Any;

use super::context::Device;
use super::scratch::ALIGNMENT;
use super::{Cuda, Storage, batch_norm, blas, embedding, layer_norm, linear, loss};
use crate::backend::ops::{
    AttentionBackward, BatchNormBackward, BatchNormForward, BinaryCrossEntropy, Conv2dBackward, Conv2dForward,
    CrossEntropy, EmbeddingBackward, LayerNormBackward, LinearBackward, LinearForward, MeanSquaredError,
    PositionBackward, RmsNormBackward,
};
use crate::backend::{Op, Workspace};
use crate::error::Result;

impl Device {
    /// Takes this memory now; what of it is there already is not taken again.
    ///
    /// # Errors
    /// Not enough, or a library that is missing.
    pub(super) fn reserve(&self, workspace: &Workspace) -> Result<()> {
        if workspace.libraries > 0 {
            self.blas()?;
        }
        self.scratch(workspace.scratch).map(drop)
    }
}

impl<S: Storage> Cuda<S> {
    /// [`crate::backend::Backend::workspace`]. Operations of others' own are not known; what they call takes memory as it runs.
    pub(super) fn workspace_of(op: &dyn Op<Self>, device: Option<&Device>) -> Result<Workspace> {
        let Some(op) = op.as_any() else { return Ok(Workspace::default()) };
        let found = if let Some(args) = op.downcast_ref::<Conv2dForward>() {
            Self::forward_workspace(args, device)?
        } else if let Some(args) = op.downcast_ref::<Conv2dBackward>() {
            Self::backward_workspace(args, device)?
        } else {
            let products = op.is::<LinearForward>() || op.is::<LinearBackward>();
            let libraries = if products { blas::WORKSPACE_BYTES } else { 0 };
            Workspace { scratch: scratch::<S>(op)?, libraries, is_bound: false }
        };
        // As much as the device then takes.
        Ok(Workspace { scratch: found.scratch.next_multiple_of(ALIGNMENT), ..found })
    }
}

/// Scratch memory of an operation whose kernels are our own.
fn scratch<S: Storage>(op: &dyn Any) -> Result<usize> {
    if let Some(args) = op.downcast_ref::<LinearBackward>() {
        return Ok(linear::scratch(args));
    }
    if let Some(args) = op.downcast_ref::<LayerNormBackward>() {
        let kinds = 1 + usize::from(args.dbias.is_some());
        return Ok(layer_norm::Parts::new::<S>([args.rows, args.width]).scratch(kinds));
    }
    if let Some(args) = op.downcast_ref::<RmsNormBackward>() {
        return Ok(layer_norm::Parts::new::<S>([args.rows, args.width]).scratch(1));
    }
    if let Some(args) = op.downcast_ref::<BatchNormForward>() {
        return batch_norm::forward_scratch(args);
    }
    if let Some(args) = op.downcast_ref::<BatchNormBackward>() {
        return batch_norm::backward_scratch(args);
    }
    if let Some(args) = op.downcast_ref::<EmbeddingBackward>() {
        return Ok(embedding::scratch(args));
    }
    if let Some(args) = op.downcast_ref::<PositionBackward>() {
        return Ok(linear::sums_scratch([args.batch, args.time * args.width]));
    }
    if let Some(args) = op.downcast_ref::<AttentionBackward>() {
        return Ok(super::attention::scratch(&args.geometry));
    }
    if let Some(args) = op.downcast_ref::<CrossEntropy>() {
        return Ok(loss::scratch_of_rows([args.rows, args.classes]));
    }
    if let Some(args) = op.downcast_ref::<MeanSquaredError>() {
        return Ok(loss::scratch_of_values(args.len));
    }
    if let Some(args) = op.downcast_ref::<BinaryCrossEntropy>() {
        return Ok(loss::scratch_of_values(args.len));
    }
    Ok(0)
}
