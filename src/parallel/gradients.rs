//! The gradients of a whole batch out of those of its parts, in one process or several.
//!
//! Within a process the parts' gradients are summed as a binary tree: `((0 + 1) + (2 + 3)) + ..`, each left sum kept until its right
//! one is there. Between processes, buckets of the last part are summed as the backward finishes them, by a thread of their own
//! where the collective is one of the host, while the backward goes on.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use half::bf16;

use super::buckets::Bucket;
use super::collective::Collective;
use super::tree::tree_sum;
use crate::backend::{Arena, Backend, Exchange, PassOfStep};
use crate::error::{Error, Result};
use crate::plan::Share;

/// What gradients are sent as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// f32.
    #[default]
    F32,
    /// Rounded to bf16, half as many bytes.
    Bf16,
}

/// How gradients are exchanged.
#[derive(Clone, Debug, PartialEq)]
pub struct GradientsOptions {
    /// This process's share of batches.
    pub share: Share,
    /// What gradients are sent as.
    pub wire: Wire,
    /// Whether buckets are summed while the backward goes on.
    pub overlap: bool,
}

/// Gradients that become those of the whole batch.
pub struct Gradients<B: Backend> {
    options: GradientsOptions,
    collective: Arc<dyn Collective>,
    buckets: Vec<Bucket>,
    /// The first bucket that the present step has not taken up yet.
    next: usize,
    /// The gradients' sums of left halves, by the level of the tree.
    left: Vec<B::Buffer<f32>>,
    /// Kept tensors: as they were when the step began, and sums of left halves.
    before: Option<B::Buffer<f32>>,
    left_state: Vec<B::Buffer<f32>>,
    reducer: Reducer,
    /// Memory for values on their way.
    spare: Vec<Vec<f32>>,
}

impl<B: Backend<Real = f32>> Gradients<B> {
    /// For steps whose backward finishes `buckets`, with `collective`'s processes.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn new(options: GradientsOptions, collective: Arc<dyn Collective>, buckets: Vec<Bucket>) -> Result<Self> {
        let sum = Sum { collective: Arc::clone(&collective), tree: options.share.reproducible, wire: options.wire };
        let reducer = if options.overlap && collective.world() > 1 {
            Reducer::Thread(Worker::start(sum)?)
        } else {
            Reducer::Here(sum, Vec::new())
        };
        Ok(Gradients {
            options,
            collective,
            buckets,
            next: 0,
            left: Vec::new(),
            before: None,
            left_state: Vec::new(),
            reducer,
            spare: Vec::new(),
        })
    }

    /// Takes up the buckets that are complete after an operation.
    fn take_up(&mut self, backend: &B, arena: &mut Arena<B>, op: usize) -> Result<()> {
        while let Some(Bucket { elements, .. }) = self.buckets.get(self.next).filter(|bucket| bucket.after <= op) {
            let elements = elements.clone();
            for left in &self.left[..levels(self.options.share.count)] {
                backend.add_to(&mut arena.gradients, left, elements.clone())?;
            }
            if self.collective.world() > 1 {
                let mut values = self.spare.pop().unwrap_or_default();
                values.resize(elements.len(), 0.0);
                backend.download(&arena.gradients, elements.start, &mut values)?;
                self.reducer.take(self.next, values)?;
            }
            self.next += 1;
        }
        Ok(())
    }

    /// Writes back the buckets that were summed.
    fn collect(&mut self, backend: &B, arena: &mut Arena<B>) -> Result<()> {
        if self.collective.world() > 1 {
            for _ in 0..self.buckets.len() {
                let (bucket, values) = self.reducer.give()?;
                backend.upload(&mut arena.gradients, self.buckets[bucket].elements.start, &values)?;
                self.spare.push(values);
            }
        }
        Ok(())
    }

    /// Makes kept tensors, which each part moved from the same place, the mean of what the parts made of them.
    fn mean_state(&mut self, backend: &B, arena: &mut Arena<B>) -> Result<()> {
        let len = arena.state_layout.padded_len();
        if len == 0 {
            return Ok(());
        }
        for left in &self.left_state[..levels(self.options.share.count)] {
            backend.add_to(&mut arena.state, left, 0..len)?;
        }
        let mut values = vec![0f32; len];
        backend.download(&arena.state, 0, &mut values)?;
        if self.collective.world() > 1 {
            self.reducer.sum(&mut values)?;
        }
        let parts = self.options.share.of as f32;
        values.iter_mut().for_each(|value| *value /= parts);
        backend.upload(&mut arena.state, 0, &values)
    }
}

/// Levels of a tree of so many leaves, a power of two.
fn levels(leaves: usize) -> usize {
    leaves.trailing_zeros() as usize
}

/// Adds what stands on the left of part `part` to `sum`, level by level, and keeps the result for its right.
fn fold<B: Backend<Real = f32>>(
    backend: &B,
    left: &mut Vec<B::Buffer<f32>>,
    sum: &mut B::Buffer<f32>,
    elements: Range<usize>,
    part: usize,
) -> Result<()> {
    let done = part.trailing_ones() as usize;
    for left in &left[..done] {
        backend.add_to(sum, left, elements.clone())?;
    }
    if left.len() == done {
        left.push(backend.allocate(elements.end)?);
    }
    backend.copy_to(&mut left[done], sum, elements)
}

