//! Recordings: they are of what is run, whatever is put in the place of what they were made of; and one that fails leaves a device
//! that can be used.

#[path = "common/device.rs"]
mod device;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::cuda::{Buffer, Cuda, Device, Storage};
use warpstep::backend::ops::{PositionBackward, PositionForward, Update};
use warpstep::backend::step::{LossScale, UpdateWork, Work};
use warpstep::backend::{Act, Activations, Arena, Backend, Memory, Op, Param, StepContext, Use};
use warpstep::data::{Batch, Inputs, Targets};
use warpstep::error::{Error, Result};
use warpstep::model::layers::{Linear, Residual, Sequential};
use warpstep::model::{Init, Input, Layer, Loss, Mode, Model, Planner, Program, Tensor, Value};
use warpstep::optim::{Clip, NormClip, OptimizerOptions, Rule, StepParams, UpdatePlan};
use warpstep::real::Element;
use warpstep::train::step::{LossSums, Trainer, TrainerParts};

type Gpu = Cuda<f32>;

const SAMPLES: usize = 3;
const WIDTH: usize = 5;

/// How an operation ends at the run that it is told.
#[derive(Clone, Copy)]
enum Ends {
    Panics,
    Fails,
}

/// An operation that does nothing, but for one run.
#[derive(Clone)]
struct Fickle {
    x: Act,
    runs: Arc<AtomicUsize>,
    bad_run: usize,
    ends: Ends,
}

impl Op<Gpu> for Fickle {
    fn name(&self) -> &'static str {
        "fickle"
    }
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        visit(Use::Activation(self.x));
    }
    fn flops(&self) -> u64 {
        0
    }
    fn run(&self, _: &Gpu, _: &mut Memory<'_, Gpu>, _: &StepContext) -> Result<()> {
        match (self.runs.fetch_add(1, Ordering::Relaxed) + 1 == self.bad_run, self.ends) {
            (true, Ends::Panics) => panic!("this run was to panic"),
            (true, Ends::Fails) => Err(Error::Training("this run was to fail".into())),
            (false, _) => Ok(()),
        }
    }
}

struct FickleLayer {
    runs: Arc<AtomicUsize>,
    bad_run: usize,
    ends: Ends,
}

impl Layer<Gpu> for FickleLayer {
    fn kind(&self) -> &'static str {
        "fickle"
    }
    fn forward(&mut self, planner: &mut Planner<'_, Gpu>, x: Tensor) -> Result<Tensor> {
        let FickleLayer { runs, bad_run, ends } = self;
        planner.emit(Fickle { x: x.real("fickle")?, runs: runs.clone(), bad_run: *bad_run, ends: *ends });
        Ok(x)
    }
    fn backward(&mut self, _: &mut Planner<'_, Gpu>, dy: Tensor) -> Result<Option<Tensor>> {
        Ok(Some(dy))
    }
}

fn trainer(device: &Arc<Device>, bad_run: usize, ends: Ends) -> Trainer<Gpu> {
    let layers = Sequential::new()
        .then("first", Linear::new(4))
        .then("fickle", FickleLayer { runs: Arc::default(), bad_run, ends })
        .then("last", Linear::new(1));
    let parts = TrainerParts {
        backend: Gpu::new(device.clone()),
        model: Model::new(Box::new(layers), Loss::MeanSquaredError),
        input: Input::Real(vec![WIDTH]),
        batch_size: SAMPLES,
        accumulate: 1,
        optimizer: &OptimizerOptions::new(Rule::Sgd, 0.01),
        ema: None,
        seed: 1,
    };
    Trainer::new(parts).unwrap()
}

fn values(number: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7 + number * 5) % 11) as f32 / 11.0).collect()
}

fn batch(number: usize) -> Batch {
    let inputs = Inputs::Real(values(number, SAMPLES * WIDTH));
    Batch { inputs, targets: Targets::Real(values(number + 3, SAMPLES)), samples: SAMPLES }
}

