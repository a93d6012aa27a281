//! Devices that share a model's memory out: one graph launch a pass, the bits of devices that share nothing, and the memory that
//! was planned.

use std::sync::{Arc, PoisonError};

use half::bf16;
use warpstep::backend::cuda::{Cuda, Device, DeviceOptions, Storage};
use warpstep::backend::ops::Update;
use warpstep::backend::{Exchange, PassOfStep};
use warpstep::model::Input;
use warpstep::optim::{Clip, MuonScale, NormClip, OptimizerOptions, Rule, StepParams};
use warpstep::parallel::{Collective, Gradients, GradientsOptions, Shard, ShardingOptions, Windowed, Wire};
use warpstep::plan::Share;
use warpstep::train::memory::{RunMemory, Wanted};
use warpstep::train::step::Trainer;

use crate::emulator::Emulator;
use crate::steps::{
    Asked, BUCKET, Observed, PART, TIME, adam, gpt, is_one_graph_launch_a_pass, parts, pipelined, trainer_by,
};
use crate::{ALONE, device, each, is_there, together};

const LEVELS: [Shard; 3] = [Shard::Optimizer, Shard::Gradients, Shard::Parameters];

/// As the steps' trainer, and its exchange, which it is not given yet.
fn sharded<S: Storage>(
    optimizer: &OptimizerOptions,
    device: &Arc<Device>,
    collective: Arc<dyn Collective>,
    share: Share,
    options: ShardingOptions,
) -> (Trainer<Cuda<S>>, Box<dyn Exchange<Cuda<S>>>) {
    let trainer = Trainer::sharded(parts(device, optimizer), Some(options)).unwrap();
    let sharding = trainer.sharding().unwrap();
    assert!(sharding.buckets.len() > 2 && sharding.shards.iter().all(|shard| !shard.is_empty()), "{sharding:?}");
    let exchanged = GradientsOptions { share, wire: options.wire, overlap: true };
    let exchange: Box<dyn Exchange<Cuda<S>>> = match options.shard {
        Shard::None | Shard::Optimizer => Box::new(Gradients::sharded(exchanged, collective, sharding).unwrap()),
        Shard::Gradients | Shard::Parameters => Box::new(Windowed::new(exchanged, collective, sharding).unwrap()),
    };
    (trainer, exchange)
}

fn options(collective: &dyn Collective, shard: Shard, wire: Wire) -> ShardingOptions {
    let (rank, world) = (collective.rank(), collective.world());
    ShardingOptions { shard, rank, world, bucket: BUCKET, adds_up: false, wire }
}

#[test]
fn a_step_that_shares_memory_out_is_one_graph_launch_a_pass_without_waiting_or_allocating() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for shard in LEVELS {
        for (reproducible, wire) in [(false, Wire::F32), (false, Wire::Bf16), (true, Wire::F32)] {
            let shares = |rank, world| {
                let reproducible = reproducible.then(|| Share::side_by_side(rank, world, 4).unwrap());
                reproducible.unwrap_or(Share::of_rank(rank, world))
            };
            is_one_graph_launch_a_pass(shares, |nccl, device, share| {
                let options = options(&nccl, shard, wire);
                let (trainer, exchange) = sharded::<bf16>(&adam(), device, Arc::new(nccl), share, options);
                trainer.sharing(share, exchange)
            });
        }
    }
}

#[test]
fn parameters_and_sums_are_on_their_way_while_the_program_goes_on() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(emulator) = Emulator::find() else { return };
    let (device, share) = (device(0), Share::default());
    let observed = Arc::new(Observed::new(&device, emulator));
    let options = options(&*observed, Shard::Parameters, Wire::F32);
    let (trainer, exchange) = sharded::<f32>(&adam(), &device, observed.clone(), share, options);
    let gathers = trainer.sharding().unwrap().parameters.clone().unwrap().gathers;
    let mut trainer = trainer.sharing(share, exchange);
    // Not recorded yet, so that what is queued runs, and is counted, in the order in which it is queued.
    pipelined(&mut trainer, share, 0..1);
    // A bucket is copied out, and its sum begun, once that of the bucket before the last is done.
    let sums = observed.times(|asked| asked == Asked::Sum);
    let waits = observed.times(|asked| matches!(asked, Asked::JoinMark(0 | 1)));
    assert_eq!(sums.len(), trainer.sharding().unwrap().buckets.len());
    assert!(sums[0] < sums[2] && waits == sums[2..], "sums at {sums:?}, waits at {waits:?}");
    // Every gather but the first begins when the one before it is needed, and is waited for later: by operations, and by kernels
    // where operations between them are not products of a library, which are not counted.
    let begun = observed.times(|asked| matches!(asked, Asked::Mark(2 | 3)));
    let needed = observed.times(|asked| matches!(asked, Asked::JoinMark(2 | 3)));
    assert!(gathers.len() > 3 && begun.len() == gathers.len() && needed.len() == gathers.len());
    assert!(gathers.windows(2).all(|pair| pair[1].before == pair[0].needed && pair[0].needed < pair[1].needed));
    assert_eq!(begun[1..], needed[..needed.len() - 1]);
    let later = begun[1..].iter().zip(&needed[1..]).filter(|(begun, needed)| begun < needed).count();
    assert!(2 * later > gathers.len(), "{begun:?}, {needed:?}");
}

