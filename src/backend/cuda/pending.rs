//! Operation families that the device cannot run yet: each says so. A family leaves this file when its kernels come.

use super::{Cuda, Storage};
use crate::backend::ops::*;
use crate::backend::{Memory, StepContext};
use crate::error::{Error, Result};

fn missing(operation: &str) -> Result<()> {
    Err(Error::Device(format!("the CUDA backend has no {operation} yet; use device = \"cpu\"")))
}

impl<S: Storage> LayerNorm for Cuda<S> {
    fn layer_norm_forward(&self, _: &mut Memory<'_, Self>, _: &LayerNormForward, _: &StepContext) -> Result<()> {
        missing("layer_norm_forward")
    }
    fn layer_norm_backward(&self, _: &mut Memory<'_, Self>, _: &LayerNormBackward, _: &StepContext) -> Result<()> {
        missing("layer_norm_backward")
    }
    fn rms_norm_forward(&self, _: &mut Memory<'_, Self>, _: &RmsNormForward, _: &StepContext) -> Result<()> {
        missing("rms_norm_forward")
    }
    fn rms_norm_backward(&self, _: &mut Memory<'_, Self>, _: &RmsNormBackward, _: &StepContext) -> Result<()> {
        missing("rms_norm_backward")
    }
}

impl<S: Storage> Embedding for Cuda<S> {
    fn embedding_forward(&self, _: &mut Memory<'_, Self>, _: &EmbeddingForward, _: &StepContext) -> Result<()> {
        missing("embedding_forward")
    }
    fn embedding_backward(&self, _: &mut Memory<'_, Self>, _: &EmbeddingBackward, _: &StepContext) -> Result<()> {
        missing("embedding_backward")
    }
    fn position_forward(&self, _: &mut Memory<'_, Self>, _: &PositionForward, _: &StepContext) -> Result<()> {
        missing("position_forward")
    }
    fn position_backward(&self, _: &mut Memory<'_, Self>, _: &PositionBackward, _: &StepContext) -> Result<()> {
        missing("position_backward")
    }
}

impl<S: Storage> Attention for Cuda<S> {
    fn attention_forward(&self, _: &mut Memory<'_, Self>, _: &AttentionForward, _: &StepContext) -> Result<()> {
        missing("attention_forward")
    }
    fn attention_backward(&self, _: &mut Memory<'_, Self>, _: &AttentionBackward, _: &StepContext) -> Result<()> {
        missing("attention_backward")
    }
    fn rotary(&self, _: &mut Memory<'_, Self>, _: &Rotary, _: &StepContext) -> Result<()> {
        missing("rotary")
    }
}
