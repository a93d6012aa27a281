//! Buckets of gradients, summed over processes by the caller, by a thread while the caller goes on, or by the device.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use half::bf16;

use super::buckets::Bucket;
use super::collective::Collective;
use super::gradients::{GradientsOptions, Wire};
use super::tree::{room_of_tree, tree_reduce_scatter, tree_sum};
use crate::backend::{Backend, Slice};
use crate::error::{Error, Result};
use crate::plan::overlap;

/// A sum over processes.
pub(super) struct Sum {
    collective: Arc<dyn Collective>,
    tree: bool,
}

/// Memory for what is on its way: other processes' values, and values rounded to bf16.
struct Room<W, N> {
    wide: W,
    narrow: N,
}

/// Elements of room in f32 and in bf16 for a sum of so many values, by all or of shards; `tree`: whether it is one of a tree.
fn room(tree: bool, len: usize, shards: &[Range<usize>], wire: Wire) -> [usize; 2] {
    let longest = shards.iter().map(Range::len).max();
    match wire {
        Wire::F32 => [if tree { longest.unwrap_or(room_of_tree(len)) } else { 0 }, 0],
        Wire::Bf16 => [0, len],
    }
}

/// Elements of room, as [`Queue`] makes it.
pub(super) fn room_on_device(tree: bool, places: impl Iterator<Item = Place>, wire: Wire, state: usize) -> [usize; 2] {
    places.fold(room(tree, state, &[], Wire::F32), |[wide, narrow], Place { elements, shards }| {
        let [w, n] = room(tree, elements.len(), &shards, wire);
        [wide.max(w), narrow.max(n)]
    })
}

impl Sum {
    /// Sums of all values to all, or of each shard to its process.
    fn over_processes(
        &self,
        mut values: Slice<'_>,
        shards: &[Range<usize>],
        wire: Wire,
        room: Room<Slice<'_>, Slice<'_>>,
    ) -> Result<()> {
        let (len, collective) = (values.len(), &*self.collective);
        let sum = |values: Slice<'_>| match shards {
            [] => collective.all_reduce_sum(values),
            shards => collective.reduce_scatter_sum(values, shards),
        };
        let Room { wide, mut narrow } = room;
        match wire {
            Wire::F32 if self.tree && shards.is_empty() => tree_sum(collective, values, wide),
            Wire::F32 if self.tree => tree_reduce_scatter(collective, values, shards, wide),
            Wire::F32 => sum(values),
            Wire::Bf16 => {
                collective.convert(narrow.part(0..len)?, values.part(0..len)?)?;
                sum(narrow.part(0..len)?)?;
                collective.convert(values, narrow.part(0..len)?)
            }
        }
    }

    /// Sums values of the host.
    fn on_host(&self, job: &mut Job, room: &mut Room<Vec<f32>, Vec<bf16>>) -> Result<()> {
        let [wide, narrow] = self::room(self.tree, job.values.len(), &job.shards, job.wire);
        room.wide.resize(wide.max(room.wide.len()), 0.0);
        room.narrow.resize(narrow.max(room.narrow.len()), bf16::ZERO);
        let room = Room { wide: room.wide.as_mut_slice().into(), narrow: room.narrow.as_mut_slice().into() };
        self.over_processes(job.values.as_mut_slice().into(), &job.shards, job.wire, room)
    }
}

impl Room<Vec<f32>, Vec<bf16>> {
    fn none() -> Self {
        Room { wide: Vec::new(), narrow: Vec::new() }
    }
}

/// A bucket that is to be summed, or was.
pub(super) struct Job {
    pub bucket: usize,
    pub values: Vec<f32>,
    /// The part of each process, where each wants its own alone; else empty.
    pub shards: Vec<Range<usize>>,
    /// What the values are sent as.
    pub wire: Wire,
}

/// Sums that a device queues behind what it has queued, in its own memory.
pub(super) struct Queue<B: Backend> {
    sum: Sum,
    room: Option<Room<B::Buffer<f32>, B::Buffer<bf16>>>,
}