/// What steps find, and this process's parameters and slots after them.
type Ended = (Vec<warpstep::train::step::StepReport>, Vec<Vec<f32>>);

fn ended<S: Storage>(mut trainer: Trainer<Cuda<S>>, share: Share, rank: usize, world: usize) -> Ended {
    let reports = pipelined(&mut trainer, share, 0..6);
    let arena = trainer.arena();
    let whole = warpstep::plan::shards(arena.layout.padded_len(), &trainer.update_plan().cuts(), world)[rank].clone();
    let elements = arena.own_elements();
    let (parameters, own) = arena.own_parameters();
    let skip = whole.start - elements.start;
    let mut values = vec![vec![0f32; whole.len()]; 1 + arena.slots.len()];
    parameters.read(own.start + skip, &mut values[0]).unwrap();
    for (slot, values) in arena.slots.iter().zip(&mut values[1..]) {
        slot.read(skip, values).unwrap();
    }
    (reports, values)
}

/// Each of so many devices, whatever they share out, finds what they find that share nothing, and ends with its bits.
fn has_the_bits_of_devices_that_share_nothing(optimizer: &OptimizerOptions, world: usize) {
    let plain = together(world, |nccl, device| {
        let (rank, share) = (nccl.rank(), Share::of_rank(nccl.rank(), world));
        let trainer = trainer_by::<f32>(optimizer, &device, Arc::new(nccl), share, Wire::F32);
        ended(trainer, share, rank, world)
    });
    assert!(plain.iter().all(|(reports, _)| *reports == plain[0].0), "processes disagree");
    assert!(plain[0].0.iter().any(|report| report.outcome.clip_coefficient < 1.0), "nothing was clipped");
    for shard in LEVELS {
        let found = together(world, |nccl, device| {
            let (rank, share) = (nccl.rank(), Share::of_rank(nccl.rank(), world));
            let options = options(&nccl, shard, Wire::F32);
            let (trainer, exchange) = sharded::<f32>(optimizer, &device, Arc::new(nccl), share, options);
            ended(trainer.sharing(share, exchange), share, rank, world)
        });
        assert_eq!(found, plain, "{world} devices, {shard:?}");
    }
}

#[test]
fn every_device_has_of_its_share_the_bits_of_devices_that_share_nothing() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let clipped = |norm| OptimizerOptions { clip: Clip { value: Some(0.5), norm }, ..adam() };
    for world in [2, 4] {
        has_the_bits_of_devices_that_share_nothing(&clipped(NormClip::Global { max_norm: 0.1 }), world);
        // The least coefficient of all units is that of one process's.
        has_the_bits_of_devices_that_share_nothing(
            &clipped(NormClip::Adaptive { clipping: 0.01, epsilon: 1e-3 }),
            world,
        );
    }
}

