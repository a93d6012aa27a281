//! Whole steps of several devices: one graph launch a pass, sums beside the backward.

use std::ops::Range;
use std::sync::{Arc, Barrier, Mutex, PoisonError};

use half::bf16;
use warpstep::backend::Slice;
use warpstep::backend::cuda::{Cuda, Device, Storage};
use warpstep::data::{Batch, Inputs, Targets};
use warpstep::model::presets::{Fit, Goal, GptOptions, ModelOptions, Preset};
use warpstep::model::{Input, Model};
use warpstep::optim::{Clip, NormClip, OptimizerOptions, Rule};
use warpstep::parallel::{Collective, Gradients, GradientsOptions, Nccl, Wire, buckets};
use warpstep::plan::Share;
use warpstep::train::step::{StepReport, Trainer, TrainerParts};

use crate::emulator::Emulator;
use crate::{ALONE, device, is_there, together};

const TOKENS: usize = 11;
pub const TIME: usize = 8;
pub const PART: usize = 2;
/// Elements of a bucket.
pub const BUCKET: usize = 1000;

/// A part of a batch.
fn batch(step: usize, part: usize) -> Batch {
    let token = |i: usize| ((i * 7 + step * 3 + part * 5 + i * i) % TOKENS) as i32;
    let tokens = |shift: usize| (0..PART * TIME).map(|i| token(i + shift)).collect();
    Batch { inputs: Inputs::Tokens(tokens(0)), targets: Targets::Index(tokens(1)), samples: PART }
}

/// A small GPT with dropout.
pub fn gpt<S: Storage>() -> Model<Cuda<S>> {
    let options = GptOptions { layers: 1, heads: 2, width: 16, dropout: 0.1, ..GptOptions::default() };
    let fit =
        Fit { vocabulary: Some(TOKENS), context: Some(TIME), goal: Goal::NextToken, padding: None, outputs: TOKENS };
    let model = ModelOptions { preset: Preset::Gpt(options), loss: None, label_smoothing: 0.0 };
    model.build(&fit).unwrap()
}

pub fn adam() -> OptimizerOptions {
    OptimizerOptions {
        clip: Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } },
        ..OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.99], epsilon: 1e-8 }, 0.01)
    }
}

/// What a trainer is made of.
pub fn parts<'a, S: Storage>(device: &Arc<Device>, optimizer: &'a OptimizerOptions) -> TrainerParts<'a, Cuda<S>> {
    TrainerParts {
        backend: Cuda::<S>::new(device.clone()),
        model: gpt(),
        input: Input::Tokens(TIME),
        batch_size: PART,
        accumulate: 1,
        optimizer,
        ema: None,
        seed: 5,
    }
}

/// A trainer of one of several processes.
pub fn trainer<S: Storage>(
    device: &Arc<Device>,
    collective: Arc<dyn Collective>,
    share: Share,
    wire: Wire,
) -> Trainer<Cuda<S>> {
    trainer_by(&adam(), device, collective, share, wire)
}

/// As [`trainer`], by any rule and clip.
pub fn trainer_by<S: Storage>(
    optimizer: &OptimizerOptions,
    device: &Arc<Device>,
    collective: Arc<dyn Collective>,
    share: Share,
    wire: Wire,
) -> Trainer<Cuda<S>> {
    let trainer = Trainer::new(parts(device, optimizer)).unwrap();
    let arena = trainer.arena();
    let buckets = buckets(&trainer.program().ops, &arena.ranges, &arena.layout, BUCKET).unwrap();
    assert!(buckets.len() > 2, "{buckets:?}");
    let options = GradientsOptions { share, wire, overlap: true };
    let gradients = Gradients::new(options, collective, buckets).unwrap();
    trainer.sharing(share, Box::new(gradients))
}

/// Takes so many steps with two in flight, and gives what they found as it comes.
pub fn pipelined<S: Storage>(trainer: &mut Trainer<Cuda<S>>, share: Share, steps: Range<usize>) -> Vec<StepReport> {
    let mut reports = Vec::new();
    for step in steps {
        for turn in 0..share.count {
            let batch = batch(step, share.first + turn * share.stride);
            trainer.queue(&batch, (turn + 1 == share.count).then_some(0.01)).unwrap();
        }
        reports.extend(trainer.finished(false).unwrap());
    }
    while let Some(report) = trainer.finished(true).unwrap() {
        reports.push(report);
    }
    reports
}

#[test]
fn a_step_of_several_processes_is_one_graph_launch_a_pass_without_waiting_or_allocating() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (reproducible, wire) in [(false, Wire::F32), (false, Wire::Bf16), (true, Wire::F32)] {
        let shares = |rank, world| {
            if reproducible { Share::reproducible(rank, world, 4).unwrap() } else { Share::of_rank(rank, world) }
        };
        is_one_graph_launch_a_pass(shares, |nccl, device, share| trainer::<bf16>(device, Arc::new(nccl), share, wire));
    }
}

