//! The affine map, and a whole network of every sequence operation.

use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::{
    ActivationBackward, ActivationForward, ActivationKind, FusedActivation, FusedSlope, LinearBackward, LinearForward,
};
use warpstep::model::layers::{Activation, Linear, Residual, Sequential};
use warpstep::model::presets::GptOptions;
use warpstep::model::{Input, Loss, Mode, Model, Probe, Program, Value};
use warpstep::real::Real;

use crate::*;

/// y, dx, dweight, dbias.
fn reference<R: Real>([x, dy, weight, bias]: [&[f64]; 4], [rows, inputs, outputs]: [usize; 3]) -> Vec<Vec<f64>> {
    let (x, dy, weight, bias) = (cast::<R>(x), cast::<R>(dy), cast::<R>(weight), cast::<R>(bias));
    let (mut y, mut dx) = (vec![R::zero(); rows * outputs], vec![R::zero(); rows * inputs]);
    let (mut dweight, mut dbias) = (vec![R::zero(); weight.len()], vec![R::zero(); outputs]);
    for r in 0..rows {
        for o in 0..outputs {
            let d = dy[r * outputs + o];
            dbias[o] += d;
            for i in 0..inputs {
                y[r * outputs + o] += x[r * inputs + i] * weight[o * inputs + i];
                dx[r * inputs + i] += d * weight[o * inputs + i];
                dweight[o * inputs + i] += d * x[r * inputs + i];
            }
            y[r * outputs + o] += bias[o];
        }
    }
    vec![wide(&y), wide(&dx), wide(&dweight), wide(&dbias)]
}

#[test]
fn an_affine_map_is_what_it_is_for_any_number_of_threads() {
    let seed = fresh_seed();
    for size in [[1, 1, 1], [3, 5, 7], [65, 33, 17], [200, 130, 65], [70, 1500, 40], [1100, 24, 50]] {
        let [rows, inputs, outputs] = size;
        let (x, dy) = (normal(seed, 0, rows * inputs), normal(seed, 1, rows * outputs));
        let (weight, bias) = (normal(seed, 2, inputs * outputs), normal(seed, 3, outputs));
        let what = format!("linear {size:?}");
        let found = same_bits(&what, || {
            let mut bed = Bed::<Cpu<f32>>::cpu();
            let (x, dy) = (bed.real(&x), bed.real(&dy));
            let (weight, bias) = (bed.parameter(&weight), bed.parameter(&bias));
            let (y, dx) = (bed.empty(rows * outputs), bed.empty(rows * inputs));
            let forward = LinearForward { x, weight, bias: Some(bias), y, rows, inputs, outputs, activation: None };
            let (dweight, dbias) = (first(weight), Some(first(bias)));
            let backward =
                LinearBackward { x, dy, weight, dx: Some(dx), dweight, dbias, rows, inputs, outputs, slope: None };
            let backward = bed.run(&backward).unwrap();
            let forward = bed.run(&forward).unwrap();
            vec![forward.get(y), backward.get(dx), backward.gradient(weight), backward.gradient(bias)]
        });
        let given = [&x[..], &dy[..], &weight[..], &bias[..]];
        judge(&what, &found, &reference::<f32>(given, size), &reference::<f64>(given, size));
    }
}

#[test]
fn a_joined_operation_has_the_bits_of_its_parts() {
    use ActivationKind::*;
    let seed = fresh_seed();
    let (rows, inputs, outputs) = (70, 37, 500);
    for (kind, bias) in [Relu, GeluTanh, Gelu, Silu, Sigmoid, Tanh].into_iter().flat_map(|k| [(k, false), (k, true)]) {
        let mut bed = Bed::<Cpu<f32>>::cpu();
        let (x, dy) = (bed.real(&normal(seed, 0, rows * inputs)), bed.real(&normal(seed, 1, rows * outputs)));
        let weight = bed.parameter(&normal(seed, 2, inputs * outputs));
        let bias = bias.then(|| bed.parameter(&normal(seed, 3, outputs)));
        let (y, kept) = (bed.empty(rows * outputs), bed.empty(rows * outputs));
        let forward = LinearForward { x, weight, bias, y, rows, inputs, outputs, activation: None };
        let before = bed.run(&forward).unwrap().get(y);
        let given = bed.real(&before);
        let expected = bed.run(&ActivationForward { x: given, y, kind, len: rows * outputs }).unwrap().get(y);
        for keep in [None, Some(kept)] {
            let fused = LinearForward { activation: Some(FusedActivation { kind, kept: keep }), ..forward.clone() };
            let ran = bed.run(&fused).unwrap();
            assert_eq!(ran.get(y), expected, "{kind:?}");
            if keep.is_some() {
                assert_eq!(ran.get(kept), before, "{kind:?}");
            }
        }
        let (dx, of) = (bed.empty(rows * inputs), bed.real(&normal(seed, 4, rows * inputs)));
        let dweight = first(weight);
        let backward =
            LinearBackward { x, dy, weight, dx: Some(dx), dweight, dbias: None, rows, inputs, outputs, slope: None };
        let d = bed.run(&backward).unwrap().get(dx);
        let d = bed.real(&d);
        for of in [of, x] {
            let parts = ActivationBackward { x: of, dy: d, dx, kind, len: rows * inputs };
            let expected = bed.run(&parts).unwrap().get(dx);
            let fused = LinearBackward { slope: Some(FusedSlope { kind, of }), ..backward.clone() };
            assert_eq!(bed.run(&fused).unwrap().get(dx), expected, "{kind:?}");
        }
    }
}

