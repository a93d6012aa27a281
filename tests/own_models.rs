//! Models and loops of one's own, over the library alone: what a program gets wrong is an error that names it, what it gets right has
//! the numbers that it asked for.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::ActivationKind;
use warpstep::backend::{Act, Backend, Memory, Op, StepContext, Use};
use warpstep::data::{Batch, Inputs, Targets};
use warpstep::error::Result;
use warpstep::model::layers::{
    Activation, BatchNorm, Dropout, Embedding, Flatten, LayerNorm, Linear, MeanOverTime, Parallel, Residual, RmsNorm,
    Sequential,
};
use warpstep::model::{GradientCheck, Input, Layer, Loss, Mode, Model, Planner, Probe, Tensor};
use warpstep::optim::{OptimizerOptions, Rule};
use warpstep::random::{Philox, Purpose};
use warpstep::train::checkpoint::{self, RunState, Which};
use warpstep::train::infer::Predictor;
use warpstep::train::step::{Trainer, TrainerParts};

const WIDTH: usize = 6;
const CLASSES: usize = 3;

fn random(number: u64) -> Philox {
    Philox::new(11, Purpose::Sampling, number as u32)
}

/// `WIDTH` features of which the largest of the first three is the class.
fn batch(number: u64, samples: usize) -> Batch {
    let stream = random(number);
    let x: Vec<f32> = (0..(samples * WIDTH) as u64).map(|i| stream.normal(i) as f32).collect();
    let class = |x: &[f32]| (0..CLASSES).max_by(|&a, &b| x[a].total_cmp(&x[b])).unwrap() as i32;
    let targets = x.chunks_exact(WIDTH).map(class).collect();
    Batch { inputs: Inputs::Real(x), targets: Targets::Index(targets), samples }
}

fn layers<B: Backend>() -> Sequential<B> {
    let branch = Sequential::new()
        .then("norm", Box::new(BatchNorm::new()) as Box<dyn Layer<B>>)
        .then("relu", Activation::new(ActivationKind::Relu))
        .then("dropout", Dropout::new(0.2))
        .then("linear", Linear::new(16));
    Sequential::new()
        .then("in", Linear::new(16))
        .then("block", Residual::new("", branch))
        .then("out", Linear::new(CLASSES))
}

const CROSS_ENTROPY: Loss = Loss::CrossEntropy { label_smoothing: 0.0, ignore_index: -1 };

fn adam(rate: f64) -> OptimizerOptions {
    OptimizerOptions {
        weight_decay: 0.01,
        decoupled: true,
        ..OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.999], epsilon: 1e-8 }, rate)
    }
}

fn trainer_of(model: Model<Cpu<f32>>, input: Input, batch_size: usize, ema: Option<f64>) -> Result<Trainer<Cpu<f32>>> {
    let optimizer = adam(0.01);
    Trainer::new(TrainerParts {
        backend: Cpu::new(),
        model,
        input,
        batch_size,
        accumulate: 1,
        optimizer: &optimizer,
        ema,
        seed: 3,
    })
}

fn trainer(batch_size: usize, ema: Option<f64>) -> Result<Trainer<Cpu<f32>>> {
    trainer_of(Model::new(Box::new(layers()), CROSS_ENTROPY), Input::Real(vec![WIDTH]), batch_size, ema)
}

#[test]
fn a_model_in_code_is_trained_evaluated_saved_and_predicted_with() {
    let folder = TempDir::new().unwrap();
    let mut trainer = trainer(32, Some(0.9)).unwrap();
    for step in 0..300 {
        trainer.step(&[batch(step, 32)], 0.01).unwrap();
    }
    let held_out = batch(1_000_000, 20);
    let sums = trainer.evaluate(std::iter::once(Ok(held_out.clone()))).unwrap();
    assert!(sums[0].accuracy() > 0.8, "{sums:?}");
    assert_eq!(trainer.evaluate(std::iter::once(Ok(held_out.clone()))).unwrap(), sums);
    let saved = checkpoint::save(folder.path(), &trainer, &RunState::new(3, String::new(), String::new())).unwrap();
    let file = checkpoint::weights_file(&saved);
    let model = Model::new(Box::new(layers()), CROSS_ENTROPY);
    let mut predictor = Predictor::new(Cpu::<f32>::new(), model, &Input::Real(vec![WIDTH]), &file).unwrap();
    let (logits, shape) = predictor.run(&Input::Real(vec![WIDTH]), &held_out.inputs, 20).unwrap();
    assert_eq!(shape, [20, CLASSES]);
    let Targets::Index(targets) = &held_out.targets else { unreachable!() };
    let largest = |row: &[f32]| (0..CLASSES).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i32;
    let right = logits.chunks_exact(CLASSES).zip(targets).filter(|(row, target)| largest(row) == **target).count();
    assert_eq!(right as f64, sums[0].right);
    // And by the trainer itself, whose weights are left as they were.
    let before = trainer.arena().parameters.clone();
    assert_eq!(trainer.predict(&held_out.inputs, 20).unwrap(), (logits, shape));
    assert_eq!(trainer.arena().parameters, before);
    assert!(trainer.predict(&held_out.inputs, 19).is_err());
    assert!(trainer.predict(&Inputs::Tokens(vec![0; 20 * WIDTH]), 20).is_err());
}

