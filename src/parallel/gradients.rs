//! The gradients of a whole batch out of those of its parts, in one process or several.
//!
//! Within a process the parts' gradients are summed as a binary tree: `((0 + 1) + (2 + 3)) + ..`, each left sum kept until its right
//! one is there. Between processes, buckets of the last part are summed as the backward finishes them, while it goes on: on the
//! collective's own stream where it has one, which the step's recording takes in; else by a thread of the host.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use half::bf16;

use super::buckets::Bucket;
use super::collective::Collective;
use super::tree::{room_of_tree, tree_sum};
use crate::backend::{Arena, Backend, Exchange, PassOfStep, Slice};
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
        let sum = Sum { collective: Arc::clone(&collective), tree: options.share.reproducible };
        let reducer = if collective.is_queued() {
            Reducer::Queued(sum, None)
        } else if options.overlap && collective.world() > 1 {
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

    /// Whether gradients go through the collective: with one process alone where that is one of a device, so that what is recorded
    /// is the same at any number.
    fn reduces(&self) -> bool {
        self.collective.world() > 1 || self.collective.is_queued()
    }

    /// Takes up the buckets that are complete after an operation.
    fn take_up(&mut self, backend: &B, arena: &mut Arena<B>, op: usize) -> Result<()> {
        while let Some(Bucket { elements, .. }) = self.buckets.get(self.next).filter(|bucket| bucket.after <= op) {
            let elements = elements.clone();
            for left in &self.left[..levels(self.options.share.count)] {
                backend.add_to(&mut arena.gradients, left, elements.clone())?;
            }
            match &mut self.reducer {
                Reducer::Queued(sum, room) => {
                    sum.queue(backend, &mut arena.gradients, elements, room, self.options.wire)?;
                }
                Reducer::Here(..) | Reducer::Thread(_) if self.collective.world() > 1 => {
                    let mut values = self.spare.pop().unwrap_or_default();
                    values.resize(elements.len(), 0.0);
                    backend.download(&arena.gradients, elements.start, &mut values)?;
                    self.reducer.take(Piece { bucket: self.next, values, wire: self.options.wire })?;
                }
                Reducer::Here(..) | Reducer::Thread(_) => {}
            }
            self.next += 1;
        }
        Ok(())
    }

    /// Writes back the buckets that the host summed.
    fn collect(&mut self, backend: &B, arena: &mut Arena<B>) -> Result<()> {
        if self.collective.world() > 1 && !self.collective.is_queued() {
            for _ in 0..self.buckets.len() {
                let Piece { bucket, values, .. } = self.reducer.give()?;
                backend.upload(&mut arena.gradients, self.buckets[bucket].elements.start, &values)?;
                self.spare.push(values);
            }
        }
        Ok(())
    }

    /// Sums kept tensors over the parts, in f32 whatever gradients are sent as: they are kept, and small steps of theirs would be
    /// rounded away for good.
    fn sum_state(&mut self, backend: &B, arena: &mut Arena<B>) -> Result<()> {
        let len = arena.state_layout.padded_len();
        if len == 0 {
            return Ok(());
        }
        for left in &self.left_state[..levels(self.options.share.count)] {
            backend.add_to(&mut arena.state, left, 0..len)?;
        }
        match &mut self.reducer {
            Reducer::Queued(sum, room) => sum.queue(backend, &mut arena.state, 0..len, room, Wire::F32),
            Reducer::Here(..) | Reducer::Thread(_) if self.collective.world() > 1 => {
                let mut values = vec![0f32; len];
                backend.download(&arena.state, 0, &mut values)?;
                self.reducer.take(Piece { bucket: 0, values, wire: Wire::F32 })?;
                backend.upload(&mut arena.state, 0, &self.reducer.give()?.values)
            }
            Reducer::Here(..) | Reducer::Thread(_) => Ok(()),
        }
    }

    /// Makes room for sums on the device, before anything is recorded.
    fn make_room(&mut self, backend: &B, arena: &Arena<B>) -> Result<()> {
        if let Reducer::Queued(sum, room @ None) = &mut self.reducer {
            let lens = self.buckets.iter().map(|bucket| bucket.elements.len());
            let largest = lens.max().unwrap_or(0);
            let state = sum.room(arena.state_layout.padded_len(), Wire::F32);
            let [wide, narrow] = sum.room(largest, self.options.wire);
            let (wide, narrow) = (backend.allocate(wide.max(state[0]))?, backend.allocate(narrow)?);
            *room = Some(Room { wide, narrow });
        }
        Ok(())
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
        !self.reduces() || self.collective.is_queued()
    }

    fn place(&self) -> (usize, usize) {
        (self.collective.rank(), self.collective.world())
    }

    fn begin(&mut self, backend: &B, arena: &mut Arena<B>, pass: PassOfStep) -> Result<()> {
        self.make_room(backend, arena)?;
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
        if self.options.overlap { self.take_up(backend, arena, op) } else { Ok(()) }
    }

    fn end(&mut self, backend: &B, arena: &mut Arena<B>, pass: PassOfStep) -> Result<()> {
        if pass.ends_step {
            self.take_up(backend, arena, usize::MAX)?;
            self.next = 0;
            self.collect(backend, arena)?;
            self.sum_state(backend, arena)?;
            self.collective.join()?;
            // Each part moved kept tensors from the same place: they become the mean of what the parts made of them.
            let (len, parts) = (arena.state_layout.padded_len(), self.options.share.of as f32);
            return if len > 0 { backend.divide(&mut arena.state, parts, 0..len) } else { Ok(()) };
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

    fn gather(&mut self, values: Slice<'_>) -> Result<()> {
        let world = self.collective.world();
        let each = values.len() / world;
        let shards: Vec<Range<usize>> = (0..world).map(|rank| rank * each..(rank + 1) * each).collect();
        self.collective.fork()?;
        self.collective.all_gather(values, &shards)
    }

    fn join(&mut self) -> Result<()> {
        self.collective.join()
    }
}

/// A sum over processes.
struct Sum {
    collective: Arc<dyn Collective>,
    tree: bool,
}

/// Memory for what is on its way: other processes' values, and values rounded to bf16.
struct Room<B: Backend> {
    wide: B::Buffer<f32>,
    narrow: B::Buffer<bf16>,
}

impl Sum {
    /// Elements of room in f32 and in bf16 for a sum of so many values.
    fn room(&self, len: usize, wire: Wire) -> [usize; 2] {
        match wire {
            Wire::F32 if self.tree => [room_of_tree(len), 0],
            Wire::F32 => [0, 0],
            Wire::Bf16 => [0, len],
        }
    }

    fn over_processes(&self, mut values: Slice<'_>, wire: Wire, wide: Slice<'_>, mut narrow: Slice<'_>) -> Result<()> {
        let len = values.len();
        match wire {
            Wire::F32 if self.tree => tree_sum(&*self.collective, values, wide),
            Wire::F32 => self.collective.all_reduce_sum(values),
            Wire::Bf16 => {
                self.collective.convert(narrow.part(0..len)?, values.part(0..len)?)?;
                self.collective.all_reduce_sum(narrow.part(0..len)?)?;
                self.collective.convert(values, narrow.part(0..len)?)
            }
        }
    }

    /// Sums values of the host.
    fn on_host(&self, piece: &mut Piece, wide: &mut Vec<f32>, narrow: &mut Vec<bf16>) -> Result<()> {
        let [w, n] = self.room(piece.values.len(), piece.wire);
        wide.resize(w.max(wide.len()), 0.0);
        narrow.resize(n.max(narrow.len()), bf16::ZERO);
        let (wide, narrow) = (wide.as_mut_slice().into(), narrow.as_mut_slice().into());
        self.over_processes(piece.values.as_mut_slice().into(), piece.wire, wide, narrow)
    }

    /// Queues the sum of some values of the device, behind what it has queued.
    fn queue<B: Backend<Real = f32>>(
        &self,
        backend: &B,
        values: &mut B::Buffer<f32>,
        elements: Range<usize>,
        room: &mut Option<Room<B>>,
        wire: Wire,
    ) -> Result<()> {
        let Some(Room { wide, narrow }) = room else {
            return Err(Error::Training("gradients are summed in a pass that has not begun".into()));
        };
        let [w, n] = self.room(elements.len(), wire);
        self.collective.fork()?;
        let (wide, narrow) = (backend.slice(wide, 0..w)?, backend.slice(narrow, 0..n)?);
        self.over_processes(backend.slice(values, elements)?, wire, wide, narrow)
    }
}

/// Values of the host to be summed, or summed.
struct Piece {
    bucket: usize,
    values: Vec<f32>,
    wire: Wire,
}

/// Who sums over processes.
enum Reducer<B: Backend> {
    /// The caller, at once.
    Here(Sum, Vec<Piece>),
    /// A thread, while the caller goes on.
    Thread(Worker),
    /// The device, whose room is made when its first pass begins.
    Queued(Sum, Option<Room<B>>),
}

impl<B: Backend> Reducer<B> {
    /// Begins the sum of values of the host.
    fn take(&mut self, mut piece: Piece) -> Result<()> {
        match self {
            Reducer::Here(sum, done) => {
                sum.on_host(&mut piece, &mut Vec::new(), &mut Vec::new())?;
                done.push(piece);
                Ok(())
            }
            Reducer::Thread(worker) => worker.send(piece),
            Reducer::Queued(..) => Err(gone()),
        }
    }

    /// Values that were summed.
    fn give(&mut self) -> Result<Piece> {
        match self {
            Reducer::Here(_, done) => done.pop().ok_or_else(gone),
            Reducer::Thread(worker) => worker.done.recv().map_err(|_| gone())?,
            Reducer::Queued(..) => Err(gone()),
        }
    }
}

fn gone() -> Error {
    Error::Training("the thread that sums gradients over processes ended early".into())
}

/// A thread that sums buckets over processes, in the order in which they are sent to it.
struct Worker {
    /// None once it is to end.
    to: Option<Sender<Piece>>,
    done: Receiver<Result<Piece>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn start(sum: Sum) -> Result<Self> {
        let (to, work) = channel::<Piece>();
        let (finished, done) = channel();
        let thread = std::thread::Builder::new()
            .name("gradients".into())
            .spawn(move || {
                let (mut wide, mut narrow) = (Vec::new(), Vec::new());
                for mut piece in work {
                    let result = sum.on_host(&mut piece, &mut wide, &mut narrow).map(|()| piece);
                    let failed = result.is_err();
                    if finished.send(result).is_err() || failed {
                        return;
                    }
                }
            })
            .map_err(|e| Error::Training(format!("cannot start a thread that sums gradients: {e}")))?;
        Ok(Worker { to: Some(to), done, thread: Some(thread) })
    }

    fn send(&self, piece: Piece) -> Result<()> {
        match &self.to {
            Some(to) => to.send(piece).map_err(|_| gone()),
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
