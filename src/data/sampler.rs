//! Which samples make up batch `n`, and this process's part of it: a pure function of the seed and of `n`.

use std::sync::{Arc, Mutex, PoisonError};

use super::options::Sampling;
use super::{Dataset, Draw, Pick};
use crate::error::{Error, Result};
use crate::plan::{PassOf, Share};
use crate::random::{Philox, Purpose};

/// How training batches are put together.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Samples of a batch, those of all processes.
    pub batch_size: usize,
    /// Batches of a step, which decide the order in which this process takes its parts of them.
    pub accumulate: u32,
    /// The run's seed.
    pub seed: u64,
    /// The order of the samples.
    pub sampling: Sampling,
    /// Leave out the last batch of a pass where it is not full.
    pub drop_last: bool,
    /// This process's share.
    pub share: Share,
}

impl SamplerOptions {
    /// Samples of the batch that ends a pass over `len` of them, where it is not full and not left out, as several processes always do.
    pub fn left(&self, len: usize) -> Option<usize> {
        let taken = !self.drop_last && self.share.of == 1 && self.sampling != Sampling::Random;
        len.checked_rem(self.batch_size).filter(|&left| taken && left > 0)
    }
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
        let (batch_size, parts) = (options.batch_size, options.share.of);
        if batch_size == 0 {
            return wrong("found 0, expected 1 or more".into());
        }
        if !batch_size.is_multiple_of(parts) {
            return wrong(format!(
                "found {batch_size}, expected a multiple of {parts}: it is the batch of all processes together, and each takes \
                 as many samples of it"
            ));
        }
        let whole = options.drop_last || parts > 1;
        let batches = if whole { len / batch_size } else { len.div_ceil(batch_size) };
        if batches == 0 {
            // Of a batch in parts all are as large.
            let or = if parts > 1 { "" } else { ", or data.drop_last = false" };
            return wrong(format!(
                "found {batch_size}, but the training split holds {len} samples; set it to {len} at most{or}"
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

    /// The samples of this process's pass number `pass` (`=`), and the key of their augmentations.
    pub fn pass(&self, pass: u64, picks: &mut Vec<Pick>) -> Draw {
        let SamplerOptions { batch_size, accumulate, seed, sampling, share, .. } = self.options;
        let PassOf { micro_batch, part, .. } = share.pass(pass, accumulate);
        let (epoch, within) = (micro_batch / self.batches_per_epoch, micro_batch % self.batches_per_epoch);
        picks.clear();
        let samples = share.samples(batch_size, part);
        let first = within as usize * batch_size + samples.start;
        let range = first..(first + samples.len()).min(self.len);
        match sampling {
            Sampling::Sequential => picks.extend(range.map(Pick::Sample)),
            Sampling::Shuffle => {
                let order = self.order(epoch);
                picks.extend(order[range].iter().map(|i| Pick::Sample(*i as usize)));
            }
            Sampling::Random => {
                let stream = Philox::new(seed, Purpose::Shuffle, WITH_REPLACEMENT);
                let first = micro_batch * batch_size as u64 + samples.start as u64;
                picks.extend((first..first + samples.len() as u64).map(|position| match self.starts {
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