fn names<B: Backend>(program: &Program<B>) -> Vec<&'static str> {
    program.ops.iter().map(|op| op.name()).collect()
}

#[test]
fn functions_after_affine_maps_take_no_operation_of_their_own() {
    for kind in [ActivationKind::Relu, ActivationKind::GeluTanh] {
        let layers = Sequential::new()
            .then("0", Linear::new(9))
            .then("1", Activation::new(kind))
            .then("2", Linear::new(7))
            .then("3", Activation::new(kind))
            .then("4", Linear::new(2));
        let mut model = Model::<Cpu<f32>>::new(Box::new(layers), Loss::MeanSquaredError);
        let training = model.plan(&Input::Real(vec![5]), 3, Mode::Training).unwrap();
        let (forward, backward) = ("linear_forward", "linear_backward");
        assert_eq!(names(&training), [forward, forward, forward, "mean_squared_error", backward, backward, backward]);
        assert_eq!(training.forward_ops, 4);
        // What goes into ReLU is not kept: its slope is that of its value. Nothing is kept without a backward.
        let lives = |program: &Program<Cpu<f32>>| program.value_lifetimes.iter().filter(|life| life.len > 0).count();
        let inference = model.plan(&Input::Real(vec![5]), 3, Mode::Inference).unwrap();
        assert_eq!(names(&inference), [forward; 3]);
        assert_eq!(lives(&inference), 4);
        // Input, target, metrics, three outputs and three gradients of them; GELU's two inputs besides.
        assert_eq!(lives(&training), if kind == ActivationKind::Relu { 9 } else { 11 });
    }
}

/// The shortcut around the function reads what goes into it, and the gradient of what comes out of it.
fn with_a_shortcut<B: Backend>(kind: ActivationKind) -> Sequential<B> {
    let around = Residual::new("inner", Activation::new(kind));
    Sequential::new().then("0", Linear::new(6)).then("1", around).then("2", Linear::new(4))
}

#[test]
fn what_something_else_reads_is_not_joined_away() {
    for kind in [ActivationKind::Relu, ActivationKind::GeluTanh] {
        let mut model = Model::<Cpu<f32>>::new(Box::new(with_a_shortcut(kind)), Loss::MeanSquaredError);
        let program = model.plan(&Input::Real(vec![5]), 3, Mode::Training).unwrap();
        let found = names(&program);
        assert!(!found.contains(&"activation_forward") && found.contains(&"activation_backward"), "{found:?}");
        let seed = fresh_seed();
        let mut probe =
            Probe::<f64>::new(with_a_shortcut(kind), &Input::Real(vec![5]), 3, Mode::Training, seed).unwrap();
        probe.set_input(&normal(seed, 0, 15)).unwrap();
        let check = probe.check_gradients(seed, 200).unwrap();
        assert!(check.worst().1 < 1e-6, "{:?}", check.errors);
    }
}

#[test]
fn a_whole_gpt_has_the_same_gradients_for_any_number_of_threads() {
    let seed = fresh_seed();
    let options = GptOptions { layers: 2, heads: 4, width: 64, dropout: 0.1, bias: true, ..GptOptions::default() };
    let (vocabulary, time, batch) = (65, 70, 5);
    let (tokens, targets) = (whole(seed, 0, batch * time, 65), whole(seed, 1, batch * time, 65));
    same_bits("GPT", || {
        let backend = Cpu::<f32>::new();
        let mut model = options.build::<Cpu<f32>>(vocabulary, time).unwrap();
        let program = model.plan(&Input::Tokens(time), batch, Mode::Training).unwrap();
        let mut arena = model.arena(&backend, 1, 0).unwrap();
        let mut activations = program.activations(&backend).unwrap();
        for (value, numbers) in [(Some(program.input), &tokens), (program.target, &targets)] {
            let Some(Value::Tokens(indices)) = value else { panic!("a GPT takes and tells tokens") };
            let range = activations.index_range(indices);
            activations.indices[range].copy_from_slice(numbers);
        }
        let mut memory = Memory { arena: &mut arena, activations: &mut activations };
        backend.run(&program.ops, &mut memory, &StepContext { seed: 1, ..StepContext::default() }).unwrap();
        vec![wide(&activations.values[activations.range(program.metrics.unwrap())]), wide(&arena.gradients)]
    });
}
