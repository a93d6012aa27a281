//! What devices do together by NCCL, as a program that uses the library sees it: each collective against its definition, whole
//! steps as one graph launch with sums beside the backward, and a wait that another thread ends.
//!
//! A thread stands for a process, with an emulated device of its own.

#[path = "common/emulator.rs"]
mod emulator;

use std::ops::Range;
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use emulator::Emulator;
use half::{bf16, f16};
use warpstep::backend::cuda::{Cuda, Device, DeviceOptions, Storage, emulated, is_embedded};
use warpstep::backend::{Backend, HostSlice, Numeric, Slice};
use warpstep::data::{Batch, Inputs, Targets};
use warpstep::model::Input;
use warpstep::model::presets::{Fit, Goal, GptOptions, ModelOptions, Preset};
use warpstep::optim::{Clip, NormClip, OptimizerOptions, Rule};
use warpstep::parallel::{
    Collective, Gradients, GradientsOptions, ID_BYTES, Nccl, Wire, buckets, host_slice, room_of_tree, tree_sum,
};
use warpstep::plan::Share;
use warpstep::random::{Philox, Purpose};
use warpstep::real::Element;
use warpstep::train::step::{StepReport, Trainer, TrainerParts};

const DEVICES: usize = 4;

/// Before any test runs, this program starts itself again on so many emulated devices.
#[ctor::ctor]
fn run_on_the_emulated_devices() {
    if !emulated::is_active() && emulated::find_library().is_some() {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("WARPSTEP_EMULATOR_DEVICES", DEVICES.to_string()) };
        panic!("{}", emulated::start_again());
    }
}

/// A device belongs to one test at a time, and counts are the process's.
static ALONE: Mutex<()> = Mutex::new(());

fn is_there() -> bool {
    let found = emulated::is_active() && is_embedded();
    if !found {
        println!("skipped: the emulator was not built, or Warpstep was built without nvcc");
    }
    found
}

fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    println!("seed {seed}");
    seed
}

fn device(ordinal: usize) -> Arc<Device> {
    Device::open(DeviceOptions { ordinal, ..DeviceOptions::default() }).unwrap()
}

