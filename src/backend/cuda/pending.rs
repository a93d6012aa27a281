//! Operation families that the device cannot run yet: each says so. A family leaves this file when its kernels come.

use super::{Cuda, Storage};
use crate::backend::ops::*;
use crate::backend::{Memory, StepContext};
use crate::error::{Error, Result};

fn missing(operation: &str) -> Result<()> {
    Err(Error::Device(format!("the CUDA backend has no {operation} yet; use device = \"cpu\"")))
}

impl<S: Storage> Conv for Cuda<S> {
    fn conv2d_workspace(_: &Conv2dGeometry, _: bool) -> usize {
        0
    }
    fn conv2d_forward(&self, _: &mut Memory<'_, Self>, _: &Conv2dForward, _: &StepContext) -> Result<()> {
        missing("conv2d_forward")
    }
    fn conv2d_backward(&self, _: &mut Memory<'_, Self>, _: &Conv2dBackward, _: &StepContext) -> Result<()> {
        missing("conv2d_backward")
    }
}

impl<S: Storage> Pool for Cuda<S> {
    fn max_pool_forward(&self, _: &mut Memory<'_, Self>, _: &MaxPoolForward, _: &StepContext) -> Result<()> {
        missing("max_pool_forward")
    }
    fn max_pool_backward(&self, _: &mut Memory<'_, Self>, _: &MaxPoolBackward, _: &StepContext) -> Result<()> {
        missing("max_pool_backward")
    }
    fn average_pool_forward(&self, _: &mut Memory<'_, Self>, _: &AveragePoolForward, _: &StepContext) -> Result<()> {
        missing("average_pool_forward")
    }
    fn average_pool_backward(&self, _: &mut Memory<'_, Self>, _: &AveragePoolBackward, _: &StepContext) -> Result<()> {
        missing("average_pool_backward")
    }
}

impl<S: Storage> BatchNorm for Cuda<S> {
    fn batch_norm_forward(&self, _: &mut Memory<'_, Self>, _: &BatchNormForward, _: &StepContext) -> Result<()> {
        missing("batch_norm_forward")
    }
    fn batch_norm_inference(&self, _: &mut Memory<'_, Self>, _: &BatchNormInference, _: &StepContext) -> Result<()> {
        missing("batch_norm_inference")
    }
    fn batch_norm_backward(&self, _: &mut Memory<'_, Self>, _: &BatchNormBackward, _: &StepContext) -> Result<()> {
        missing("batch_norm_backward")
    }
}
