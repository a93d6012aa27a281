//! The gradients of a whole batch where each process keeps those of its own elements alone, and perhaps parameters too.
//!
//! A backward leaves each bucket in a window, from where it is summed over processes, each getting the sum of its elements, and the
//! room is used again. So every pass is summed by itself: micro-batches, where the order of sums is free, are added up by the
//! process that has the element, and so are the parts of [`Share::side_by_side`](crate::plan::Share::side_by_side), in the order of
//! the tree.
//!
//! A device copies a bucket out of the window into one of [`IN_FLIGHT`] buffers in turn, and goes on; its collective's stream sums
//! it there and keeps this process's elements. Parameters are gathered there too, one gather ahead of where they are needed.

use std::ops::Range;
use std::sync::Arc;

use super::collective::Collective;
use super::gradients::{GradientsOptions, Wire, fold, levels};
use super::kept::KeptTensors;
use super::options::Shard;
use super::ranks::Ranks;
use super::reducer::{Job, Place, Queue, Reducer};
use super::sharding::Sharding;
use crate::backend::{Arena, Backend, Exchange, IN_FLIGHT, PassOfStep, Slice, Together};
use crate::error::{Error, Result};
use crate::plan::{ALIGNMENT, Gather, Window, overlap};

/// Gradients that become those of the whole batch, each process's elements in it alone.
pub struct Windowed<B: Backend> {
    options: GradientsOptions,
    ranks: Ranks,
    sharding: Sharding,
    /// The first bucket that the present pass has not taken up yet.
    next: usize,
    in_flight: usize,
    /// Whether the present pass's sums are added to those of the pass before.
    adds: bool,
    /// The sums of left halves of this process's elements, by the level of the tree.
    left: Vec<B::Buffer<f32>>,
    kept: KeptTensors<B>,
    reducer: Reducer<B>,
    /// Memory for values on their way, in the host and on a device.
    spare: Vec<Vec<f32>>,
    leaving: Vec<B::Buffer<f32>>,
}