#[test]
fn under_muon_devices_of_several_kinds_end_with_the_same_parameters_where_updates_are_shared_out() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let muon = Rule::Muon { momentum: 0.95, nesterov: true, steps: 5, scale: MuonScale::Original };
    let optimizer = OptimizerOptions::new(muon, 0.02);
    let world = 2;
    let parameters = |shard: Shard| {
        let id = warpstep::parallel::Nccl::unique_id().unwrap();
        each(world, |rank, _| {
            // Products of another kind of device have other bits, as those in tf32 have.
            let options_of_kind = DeviceOptions { ordinal: rank, tf32: rank == 1, ..DeviceOptions::default() };
            let device = Device::open(options_of_kind).unwrap();
            let nccl = warpstep::parallel::Nccl::join(&device, &id, rank, world).unwrap();
            let share = Share::of_rank(rank, world);
            let mut trainer = match shard {
                Shard::None => trainer_by::<f32>(&optimizer, &device, Arc::new(nccl), share, Wire::F32),
                _ => {
                    let options = options(&nccl, shard, Wire::F32);
                    let (trainer, exchange) = sharded::<f32>(&optimizer, &device, Arc::new(nccl), share, options);
                    trainer.sharing(share, exchange)
                }
            };
            pipelined(&mut trainer, share, 0..4);
            let mut values = vec![0f32; trainer.arena().layout.padded_len()];
            trainer.arena().parameters.read(0, &mut values).unwrap();
            values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        })
    };
    let [first, second] = &parameters(Shard::None)[..] else { panic!("a process is missing") };
    assert_ne!(first, second, "the devices are of one kind");
    for shard in [Shard::Optimizer, Shard::Gradients] {
        let [first, second] = &parameters(shard)[..] else { panic!("a process is missing") };
        assert_eq!(first, second, "{shard:?}");
    }
}

/// What an allocation of nothing takes, a few times.
const SLACK: usize = 64;

/// Plans and takes the memory of a process, and gives the bytes of its arena.
fn takes_what_was_planned<S: Storage>(
    nccl: warpstep::parallel::Nccl,
    device: &Arc<Device>,
    share: Share,
    options: ShardingOptions,
) -> usize {
    let optimizer = adam();
    let wanted = Wanted {
        input: Input::Tokens(TIME),
        batch_size: PART,
        left: None,
        evaluations: Vec::new(),
        optimizer: &optimizer,
        average: false,
        share: Some((share, options)),
    };
    let (_, memory) = RunMemory::plan::<Cuda<S>>(&mut gpt(), &wanted).unwrap();
    let planned = |name: &str| memory.parts.iter().find(|part| part.name == name).map_or(0, |part| part.bytes);
    let free = || device.memory().unwrap().0;
    let near = |what: &str, taken: usize, told: usize| {
        assert!(
            taken.abs_diff(told) <= SLACK,
            "{options:?}: {taken} bytes of {what}, told {told}: {:#?}",
            memory.parts
        );
    };
    let (on_their_way, tables, sums) = ("buckets on their way", "tables of the update", "sums of parts");
    let later = [on_their_way, tables, sums].map(planned).iter().sum::<usize>();
    let before = free();
    let (mut trainer, mut exchange) = sharded::<S>(&optimizer, device, Arc::new(nccl), share, options);
    let of_arena = memory.total() - later;
    near("the arena and activations", before - free(), of_arena);
    let before = free();
    let first = PassOfStep { number: 0, passes: 1, part: 0, first: true, last: true, ends_step: true };
    let (backend, arena) = trainer.parts_mut();
    exchange.begin(backend, arena, first).unwrap();
    near(on_their_way, before - free(), planned(on_their_way));
    let before = free();
    let plan = trainer.update_plan().clone();
    let step = StepParams { learning_rate: 0.01, step: 1, divisor: 1.0, zero_gradients: false };
    let (backend, arena) = trainer.parts_mut();
    backend.begin_update(arena, &plan, &step).unwrap();
    near(tables, before - free(), planned(tables));
    assert_eq!(planned(tables), Cuda::<S>::table_bytes(&plan, &trainer.arena().own_elements()));
    of_arena
}

#[test]
fn memory_falls_from_level_to_level_and_is_what_was_planned() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let world = 4;
    for wire in [Wire::F32, Wire::Bf16] {
        let of_levels = |take: &(dyn Fn(Shard) -> Vec<usize> + Sync)| {
            let most: Vec<usize> = LEVELS.iter().map(|&shard| take(shard).into_iter().max().unwrap()).collect();
            assert!(most.is_sorted_by(|more, less| more > less), "{most:?}");
        };
        of_levels(&|shard| {
            together(world, |nccl, device| {
                let (share, options) = (Share::of_rank(nccl.rank(), world), options(&nccl, shard, wire));
                takes_what_was_planned::<f32>(nccl, &device, share, options)
            })
        });
        of_levels(&|shard| {
            together(world, |nccl, device| {
                let (share, options) = (Share::of_rank(nccl.rank(), world), options(&nccl, shard, wire));
                takes_what_was_planned::<bf16>(nccl, &device, share, options)
            })
        });
    }
}
