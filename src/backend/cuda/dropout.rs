//! Dropout (kernels/dropout.cu).

use super::launch::{Grid, args};
use super::{Cuda, Storage};
use crate::backend::ops::{Dropout, DropoutApply};
use crate::backend::{Memory, StepContext};
use crate::error::Result;

impl<S: Storage> Dropout for Cuda<S> {
    fn dropout(&self, memory: &mut Memory<'_, Self>, args: &DropoutApply, step: &StepContext) -> Result<()> {
        let [x, y] = [args.x, args.y].map(|act| Self::act(memory, act));
        let len = args.len;
        let (probability, scale) = (args.probability as f32, (1.0 / (1.0 - args.probability)) as f32);
        let state = self.device().step_state();
        let grid = Grid::elements(self.device(), len, 4);
        // SAFETY: two activations of `len` values each; the device's step state outlives the launch.
        unsafe {
            self.launch("dropout", "dropout", grid, args![x, y, step.seed, args.stream, probability, scale, len, state])
        }
    }
}
