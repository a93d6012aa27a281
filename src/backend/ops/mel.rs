use std::sync::Arc;

use crate::backend::op::{op, plain_operand};
use crate::backend::{Act, Backend, Memory, StepContext};
use crate::error::Result;
use crate::log_mel::LogMel;

/// Log-mel pictures of waveforms.
pub trait Mel: Sized {
    /// The picture of each waveform, normalized. There is no backward: nothing before it is trained.
    fn log_mel_forward(&self, memory: &mut Memory<'_, Self>, args: &LogMelForward, step: &StepContext) -> Result<()>
    where
        Self: Backend;
}

plain_operand!(Arc<LogMel>);

op! {
    /// `y = log_mel(x) * scale + shift`, computed in f32 whatever the backend computes in.
    LogMelForward => log_mel_forward {
        /// `[batch, samples]`.
        x: Act,
        /// `[batch, mels, frames]`, `=`.
        y: Act,
        /// Waveforms.
        batch: usize,
        /// Window, step and bands, for waveforms of one length.
        transform: Arc<LogMel>,
        /// A number that f32 holds.
        scale: f64,
        /// Likewise.
        shift: f64,
    }
    flops(a) a.batch * a.transform.flops()
}