/// A bucket that is summed where it stands, as elements of a buffer; `shards` as in [`Job`].
pub(super) struct Place {
    pub elements: Range<usize>,
    pub shards: Vec<Range<usize>>,
}

impl Place {
    /// A bucket of an arena, of which each process wants its own of `shards` alone, or all.
    pub fn of_bucket(Bucket { elements, .. }: &Bucket, shards: &[Range<usize>]) -> Self {
        Place { elements: elements.clone(), shards: within(elements, shards) }
    }
}

/// Each shard's part of `elements`, counted from their first.
pub(super) fn within(elements: &Range<usize>, shards: &[Range<usize>]) -> Vec<Range<usize>> {
    let within = |shard: &Range<usize>| {
        let common = overlap(elements, shard);
        common.start - elements.start..common.end - elements.start
    };
    shards.iter().map(within).collect()
}

impl<B: Backend<Real = f32>> Queue<B> {
    /// Makes room for sums of `buckets` sent as `wire`, and of `state` values in f32.
    pub fn make_room(
        &mut self,
        backend: &B,
        buckets: impl Iterator<Item = Place>,
        wire: Wire,
        state: usize,
    ) -> Result<()> {
        if self.room.is_none() {
            let [wide, narrow] = room_on_device(self.sum.tree, buckets, wire, state);
            self.room = Some(Room { wide: backend.allocate(wide)?, narrow: backend.allocate(narrow)? });
        }
        Ok(())
    }

    /// Queues the sum of some elements of a buffer.
    pub fn sum(&mut self, backend: &B, values: &mut B::Buffer<f32>, place: Place, wire: Wire) -> Result<()> {
        let Place { elements, shards } = place;
        let [w, n] = room(self.sum.tree, elements.len(), &shards, wire);
        let Some(Room { wide, narrow }) = &mut self.room else {
            return Err(Error::Training("gradients are summed in a pass that has not begun".into()));
        };
        self.sum.collective.fork()?;
        let room = Room { wide: backend.slice(wide, 0..w)?, narrow: backend.slice(narrow, 0..n)? };
        self.sum.over_processes(backend.slice(values, elements)?, &shards, wire, room)
    }
}

/// Who sums buckets over processes.
pub(super) enum Reducer<B: Backend> {
    /// The caller, at once.
    Here(Sum, Vec<Job>),
    /// A thread, while the caller goes on.
    Thread(Worker),
    /// The device.
    Queued(Queue<B>),
}

impl<B: Backend> Reducer<B> {
    /// One that sums as the options say.
    pub fn new(options: &GradientsOptions, collective: Arc<dyn Collective>) -> Result<Self> {
        let (queued, overlap) = (collective.is_queued(), options.overlap && collective.world() > 1);
        let sum = Sum { collective, tree: options.share.reproducible };
        Ok(match (queued, overlap) {
            (true, _) => Reducer::Queued(Queue { sum, room: None }),
            (false, true) => Reducer::Thread(Worker::start(sum)?),
            (false, false) => Reducer::Here(sum, Vec::new()),
        })
    }

    /// Begins the sum of a bucket of the host.
    pub fn take(&mut self, mut job: Job) -> Result<()> {
        match self {
            Reducer::Here(sum, done) => {
                sum.on_host(&mut job, &mut Room::none())?;
                done.push(job);
                Ok(())
            }
            Reducer::Thread(worker) => worker.send(job),
            Reducer::Queued(_) => Err(gone()),
        }
    }

    /// A bucket of the host that was summed.
    pub fn give(&mut self) -> Result<Job> {
        match self {
            Reducer::Here(_, done) => done.pop().ok_or_else(gone),
            Reducer::Thread(worker) => worker.done.recv().map_err(|_| gone())?,
            Reducer::Queued(_) => Err(gone()),
        }
    }

    /// Sums values of the host in f32, while nothing else is on its way.
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
                let mut room = Room::none();
                for mut job in work {
                    let result = sum.on_host(&mut job, &mut room).map(|()| job);
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
