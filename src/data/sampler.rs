//! Which samples make up batch `n`: a pure function of the seed and of `n`.

use std::sync::{Arc, Mutex, PoisonError};

use super::options::Sampling;
use super::{Dataset, Draw, Pick};
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};

/// This process's share of each batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Number of this process.
    pub rank: usize,
    /// Number of processes.
    pub world: usize,
}

impl Default for Share {
    fn default() -> Self {
        Share { rank: 0, world: 1 }
    }
}

/// How training batches are put together.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Samples of a batch, in each process.
    pub batch_size: usize,
    /// The run's seed.
    pub seed: u64,
    /// The order of the samples.
    pub sampling: Sampling,
    /// Leave out the last batch of a pass where it is not full.
    pub drop_last: bool,
    /// This process's share.
    pub share: Share,
}

/// The stream of windows drawn with replacement; passes are shuffled by the streams of their numbers.
const WITH_REPLACEMENT: u32 = u32::MAX;

/// Puts batches together.
pub struct Sampler {
    len: usize,
    starts: Option<usize>,
    options: SamplerOptions,
    batches_per_epoch: u64,
    /// The orders of the last even and the last odd pass that was asked for.
    orders: [Mutex<Option<Order>>; 2],
}

/// A pass and the order of its samples.
type Order = (u64, Arc<Vec<u32>>);

impl Sampler {
    /// A sampler over `dataset`.
    ///
    /// # Errors
    /// A batch that is empty, or larger than the whole split while `drop_last` holds.
    pub fn new(dataset: &dyn Dataset, options: SamplerOptions) -> Result<Self> {
        let wrong = |problem: String| Err(Error::config("data.batch_size", problem));
        let len = dataset.len();
        let Share { rank, world } = options.share;
        if options.batch_size == 0 {
            return wrong("found 0, expected 1 or more".into());
        }
        if rank >= world {
            return Err(Error::config("rank", format!("found {rank}, expected a number below the world size {world}")));
        }
        let global = options.batch_size.saturating_mul(world);
        let whole = options.drop_last || world > 1;
        let batches = if whole { len / global } else { len.div_ceil(global) };
        if batches == 0 {
            return wrong(format!(
                "found {} for {world} process(es), but the training split holds {len} samples; set it to {} at most, or \
                 data.drop_last = false",
                options.batch_size,
                len / world
            ));
        }
        if options.sampling == Sampling::Shuffle && u32::try_from(len).is_err() {
            return Err(Error::config(
                "data.sampling",
                format!("found \"shuffle\" for {len} samples, expected \"random\""),
            ));
        }
        let starts = dataset.starts();
        Ok(Sampler { len, starts, options, batches_per_epoch: batches as u64, orders: Default::default() })
    }

    /// Batches of one pass over the split.
    pub fn batches_per_epoch(&self) -> u64 {
        self.batches_per_epoch
    }

    /// The samples of batch `batch` (`=`), and the key of their augmentations.
    pub fn batch(&self, batch: u64, picks: &mut Vec<Pick>) -> Draw {
        let SamplerOptions { batch_size, seed, sampling, share, .. } = self.options;
        let (epoch, within) = (batch / self.batches_per_epoch, batch % self.batches_per_epoch);
        let global = batch_size * share.world;
        picks.clear();
        let first = within as usize * global + share.rank * batch_size;
        let range = first..(first + batch_size).min(self.len);
        match sampling {
            Sampling::Sequential => picks.extend(range.map(Pick::Sample)),
            Sampling::Shuffle => {
                let order = self.order(epoch);
                picks.extend(order[range].iter().map(|i| Pick::Sample(*i as usize)));
            }
            Sampling::Random => {
                let stream = Philox::new(seed, Purpose::Shuffle, WITH_REPLACEMENT);
                let first = batch * global as u64 + (share.rank * batch_size) as u64;
                picks.extend((first..first + batch_size as u64).map(|position| match self.starts {
                    Some(starts) => Pick::Window(stream.below(position, starts as u64) as usize),
                    None => Pick::Sample(stream.below(position, self.len as u64) as usize),
                }));
            }
        }
        Draw { seed, epoch }
    }

    /// The shuffled order of pass `epoch`.
    fn order(&self, epoch: u64) -> Arc<Vec<u32>> {
        let mut slot = self.orders[(epoch % 2) as usize].lock().unwrap_or_else(PoisonError::into_inner);
        match &*slot {
            Some((known, order)) if *known == epoch => Arc::clone(order),
            _ => {
                let mut order: Vec<u32> = (0..self.len as u32).collect();
                Philox::new(self.options.seed, Purpose::Shuffle, epoch as u32).shuffle(&mut order);
                let order = Arc::new(order);
                *slot = Some((epoch, Arc::clone(&order)));
                order
            }
        }
    }
}