#[test]
fn checkpoints_are_of_the_step_that_the_trainer_stands_at() {
    let folder = TempDir::new().unwrap();
    let mut trainer = trainer(8, None).unwrap();
    let state = RunState::new(3, String::new(), String::new());
    let mut weights = Vec::new();
    for step in 1..=3 {
        trainer.step(&[batch(step, 8)], 0.01).unwrap();
        let path = checkpoint::save(folder.path(), &trainer, &state).unwrap();
        assert_eq!(path, folder.path().join(checkpoint::folder_name(step)));
        weights.push(trainer.arena().parameters.clone());
    }
    assert_eq!(
        checkpoint::find(folder.path(), Which::Latest).unwrap(),
        Some(folder.path().join(checkpoint::folder_name(3)))
    );
    for step in 1..=3 {
        let mut other = self::trainer(8, None).unwrap();
        let state = checkpoint::load(&folder.path().join(checkpoint::folder_name(step)), &mut other).unwrap();
        assert_eq!((state.step, other.counters().step, other.counters().applied), (step, step, step));
        assert_eq!(other.arena().parameters, weights[step as usize - 1]);
    }
}

#[test]
fn batches_that_do_not_fit_are_errors_after_which_steps_go_on() {
    let mut trainer = trainer(8, None).unwrap();
    let mut sound = self::trainer(8, None).unwrap();
    assert_eq!(trainer.step(&[batch(0, 8)], 0.01).unwrap(), sound.step(&[batch(0, 8)], 0.01).unwrap());
    let with_targets = |targets| Batch { targets, ..batch(1, 8) };
    let tokens = Batch { inputs: Inputs::Tokens(vec![0; 8 * WIDTH]), ..batch(1, 8) };
    let wrong = [
        ("more samples", Batch { samples: 9, ..batch(1, 8) }),
        ("fewer samples", Batch { samples: 7, ..batch(1, 8) }),
        ("no sample", Batch { samples: 0, ..batch(1, 8) }),
        ("nothing", batch(1, 0)),
        ("a larger batch", batch(1, 9)),
        ("tokens", tokens),
        ("real targets", with_targets(Targets::Real(vec![0.0; 8]))),
        ("too few targets", with_targets(Targets::Index(vec![0; 7]))),
        ("a class that is none", with_targets(Targets::Index(vec![CLASSES as i32; 8]))),
        ("a class below 0", with_targets(Targets::Index(vec![-7; 8]))),
    ];
    for (what, batch) in wrong {
        assert!(trainer.step(std::slice::from_ref(&batch), 0.01).is_err(), "{what}");
        // Evaluations are of batches of any size.
        assert_eq!(trainer.evaluate(std::iter::once(Ok(batch))).is_ok(), what == "a larger batch", "{what}");
    }
    for rate in [f64::NAN, f64::INFINITY] {
        assert!(trainer.step(&[batch(1, 8)], rate).is_err());
    }
    for step in 1..4 {
        assert_eq!(trainer.step(&[batch(step, 8)], 0.01).unwrap(), sound.step(&[batch(step, 8)], 0.01).unwrap());
    }
}

#[test]
fn a_step_of_which_a_later_batch_does_not_fit_can_be_taken_again() {
    let optimizer = adam(0.01);
    let accumulating = || {
        Trainer::new(TrainerParts {
            backend: Cpu::<f32>::new(),
            model: Model::new(Box::new(layers()), CROSS_ENTROPY),
            input: Input::Real(vec![WIDTH]),
            batch_size: 8,
            accumulate: 2,
            optimizer: &optimizer,
            ema: None,
            seed: 3,
        })
        .unwrap()
    };
    let (mut trainer, mut sound) = (accumulating(), accumulating());
    for step in 0..3 {
        assert!(trainer.step(&[batch(step, 8), Batch { samples: 7, ..batch(9, 8) }], 0.01).is_err());
        let good = [batch(2 * step, 8), batch(2 * step + 1, 8)];
        assert_eq!(trainer.step(&good, 0.01).unwrap(), sound.step(&good, 0.01).unwrap());
    }
    assert_eq!(trainer.counters(), sound.counters());
}

