//! The gradients of a whole batch out of those of its parts, in one process or several.
//!
//! Within a process the parts' gradients are summed as a binary tree: `((0 + 1) + (2 + 3)) + ..`, each left sum kept until its right
//! one is there. Between processes, buckets of the last part are summed as the backward finishes them, while it goes on: on the
//! collective's own stream where it has one, which the step's recording takes in; else by a thread of the host.

use std::ops::Range;
use std::sync::Arc;

use super::buckets::Bucket;
use super::collective::Collective;
use super::kept::KeptTensors;
use super::ranks::Ranks;
use super::reducer::{Job, Place, Reducer};
use super::sharding::Sharding;
use crate::backend::{Arena, Backend, Exchange, PassOfStep, Slice, Together};
use crate::error::Result;
use crate::plan::{Share, overlap};

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
    ranks: Ranks,
    buckets: Vec<Bucket>,
    /// The first bucket that the present step has not taken up yet.
    next: usize,
    /// The gradients' sums of left halves, by the level of the tree.
    left: Vec<B::Buffer<f32>>,
    kept: KeptTensors<B>,
    reducer: Reducer<B>,
    /// Memory for values on their way.
    spare: Vec<Vec<f32>>,
}

impl<B: Backend<Real = f32>> Gradients<B> {
    /// For steps whose backward finishes `buckets`, with `collective`'s processes.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn new(options: GradientsOptions, collective: Arc<dyn Collective>, buckets: Vec<Bucket>) -> Result<Self> {
        Self::with(options, Ranks::all_alike(collective), buckets)
    }

    /// As [`Gradients::new`], where each process updates its own elements alone: of gradients it gets the sums of these, and it gives
    /// the parameters that it updated to all.
    ///
    /// # Errors
    /// As [`Gradients::new`].
    pub fn sharded(options: GradientsOptions, collective: Arc<dyn Collective>, sharding: &Sharding) -> Result<Self> {
        Self::with(options, Ranks::new(collective, sharding), sharding.buckets.clone())
    }

    fn with(options: GradientsOptions, ranks: Ranks, buckets: Vec<Bucket>) -> Result<Self> {
        let reducer = Reducer::new(&options, Arc::clone(&ranks.collective))?;
        Ok(Gradients {
            options,
            ranks,
            buckets,
            next: 0,
            left: Vec::new(),
            kept: KeptTensors::default(),
            reducer,
            spare: Vec::new(),
        })
    }

    /// Whether gradients go through the collective: with one process alone where that is one of a device, so that what is recorded
    /// is the same at any number.
    fn reduces(&self) -> bool {
        self.ranks.world() > 1 || self.ranks.collective.is_queued()
    }

    /// Takes up the buckets that are complete after an operation.
    fn take_up(&mut self, backend: &B, arena: &mut Arena<B>, op: usize) -> Result<()> {
        while let Some(Bucket { elements, .. }) = self.buckets.get(self.next).filter(|bucket| bucket.after <= op) {
            let elements = elements.clone();
            for left in &self.left[..levels(self.options.share.count)] {
                backend.add_to(&mut arena.gradients, left, elements.clone())?;
            }
            if let Reducer::Queued(queue) = &mut self.reducer {
                let shards = self.ranks.shards_of(&elements);
                queue.sum(backend, &mut arena.gradients, Place { elements, shards }, self.options.wire)?;
            } else if self.ranks.world() > 1 {
                let mut values = self.spare.pop().unwrap_or_default();
                values.resize(elements.len(), 0.0);
                backend.download(&arena.gradients, elements.start, &mut values)?;
                let shards = self.ranks.shards_of(&elements);
                self.reducer.take(Job { bucket: self.next, values, shards, wire: self.options.wire })?;
            }
            self.next += 1;
        }
        Ok(())
    }

    /// Writes back the buckets that the host summed.
    fn collect(&mut self, backend: &B, arena: &mut Arena<B>) -> Result<()> {
        if self.ranks.world() > 1 && !self.ranks.collective.is_queued() {
            for _ in 0..self.buckets.len() {
                let Job { bucket, values, .. } = self.reducer.give()?;
                let elements = &self.buckets[bucket].elements;
                let own = overlap(elements, &self.ranks.own());
                let summed = &values[own.start - elements.start..own.end - elements.start];
                backend.upload(&mut arena.gradients, own.start, summed)?;
                self.spare.push(values);
            }
        }
        Ok(())
    }
}

/// Levels of a tree of so many leaves, a power of two.
pub(super) fn levels(leaves: usize) -> usize {
    leaves.trailing_zeros() as usize
}

/// Adds what stands on the left of part `part` to `sum`, level by level, and keeps the result for its right.
pub(super) fn fold<B: Backend<Real = f32>>(
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
        !self.reduces() || self.ranks.collective.is_queued()
    }

    fn begin(&mut self, backend: &B, arena: &mut Arena<B>, pass: PassOfStep) -> Result<()> {
        // Room on the device is made before anything is recorded.
        if let Reducer::Queued(queue) = &mut self.reducer {
            let places = self.buckets.iter().map(|bucket| Place::of_bucket(bucket, self.ranks.shards()));
            queue.make_room(backend, places, self.options.wire, arena.state_layout.padded_len())?;
        }
        self.kept.begin(backend, arena, pass)
    }

    fn after_op(&mut self, backend: &B, arena: &mut Arena<B>, op: usize) -> Result<()> {
        if self.options.overlap { self.take_up(backend, arena, op) } else { Ok(()) }
    }

    fn end(&mut self, backend: &B, arena: &mut Arena<B>, pass: PassOfStep) -> Result<()> {
        if pass.ends_step {
            self.take_up(backend, arena, usize::MAX)?;
            self.next = 0;
            self.collect(backend, arena)?;
            self.kept.add_left(backend, arena, self.options.share.count)?;
            if self.reduces() {
                self.kept.sum(backend, arena, &mut self.reducer)?;
            }
            self.ranks.collective.join()?;
            return self.kept.divide(backend, arena, self.options.share.of);
        }
        if pass.last {
            let len = arena.layout.padded_len();
            fold(backend, &mut self.left, &mut arena.gradients, 0..len, pass.part)?;
            self.kept.fold(backend, arena, pass)?;
        }
        Ok(())
    }

    fn spread(&mut self, backend: &B, arena: &mut Arena<B>) -> Result<()> {
        let most = self.buckets.iter().map(|bucket| bucket.elements.len()).max().unwrap_or(0);
        self.ranks.spread(backend, arena, most)
    }
}

impl<B: Backend> Together for Gradients<B> {
    fn place(&self) -> (usize, usize) {
        self.ranks.place()
    }

    fn pieces(&mut self, of_this: &[f64]) -> Result<Vec<f64>> {
        self.ranks.pieces(of_this)
    }

    fn processes(&mut self, of_this: f64) -> Result<Vec<f64>> {
        self.ranks.gather(&[of_this])
    }

    fn gather_pieces(&mut self, values: Slice<'_>) -> Result<()> {
        self.ranks.gather_pieces(values)
    }

    fn gather(&mut self, values: Slice<'_>) -> Result<()> {
        self.ranks.gather_slice(values)
    }

    fn join(&mut self) -> Result<()> {
        self.ranks.collective.join()
    }
}