impl<B: Backend<Real = f32>> Windowed<B> {
    /// For steps of a program that was planned so.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn new(options: GradientsOptions, collective: Arc<dyn Collective>, sharding: &Sharding) -> Result<Self> {
        // Parameters are gathered between buckets, and all processes must do both in one order: so the caller does both.
        let overlap = options.overlap && sharding.options.shard < Shard::Parameters;
        let options = GradientsOptions { overlap, ..options };
        Ok(Windowed {
            reducer: Reducer::new(&options, Arc::clone(&collective))?,
            ranks: Ranks::new(collective, sharding),
            sharding: sharding.clone(),
            options,
            next: 0,
            in_flight: 0,
            adds: false,
            left: Vec::new(),
            kept: KeptTensors::default(),
            spare: Vec::new(),
            leaving: Vec::new(),
        })
    }

    /// Takes up the buckets that are complete after an operation.
    fn take_up(&mut self, backend: &B, arena: &mut Arena<B>, op: usize) -> Result<()> {
        while let Some(bucket) = self.sharding.buckets.get(self.next).filter(|bucket| bucket.after <= op) {
            let elements = bucket.elements.clone();
            if let Reducer::Queued(queue) = &mut self.reducer {
                let turn = self.next % IN_FLIGHT;
                // What left in this buffer before has arrived.
                if self.next >= IN_FLIGHT {
                    self.ranks.collective.join_mark(turn)?;
                }
                copy_out(backend, arena, &self.sharding.ranges, &elements, &mut self.leaving[turn])?;
                let bucket = Leaving { buffer: &mut self.leaving[turn], elements, wire: self.options.wire };
                bucket.sum_and_keep(backend, arena, (queue, &self.ranks), self.adds)?;
                self.ranks.collective.mark(turn)?;
                self.next += 1;
                continue;
            }
            while self.in_flight >= IN_FLIGHT {
                self.store_one(backend, arena)?;
            }
            let mut values = self.spare.pop().unwrap_or_default();
            values.clear();
            // What lies between tensors is 0.
            values.resize(elements.len(), 0.0);
            for (tensor, range) in self.sharding.ranges.iter().enumerate() {
                if elements.contains(&range.start) && !range.is_empty() {
                    let place = place(arena, tensor)?;
                    let at = range.start - elements.start;
                    backend.download(&arena.gradients, place.start, &mut values[at..at + range.len()])?;
                }
            }
            let shards = self.ranks.shards_of(&elements);
            self.reducer.take(Job { bucket: self.next, values, shards, wire: self.options.wire })?;
            self.in_flight += 1;
            self.next += 1;
        }
        Ok(())
    }

    /// Keeps this process's elements of a bucket that was summed.
    fn store_one(&mut self, backend: &B, arena: &mut Arena<B>) -> Result<()> {
        let Job { bucket, mut values, .. } = self.reducer.give()?;
        self.in_flight -= 1;
        let (own, elements) = (self.ranks.own(), &self.sharding.buckets[bucket].elements);
        let common = overlap(elements, &own);
        let summed = &mut values[common.start - elements.start..common.end - elements.start];
        if !summed.is_empty() {
            let gradients = own_gradients(arena)?;
            if self.adds {
                let mut before = vec![0f32; summed.len()];
                backend.download(gradients, common.start - own.start, &mut before)?;
                summed.iter_mut().zip(before).for_each(|(value, before)| *value += before);
            }
            backend.upload(gradients, common.start - own.start, summed)?;
        }
        self.spare.push(values);
        Ok(())
    }

    /// Begins to bring tensors into the window of parameters; in the host's memory they are there then.
    fn gather(&mut self, backend: &B, arena: &mut Arena<B>, gather: &Gather) -> Result<()> {
        let Arena { held: Some(held), parameters, stored, ranges, .. } = arena else { return Err(not_windowed()) };
        match (&mut held.stored, &mut held.parameters) {
            (Some(own), _) => self.ranks.bring_queued(backend, (own, stored), ranges, gather),
            (None, Some(own)) if self.ranks.collective.is_queued() => {
                self.ranks.bring_queued(backend, (own, parameters), ranges, gather)
            }
            (None, Some(own)) => self.ranks.bring(backend, (own, parameters), ranges, gather),
            (None, None) => Err(not_windowed()),
        }
    }

    /// Whether the sums over processes are taken in this pass.
    fn sums(&self, pass: PassOfStep) -> bool {
        pass.last || !self.sharding.options.adds_up
    }
}

/// A bucket on a device, copied out of the window.
struct Leaving<'a, B: Backend> {
    buffer: &'a mut B::Buffer<f32>,
    elements: Range<usize>,
    wire: Wire,
}

impl<B: Backend<Real = f32>> Leaving<'_, B> {
    /// Queues its sum over processes, and that this process's elements are kept, or added to what is.
    fn sum_and_keep(
        self,
        backend: &B,
        arena: &mut Arena<B>,
        (queue, ranks): (&mut Queue<B>, &Ranks),
        adds: bool,
    ) -> Result<()> {
        let Leaving { buffer, elements, wire } = self;
        let place = Place { elements: 0..elements.len(), shards: ranks.shards_of(&elements) };
        queue.sum(backend, buffer, place, wire)?;
        let (own, common) = (ranks.own(), overlap(&elements, &ranks.own()));
        if common.is_empty() {
            return Ok(());
        }
        let to = backend.slice(own_gradients(arena)?, common.start - own.start..common.end - own.start)?;
        let summed = backend.slice(buffer, common.start - elements.start..common.end - elements.start)?;
        if adds { ranks.collective.add(to, summed) } else { ranks.collective.copy(to, summed) }
    }
}

/// Copies a bucket out of the window, on the device; what lies between tensors becomes 0.
fn copy_out<B: Backend<Real = f32>>(
    backend: &B,
    arena: &Arena<B>,
    ranges: &[Range<usize>],
    elements: &Range<usize>,
    to: &mut B::Buffer<f32>,
) -> Result<()> {
    for (tensor, range) in ranges.iter().enumerate() {
        if !elements.contains(&range.start) || range.is_empty() {
            continue;
        }
        let (start, end) = (range.start - elements.start, range.end - elements.start);
        backend.copy_part(to, start, &arena.gradients, place(arena, tensor)?)?;
        let gap = end..end.next_multiple_of(ALIGNMENT).min(elements.len());
        if !gap.is_empty() {
            backend.clear(to, gap)?;
        }
    }
    Ok(())
}