#[test]
fn what_no_training_can_be_made_of_is_refused() {
    let told = |found: Result<Trainer<Cpu<f32>>>| found.map(drop).map_err(|error| error.to_string());
    assert!(told(trainer(0, None)).unwrap_err().contains("a batch of 1 sample or more"));
    for decay in [-0.1, 1.0, 1.5, f64::NAN] {
        assert!(told(trainer(4, Some(decay))).unwrap_err().contains("from 0 to below 1"), "{decay}");
    }
    let of = |layers: Sequential<Cpu<f32>>| Model::new(Box::new(layers.then("out", Linear::new(2))), CROSS_ENTROPY);
    let norm = |epsilon, momentum| of(Sequential::new().then("0", BatchNorm::new().with_constants(epsilon, momentum)));
    let real = || Input::Real(vec![WIDTH]);
    let smoothing = Loss::CrossEntropy { label_smoothing: 1.5, ignore_index: -1 };
    let wrong: Vec<(&str, Model<Cpu<f32>>, Input)> = vec![
        ("at least one parameter", Model::new(Box::new(Sequential::new()), CROSS_ENTROPY), real()),
        ("1 output or more", of(Sequential::new().then("0", Linear::new(0))), real()),
        ("1 value or more a sample", of(Sequential::new()), Input::Real(vec![0])),
        ("parameter `out.weight` twice", of(Sequential::new().then("out", Linear::new(2))), real()),
        ("kept tensor `0.seen` twice", of(Sequential::new().then("0", Keeps).then("0", Keeps)), real()),
        ("a probability from 0 to below 1", of(Sequential::new().then("0", Dropout::new(1.0))), real()),
        ("an epsilon above 0", norm(-1.0, 0.1), real()),
        ("an epsilon above 0", of(Sequential::new().then("0", LayerNorm::new(0.0))), real()),
        ("an epsilon above 0", of(Sequential::new().then("0", RmsNorm::new(f64::NAN))), real()),
        ("a momentum from 0 to 1", norm(1e-5, 1.5), real()),
        ("a momentum from 0 to 1", norm(1e-5, f64::NAN), real()),
        ("expected real values", Model::new(Box::new(layers()), CROSS_ENTROPY), Input::Tokens(4)),
        ("expected tokens", of(Sequential::new().then("0", Embedding::new(5, 4))), real()),
        ("two branches", of(Sequential::new().then("0", Residual::new("", Linear::new(2)))), real()),
        ("label smoothing from 0", Model::new(Box::new(layers()), smoothing), real()),
    ];
    for (expected, model, input) in wrong {
        match trainer_of(model, input, 4, None) {
            Err(error) => assert!(error.to_string().contains(expected), "{error}"),
            Ok(_) => panic!("a model was taken that should tell of {expected}"),
        }
    }
}

#[test]
fn tokens_that_are_none_are_refused() {
    let model = || {
        Model::new(
            Box::new(
                Sequential::<Cpu<f32>>::new()
                    .then("0", Embedding::new(5, 4))
                    .then("1", MeanOverTime::new())
                    .then("2", Linear::new(CLASSES)),
            ),
            CROSS_ENTROPY,
        )
    };
    let mut trainer = trainer_of(model(), Input::Tokens(3), 2, None).unwrap();
    for token in [5, -1, i32::MIN] {
        let batch = Batch {
            inputs: Inputs::Tokens(vec![0, 1, token, 2, 3, 4]),
            targets: Targets::Index(vec![0, 1]),
            samples: 2,
        };
        let error = trainer.step(&[batch], 0.01).unwrap_err().to_string();
        assert!(error.contains("expected tokens from 0 to 4"), "{error}");
    }
}

/// Keeps a tensor, and gives what it is given.
struct Keeps;

impl<B: Backend> Layer<B> for Keeps {
    fn kind(&self) -> &'static str {
        "keeps"
    }
    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        planner.state("seen", &[1], 0.0)?;
        Ok(x)
    }
    fn backward(&mut self, _: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        Ok(Some(dy))
    }
}

#[test]
fn branches_side_by_side_keep_the_dimensions_before_their_widths() {
    let branch = |name: &str, width| (name.to_owned(), Box::new(Linear::new(width)) as Box<dyn Layer<Cpu<f64>>>);
    let layer = Parallel::new(vec![branch("narrow", 2), branch("wide", 3)]);
    let mut probe = Probe::<f64>::new(layer, &Input::Real(vec![4, WIDTH]), 2, Mode::Training, 1).unwrap();
    assert_eq!(probe.output_shape(), [2, 4, 5]);
    probe.set_input(&(0..8 * WIDTH as u64).map(|i| random(1).normal(i)).collect::<Vec<_>>()).unwrap();
    let check = probe.check_gradients(1, 100).unwrap();
    assert!(check.worst().1 < 1e-6, "{check:?}");
    // Of branches that differ in more, an error.
    let flat = ("flat".to_owned(), Box::new(Flatten::new()) as Box<dyn Layer<Cpu<f64>>>);
    let layer = Parallel::new(vec![branch("narrow", 2), flat]);
    let found = Probe::<f64>::new(layer, &Input::Real(vec![4, WIDTH]), 2, Mode::Training, 1);
    assert!(found.err().is_some_and(|error| error.to_string().starts_with("parallel: expected branches")));
}

