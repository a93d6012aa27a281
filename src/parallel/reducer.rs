//! Buckets of gradients, summed over processes by the caller, or by a thread while the caller goes on.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use half::bf16;

use super::collective::Collective;
use super::gradients::{GradientsOptions, Wire};
use super::tree::{tree_reduce_scatter, tree_sum};
use crate::backend::Slice;
use crate::error::{Error, Result};

/// A sum over processes.
pub(super) struct Sum {
    collective: Arc<dyn Collective>,
    tree: bool,
    wire: Wire,
}

impl Sum {
    /// Sums of all values to all, or of each shard to its process.
    fn over_processes(&self, values: &mut [f32], shards: &[Range<usize>], room: &mut Vec<f32>) -> Result<()> {
        let collective = &*self.collective;
        let sum = |values: Slice<'_>| match shards {
            [] => collective.all_reduce_sum(values),
            shards => collective.reduce_scatter_sum(values, shards),
        };
        match (self.tree, self.wire) {
            (true, _) if shards.is_empty() => tree_sum(collective, values, room),
            (true, _) => tree_reduce_scatter(collective, values, shards, room),
            (false, Wire::F32) => sum(values.into()),
            (false, Wire::Bf16) => {
                let mut rounded: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
                sum(rounded.as_mut_slice().into())?;
                values.iter_mut().zip(rounded).for_each(|(value, sum)| *value = sum.to_f32());
                Ok(())
            }
        }
    }
}

/// A bucket that is to be summed, or was.
pub(super) struct Job {
    pub bucket: usize,
    pub values: Vec<f32>,
    /// The part of each process, where each wants its own alone; else empty.
    pub shards: Vec<Range<usize>>,
}

/// Who sums buckets over processes.
pub(super) enum Reducer {
    /// The caller, at once.
    Here(Sum, Vec<Job>),
    /// A thread, while the caller goes on.
    Thread(Worker),
}

impl Reducer {
    /// One that sums as the options say.
    pub fn new(options: &GradientsOptions, collective: Arc<dyn Collective>) -> Result<Self> {
        let overlap = options.overlap && collective.world() > 1;
        let sum = Sum { collective, tree: options.share.reproducible, wire: options.wire };
        Ok(if overlap { Reducer::Thread(Worker::start(sum)?) } else { Reducer::Here(sum, Vec::new()) })
    }

    /// Begins the sum of a bucket.
    pub fn take(&mut self, mut job: Job) -> Result<()> {
        match self {
            Reducer::Here(sum, done) => {
                sum.over_processes(&mut job.values, &job.shards, &mut Vec::new())?;
                done.push(job);
                Ok(())
            }
            Reducer::Thread(worker) => worker.send(job),
        }
    }

    /// A bucket that was summed.
    pub fn give(&mut self) -> Result<Job> {
        match self {
            Reducer::Here(_, done) => done.pop().ok_or_else(gone),
            Reducer::Thread(worker) => worker.done.recv().map_err(|_| gone())?,
        }
    }

    /// Sums values while nothing else is on its way.
    pub fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        match self {
            Reducer::Here(sum, _) => sum.over_processes(values, &[], &mut Vec::new()),
            Reducer::Thread(worker) => {
                worker.send(Job { bucket: 0, values: values.to_vec(), shards: Vec::new() })?;
                let job = worker.done.recv().map_err(|_| gone())??;
                values.copy_from_slice(&job.values);
                Ok(())
            }
        }
    }
}

fn gone() -> Error {
    Error::Training("the thread that sums gradients over processes ended early".into())
}

/// A thread that sums buckets over processes, in the order in which they are sent to it.
pub(super) struct Worker {
    /// None once it is to end.
    to: Option<Sender<Job>>,
    done: Receiver<Result<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn start(sum: Sum) -> Result<Self> {
        let (to, work) = channel::<Job>();
        let (finished, done) = channel();
        let thread = std::thread::Builder::new()
            .name("gradients".into())
            .spawn(move || {
                let mut room = Vec::new();
                for mut job in work {
                    let result = sum.over_processes(&mut job.values, &job.shards, &mut room).map(|()| job);
                    let failed = result.is_err();
                    if finished.send(result).is_err() || failed {
                        return;
                    }
                }
            })
            .map_err(|e| Error::Training(format!("cannot start a thread that sums gradients: {e}")))?;
        Ok(Worker { to: Some(to), done, thread: Some(thread) })
    }

    fn send(&self, job: Job) -> Result<()> {
        match &self.to {
            Some(to) => to.send(job).map_err(|_| gone()),
            None => Err(gone()),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.to = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}
