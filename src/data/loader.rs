//! Batches read ahead by threads of their own, or, where a backend keeps the data set, what samples they have.
//!
//! Thread `t` of `n` reads batches `t, t + n, ..` into its own bounded ring; the caller takes them in turn, so they come in
//! order whatever the threads do. Buffers that the caller hands back are used again.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use super::{Batch, Dataset, Draw, InputMut, Inputs, Pick, Picked, Sampler, SamplerOptions, Table, TargetMut, Targets};
use crate::error::{Error, Result};
use crate::host;

/// How far ahead batches are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefetch {
    /// Batches that wait, all threads together.
    pub batches: usize,
    /// Threads.
    pub threads: usize,
}

impl Default for Prefetch {
    fn default() -> Self {
        Prefetch { batches: 4, threads: 1 }
    }
}

/// Reads `picks` into `batch` (`=`), which takes their number of samples. `draw` as in [`Dataset::read`].
///
/// # Errors
/// As [`Dataset::read`].
pub fn read_batch(dataset: &dyn Dataset, picks: &[Pick], draw: Option<Draw>, batch: &mut Batch) -> Result<()> {
    let input = dataset.input();
    let each = (input.elements(), dataset.target().elements(&input));
    read_sized(dataset, picks, draw, batch, each)
}

/// [`read_batch`] for a dataset whose samples have `inputs_each` values and `targets_each` targets.
fn read_sized(
    dataset: &dyn Dataset,
    picks: &[Pick],
    draw: Option<Draw>,
    batch: &mut Batch,
    (inputs_each, targets_each): (usize, usize),
) -> Result<()> {
    let samples = picks.len();
    match &mut batch.inputs {
        Inputs::Real(values) => host::resize(values, samples.saturating_mul(inputs_each))?,
        Inputs::Tokens(values) => host::resize(values, samples.saturating_mul(inputs_each))?,
    }
    match &mut batch.targets {
        Targets::Index(values) => host::resize(values, samples.saturating_mul(targets_each))?,
        Targets::Real(values) => host::resize(values, samples.saturating_mul(targets_each))?,
    }
    batch.samples = samples;
    for (i, pick) in picks.iter().enumerate() {
        let (inputs, targets) = (i * inputs_each..(i + 1) * inputs_each, i * targets_each..(i + 1) * targets_each);
        let input = match &mut batch.inputs {
            Inputs::Real(values) => InputMut::Real(&mut values[inputs]),
            Inputs::Tokens(values) => InputMut::Tokens(&mut values[inputs]),
        };
        let target = match &mut batch.targets {
            Targets::Index(values) => TargetMut::Index(&mut values[targets]),
            Targets::Real(values) => TargetMut::Real(&mut values[targets]),
        };
        dataset.read(*pick, draw, input, target)?;
    }
    Ok(())
}

/// Which batches a loader gives.
enum Plan {
    Training(Sampler),
    /// Batches of a split in order, of which this process takes every `world`-th, from number `rank` on.
    Evaluation {
        len: usize,
        batch_size: usize,
        rank: u64,
        world: u64,
    },
}

impl Plan {
    fn batch(&self, batch: u64, picks: &mut Vec<Pick>) -> Option<Draw> {
        match self {
            Plan::Training(sampler) => Some(sampler.pass(batch, picks)),
            Plan::Evaluation { len, batch_size, rank, world } => {
                let number = batch * world + rank;
                let first = (number as usize).saturating_mul(*batch_size).min(*len);
                picks.clear();
                picks.extend((first..(first + batch_size).min(*len)).map(Pick::Sample));
                None
            }
        }
    }
}

struct Worker<T> {
    /// None once the loader is dropped, so that a thread that waits for room sees it.
    full: Option<Receiver<Result<T>>>,
    empty: Sender<T>,
    thread: Option<JoinHandle<()>>,
}

/// Makes a batch of these samples, of one that was handed back where there is one.
type Make<T> = dyn Fn(&[Pick], Option<Draw>, Option<T>) -> Result<T> + Send + Sync;

/// An iterator of batches that threads read ahead. It ends after an error; dropping it stops its threads.
pub struct Loader<T = Batch> {
    workers: Vec<Worker<T>>,
    /// Batches given so far.
    given: u64,
    /// Batches until the end; none for training, which has no end.
    total: Option<u64>,
    failed: bool,
}

impl Loader<Picked> {
    /// As [`Loader::train`], of a table that a backend gathers from; one thread is enough.
    ///
    /// # Errors
    /// As [`Loader::train`].
    pub fn picks(table: &Arc<Table>, options: SamplerOptions, first_pass: u64, prefetch: Prefetch) -> Result<Self> {
        let (sampler, table) = (Sampler::new(table.dataset(), options)?, Arc::clone(table));
        let make = move |picks: &[Pick], _: Option<Draw>, old: Option<Picked>| {
            let mut picked = old.unwrap_or_else(|| Picked::new(&table));
            picked.set(picks).map(|()| picked)
        };
        let prefetch = Prefetch { threads: 1, ..prefetch };
        Loader::start(Arc::new(make), Plan::Training(sampler), first_pass, None, prefetch)
    }
}