/// Counts how often it is planned for evaluation.
struct Counting(Arc<AtomicUsize>);

impl<B: Backend> Layer<B> for Counting {
    fn kind(&self) -> &'static str {
        "counting"
    }
    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        self.0.fetch_add(usize::from(planner.mode() == Mode::Evaluation), Ordering::Relaxed);
        Ok(x)
    }
    fn backward(&mut self, _: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        Ok(Some(dy))
    }
}

#[test]
fn evaluations_are_planned_once() {
    let planned = Arc::new(AtomicUsize::new(0));
    let layers = Sequential::new().then("0", Counting(Arc::clone(&planned))).then("1", Linear::new(CLASSES));
    let model = Model::new(Box::new(layers), CROSS_ENTROPY);
    let mut trainer = trainer_of(model, Input::Real(vec![WIDTH]), 8, None).unwrap();
    trainer.plan_evaluations(&[8, 5]).unwrap();
    for _ in 0..2 {
        trainer.evaluate([8, 5, 8].into_iter().map(|samples| Ok(batch(1, samples)))).unwrap();
    }
    assert_eq!(planned.load(Ordering::Relaxed), 2);
}

/// Batches that a program makes of its own may panic, and it may go on.
#[test]
fn a_panic_within_an_evaluation_leaves_the_parameters_in_their_place() {
    let mut trainer = trainer(8, Some(0.5)).unwrap();
    for step in 0..3 {
        trainer.step(&[batch(step, 8)], 0.01).unwrap();
    }
    let parameters = trainer.arena().parameters.clone();
    assert_ne!(Some(&parameters), trainer.average());
    let batches = [batch(9, 8)].into_iter().map(Ok).chain(std::iter::once_with(|| panic!("a program's own")));
    catch_unwind(AssertUnwindSafe(|| trainer.evaluate(batches))).unwrap_err();
    assert_eq!(trainer.arena().parameters, parameters);
}

/// `y = x`, with gradients that are not numbers.
struct Broken;

struct Spoil {
    from: Act,
    to: Act,
    value: f64,
}

impl Op<Cpu<f64>> for Spoil {
    fn name(&self) -> &'static str {
        "spoil"
    }
    fn uses(&self, visit: &mut dyn FnMut(Use)) {
        [self.from, self.to].map(Use::Activation).into_iter().for_each(visit);
    }
    fn flops(&self) -> u64 {
        0
    }
    fn run(&self, _: &Cpu<f64>, memory: &mut Memory<'_, Cpu<f64>>, _: &StepContext) -> Result<()> {
        let (from, to) = (memory.activations.range(self.from), memory.activations.range(self.to));
        memory.activations.values.copy_within(from, to.start);
        memory.activations.values[to].iter_mut().for_each(|value| *value *= self.value);
        Ok(())
    }
}

impl Layer<Cpu<f64>> for Broken {
    fn kind(&self) -> &'static str {
        "broken"
    }
    fn forward(&mut self, planner: &mut Planner<'_, Cpu<f64>>, x: Tensor) -> Result<Tensor> {
        let (to, y) = planner.tensor(&x.shape, true);
        planner.emit(Spoil { from: x.real("broken")?, to, value: 1.0 });
        Ok(y)
    }
    fn backward(&mut self, planner: &mut Planner<'_, Cpu<f64>>, dy: Tensor) -> Result<Option<Tensor>> {
        let (to, dx) = planner.tensor(&dy.shape, true);
        planner.emit(Spoil { from: dy.real("broken")?, to, value: f64::NAN });
        Ok(Some(dx))
    }
}

#[test]
fn a_gradient_that_is_no_number_is_the_worst_of_all() {
    let mut probe = Probe::<f64>::new(Broken, &Input::Real(vec![3]), 2, Mode::Training, 1).unwrap();
    probe.set_input(&[1.0; 6]).unwrap();
    let check = probe.check_gradients(1, 100).unwrap();
    assert!(check.worst().1.is_nan(), "{check:?}");
    let errors = vec![("a".to_owned(), 0.5), ("b".to_owned(), -f64::NAN), ("c".to_owned(), f64::INFINITY)];
    assert_eq!(GradientCheck { errors }.worst().0, "b");
}
