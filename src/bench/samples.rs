//! Random samples that lie in memory, as those of a small data set do.

use std::sync::Arc;

use super::works::Training;
use crate::data::{
    Batch, Dataset, Draw, InputMut, InputSpec, Inputs, Pick, Picked, Table, TargetMut, TargetSpec, Targets,
};
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};

/// Bytes of inputs that a table holds: more than caches do, where samples are small enough.
const BYTES: usize = 64 << 20;
/// Batches of a table, at least and at most.
const BATCHES: [usize; 2] = [4, 256];
/// The stream of the order in which samples are taken.
const ORDER: u32 = u32::MAX;

struct Samples {
    batches: Vec<Batch>,
    each: usize,
    input: InputSpec,
    target: TargetSpec,
}

impl Dataset for Samples {
    fn len(&self) -> usize {
        self.batches.len() * self.each
    }

    fn input(&self) -> InputSpec {
        self.input.clone()
    }

    fn target(&self) -> TargetSpec {
        self.target.clone()
    }

    fn read(&self, pick: Pick, _: Option<Draw>, input: InputMut<'_>, target: TargetMut<'_>) -> Result<()> {
        let Pick::Sample(sample) = pick else { return Err(Error::shape("data", "a sample", format!("{pick:?}"))) };
        let (batch, within) = (&self.batches[sample / self.each], sample % self.each);
        match &batch.inputs {
            Inputs::Real(values) => copy(values, within, input.real()?),
            Inputs::Tokens(values) => copy(values, within, input.tokens()?),
        }
        match &batch.targets {
            Targets::Real(values) => copy(values, within, target.real()?),
            Targets::Index(values) => copy(values, within, target.index()?),
        }
        Ok(())
    }

    fn is_plain(&self) -> bool {
        true
    }
}

/// One sample's values.
fn copy<T: Copy>(from: &[T], sample: usize, to: &mut [T]) {
    to.copy_from_slice(&from[sample * to.len()..][..to.len()]);
}

/// How many batches a table has.
pub fn count(work: &Training) -> usize {
    let bytes = work.batch * work.specs().0.elements() * size_of::<f32>();
    (BYTES / bytes).clamp(BATCHES[0], BATCHES[1])
}

/// Batches of different samples each, which together are a table.
///
/// # Errors
/// None, for works as they are.
pub fn batches(work: &Training) -> Result<Vec<Picked>> {
    let (input, target) = work.specs();
    let batches = (0..count(work) as u32).map(|number| work.random_batch(number)).collect();
    let samples: Arc<dyn Dataset> = Arc::new(Samples { batches, each: work.batch, input, target });
    let mut order: Vec<u32> = (0..samples.len() as u32).collect();
    Philox::new(1, Purpose::Shuffle, ORDER).shuffle(&mut order);
    let table = Table::new(samples).ok_or_else(|| Error::shape("bench", "samples of a table", "none"))?;
    let picked = order.chunks(work.batch).map(|rows| {
        let picks: Vec<Pick> = rows.iter().map(|&row| Pick::Sample(row as usize)).collect();
        let mut picked = Picked::new(&table);
        picked.set(&picks).map(|()| picked)
    });
    picked.collect()
}