/// Does the same with every device, and gives what each found.
fn each<T: Send>(world: usize, work: impl Fn(usize, Arc<Device>) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..world).map(|rank| scope.spawn(move || work(rank, device(rank)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// As `each`, joined.
fn together<T: Send>(world: usize, work: impl Fn(Nccl, Arc<Device>) -> T + Sync) -> Vec<T> {
    let id = Nccl::unique_id().unwrap();
    each(world, |rank, device| work(Nccl::join(&device, &id, rank, world).unwrap(), device))
}

/// Small whole numbers, whose sums every type holds.
fn drawn<T: Element>(seed: u64, rank: usize, len: usize) -> Vec<T> {
    let stream = Philox::new(seed, Purpose::Shuffle, rank as u32);
    (0..len as u64).map(|i| T::from_f64(stream.below(i, 31) as f64 - 15.0)).collect()
}

fn summed<T: Element>(seed: u64, world: usize, len: usize) -> Vec<T> {
    let all: Vec<Vec<T>> = (0..world).map(|rank| drawn(seed, rank, len)).collect();
    (0..len).map(|i| T::from_f64(all.iter().map(|values| values[i].f64()).sum())).collect()
}

/// Runs a collective on values of a device, or of the host.
fn with_values<T: Numeric>(
    device: &Arc<Device>,
    nccl: &Nccl,
    on_device: bool,
    values: &[T],
    work: impl Fn(Slice<'_>),
) -> Vec<T> {
    let mut values = values.to_vec();
    if !on_device {
        work(Slice::Host(T::host(&mut values)));
        return values;
    }
    let backend = Cuda::<f32>::new(device.clone());
    // Not at the beginning of the buffer.
    let mut buffer = backend.allocate::<T>(values.len() + 64).unwrap();
    backend.upload(&mut buffer, 64, &values).unwrap();
    nccl.fork().unwrap();
    work(backend.slice(&mut buffer, 64..64 + values.len()).unwrap());
    nccl.join().unwrap();
    backend.download(&buffer, 64, &mut values).unwrap();
    values
}

/// Shards of 40 elements: as long as each other, or not, one of them empty.
fn shards(world: usize, even: bool) -> Vec<Range<usize>> {
    let each = 40 / world;
    let mut shards: Vec<_> = (0..world).map(|rank| rank * each..(rank + 1) * each).collect();
    if !even {
        shards[0].end = 3;
        shards[1].start = 3;
        (shards[world - 2].end, shards[world - 1].start) = (40, 40);
    }
    shards
}

fn collectives_of<T: Numeric + Element>(seed: u64, world: usize) {
    together(world, |nccl, device| {
        let (rank, own) = (nccl.rank(), drawn::<T>(seed, nccl.rank(), 40));
        let sums = summed::<T>(seed, world, 40);
        for on_device in [true, false] {
            let run = |work: &dyn Fn(Slice<'_>)| with_values(&device, &nccl, on_device, &own, work);
            assert_eq!(run(&|values| nccl.all_reduce_sum(values).unwrap()), sums);
            let root = world - 1;
            assert_eq!(run(&|values| nccl.broadcast(values, root).unwrap()), drawn::<T>(seed, root, 40));
            for even in [true, false] {
                let shards = shards(world, even);
                let found = run(&|values| nccl.reduce_scatter_sum(values, &shards).unwrap());
                assert_eq!(found[shards[rank].clone()], sums[shards[rank].clone()]);
                let found = run(&|values| nccl.all_gather(values, &shards).unwrap());
                for (from, shard) in shards.iter().enumerate() {
                    assert_eq!(found[shard.clone()], drawn::<T>(seed, from, 40)[shard.clone()]);
                }
            }
            let partner = rank ^ 1;
            let found = run(&|mut values| {
                let [send, receive] = values.parts([0..10, 20..30]).unwrap();
                nccl.swap(partner, send, receive).unwrap();
            });
            assert_eq!(found[20..30], drawn::<T>(seed, partner, 40)[..10]);
            assert_eq!((&found[..20], &found[30..]), (&own[..20], &own[30..]));
        }
        nccl.barrier().unwrap();
    });
}

#[test]
fn collectives_of_every_type_are_as_defined_on_the_device_and_the_host() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let seed = fresh_seed();
    collectives_of::<f32>(seed, 4);
    collectives_of::<f64>(seed, 2);
    collectives_of::<bf16>(seed, 2);
    collectives_of::<f16>(seed, 2);
}

#[test]
fn bytes_are_moved_and_never_summed_and_shards_must_fit() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    together(2, |nccl, _| {
        let mut bytes = [nccl.rank() as u8 + 1; 6];
        nccl.all_gather(bytes.as_mut_slice().into(), &[0..2, 2..6]).unwrap();
        assert_eq!(bytes, [1, 1, 2, 2, 2, 2]);
        let refused = [
            nccl.all_reduce_sum(bytes.as_mut_slice().into()),
            nccl.all_gather(bytes.as_mut_slice().into(), &[0..2, 3..6]),
            nccl.all_gather(bytes.as_mut_slice().into(), &[0..2, 2..7]),
            nccl.all_gather(bytes.as_mut_slice().into(), std::slice::from_ref(&(0..6))),
            nccl.broadcast(bytes.as_mut_slice().into(), 2),
        ];
        assert!(refused.iter().all(Result::is_err), "{refused:?}");
        // Nothing was broken by it.
        nccl.barrier().unwrap();
    });
}

#[test]
fn a_tree_sum_on_devices_has_the_bits_of_the_tree_over_ranks() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let seed = fresh_seed();
    let normal = |rank: usize, len: usize| -> Vec<f32> {
        let stream = Philox::new(seed, Purpose::Augmentation, rank as u32);
        (0..len as u64).map(|i| stream.normal(i) as f32).collect()
    };
    for world in [2, 4] {
        together(world, |nccl, device| {
            let backend = Cuda::<f32>::new(device.clone());
            for len in [1, 15, 16, 33, 130, 1000] {
                let all: Vec<Vec<f32>> = (0..world).map(|rank| normal(rank, len)).collect();
                let expected: Vec<u32> = (0..len)
                    .map(|i| match world {
                        2 => all[0][i] + all[1][i],
                        _ => (all[0][i] + all[1][i]) + (all[2][i] + all[3][i]),
                    })
                    .map(f32::to_bits)
                    .collect();
                let mut room = backend.allocate::<f32>(room_of_tree(len)).unwrap();
                let room_len = room.len();
                let room = Mutex::new(&mut room);
                let found = with_values(&device, &nccl, true, &all[nccl.rank()], |values| {
                    let mut room = room.lock().unwrap();
                    tree_sum(&nccl, values, backend.slice(&mut room, 0..room_len).unwrap()).unwrap();
                });
                assert_eq!(found.into_iter().map(f32::to_bits).collect::<Vec<_>>(), expected, "{len} in {world}");
            }
        });
    }
}

#[test]
fn an_abort_from_another_thread_ends_a_wait_for_a_process_that_does_not_come() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let met = Barrier::new(2);
    let ended = together(2, |nccl, _| {
        if nccl.rank() == 1 {
            // Joined, and gone silent.
            met.wait();
            return None;
        }
        let waiting = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| nccl.all_reduce_sum([1f32; 4].as_mut_slice().into()));
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert!(!waiting.is_finished(), "nobody answered");
            nccl.abort();
            waiting.join().unwrap()
        });
        met.wait();
        let after = nccl.barrier().unwrap_err().to_string();
        assert!(after.contains("given up"), "{after}");
        nccl.abort();
        Some(waiting.unwrap_err().to_string())
    });
    let error = ended[0].as_ref().unwrap();
    assert!(error.contains("sum values over processes"), "{error}");
}

