//! The suite `kernel`: no operation is left out of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::ActivationKind;
use warpstep::backend::profile::Kind;
use warpstep::backend::{Op, Use};
use warpstep::bench::layers::cases;
use warpstep::model::layers::{HiddenActivation, NormKind, RotaryOptions, Window};
use warpstep::model::presets::{
    AudioCnnOptions, CnnOptions, Fit, Goal, GptOptions, GptPositions, LayerOptions, LinearOptions, MlpOptions,
    ModelOptions, Preset, ResNetOptions, TextCnnOptions, TextEncoderOptions,
};
use warpstep::model::{Input, Mode};

type B = Cpu<f32>;

const KINDS: [Kind; 3] = [Kind::Host, Kind::Gpu, Kind::Emulated];

/// What all cases of a kind emit, as `told` tells it of an operation.
fn timed(kind: Kind, told: impl Fn(&dyn Op<B>) -> String) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for case in cases(kind) {
        let planned = case.plan::<B>().unwrap_or_else(|error| panic!("{}: {error}", case.name));
        found.extend(planned.alone.program.ops.iter().map(|op| told(&**op)));
    }
    found
}

/// The operations that src/backend/ops/ declares: `Rotary => rotary {` below `op! {`.
fn declared() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/ops")).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        for declaration in text.split("\nop! {\n").skip(1) {
            let head = declaration.lines().find(|line| !line.trim_start().starts_with("//")).unwrap();
            let name = head.split_once(" => ").and_then(|(_, rest)| rest.strip_suffix(" {"));
            found.insert(name.unwrap_or_else(|| panic!("no name in {head:?}")).to_owned());
        }
    }
    found
}

#[test]
fn every_operation_that_the_library_declares_is_timed_on_every_kind_of_device() {
    let declared = declared();
    assert!(declared.len() > 30 && declared.contains("rotary"), "{declared:?}");
    for kind in KINDS {
        let timed = timed(kind, |op| op.name().to_owned());
        assert_eq!(declared.difference(&timed).collect::<Vec<_>>(), Vec::<&String>::new(), "{kind:?}");
    }
}

#[test]
fn every_function_is_timed_alone_on_every_kind_of_device() {
    for kind in KINDS {
        let timed: BTreeSet<String> = cases(kind).iter().map(|case| case.name.clone()).collect();
        for function in ActivationKind::ALL {
            let family = format!("{}/", function.name());
            assert!(timed.iter().any(|name| name.starts_with(&family)), "{family} on {kind:?}: {timed:?}");
        }
    }
}

/// An operation and what it names, which tells what was fused into it. Of any number of parts, none is counted.
fn form(op: &dyn Op<B>) -> String {
    let name = op.name();
    if ["concatenate", "split"].contains(&name) {
        return name.to_owned();
    }
    let mut named: Vec<Use> = Vec::new();
    op.uses(&mut |used| {
        if !named.contains(&used) {
            named.push(used);
        }
    });
    let count = |is: fn(&Use) -> bool| named.iter().filter(|used| is(used)).count();
    let (activations, indices) =
        (count(|used| matches!(used, Use::Activation(_))), count(|used| matches!(used, Use::Indices(_))));
    let (parameters, gradients) =
        (count(|used| matches!(used, Use::Parameter(_))), count(|used| matches!(used, Use::Gradient(_))));
    format!("{name}: {activations} activations, {indices} indices, {parameters} parameters, {gradients} gradients")
}

