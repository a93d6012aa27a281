//! A training step as the host sees it: one graph launch, nothing waited for, nothing allocated. And what the steps in flight
//! find is what steps taken one by one find.

#[path = "common/device.rs"]
mod device;
#[path = "common/emulator.rs"]
mod emulator;

use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};
use warpstep::backend::Backend;
use warpstep::backend::cuda::cudarc::driver::CudaContext;
use warpstep::backend::cuda::{Cuda, Device, DeviceOptions, SmallProducts, Storage};
use warpstep::backend::ops::Update;
use warpstep::backend::step::LossScale;
use warpstep::data::{Batch, Inputs, Targets};
use warpstep::model::layers::{Conv2d, Flatten, Linear, Sequential};
use warpstep::model::presets::{Fit, Goal, GptOptions, MlpOptions, ModelOptions, Preset};
use warpstep::model::{Input, Loss, Model};
use warpstep::optim::{Clip, NormClip, OptimizerOptions, Rule};
use warpstep::train::step::{StepReport, Trainer, TrainerParts};

use emulator::Emulator;

/// Counts are the process's.
static ALONE: Mutex<()> = Mutex::new(());

const TOKENS: usize = 11;
const TIME: usize = 8;
const SAMPLES: usize = 2;

fn batch(number: usize) -> Batch {
    let token = |i: usize| ((i * 7 + number * 3 + i * i) % TOKENS) as i32;
    let tokens = |shift: usize| (0..SAMPLES * TIME).map(|i| token(i + shift)).collect();
    Batch { inputs: Inputs::Tokens(tokens(0)), targets: Targets::Index(tokens(1)), samples: SAMPLES }
}

fn trainer<S: Storage>(device: &Arc<Device>, accumulate: u32, ema: Option<f64>, rate: f64) -> Trainer<Cuda<S>> {
    let options = GptOptions { layers: 1, heads: 2, width: 16, dropout: 0.1, ..GptOptions::default() };
    let fit =
        Fit { vocabulary: Some(TOKENS), context: Some(TIME), goal: Goal::NextToken, padding: None, outputs: TOKENS };
    let model = ModelOptions { preset: Preset::Gpt(options), loss: None, label_smoothing: 0.0 };
    let optimizer = OptimizerOptions {
        weight_decay: 0.1,
        clip: Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } },
        ..OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.99], epsilon: 1e-8 }, rate)
    };
    let parts = TrainerParts {
        backend: Cuda::<S>::new(device.clone()),
        model: model.build(&fit).unwrap(),
        input: Input::Tokens(TIME),
        batch_size: SAMPLES,
        accumulate,
        optimizer: &optimizer,
        ema,
        seed: 5,
    };
    Trainer::new(parts).unwrap()
}

/// Queues `steps` steps, and takes what they found as it comes.
fn pipelined<S: Storage>(trainer: &mut Trainer<Cuda<S>>, steps: usize, accumulate: usize) -> Vec<StepReport> {
    let mut reports = Vec::new();
    for step in 0..steps {
        for part in 0..accumulate {
            let last = part + 1 == accumulate;
            trainer.queue(&batch(step * accumulate + part), last.then_some(0.01)).unwrap();
        }
        reports.extend(trainer.finished(false).unwrap());
    }
    while let Some(report) = trainer.finished(true).unwrap() {
        reports.push(report);
    }
    reports
}

#[test]
fn a_step_is_one_graph_launch_without_waiting_or_allocating() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // The update as one launch, and as several behind the backward.
    for persistent_update in [true, false] {
        let options = DeviceOptions { persistent_update, ..DeviceOptions::default() };
        let Some(device) = device::device_with(options) else { return };
        let Some(emulator) = Emulator::find() else { return };
        for accumulate in [1, 2] {
            let mut trainer = trainer::<bf16>(&device, accumulate as u32, Some(0.9), 0.01);
            // Both slots, each micro-batch of a step: run once as they are, then recorded.
            pipelined(&mut trainer, 4, accumulate);
            emulator.reset();
            let steps = 5;
            pipelined(&mut trainer, steps, accumulate);
            let host = emulator.host();
            let launches = (steps * accumulate) as u64;
            assert_eq!((host.graph_launches, host.launches), (launches, 0), "{host:?}");
            assert_eq!((host.allocations, host.frees, host.host_allocations), (0, 0, 0), "{host:?}");
            assert_eq!((host.synchronizations, host.library_calls > 0), (0, true), "{host:?}");
            // Inputs, targets and scalars in, the figures out.
            assert_eq!(host.copies_in, 3 * launches, "{host:?}");
        }
    }
}

