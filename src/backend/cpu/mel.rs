//! Log-mel pictures.

use rayon::prelude::*;

use super::Cpu;
use crate::backend::ops::{LogMelForward, Mel};
use crate::backend::{Memory, StepContext, disjoint};
use crate::error::Result;
use crate::real::Real;

impl<R: Real> Mel for Cpu<R> {
    /// The bits of a picture that was made while data was read, and normalized then.
    fn log_mel_forward(&self, memory: &mut Memory<'_, Self>, args: &LogMelForward, _: &StepContext) -> Result<()> {
        let activations = &mut *memory.activations;
        let transform = &args.transform;
        let [mels, frames] = transform.shape();
        let (scale, shift) = (args.scale as f32, args.shift as f32);
        let ranges = [activations.range(args.x), activations.range(args.y)];
        let [x, y] = disjoint(&mut activations.values, ranges, "log_mel")?;
        let waves = x.par_chunks(transform.samples()).zip(y.par_chunks_mut(mels * frames)).take(args.batch);
        waves.try_for_each(|(x, y)| {
            let wave: Vec<f32> = x.iter().map(|x| x.f64() as f32).collect();
            let mut picture = vec![0.0; y.len()];
            transform.apply(&wave, &mut picture)?;
            y.iter_mut().zip(picture).for_each(|(y, value)| *y = R::from_f64(f64::from(value * scale + shift)));
            Ok(())
        })
    }
}