const TOKENS: usize = 11;
const TIME: usize = 8;
const PART: usize = 2;

/// A part of a batch.
fn batch(step: usize, part: usize) -> Batch {
    let token = |i: usize| ((i * 7 + step * 3 + part * 5 + i * i) % TOKENS) as i32;
    let tokens = |shift: usize| (0..PART * TIME).map(|i| token(i + shift)).collect();
    Batch { inputs: Inputs::Tokens(tokens(0)), targets: Targets::Index(tokens(1)), samples: PART }
}

/// A small GPT with dropout, of one of several processes.
fn trainer<S: Storage>(
    device: &Arc<Device>,
    collective: Arc<dyn Collective>,
    share: Share,
    wire: Wire,
) -> Trainer<Cuda<S>> {
    let options = GptOptions { layers: 1, heads: 2, width: 16, dropout: 0.1, ..GptOptions::default() };
    let fit =
        Fit { vocabulary: Some(TOKENS), context: Some(TIME), goal: Goal::NextToken, padding: None, outputs: TOKENS };
    let model = ModelOptions { preset: Preset::Gpt(options), loss: None, label_smoothing: 0.0 };
    let optimizer = OptimizerOptions {
        clip: Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } },
        ..OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.99], epsilon: 1e-8 }, 0.01)
    };
    let parts = TrainerParts {
        backend: Cuda::<S>::new(device.clone()),
        model: model.build(&fit).unwrap(),
        input: Input::Tokens(TIME),
        batch_size: PART,
        accumulate: 1,
        optimizer: &optimizer,
        ema: None,
        seed: 5,
    };
    let trainer = Trainer::new(parts).unwrap();
    let arena = trainer.arena();
    let buckets = buckets(&trainer.program().ops, &arena.ranges, &arena.layout, 1000).unwrap();
    assert!(buckets.len() > 2, "{buckets:?}");
    let options = GradientsOptions { share, wire, overlap: true };
    let gradients = Gradients::new(options, collective, buckets).unwrap();
    trainer.sharing(share, Box::new(gradients))
}