#[test]
fn a_step_that_panics_or_fails_as_it_is_run_or_recorded_can_be_done_again() {
    let Some(device) = device::device() else { return };
    let mut sound = trainer(&device, usize::MAX, Ends::Fails);
    let expected: Vec<_> = (0..6).map(|number| sound.step(&[batch(number)], 0.01).unwrap()).collect();
    // The first run is as it is, the second and the third are recorded, one for each slot.
    for (bad_run, ends) in (1..=3).flat_map(|run| [(run, Ends::Panics), (run, Ends::Fails)]) {
        let mut fickle = trainer(&device, bad_run, ends);
        for (number, expected) in expected.iter().enumerate() {
            if number + 1 == bad_run {
                match (catch_unwind(AssertUnwindSafe(|| fickle.step(&[batch(number)], 0.01))), ends) {
                    (Err(_), Ends::Panics) => {}
                    (Ok(Err(error)), Ends::Fails) => assert!(error.to_string().contains("was to fail"), "{error}"),
                    (other, _) => panic!("step {number} found {other:?}"),
                }
                device.synchronize().unwrap();
            }
            assert_eq!(fickle.step(&[batch(number)], 0.01).unwrap(), *expected, "run {bad_run}, step {number}");
        }
    }
}

/// A model's program and its memory, with room for so many batches.
fn planned<B: Backend>(backend: &B, mode: Mode, slots: usize) -> (Program<B>, Activations<B>, Arena<B>) {
    let mut model = Model::<B>::new(Box::new(Sequential::new().then("0", Linear::new(4))), Loss::MeanSquaredError);
    let program = model.plan(&Input::Real(vec![WIDTH]), SAMPLES, mode).unwrap();
    let activations = program.activations_with_slots(backend, slots).unwrap();
    (program, activations, model.arena(backend, 1, 2).unwrap())
}

fn run<B: Backend>(backend: &B, program: &Program<B>, activations: &mut Activations<B>, arena: &mut Arena<B>) {
    backend.run(&program.ops, &mut Memory { arena, activations }, &StepContext::default()).unwrap();
}

fn write<B: Backend>(backend: &B, activations: &mut Activations<B>, value: Value, number: usize) {
    let Value::Real(act) = value else { panic!("{value:?}") };
    let range = activations.range(act);
    let values: Vec<B::Storage> = values(number, range.len()).into_iter().map(B::Storage::from_f32).collect();
    backend.upload(&mut activations.values, range.start, &values).unwrap();
}

fn read<S: Storage>(backend: &Cuda<S>, buffer: &Buffer<f32>) -> Vec<f32> {
    let mut values = vec![0.0; buffer.len()];
    backend.download(buffer, 0, &mut values).unwrap();
    values
}

#[test]
fn a_program_computes_with_the_slot_that_is_selected_however_often_it_was_replayed() {
    let Some(device) = device::device() else { return };
    let backend = Gpu::new(device);
    let output = |activations: &Activations<Gpu>, act| {
        let range = activations.range(act);
        let mut values = vec![0.0; range.len()];
        backend.download(&activations.values, range.start, &mut values).unwrap();
        values
    };
    let (program, mut activations, mut arena) = planned(&backend, Mode::Inference, 2);
    for round in 0..4 {
        for slot in 0..2 {
            activations.select(slot);
            assert_eq!(activations.selected(), Some(slot));
            write(&backend, &mut activations, program.input, 2 * round + slot);
        }
        for slot in 0..2 {
            activations.select(slot);
            run(&backend, &program, &mut activations, &mut arena);
            // Of memory that was never replayed.
            let (fresh, mut alone, _) = planned(&backend, Mode::Inference, 1);
            write(&backend, &mut alone, fresh.input, 2 * round + slot);
            run(&backend, &fresh, &mut alone, &mut arena);
            let expected = output(&alone, fresh.output);
            assert_eq!(output(&activations, program.output), expected, "round {round}, slot {slot}");
        }
    }
}

#[test]
fn gradients_go_to_the_buffer_that_the_arena_has_now() {
    let Some(device) = device::device() else { return };
    let backend = Gpu::new(device);
    let (program, mut activations, mut arena) = planned(&backend, Mode::Training, 1);
    write(&backend, &mut activations, program.input, 1);
    write(&backend, &mut activations, program.target.unwrap(), 2);
    for _ in 0..3 {
        run(&backend, &program, &mut activations, &mut arena);
    }
    let expected = read(&backend, &arena.gradients);
    assert!(expected.iter().any(|&value| value != 0.0));
    let before = std::mem::replace(&mut arena.gradients, backend.allocate(expected.len()).unwrap());
    run(&backend, &program, &mut activations, &mut arena);
    assert_eq!(read(&backend, &arena.gradients), expected);
    drop(before);
}