/// A driver's copy into ordinary memory waits for all that is queued, which may wait for other processes.
#[test]
fn no_copy_to_the_host_waits_for_the_device_where_something_watches_it() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(device) = device::device() else { return };
    let Some(emulator) = Emulator::find() else { return };
    let mut trainer = trainer::<bf16>(&device, 1, Some(0.9), 0.01);
    let mut counted = || {
        emulator.reset();
        pipelined(&mut trainer, 3, 1);
        trainer.evaluate((0..2).map(|number| Ok(batch(number)))).unwrap();
        trainer.step(&[batch(3)], 0.01).unwrap();
        let mut parameters = vec![0.0; trainer.arena().layout.padded_len()];
        trainer.backend().download(&trainer.arena().parameters, 0, &mut parameters).unwrap();
        emulator.host()
    };
    // Where nothing does, the driver may as well wait.
    assert!(counted().waiting_copies > 0);
    device.watch(|| Ok(()));
    let host = counted();
    assert!(host.copies_out > 0 && host.waiting_copies == 0, "{host:?}");
}

/// CUDA records nothing there.
#[test]
fn on_a_contexts_default_stream_steps_are_launches_that_find_the_same() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let options = DeviceOptions { small_products: SmallProducts::Never, measure: false, ..DeviceOptions::default() };
    let Some(own) = device::device_with(options) else { return };
    let stream = CudaContext::new(0).unwrap().default_stream();
    let device = Device::on_stream(&stream, options).unwrap();
    let found = pipelined(&mut trainer::<f32>(&device, 2, None, 0.01), 3, 2);
    assert_eq!(found, pipelined(&mut trainer::<f32>(&own, 2, None, 0.01), 3, 2));
    // Where small products are to be measured, none can be.
    let device = Device::on_stream(&stream, DeviceOptions::default()).unwrap();
    assert_eq!(pipelined(&mut trainer::<f32>(&device, 1, None, 0.01), 3, 1).len(), 3);
}

#[test]
fn a_small_networks_step_is_as_many_launches_as_it_depends_on_one_after_the_other() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let options = DeviceOptions { small_products: SmallProducts::Always, ..DeviceOptions::default() };
    let Some(device) = device::device_with(options) else { return };
    let Some(emulator) = Emulator::find() else { return };
    let (samples, inputs, classes) = (24, 20, 10);
    let fit = Fit { vocabulary: None, context: None, goal: Goal::Classes(classes), padding: None, outputs: classes };
    let preset = Preset::Mlp(MlpOptions { hidden: vec![16, 12], ..MlpOptions::default() });
    let mut trainer = Trainer::new(TrainerParts {
        backend: Cuda::<bf16>::new(device),
        model: ModelOptions { preset, loss: None, label_smoothing: 0.0 }.build(&fit).unwrap(),
        input: Input::Real(vec![inputs]),
        batch_size: samples,
        accumulate: 1,
        optimizer: &OptimizerOptions {
            clip: Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } },
            ..OptimizerOptions::new(Rule::Sgd, 0.1)
        },
        ema: None,
        seed: 5,
    })
    .unwrap();
    let batch = Batch {
        inputs: Inputs::Real((0..samples * inputs).map(|i| (i % 7) as f32 - 3.0).collect()),
        targets: Targets::Index((0..samples).map(|i| (i % classes) as i32).collect()),
        samples,
    };
    let run = |trainer: &mut Trainer<Cuda<bf16>>, steps: usize| {
        (0..steps).for_each(|_| trainer.queue(&batch, Some(0.1)).unwrap());
        while trainer.finished(true).unwrap().is_some() {}
    };
    run(&mut trainer, 4);
    emulator.reset();
    run(&mut trainer, 5);
    let host = emulator.host();
    // Three layers forward, the loss, three backward, the update, and what it found; no copy between.
    assert_eq!((host.graph_launches, host.graph_kernels, host.launches), (5, 5 * 9, 0), "{host:?}");
    assert_eq!((host.copies, host.copies_out, host.library_calls, host.fills), (0, 0, 0, 0), "{host:?}");
}

#[test]
fn without_graphs_each_kernel_is_waited_for_so_that_the_one_that_fails_is_named() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(device) = device::device_with(DeviceOptions { graphs: false, ..DeviceOptions::default() }) else { return };
    let Some(emulator) = Emulator::find() else { return };
    let mut trainer = trainer::<bf16>(&device, 1, None, 0.01);
    pipelined(&mut trainer, 2, 1);
    emulator.reset();
    pipelined(&mut trainer, 3, 1);
    let host = emulator.host();
    assert_eq!(host.graph_launches, 0, "{host:?}");
    assert!(host.launches > 0 && host.library_calls > 0, "{host:?}");
    assert_eq!(host.synchronizations, host.launches + host.library_calls, "{host:?}");
}

fn the_same_reports<S: Storage>() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(device) = device::device() else { return };
    let Some(plain) = device::device_with(DeviceOptions { graphs: false, ..DeviceOptions::default() }) else { return };
    for (accumulate, ema) in [(1, None), (2, Some(0.9))] {
        let mut queued = trainer::<S>(&device, accumulate as u32, ema, 0.01);
        let found = pipelined(&mut queued, 6, accumulate);
        let mut one_by_one = trainer::<S>(&plain, accumulate as u32, ema, 0.01);
        let expected: Vec<StepReport> = (0..6)
            .map(|step| {
                let batches: Vec<Batch> = (0..accumulate).map(|part| batch(step * accumulate + part)).collect();
                one_by_one.step(&batches, 0.01).unwrap()
            })
            .collect();
        assert_eq!(found, expected);
        assert_eq!(queued.counters(), one_by_one.counters());
        assert!(found.windows(2).all(|pair| pair[0].outcome.grad_norm != pair[1].outcome.grad_norm), "{found:?}");
    }
}