/// Takes so many steps with two in flight, and gives what they found as it comes.
fn pipelined<S: Storage>(trainer: &mut Trainer<Cuda<S>>, share: Share, steps: Range<usize>) -> Vec<StepReport> {
    let mut reports = Vec::new();
    for step in steps {
        for part in share.first..share.first + share.count {
            let last = part + 1 == share.first + share.count;
            trainer.queue(&batch(step, part), last.then_some(0.01)).unwrap();
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
    let Some(emulator) = Emulator::find() else { return };
    let (world, warm, steps) = (2, 4, 5);
    for (reproducible, wire) in [(false, Wire::F32), (false, Wire::Bf16), (true, Wire::F32)] {
        let met = Barrier::new(world);
        let shares = |rank| {
            if reproducible { Share::reproducible(rank, world, 4).unwrap() } else { Share::of_rank(rank, world) }
        };
        together(world, |nccl, device| {
            let share = shares(nccl.rank());
            let first = nccl.rank() == 0;
            let mut trainer = trainer::<bf16>(&device, Arc::new(nccl), share, wire);
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
}

/// A collective that notes how many kernels have run when it is asked for something.
struct Observed {
    nccl: Nccl,
    kernels: Box<dyn Fn() -> u64 + Send + Sync>,
    sums: Mutex<Vec<u64>>,
    joins: Mutex<Vec<u64>>,
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
        self.sums.lock().unwrap().push((self.kernels)());
        self.nccl.all_reduce_sum(values)
    }
    fn reduce_scatter_sum(&self, values: Slice<'_>, shards: &[Range<usize>]) -> warpstep::Result<()> {
        self.nccl.reduce_scatter_sum(values, shards)
    }
    fn all_gather(&self, values: Slice<'_>, shards: &[Range<usize>]) -> warpstep::Result<()> {
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
    fn fork(&self) -> warpstep::Result<()> {
        self.nccl.fork()
    }
    fn join(&self) -> warpstep::Result<()> {
        self.joins.lock().unwrap().push((self.kernels)());
        self.nccl.join()
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
    let nccl = Nccl::join(&device, &Nccl::unique_id().unwrap(), 0, 1).unwrap();
    let kernels = Box::new(move || emulator.kernels().iter().map(|(_, counts)| counts.launches).sum());
    let observed = Arc::new(Observed { nccl, kernels, sums: Mutex::default(), joins: Mutex::default() });
    let share = Share::default();
    let mut trainer = trainer::<f32>(&device, observed.clone(), share, Wire::F32);
    // Not recorded yet, so that what is queued runs, and is counted, in the order in which it is queued.
    trainer.step(&[batch(0, 0)], 0.01).unwrap();
    let (sums, joins) = (observed.sums.lock().unwrap(), observed.joins.lock().unwrap());
    assert!(sums.len() > 2 && sums.is_sorted(), "{sums:?}");
    assert!(sums[0] + 5 < joins[0] && sums[1] < joins[0], "sums at {sums:?}, joined at {joins:?} kernels");
}

/// Threads of one process that meet in the host's memory: what MPI is to processes.
struct Meeting {
    slots: Mutex<Vec<Vec<u8>>>,
    barrier: Barrier,
}

struct OnHost {
    meeting: Arc<Meeting>,
    rank: usize,
    world: usize,
}

impl OnHost {
    /// The bytes of all.
    fn exchange(&self, own: &[u8]) -> Vec<Vec<u8>> {
        self.meeting.slots.lock().unwrap()[self.rank] = own.to_vec();
        self.meeting.barrier.wait();
        let all = self.meeting.slots.lock().unwrap().clone();
        self.meeting.barrier.wait();
        all
    }
}

impl Collective for OnHost {
    fn name(&self) -> &'static str {
        "threads"
    }
    fn rank(&self) -> usize {
        self.rank
    }
    fn world(&self) -> usize {
        self.world
    }
    fn all_reduce_sum(&self, values: Slice<'_>) -> warpstep::Result<()> {
        let HostSlice::F32(values) = host_slice("threads", values)? else { panic!("f32 alone is summed here") };
        let all = self.exchange(bytemuck::cast_slice(values));
        values.fill(0.0);
        for (rank, bytes) in all.iter().enumerate() {
            let terms: Vec<f32> = bytemuck::pod_collect_to_vec(bytes);
            values.iter_mut().zip(terms).for_each(|(sum, term)| *sum = if rank == 0 { term } else { *sum + term });
        }
        Ok(())
    }
    fn reduce_scatter_sum(&self, values: Slice<'_>, _: &[Range<usize>]) -> warpstep::Result<()> {
        self.all_reduce_sum(values)
    }
    fn all_gather(&self, values: Slice<'_>, shards: &[Range<usize>]) -> warpstep::Result<()> {
        let mut values = host_slice("threads", values)?;
        let each = values.number().bytes();
        let bytes = values.bytes_mut();
        for (shard, all) in shards.iter().zip(self.exchange(bytes)) {
            let shard = shard.start * each..shard.end * each;
            bytes[shard.clone()].copy_from_slice(&all[shard]);
        }
        Ok(())
    }
    fn broadcast(&self, values: Slice<'_>, root: usize) -> warpstep::Result<()> {
        let mut values = host_slice("threads", values)?;
        let all = self.exchange(values.bytes_mut());
        values.bytes_mut().copy_from_slice(&all[root]);
        Ok(())
    }
    fn swap(&self, partner: usize, send: Slice<'_>, receive: Slice<'_>) -> warpstep::Result<()> {
        let (mut send, mut receive) = (host_slice("threads", send)?, host_slice("threads", receive)?);
        receive.bytes_mut().copy_from_slice(&self.exchange(send.bytes_mut())[partner]);
        Ok(())
    }
    fn barrier(&self) -> warpstep::Result<()> {
        self.exchange(&[]);
        Ok(())
    }
}

/// What steps find that two processes take, by way of the host.
fn around_the_host<S: Storage>(share: impl Fn(usize) -> Share + Sync, steps: usize) -> Vec<(Vec<StepReport>, f32)> {
    let meeting = Arc::new(Meeting { slots: Mutex::new(vec![Vec::new(); 2]), barrier: Barrier::new(2) });
    each(2, |rank, device| {
        let collective = Arc::new(OnHost { meeting: meeting.clone(), rank, world: 2 });
        let mut trainer = trainer::<S>(&device, collective, share(rank), Wire::F32);
        let reports = pipelined(&mut trainer, share(rank), 0..steps);
        (reports, trainer.loss_scale().unwrap().map_or(1.0, |scale| scale.scale))
    })
}

fn by_nccl<S: Storage>(share: impl Fn(usize) -> Share + Sync, steps: usize) -> Vec<(Vec<StepReport>, f32)> {
    together(2, |nccl, device| {
        let share = share(nccl.rank());
        let mut trainer = trainer::<S>(&device, Arc::new(nccl), share, Wire::F32);
        let reports = pipelined(&mut trainer, share, 0..steps);
        (reports, trainer.loss_scale().unwrap().map_or(1.0, |scale| scale.scale))
    })
}

#[test]
fn sums_by_way_of_the_host_find_what_sums_on_the_device_find() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let apart = |rank| Share::of_rank(rank, 2);
    let parts = |rank| Share::reproducible(rank, 2, 4).unwrap();
    let found = by_nccl::<f32>(apart, 6);
    assert_eq!(found[0].0, found[1].0, "processes disagree");
    assert_eq!(found, around_the_host::<f32>(apart, 6));
    assert_eq!(by_nccl::<f32>(parts, 4), around_the_host::<f32>(parts, 4));
    // In f16 gradients are scaled, and the update divides by the scale.
    let halves = by_nccl::<f16>(apart, 4);
    assert_eq!(halves, around_the_host::<f16>(apart, 4));
    assert_eq!(halves[0].1, 65_536.0);
    let (half, full) = (&halves[0].0[0], &found[0].0[0]);
    let norms = [half, full].map(|report| report.outcome.grad_norm);
    assert!(!half.outcome.skipped && (norms[0] - norms[1]).abs() < 0.05 * norms[1], "{norms:?}");
}

#[test]
fn a_step_around_the_host_is_two_recordings() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(emulator) = Emulator::find() else { return };
    let share = |rank| Share::of_rank(rank, 2);
    let launches = |steps| {
        emulator.reset();
        around_the_host::<f32>(share, steps);
        emulator.host().graph_launches
    };
    // Backward and update of each of two processes, once all are recorded.
    let (few, more) = (launches(6), launches(9));
    assert_eq!(more - few, 2 * 2 * 3);
}

/// An id is needed by every process.
#[test]
fn an_id_of_nobody_is_refused() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let device = device(0);
    let error = Nccl::join(&device, &[0; ID_BYTES], 0, 1).err().expect("no such processes").to_string();
    assert!(error.contains("join 1 processes as number 0"), "{error}");
    let error = Nccl::join(&device, &Nccl::unique_id().unwrap(), 2, 2).err().expect("no such rank").to_string();
    assert!(error.contains("rank below 2"), "{error}");
}