#[test]
fn gradients_of_a_loop_of_ones_own_in_f16_are_scaled_as_their_arena_says() {
    let Some(device) = device::device() else { return };
    let backend = Cuda::<f16>::new(device);
    let (program, mut activations, mut arena) = planned(&backend, Mode::Training, 1);
    write(&backend, &mut activations, program.input, 1);
    write(&backend, &mut activations, program.target.unwrap(), 2);
    let mut gradients = |scale: Option<f32>| {
        if let Some(scale) = scale {
            backend.set_loss_scale(&mut arena, LossScale { scale, good_steps: 3 }).unwrap();
        }
        assert_eq!(backend.loss_scale(&arena).unwrap(), scale.map(|scale| LossScale { scale, good_steps: 3 }));
        // As it is, recorded, replayed.
        let found: Vec<Vec<f32>> = (0..3)
            .map(|_| {
                run(&backend, &program, &mut activations, &mut arena);
                read(&backend, &arena.gradients)
            })
            .collect();
        assert!(found[0] == found[1] && found[1] == found[2]);
        found[0].clone()
    };
    let plain = gradients(None);
    assert!(plain.iter().any(|&value| value != 0.0));
    for scale in [1024.0, 8.0] {
        for (scaled, plain) in gradients(Some(scale)).iter().zip(&plain) {
            // But for values that are too small for all of the bits.
            assert!((scaled / scale - plain).abs() <= 1e-3 * plain.abs() + 1e-6, "{scaled} for {scale} times {plain}");
        }
    }
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(backend.set_loss_scale(&mut arena, LossScale { scale, good_steps: 0 }).is_err());
    }
}

/// An update of a plan by a queue, or at once.
fn update(
    backend: &Gpu,
    queue: Option<&mut <Gpu as Update>::Queue>,
    arena: &mut Arena<Gpu>,
    plan: &UpdatePlan,
    params: StepParams,
) {
    match queue {
        None => drop(backend.update(arena, plan, &params).unwrap()),
        Some(queue) => {
            let update = Some(UpdateWork { plan, params, average: None });
            backend.submit(queue, Work { arena, pass: None, turn: None, update }).unwrap();
            while backend.finished(queue, true).unwrap().is_some() {}
        }
    }
}

#[test]
fn a_queue_does_the_update_that_it_is_given_when_plan_arrays_or_what_becomes_of_gradients_change() {
    let Some(device) = device::device() else { return };
    let backend = Gpu::new(device);
    let [mut queued, mut at_once] = [1, 2].map(|_| planned(&backend, Mode::Training, 1).2);
    let layout = queued.layout.clone();
    let plan = |rule: Rule, max_norm: f64| {
        let options = OptimizerOptions {
            clip: Clip { value: None, norm: NormClip::Global { max_norm } },
            ..OptimizerOptions::new(rule, 0.1)
        };
        UpdatePlan::new(&options, &layout).unwrap()
    };
    let adam = Rule::Adam { betas: [0.9, 0.99], epsilon: 1e-8 };
    let mut queue = <Gpu as Update>::Queue::default();
    let (mut step, gradients) = (0, values(4, layout.padded_len()));
    // One place holds all plans, in turn.
    let mut now = plan(Rule::Sgd, 1.0);
    for (turn, (rule, max_norm)) in
        [(Rule::Sgd, 1.0), (adam, 0.5), (Rule::Sgd, 0.25), (adam, 0.5), (Rule::Sgd, 1.0)].into_iter().enumerate()
    {
        now.clone_from(&plan(rule, max_norm));
        for repeat in 0..5 {
            step += 1;
            // The third is replayed, and the fourth, but for what is to become of the gradients.
            let params = StepParams { learning_rate: 0.1, step, divisor: 1.0, zero_gradients: repeat == 3 };
            if repeat == 4 {
                let len = layout.padded_len();
                queued.slots = (0..2).map(|_| backend.allocate(len).unwrap()).collect();
                at_once.slots = (0..2).map(|_| backend.allocate(len).unwrap()).collect();
            }
            for (arena, queue) in [(&mut queued, Some(&mut queue)), (&mut at_once, None)] {
                backend.upload(&mut arena.gradients, 0, &gradients).unwrap();
                update(&backend, queue, arena, &now, params);
            }
            let place = format!("turn {turn}, repeat {repeat}");
            assert_eq!(read(&backend, &queued.parameters), read(&backend, &at_once.parameters), "{place}");
            assert_eq!(read(&backend, &queued.gradients), read(&backend, &at_once.gradients), "{place}");
            assert_eq!(read(&backend, &queued.slots[0]), read(&backend, &at_once.slots[0]), "{place}");
        }
    }
}