#[test]
fn steps_in_flight_find_what_steps_without_graphs_find() {
    the_same_reports::<f32>();
    the_same_reports::<bf16>();
}

#[test]
fn f16_halves_its_loss_scale_until_nothing_overflows_and_goes_on() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(device) = device::device() else { return };
    let mut low = trainer::<f16>(&device, 1, None, 0.01);
    // A scale that no gradient survives.
    let mut first = low.loss_scale().unwrap().expect("f16 has a loss scale");
    assert_eq!((first.scale, first.good_steps), (65_536.0, 0));
    first.scale *= 256.0;
    let (backend, arena) = low.parts_mut();
    backend.set_loss_scale(arena, first).unwrap();
    let found = pipelined(&mut low, 16, 1);
    let skipped = found.iter().take_while(|report| report.outcome.skipped).count();
    assert!((1..14).contains(&skipped), "{found:?}");
    assert!(found[skipped..].iter().all(|report| !report.outcome.skipped), "{found:?}");
    let scale = low.loss_scale().unwrap().unwrap();
    assert_eq!(scale.scale, first.scale / f32::powi(2.0, skipped as i32));
    assert_eq!(scale.good_steps as usize, found.len() - skipped);
    assert_eq!(low.counters().applied as usize, found.len() - skipped);
    // What the scale multiplied, the update divided by: the norms are those of f32.
    let mut wide = trainer::<f32>(&device, 1, None, 0.01);
    let first_applied = &found[skipped];
    let expected = wide.step(&[batch(skipped)], 0.01).unwrap();
    let (norm, wanted) = (first_applied.outcome.grad_norm, expected.outcome.grad_norm);
    assert!((norm - wanted).abs() < 0.1 * wanted, "{norm} for {wanted}");
    assert!(found.iter().all(|report| report.loss.is_finite()), "losses themselves are not scaled: {found:?}");
}

#[test]
fn cudnn_is_asked_once_for_the_algorithms_of_a_convolution() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(device) = device::device() else { return };
    let Some(emulator) = Emulator::find() else { return };
    let side = 6;
    let layers =
        Sequential::new().then("0", Conv2d::new(2, [3, 3])).then("1", Flatten::new()).then("2", Linear::new(1));
    emulator.reset();
    let parts = TrainerParts {
        backend: Cuda::<f32>::new(device),
        model: Model::new(Box::new(layers), Loss::MeanSquaredError),
        input: Input::Real(vec![1, side, side]),
        batch_size: SAMPLES,
        accumulate: 1,
        optimizer: &OptimizerOptions::new(Rule::Sgd, 0.01),
        ema: None,
        seed: 5,
    };
    let mut trainer = Trainer::new(parts).unwrap();
    trainer.plan_smaller(1).unwrap();
    trainer.plan_evaluations(&[SAMPLES, 1]).unwrap();
    let pictures = |samples: usize| Batch {
        inputs: Inputs::Real((0..samples * side * side).map(|i| (i % 7) as f32).collect()),
        targets: Targets::Real(vec![1.0; samples]),
        samples,
    };
    for samples in [SAMPLES, 1, SAMPLES, 1] {
        trainer.step(&[pictures(samples)], 0.01).unwrap();
        trainer.evaluate(std::iter::once(Ok(pictures(samples)))).unwrap();
    }
    // The forward and the weight's gradient, of either number of samples: nothing is before the layer that would be trained.
    assert_eq!(emulator.host().heuristics, 4);
}

#[test]
fn trainings_in_f16_that_share_a_device_have_a_loss_scale_each() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(device) = device::device() else { return };
    let alone = pipelined(&mut trainer::<f16>(&device, 1, None, 0.01), 8, 1);
    let mut low = trainer::<f16>(&device, 1, None, 0.01);
    let mut found = pipelined(&mut low, 4, 1);
    let left = low.loss_scale().unwrap();
    // Another begins, at a scale that no gradient survives, and its steps are skipped.
    let mut other = trainer::<f16>(&device, 1, None, 0.01);
    let (backend, arena) = other.parts_mut();
    backend.set_loss_scale(arena, LossScale { scale: f32::powi(2.0, 100), good_steps: 0 }).unwrap();
    assert!(pipelined(&mut other, 4, 1).iter().all(|report| report.outcome.skipped));
    assert_eq!(other.loss_scale().unwrap(), Some(LossScale { scale: f32::powi(2.0, 96), good_steps: 0 }));
    assert_eq!(low.loss_scale().unwrap(), left);
    // And one without a scale reads none.
    assert_eq!(trainer::<f32>(&device, 1, None, 0.01).loss_scale().unwrap(), None);
    for step in 4..8 {
        found.push(low.step(&[batch(step)], 0.01).unwrap());
    }
    assert_eq!(found, alone);
}
