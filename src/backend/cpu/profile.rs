//! Times of operations, by the clock.

use std::time::Instant;

use rayon::prelude::*;

use super::Cpu;
use crate::backend::profile::{KernelTime, Profiled};
use crate::error::{Error, Result};
use crate::real::Real;

/// Values of a piece of a copy.
const PIECE: usize = 1 << 16;

impl<R: Real> Profiled for Cpu<R> {
    fn start_timing(&self) {}

    fn within(&self, _: &'static str, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<f64>> {
        self.milliseconds(work).map(Some)
    }

    fn finish_timing(&self) -> Result<Vec<KernelTime>> {
        Ok(Vec::new())
    }

    fn milliseconds(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let began = Instant::now();
        work()?;
        Ok(began.elapsed().as_secs_f64() * 1e3)
    }

    fn copy(&self, to: &mut Vec<f32>, from: &Vec<f32>) -> Result<()> {
        if to.len() != from.len() {
            return Err(Error::shape("copy", format!("{} elements", to.len()), from.len().to_string()));
        }
        to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    }

    fn copy_len(&self) -> usize {
        32 << 20
    }

    fn product_size(&self) -> [usize; 3] {
        [1024; 3]
    }
}