/// Counts what the host does in steps of two processes.
pub fn is_one_graph_launch_a_pass<S: Storage>(
    shares: impl Fn(usize, usize) -> Share + Sync,
    make: impl Fn(Nccl, &Arc<Device>, Share) -> Trainer<Cuda<S>> + Sync,
) {
    let Some(emulator) = Emulator::find() else { return };
    let (world, warm, steps) = (2, 4, 5);
    let met = Barrier::new(world);
    together(world, |nccl, device| {
        let share = shares(nccl.rank(), world);
        let first = nccl.rank() == 0;
        let mut trainer = make(nccl, &device, share);
        // Both slots of each pass: once as they are, then recorded.
        pipelined(&mut trainer, share, 0..warm);
        met.wait();
        if first {
            emulator.reset();
        }
        met.wait();
        let found = pipelined(&mut trainer, share, warm..warm + steps);
        assert!(found.len() == steps && found.iter().all(|report| report.samples == (share.of * PART) as u64));
        met.wait();
        if first {
            let host = emulator.host();
            let launches = (world * steps * share.count) as u64;
            assert_eq!((host.graph_launches, host.launches), (launches, 0), "{host:?}");
            assert_eq!((host.allocations, host.frees, host.host_allocations), (0, 0, 0), "{host:?}");
            assert_eq!(host.synchronizations, 0, "{host:?}");
        }
        met.wait();
    });
}

/// What a collective was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Sum,
    Gather,
    Join,
    Mark(usize),
    JoinMark(usize),
}

/// A collective that notes what it is asked for, and how many kernels have run then.
pub struct Observed {
    nccl: Nccl,
    kernels: Box<dyn Fn() -> u64 + Send + Sync>,
    asked: Mutex<Vec<(Asked, u64)>>,
}

impl Observed {
    /// A device alone, on which kernels are counted.
    pub fn new(device: &Arc<Device>, emulator: Emulator) -> Self {
        let nccl = Nccl::join(device, &Nccl::unique_id().unwrap(), 0, 1).unwrap();
        let kernels = Box::new(move || emulator.kernels().iter().map(|(_, counts)| counts.launches).sum());
        Observed { nccl, kernels, asked: Mutex::default() }
    }

    fn note(&self, asked: Asked) {
        self.asked.lock().unwrap().push((asked, (self.kernels)()));
    }

    /// How many kernels had run each time that it was asked for this.
    pub fn times(&self, wanted: impl Fn(Asked) -> bool) -> Vec<u64> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|(asked, _)| wanted(*asked)).map(|(_, kernels)| *kernels).collect()
    }
}

impl Collective for Observed {
    fn name(&self) -> &'static str {
        self.nccl.name()
    }
    fn rank(&self) -> usize {
        self.nccl.rank()
    }
    fn world(&self) -> usize {
        self.nccl.world()
    }
    fn is_queued(&self) -> bool {
        true
    }
    fn all_reduce_sum(&self, values: Slice<'_>) -> warpstep::Result<()> {
        self.note(Asked::Sum);
        self.nccl.all_reduce_sum(values)
    }
    fn reduce_scatter_sum(&self, values: Slice<'_>, shards: &[Range<usize>]) -> warpstep::Result<()> {
        self.note(Asked::Sum);
        self.nccl.reduce_scatter_sum(values, shards)
    }
    fn all_gather(&self, values: Slice<'_>, shards: &[Range<usize>]) -> warpstep::Result<()> {
        self.note(Asked::Gather);
        self.nccl.all_gather(values, shards)
    }
    fn broadcast(&self, values: Slice<'_>, root: usize) -> warpstep::Result<()> {
        self.nccl.broadcast(values, root)
    }
    fn swap(&self, partner: usize, send: Slice<'_>, receive: Slice<'_>) -> warpstep::Result<()> {
        self.nccl.swap(partner, send, receive)
    }
    fn barrier(&self) -> warpstep::Result<()> {
        self.nccl.barrier()
    }
    fn copy(&self, to: Slice<'_>, from: Slice<'_>) -> warpstep::Result<()> {
        self.nccl.copy(to, from)
    }
    fn fork(&self) -> warpstep::Result<()> {
        self.nccl.fork()
    }
    fn join(&self) -> warpstep::Result<()> {
        self.note(Asked::Join);
        self.nccl.join()
    }
    fn mark(&self, number: usize) -> warpstep::Result<()> {
        self.note(Asked::Mark(number));
        self.nccl.mark(number)
    }
    fn join_mark(&self, number: usize) -> warpstep::Result<()> {
        self.note(Asked::JoinMark(number));
        self.nccl.join_mark(number)
    }
}

#[test]
fn buckets_are_summed_while_the_backward_goes_on() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(emulator) = Emulator::find() else { return };
    let device = device(0);
    let observed = Arc::new(Observed::new(&device, emulator));
    let share = Share::default();
    let mut trainer = trainer::<f32>(&device, observed.clone(), share, Wire::F32);
    // Not recorded yet, so that what is queued runs, and is counted, in the order in which it is queued.
    trainer.step(&[batch(0, 0)], 0.01).unwrap();
    let (sums, joins) = (observed.times(|asked| asked == Asked::Sum), observed.times(|asked| asked == Asked::Join));
    assert!(sums.len() > 2 && sums.is_sorted(), "{sums:?}");
    assert!(sums[0] + 5 < joins[0] && sums[1] < joins[0], "sums at {sums:?}, joined at {joins:?} kernels");
}