/// Where a parameter's gradient stands in the window.
fn place<B: Backend>(arena: &Arena<B>, tensor: usize) -> Result<Range<usize>> {
    let place = arena.held.as_ref().and_then(|held| held.gradient_places.get(tensor));
    place.cloned().ok_or_else(not_windowed)
}

/// The gradients of this process's elements.
fn own_gradients<B: Backend>(arena: &mut Arena<B>) -> Result<&mut B::Buffer<B::Real>> {
    arena.held.as_mut().and_then(|held| held.gradients.as_mut()).ok_or_else(not_windowed)
}

fn not_windowed() -> Error {
    Error::shape("gradients", "an arena with windows", "one that is kept whole")
}

impl<B: Backend<Real = f32>> Exchange<B> for Windowed<B> {
    fn is_queued(&self) -> bool {
        self.ranks.collective.is_queued()
    }

    fn follows(&self, pass: PassOfStep) -> bool {
        self.sums(pass)
    }

    fn overwrites(&self) -> bool {
        !self.sharding.options.adds_up
    }

    fn bring(&mut self, backend: &B, arena: &mut Arena<B>, window: &Window, op: usize) -> Result<()> {
        for number in window.before(op) {
            self.gather(backend, arena, &window.gathers[number])?;
            self.ranks.collective.mark(IN_FLIGHT + number % IN_FLIGHT)?;
        }
        for number in window.needed(op) {
            self.ranks.collective.join_mark(IN_FLIGHT + number % IN_FLIGHT)?;
            let held = arena.held.as_mut().ok_or_else(not_windowed)?;
            for (tensor, place) in &window.gathers[number].tensors {
                held.parameter_places[*tensor] = place.clone();
            }
        }
        Ok(())
    }

    fn begin(&mut self, backend: &B, arena: &mut Arena<B>, pass: PassOfStep) -> Result<()> {
        self.adds = !pass.first && self.overwrites();
        // Room on the device is made before anything is recorded.
        if let Reducer::Queued(queue) = &mut self.reducer {
            let buckets = &self.sharding.buckets;
            let places = buckets.iter().map(|bucket| Place::of_bucket(bucket, self.ranks.shards()));
            queue.make_room(backend, places, self.options.wire, arena.state_layout.padded_len())?;
            if self.leaving.is_empty() {
                let longest = buckets.iter().map(|bucket| bucket.elements.len()).max().unwrap_or(0);
                self.leaving = (0..IN_FLIGHT).map(|_| backend.allocate(longest)).collect::<Result<_>>()?;
            }
        }
        self.kept.begin(backend, arena, pass)
    }

    fn after_op(&mut self, backend: &B, arena: &mut Arena<B>, op: usize) -> Result<()> {
        self.take_up(backend, arena, op)
    }

    fn end(&mut self, backend: &B, arena: &mut Arena<B>, pass: PassOfStep) -> Result<()> {
        if self.sums(pass) {
            self.take_up(backend, arena, usize::MAX)?;
            while self.in_flight > 0 {
                self.store_one(backend, arena)?;
            }
            self.next = 0;
            self.ranks.collective.join()?;
        }
        if !pass.last {
            return Ok(());
        }
        self.kept.sum(backend, arena, &mut self.reducer)?;
        self.ranks.collective.join()?;
        let own = 0..self.ranks.own().len();
        if pass.ends_step {
            let gradients = own_gradients(arena)?;
            for left in &self.left[..levels(self.options.share.count)] {
                backend.add_to(gradients, left, own.clone())?;
            }
            self.kept.add_left(backend, arena, self.options.share.count)?;
            return self.kept.divide(backend, arena, self.options.share.of);
        }
        fold(backend, &mut self.left, own_gradients(arena)?, own, pass.part)?;
        self.kept.fold(backend, arena, pass)
    }

    fn spread(&mut self, backend: &B, arena: &mut Arena<B>) -> Result<()> {
        if self.sharding.options.shard == Shard::Parameters {
            return Ok(());
        }
        let most = self.sharding.options.bucket;
        self.ranks.spread(backend, arena, most)
    }
}

impl<B: Backend> Together for Windowed<B> {
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