/// A model of each preset and in each form that differs in its operations, with a sample's input.
fn models() -> Vec<(Preset, Fit, Input)> {
    let fit = |goal| Fit { vocabulary: None, context: None, goal, padding: None, outputs: 0 };
    let tokens = |goal, padding| Fit { vocabulary: Some(50), context: Some(16), padding, ..fit(goal) };
    let mlp =
        |activation| Preset::Mlp(MlpOptions { hidden: vec![16, 8], activation, dropout: 0.1, ..MlpOptions::default() });
    let cnn = |batch_norm| Preset::Cnn(CnnOptions { batch_norm, dropout: 0.1, ..CnnOptions::default() });
    let resnet = |depth| Preset::ResNet(ResNetOptions::of_depth(depth).unwrap());
    let gpt = GptOptions { layers: 2, heads: 4, width: 32, ..GptOptions::default() };
    let gpt2 = GptOptions { bias: true, dropout: 0.1, ..gpt.clone() };
    let llama = GptOptions {
        norm: NormKind::RmsNorm,
        positions: GptPositions::Rotary(RotaryOptions::default()),
        activation: HiddenActivation::Swiglu,
        kv_heads: Some(2),
        tied: false,
        ..gpt.clone()
    };
    let list = Preset::Layers(vec![
        LayerOptions::AveragePool2d(Window::tiled([2, 2])),
        LayerOptions::Flatten,
        LayerOptions::Activation(ActivationKind::Tanh),
        LayerOptions::Linear { outputs: None, bias: true },
    ]);
    let linear = LinearOptions::default();
    let mut models = vec![
        (Preset::Linear(linear), fit(Goal::Values(3)), Input::Real(vec![7])),
        (Preset::Logistic(linear), fit(Goal::Classes(2)), Input::Real(vec![7])),
    ];
    let classes = Goal::Classes(10);
    for activation in [ActivationKind::Relu, ActivationKind::GeluTanh] {
        models.push((mlp(activation), fit(classes), Input::Real(vec![20])));
    }
    for preset in [list, cnn(false), cnn(true), resnet(18), resnet(20), Preset::AudioCnn(AudioCnnOptions::default())] {
        let channels = if matches!(preset, Preset::AudioCnn(_)) { 1 } else { 3 };
        models.push((preset, fit(classes), Input::Real(vec![channels, 32, 32])));
    }
    for gpt in [gpt, gpt2, llama] {
        for recompute in [false, true] {
            let preset = Preset::Gpt(GptOptions { recompute, ..gpt.clone() });
            models.push((preset, tokens(Goal::NextToken, None), Input::Tokens(16)));
        }
    }
    models.push((Preset::TextCnn(TextCnnOptions::default()), tokens(classes, None), Input::Tokens(16)));
    models.push((Preset::TextEncoder(TextEncoderOptions::default()), tokens(classes, Some(0)), Input::Tokens(16)));
    models
}

/// Forms that are not timed: an operation that does a part of what a timed one does, and why that is enough.
const PARTS: [(&str, &str); 13] = [
    ("batch_norm_inference: 3 activations, 0 indices, 2 parameters, 0 gradients", EPILOGUE),
    ("conv2d_backward: 3 activations, 0 indices, 1 parameters, 1 gradients", FIRST),
    ("conv2d_backward: 3 activations, 0 indices, 1 parameters, 2 gradients", FIRST),
    ("linear_backward: 2 activations, 0 indices, 1 parameters, 2 gradients", FIRST),
    ("cross_entropy: 2 activations, 1 indices, 0 parameters, 0 gradients", EVALUATION),
    ("mean_squared_error: 3 activations, 0 indices, 0 parameters, 0 gradients", EVALUATION),
    ("binary_cross_entropy: 3 activations, 0 indices, 0 parameters, 0 gradients", EVALUATION),
    ("layer_norm_forward: 4 activations, 0 indices, 1 parameters, 0 gradients", BIAS),
    ("layer_norm_forward: 6 activations, 0 indices, 1 parameters, 0 gradients", BIAS),
    ("layer_norm_backward: 5 activations, 0 indices, 1 parameters, 1 gradients", BIAS),
    ("layer_norm_backward: 6 activations, 0 indices, 1 parameters, 1 gradients", BIAS),
    ("linear_forward: 3 activations, 0 indices, 1 parameters, 0 gradients", BIAS),
    ("linear_backward: 4 activations, 0 indices, 1 parameters, 1 gradients", BIAS),
];
const EPILOGUE: &str = "the sum is taken along as in training, where it is timed";
const FIRST: &str = "a first layer's: one of the two products, which are timed together";
const EVALUATION: &str = "an evaluation's: no gradient is written";
const BIAS: &str = "without a bias of as many values as a row has";

#[test]
fn what_models_ask_of_a_device_is_timed_in_the_form_that_they_ask_for() {
    let timed = timed(Kind::Emulated, form);
    let (mut emitted, mut missing) = (BTreeSet::new(), BTreeSet::new());
    for (preset, fit, input) in models() {
        let name = preset.name();
        let options = ModelOptions { preset, loss: None, label_smoothing: 0.0 };
        let mut model = options.build::<B>(&fit).unwrap_or_else(|error| panic!("{name}: {error}"));
        for mode in [Mode::Training, Mode::Evaluation] {
            let program = model.plan(&input, 4, mode).unwrap_or_else(|error| panic!("{name}: {error}"));
            for op in &program.ops {
                let form = form(&**op);
                if !timed.contains(&form) && PARTS.iter().all(|(part, _)| *part != form) {
                    missing.insert(format!("{form} ({name}, {mode:?})"));
                }
                emitted.insert(form);
            }
        }
    }
    assert!(missing.is_empty(), "emitted by models, but no case of src/bench/layers.rs times it: {missing:#?}");
    for (part, why) in PARTS {
        assert!(
            emitted.contains(part) && !timed.contains(part),
            "{part} ({why}): emitted by no model, or timed by now"
        );
    }
}