impl<B: Backend<Real = f32>> Exchange<B> for Gradients<B> {
    fn is_queued(&self) -> bool {
        false
    }

    fn begin(&mut self, backend: &B, arena: &mut Arena<B>, pass: PassOfStep) -> Result<()> {
        let len = arena.state_layout.padded_len();
        if !pass.first || len == 0 {
            return Ok(());
        }
        let before = match &mut self.before {
            Some(before) => before,
            none => none.insert(backend.allocate(len)?),
        };
        match pass.part {
            0 => backend.copy_to(before, &arena.state, 0..len),
            _ => backend.copy_to(&mut arena.state, before, 0..len),
        }
    }

    fn after_op(&mut self, backend: &B, arena: &mut Arena<B>, op: usize) -> Result<()> {
        self.take_up(backend, arena, op)
    }

    fn end(&mut self, backend: &B, arena: &mut Arena<B>, pass: PassOfStep) -> Result<()> {
        if pass.ends_step {
            self.take_up(backend, arena, usize::MAX)?;
            self.collect(backend, arena)?;
            self.next = 0;
            return self.mean_state(backend, arena);
        }
        if pass.last {
            let len = arena.layout.padded_len();
            fold(backend, &mut self.left, &mut arena.gradients, 0..len, pass.part)?;
            let len = arena.state_layout.padded_len();
            if len > 0 {
                fold(backend, &mut self.left_state, &mut arena.state, 0..len, pass.part)?;
            }
        }
        Ok(())
    }

    fn gather(&mut self, _: &B, of_this: &[f64]) -> Result<Vec<f64>> {
        let (rank, world, len) = (self.collective.rank(), self.collective.world(), of_this.len());
        let mut all = vec![0f64; world * len];
        all[rank * len..(rank + 1) * len].copy_from_slice(of_this);
        let shards: Vec<Range<usize>> = (0..world).map(|r| r * len..(r + 1) * len).collect();
        self.collective.all_gather(all.as_mut_slice().into(), &shards)?;
        Ok(all)
    }
}

/// A sum over processes.
struct Sum {
    collective: Arc<dyn Collective>,
    tree: bool,
    wire: Wire,
}

impl Sum {
    fn over_processes(&self, values: &mut [f32], room: &mut Vec<f32>) -> Result<()> {
        if self.tree {
            return tree_sum(&*self.collective, values, room);
        }
        match self.wire {
            Wire::F32 => self.collective.all_reduce_sum(values.into()),
            Wire::Bf16 => {
                let mut rounded: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
                self.collective.all_reduce_sum(rounded.as_mut_slice().into())?;
                values.iter_mut().zip(rounded).for_each(|(value, sum)| *value = sum.to_f32());
                Ok(())
            }
        }
    }
}

/// Who sums buckets over processes.
enum Reducer {
    /// The caller, at once.
    Here(Sum, Vec<(usize, Vec<f32>)>),
    /// A thread, while the caller goes on.
    Thread(Worker),
}

impl Reducer {
    /// Begins the sum of a bucket.
    fn take(&mut self, bucket: usize, mut values: Vec<f32>) -> Result<()> {
        match self {
            Reducer::Here(sum, done) => {
                sum.over_processes(&mut values, &mut Vec::new())?;
                done.push((bucket, values));
                Ok(())
            }
            Reducer::Thread(worker) => worker.send(bucket, values),
        }
    }

    /// A bucket that was summed.
    fn give(&mut self) -> Result<(usize, Vec<f32>)> {
        match self {
            Reducer::Here(_, done) => done.pop().ok_or_else(gone),
            Reducer::Thread(worker) => worker.done.recv().map_err(|_| gone())?,
        }
    }

    /// Sums values while nothing else is on its way.
    fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        match self {
            Reducer::Here(sum, _) => sum.over_processes(values, &mut Vec::new()),
            Reducer::Thread(worker) => {
                worker.send(0, values.to_vec())?;
                let (_, sums) = worker.done.recv().map_err(|_| gone())??;
                values.copy_from_slice(&sums);
                Ok(())
            }
        }
    }
}

fn gone() -> Error {
    Error::Training("the thread that sums gradients over processes ended early".into())
}

/// A thread that sums buckets over processes, in the order in which they are sent to it.
struct Worker {
    /// None once it is to end.
    to: Option<Sender<(usize, Vec<f32>)>>,
    done: Receiver<Result<(usize, Vec<f32>)>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn start(sum: Sum) -> Result<Self> {
        let (to, work) = channel::<(usize, Vec<f32>)>();
        let (finished, done) = channel();
        let thread = std::thread::Builder::new()
            .name("gradients".into())
            .spawn(move || {
                let mut room = Vec::new();
                for (bucket, mut values) in work {
                    let result = sum.over_processes(&mut values, &mut room).map(|()| (bucket, values));
                    let failed = result.is_err();
                    if finished.send(result).is_err() || failed {
                        return;
                    }
                }
            })
            .map_err(|e| Error::Training(format!("cannot start a thread that sums gradients: {e}")))?;
        Ok(Worker { to: Some(to), done, thread: Some(thread) })
    }

    fn send(&self, bucket: usize, values: Vec<f32>) -> Result<()> {
        match &self.to {
            Some(to) => to.send((bucket, values)).map_err(|_| gone()),
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
