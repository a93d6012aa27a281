//! Buckets of gradients, summed over processes by the caller, or by a thread while the caller goes on.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use half::bf16;

use super::collective::Collective;
use super::gradients::{GradientsOptions, Wire};
use super::tree::{room_of_tree, tree_reduce_scatter, tree_sum};
use crate::backend::Slice;
use crate::error::{Error, Result};

/// A sum over processes.
pub(super) struct Sum {
    pub collective: Arc<dyn Collective>,
    /// Whether it is taken in the order of a tree.
    pub tree: bool,
}

impl Sum {
    /// Elements of room in f32 and in bf16 that a sum of so many values needs.
    pub fn room(&self, len: usize, wire: Wire) -> [usize; 2] {
        match wire {
            Wire::F32 if self.tree => [room_of_tree(len), 0],
            Wire::F32 => [0, 0],
            Wire::Bf16 => [0, len],
        }
    }

    /// Sums of all values to all, or, without the order of a tree, of each shard to its process.
    pub fn over_processes(
        &self,
        mut values: Slice<'_>,
        shards: &[Range<usize>],
        wire: Wire,
        [wide, mut narrow]: [Slice<'_>; 2],
    ) -> Result<()> {
        let (collective, len) = (&*self.collective, values.len());
        let sum = |values: Slice<'_>| match shards {
            [] => collective.all_reduce_sum(values),
            shards => collective.reduce_scatter_sum(values, shards),
        };
        match wire {
            Wire::F32 if self.tree => tree_sum(collective, values, wide),
            Wire::F32 => sum(values),
            Wire::Bf16 => {
                collective.convert(narrow.part(0..len)?, values.part(0..len)?)?;
                sum(narrow.part(0..len)?)?;
                collective.convert(values, narrow.part(0..len)?)
            }
        }
    }

    /// Sums values of the host.
    fn on_host(&self, job: &mut Job, wide: &mut Vec<f32>, narrow: &mut Vec<bf16>) -> Result<()> {
        let Job { values, shards, wire, .. } = job;
        if self.tree && !shards.is_empty() {
            return tree_reduce_scatter(&*self.collective, values, shards, wide);
        }
        let [w, n] = self.room(values.len(), *wire);
        wide.resize(w.max(wide.len()), 0.0);
        narrow.resize(n.max(narrow.len()), bf16::ZERO);
        let room = [wide.as_mut_slice().into(), narrow.as_mut_slice().into()];
        self.over_processes(values.as_mut_slice().into(), shards, *wire, room)
    }
}

/// A bucket that is to be summed, or was.
pub(super) struct Job {
    pub bucket: usize,
    pub values: Vec<f32>,
    /// The part of each process, where each wants its own alone; else empty.
    pub shards: Vec<Range<usize>>,
    pub wire: Wire,
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
        let sum = Sum { collective, tree: options.share.reproducible };
        Ok(if overlap { Reducer::Thread(Worker::start(sum)?) } else { Reducer::Here(sum, Vec::new()) })
    }

    /// Begins the sum of a bucket.
    pub fn take(&mut self, mut job: Job) -> Result<()> {
        match self {
            Reducer::Here(sum, done) => {
                sum.on_host(&mut job, &mut Vec::new(), &mut Vec::new())?;
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

    /// Sums values in f32, while nothing else is on its way.
    pub fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        self.take(Job { bucket: 0, values: values.to_vec(), shards: Vec::new(), wire: Wire::F32 })?;
        values.copy_from_slice(&self.give()?.values);
        Ok(())
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
                let (mut wide, mut narrow) = (Vec::new(), Vec::new());
                for mut job in work {
                    let result = sum.on_host(&mut job, &mut wide, &mut narrow).map(|()| job);
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