impl Loader<Batch> {
    /// What this process takes of training batches, from its pass number `first_pass` on, without end.
    ///
    /// # Errors
    /// As [`Sampler::new`]; no thread can be started.
    pub fn train(
        dataset: Arc<dyn Dataset>,
        options: SamplerOptions,
        first_pass: u64,
        prefetch: Prefetch,
    ) -> Result<Self> {
        let sampler = Sampler::new(&*dataset, options)?;
        Loader::start(reading(dataset), Plan::Training(sampler), first_pass, None, prefetch)
    }

    /// All samples in order, once, without augmentations; the last batch may be smaller.
    ///
    /// # Errors
    /// `batch_size` is 0; no thread can be started.
    pub fn batches(dataset: Arc<dyn Dataset>, batch_size: usize, prefetch: Prefetch) -> Result<Self> {
        Loader::every(dataset, batch_size, (0, 1), usize::MAX, prefetch)
    }

    /// As [`Loader::batches`], but only every `world`-th batch from number `rank` on, of the first `most` batches.
    ///
    /// # Errors
    /// As [`Loader::batches`].
    pub fn every(
        dataset: Arc<dyn Dataset>,
        batch_size: usize,
        (rank, world): (usize, usize),
        most: usize,
        prefetch: Prefetch,
    ) -> Result<Self> {
        if batch_size == 0 {
            return Err(Error::config("data.batch_size", "found 0, expected 1 or more"));
        }
        let len = dataset.len();
        let all = len.div_ceil(batch_size).min(most);
        let total = all.saturating_sub(rank).div_ceil(world.max(1)) as u64;
        let (rank, world) = (rank as u64, world as u64);
        Loader::start(reading(dataset), Plan::Evaluation { len, batch_size, rank, world }, 0, Some(total), prefetch)
    }
}

/// Reads batches of a data set.
fn reading(dataset: Arc<dyn Dataset>) -> Arc<Make<Batch>> {
    let (input, target) = (dataset.input(), dataset.target());
    let each = (input.elements(), target.elements(&input));
    Arc::new(move |picks: &[Pick], draw: Option<Draw>, old: Option<Batch>| {
        let mut batch = old.unwrap_or_else(|| Batch::zeros(&input, &target, picks.len()));
        read_sized(&*dataset, picks, draw, &mut batch, each).map(|()| batch)
    })
}

impl<T: Send + 'static> Loader<T> {
    fn start(make: Arc<Make<T>>, plan: Plan, first: u64, total: Option<u64>, prefetch: Prefetch) -> Result<Self> {
        let plan = Arc::new(plan);
        let threads = prefetch.threads.max(1);
        let depth = prefetch.batches.div_ceil(threads).max(1);
        let mut workers = Vec::with_capacity(threads);
        for thread in 0..threads {
            let (full_in, full_out) = sync_channel(depth);
            let (empty_in, empty_out) = channel();
            let (make, plan) = (Arc::clone(&make), Arc::clone(&plan));
            let handle = std::thread::Builder::new()
                .name(format!("data-{thread}"))
                .spawn(move || {
                    let mut numbers = (first + thread as u64..).step_by(threads);
                    match total {
                        Some(total) => {
                            work(&*make, &plan, &mut numbers.take_while(|n| *n < total), &full_in, &empty_out)
                        }
                        None => work(&*make, &plan, &mut numbers, &full_in, &empty_out),
                    }
                })
                .map_err(|e| Error::Training(format!("cannot start a thread that reads data: {e}")))?;
            workers.push(Worker { full: Some(full_out), empty: empty_in, thread: Some(handle) });
        }
        Ok(Loader { workers, given: 0, total, failed: false })
    }

    /// Hands a batch back, so that its memory is used again.
    pub fn recycle(&mut self, batch: T) {
        // The batch came from the thread whose turn it was last; a thread that has ended needs none.
        let last = (self.given.saturating_sub(1) % self.workers.len() as u64) as usize;
        let _ = self.workers[last].empty.send(batch);
    }
}

/// Reads the batches `numbers` until there are no more, or nobody takes them.
fn work<T>(
    make: &Make<T>,
    plan: &Plan,
    numbers: &mut dyn Iterator<Item = u64>,
    full: &SyncSender<Result<T>>,
    empty: &Receiver<T>,
) {
    let mut picks = Vec::new();
    for number in numbers {
        let draw = plan.batch(number, &mut picks);
        let made = make(&picks, draw, empty.try_recv().ok());
        let failed = made.is_err();
        if full.send(made).is_err() || failed {
            return;
        }
    }
}

impl<T> Iterator for Loader<T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Result<T>> {
        if self.failed || self.total.is_some_and(|total| self.given >= total) {
            return None;
        }
        let turn = (self.given % self.workers.len() as u64) as usize;
        let received = self.workers[turn].full.as_ref().and_then(|full| full.recv().ok());
        let batch = received.unwrap_or_else(|| Err(Error::Training("a thread that reads data ended early".into())));
        self.failed = batch.is_err();
        self.given += 1;
        Some(batch)
    }
}

impl<T> Drop for Loader<T> {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            worker.full = None;
        }
        for thread in self.workers.iter_mut().filter_map(|w| w.thread.take()) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}