/// An own layer: a trained vector that is added to each row.
#[derive(Default)]
struct Shift {
    saved: Option<Param>,
}

struct ShiftForward(PositionForward);
struct ShiftBackward(PositionBackward);

impl<B: Backend> Op<B> for ShiftForward {
    fn name(&self) -> &'static str {
        "shift_forward"
    }
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        let PositionForward { x, weight, y, .. } = self.0;
        [Use::Activation(x), Use::Parameter(weight), Use::Activation(y)].into_iter().for_each(visit);
    }
    fn flops(&self) -> u64 {
        (self.0.batch * self.0.width) as u64
    }
    fn run(&self, backend: &B, memory: &mut Memory<'_, B>, step: &StepContext) -> Result<()> {
        backend.position_forward(memory, &self.0, step)
    }
}

impl<B: Backend> Op<B> for ShiftBackward {
    fn name(&self) -> &'static str {
        "shift_backward"
    }
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        [Use::Activation(self.0.dy), Use::Gradient(self.0.dweight)].into_iter().for_each(visit);
    }
    fn flops(&self) -> u64 {
        (self.0.batch * self.0.width) as u64
    }
    fn run(&self, backend: &B, memory: &mut Memory<'_, B>, step: &StepContext) -> Result<()> {
        backend.position_backward(memory, &self.0, step)
    }
}

impl<B: Backend> Layer<B> for Shift {
    fn kind(&self) -> &'static str {
        "shift"
    }
    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let weight = planner.parameter("shift", &[1, x.width()], Init::Constant(0.5))?;
        let (y, output) = planner.tensor(&x.shape, true);
        let (act, batch, width) = (x.real("shift")?, x.rows(), x.width());
        planner.emit(ShiftForward(PositionForward { x: act, weight, y, batch, time: 1, width }));
        self.saved = Some(weight);
        Ok(output)
    }
    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let Some(weight) = self.saved.take() else { return Ok(None) };
        let dweight = planner.gradient(weight);
        let (act, batch, width) = (dy.real("shift")?, dy.rows(), dy.width());
        planner.emit(ShiftBackward(PositionBackward { dy: act, dweight, batch, time: 1, width }));
        Ok(Some(dy))
    }
}

/// Losses and norms of steps whose micro-batches add up, with an own layer within a residual one, and what an evaluation finds after them.
fn with_an_own_layer<B: Backend + Update>(backend: B) -> Vec<f64> {
    let branch = Sequential::new().then("linear", Linear::new(WIDTH)).then("own", Shift::default());
    let layers = Sequential::new().then("block", Residual::new("", branch)).then("out", Linear::new(1));
    let mut trainer = Trainer::new(TrainerParts {
        backend,
        model: Model::new(Box::new(layers), Loss::MeanSquaredError),
        input: Input::Real(vec![WIDTH]),
        batch_size: SAMPLES,
        accumulate: 2,
        optimizer: &OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.99], epsilon: 1e-8 }, 0.01),
        ema: None,
        seed: 1,
    })
    .unwrap();
    let steps = (0..6).map(|step| trainer.step(&[batch(2 * step), batch(2 * step + 1)], 0.01).unwrap());
    let mut found: Vec<f64> = steps.flat_map(|report| [report.loss, report.outcome.grad_norm]).collect();
    found.extend(trainer.evaluate((0..3).map(|number| Ok(batch(number)))).unwrap().iter().map(LossSums::mean));
    found
}

#[test]
fn an_own_operation_with_a_parameter_trains_in_recorded_steps_as_on_the_cpu() {
    let Some(device) = device::device() else { return };
    let (found, expected) = (with_an_own_layer(Gpu::new(device)), with_an_own_layer(Cpu::<f32>::new()));
    assert!(expected.windows(2).all(|pair| pair[0] != pair[1]), "{expected:?}");
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-4 * expected, "{found} for {expected}");
    }
}
