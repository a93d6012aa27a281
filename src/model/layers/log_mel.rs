//! Log-mel pictures of waveforms.

use std::sync::Arc;

use crate::backend::Backend;
use crate::backend::ops::LogMelForward;
use crate::error::{Error, Result};
use crate::log_mel::LogMel as Transform;
use crate::model::{Layer, Planner, Tensor};

/// `[batch, samples] -> [batch, 1, mels, frames]`: pictures of waveforms, made within the step. Nothing before it is trained.
///
/// In 16 bits waveforms are rounded as every input is: bf16 leaves them 8 bits, whose noise is seen in bands that are near silent.
#[derive(Clone, Debug)]
pub struct LogMel {
    transform: Arc<Transform>,
    scale: f32,
    shift: f32,
}

impl LogMel {
    /// The pictures of a transform.
    pub fn new(transform: Transform) -> Self {
        LogMel { transform: Arc::new(transform), scale: 1.0, shift: 0.0 }
    }

    /// Normalizes: `y = x * scale + shift`.
    #[must_use]
    pub fn normalized(self, scale: f32, shift: f32) -> Self {
        LogMel { scale, shift, ..self }
    }
}

impl<B: Backend> Layer<B> for LogMel {
    fn kind(&self) -> &'static str {
        "log_mel"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let [batch, samples] = x.dimensions("log_mel", "[batch, samples]")?;
        if samples != self.transform.samples() {
            return Err(Error::shape("log_mel", format!("{} samples", self.transform.samples()), samples.to_string()));
        }
        if x.needs_gradient {
            return Err(Error::shape("log_mel", "the model's input", "the output of layers that are trained"));
        }
        let [mels, frames] = self.transform.shape();
        let (y, output) = planner.tensor(&[batch, 1, mels, frames], false);
        planner.emit(LogMelForward {
            x: x.real("log_mel")?,
            y,
            batch,
            transform: self.transform.clone(),
            scale: f64::from(self.scale),
            shift: f64::from(self.shift),
        });
        Ok(output)
    }

    fn backward(&mut self, _: &mut Planner<'_, B>, _: Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }
}
