//! Whole models against PyTorch's output, loss and gradients (tests/fixtures/models, made by scripts/fixtures/models.py).

use std::path::Path;

use warpstep::backend::cpu::Cpu;
use warpstep::backend::{Backend, Memory, StepContext};
use warpstep::model::interop::TensorMap;
use warpstep::model::layers::{HiddenActivation, NormKind, RotaryOptions};
use warpstep::model::presets::*;
use warpstep::model::{Input, Mode, Value};
use warpstep::train::tensors::{self, Origin};

/// Largest difference over the largest value of the tensor.
fn error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let size = expected.iter().fold(0.0f32, |size, v| size.max(v.abs()));
    let difference = found.iter().zip(expected).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
    assert!(size > 0.0 && difference.is_finite(), "found {found:?}, expected {expected:?}");
    difference / size
}

/// The preset declares PyTorch's names and shapes; its output, loss, gradients and running statistics are PyTorch's.
fn check(name: &str, preset: Preset, goal: Goal, vocabulary: Option<usize>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(format!("{name}.safetensors"));
    let fixture: TensorMap = tensors::read(&path).unwrap();
    let (shape, batch) = (&fixture["input"].shape, fixture["input"].shape[0]);
    let (input, context) = match vocabulary {
        Some(_) => (Input::Tokens(shape[1]), Some(shape[1])),
        None => (Input::Real(shape[1..].to_vec()), None),
    };
    let padding = matches!(preset, Preset::TextEncoder(_)).then_some(0);
    let fit = Fit { vocabulary, context, goal, padding, outputs: 0 };
    let backend = Cpu::<f32>::new();
    let options = ModelOptions { preset, loss: None, label_smoothing: 0.0 };
    let mut model = options.build::<Cpu<f32>>(&fit).unwrap();
    let program = model.plan(&input, batch, Mode::Training).unwrap();
    let mut arena = model.arena(&backend, 0, 0).unwrap();
    let layout = arena.layout.clone();
    let part = |prefix: &str| -> TensorMap {
        fixture.iter().filter_map(|(key, t)| Some((key.strip_prefix(prefix)?.to_owned(), t.clone()))).collect()
    };
    let mut weights = part("param.");
    tensors::upload(&backend, &mut arena.parameters, &layout, "", &mut weights, Origin::of_run(&path)).unwrap();
    tensors::nothing_left(&weights, Origin::of_run(&path)).unwrap();

    let mut activations = program.activations(&backend).unwrap();
    for (value, key) in [(program.input, "input"), (program.target.unwrap(), "target")] {
        let values = &fixture[key].values;
        match value {
            Value::Real(real) => {
                let range = activations.range(real);
                activations.values[range].copy_from_slice(values);
            }
            Value::Tokens(tokens) => {
                let range = activations.index_range(tokens);
                let tokens: Vec<i32> = values.iter().map(|&t| t as i32).collect();
                activations.indices[range].copy_from_slice(&tokens);
            }
        }
    }
    let mut memory = Memory { arena: &mut arena, activations: &mut activations };
    backend.run(&program.ops, &mut memory, &StepContext::default()).unwrap();

    let metrics = &activations.values[activations.range(program.metrics.unwrap())];
    let output = &activations.values[activations.range(program.output)];
    let mut worst = (0.0, String::new());
    let mut compare = |key: &str, found: &[f32]| {
        let error = error(found, &fixture[key].values);
        assert!(error < 1e-5, "{name}: {key} is off by {error:e} of its largest value");
        if error >= worst.0 {
            worst = (error, key.to_owned());
        }
    };
    compare("output", output);
    compare("loss", &metrics[..1]);
    for key in part("grad.").keys() {
        compare(&format!("grad.{key}"), &arena.gradients[layout.get(key).unwrap().range()]);
    }
    let states = part("state.");
    assert_eq!(states.len(), arena.state_layout.entries().len(), "{name}: running statistics");
    for key in states.keys() {
        compare(&format!("state.{key}"), &arena.state[arena.state_layout.get(key).unwrap().range()]);
    }
    println!("{name}: largest difference {:e} of the largest value, of {}", worst.0, worst.1);
}

#[test]
fn regression_and_perceptron_are_pytorch_s() {
    check("regression", Preset::Linear(LinearOptions::default()), Goal::Values(2), None);
    check("logistic", Preset::Logistic(LinearOptions::default()), Goal::Classes(2), None);
    let mlp = MlpOptions { hidden: vec![16, 16], ..MlpOptions::default() };
    check("mlp", Preset::Mlp(mlp), Goal::Classes(4), None);
}

#[test]
fn networks_for_pictures_are_pytorch_s() {
    let cnn = CnnOptions { channels: vec![4, 6], hidden: 0, ..CnnOptions::default() };
    check("cnn", Preset::Cnn(cnn), Goal::Classes(5), None);
    let resnet = ResNetOptions { blocks: vec![1, 1, 1], channels: vec![4, 8, 16], ..ResNetOptions::default() };
    check("resnet", Preset::ResNet(resnet), Goal::Classes(5), None);
}

#[test]
fn text_classifiers_are_pytorch_s() {
    let cnn = TextCnnOptions { width: 6, kernels: vec![2, 3, 4], filters: 5, dropout: 0.0 };
    check("text_cnn", Preset::TextCnn(cnn), Goal::Classes(3), Some(23));
    let encoder = TextEncoderOptions { layers: 2, heads: 3, width: 12, dropout: 0.0, ..TextEncoderOptions::default() };
    check("text_encoder", Preset::TextEncoder(encoder), Goal::Classes(3), Some(23));
}

#[test]
fn gpts_are_pytorch_s() {
    let gpt = GptOptions { layers: 2, heads: 4, width: 16, bias: true, ..GptOptions::default() };
    check("gpt", Preset::Gpt(gpt.clone()), Goal::NextToken, Some(19));
    let llama = GptOptions {
        kv_heads: Some(2),
        hidden: Some(24),
        bias: false,
        norm: NormKind::RmsNorm,
        positions: GptPositions::Rotary(RotaryOptions { base: 1e4, interleaved: false }),
        activation: HiddenActivation::Swiglu,
        tied: false,
        ..gpt
    };
    check("gpt_llama", Preset::Gpt(llama), Goal::NextToken, Some(19));
}
