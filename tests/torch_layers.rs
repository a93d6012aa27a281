//! Every layer and loss against PyTorch's values (tests/fixtures/layers, made by scripts/fixtures/layers.py).

use std::path::Path;

use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::ActivationKind;
use warpstep::backend::{Backend, Memory, StepContext};
use warpstep::model::interop::TensorMap;
use warpstep::model::layers::*;
use warpstep::model::{Input, Layer, Loss, Mode, Model, Probe, Value};
use warpstep::train::tensors;

fn fixture(name: &str) -> TensorMap {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/layers");
    tensors::read(&folder.join(format!("{name}.safetensors"))).unwrap()
}

/// Below 1e-5 of the largest value expected.
fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().fold(0.0f32, |size, v| size.max(v.abs()));
    assert!(size > 0.0, "{what}: PyTorch's values are all 0");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() < 1e-5 * size, "{what}: element {i}: found {a}, expected {b}");
    }
}

/// Output and every gradient of `layer` are PyTorch's.
fn check(name: &str, layer: impl Layer<Cpu<f32>>) {
    let tensors = fixture(name);
    let (shape, values) = (&tensors["input"].shape, &tensors["input"].values);
    let real = tensors.contains_key("dinput");
    let input = if real { Input::Real(shape[1..].to_vec()) } else { Input::Tokens(shape[1]) };
    let mut probe = Probe::<f32>::new(layer, &input, shape[0], Mode::Training, 0).unwrap();
    if real {
        probe.set_input(values).unwrap();
    } else {
        probe.set_tokens(&values.iter().map(|&t| t as i32).collect::<Vec<_>>()).unwrap();
    }
    let declared: Vec<String> = probe.parameters().map(|(name, _)| name.to_owned()).collect();
    for parameter in &declared {
        let Some(tensor) = tensors.get(&format!("param.{parameter}")) else { panic!("{name}: no `{parameter}`") };
        probe.set(parameter, &tensor.values).unwrap();
    }
    assert_eq!(probe.output_shape(), tensors["output"].shape, "{name}");
    probe.run(&tensors["dy"].values).unwrap();
    assert_close(&format!("{name}: output"), probe.output(), &tensors["output"].values);
    if real {
        assert_close(&format!("{name}: dinput"), probe.input_gradient().unwrap(), &tensors["dinput"].values);
    }
    for (key, tensor) in &tensors {
        if let Some(parameter) = key.strip_prefix("grad.") {
            assert_close(&format!("{name}: {key}"), probe.gradient(parameter).unwrap(), &tensor.values);
        } else if let Some(state) = key.strip_prefix("state.") {
            assert_close(&format!("{name}: {key}"), probe.get(state).unwrap(), &tensor.values);
        }
    }
}

#[test]
fn affine_maps_and_functions_of_single_values() {
    check("linear", Linear::new(5));
    check("linear_no_bias", Linear::new(17).without_bias());
    for (name, kind) in [
        ("relu", ActivationKind::Relu),
        ("gelu", ActivationKind::Gelu),
        ("gelu_tanh", ActivationKind::GeluTanh),
        ("silu", ActivationKind::Silu),
        ("sigmoid", ActivationKind::Sigmoid),
        ("tanh", ActivationKind::Tanh),
    ] {
        check(name, Activation::new(kind));
    }
    check("swiglu", Swiglu::new());
    let branch = Sequential::new()
        .then("0", Linear::new(11))
        .then("1", Activation::new(ActivationKind::Gelu))
        .then("2", Linear::new(6));
    check("residual", Residual::new("inner", branch));
}

#[test]
fn normalization() {
    check("layer_norm", LayerNorm::new(1e-5));
    check("layer_norm_no_bias", LayerNorm::new(1e-5).without_bias());
    check("rms_norm", RmsNorm::new(1e-6));
    check("batch_norm_1d", BatchNorm::new());
    check("batch_norm_2d", BatchNorm::new());
}

#[test]
fn batch_norm_in_evaluation_uses_the_kept_statistics() {
    for name in ["batch_norm_1d_eval", "batch_norm_2d_eval"] {
        let tensors = fixture(name);
        let shape = &tensors["input"].shape;
        let input = Input::Real(shape[1..].to_vec());
        let mut probe = Probe::<f32>::new(BatchNorm::new(), &input, shape[0], Mode::Inference, 0).unwrap();
        probe.set_input(&tensors["input"].values).unwrap();
        for (key, tensor) in &tensors {
            if let Some(parameter) = key.strip_prefix("param.").or(key.strip_prefix("before.")) {
                probe.set(parameter, &tensor.values).unwrap();
            }
        }
        probe.run(&vec![0.0; tensors["output"].values.len()]).unwrap();
        assert_close(&format!("{name}: output"), probe.output(), &tensors["output"].values);
        for kept in ["running_mean", "running_var"] {
            assert_eq!(probe.get(kept).unwrap(), tensors[&format!("before.{kept}")].values, "{name}: {kept}");
        }
    }
}

#[test]
fn tables_of_vectors() {
    check("embedding", Embedding::new(11, 8));
    check("token_and_position", TokenAndPosition::new(11, 9, 8));
    check("positions", Positions::new(9));
}

#[test]
fn attention() {
    check("attention_causal", Attention::new(2, true));
    check("attention_full", Attention::new(2, false));
    check("attention_grouped", Attention::new(4, true).with_kv_heads(2));
    check("attention_of_one", Attention::new(2, true));
    check("attention_full_grouped", Attention::new(6, false).with_kv_heads(2));
    let halves = RotaryOptions { base: 1e4, interleaved: false };
    check("attention_grouped_rotary", Attention::new(6, true).with_kv_heads(3).with_rotary(Some(halves)));
    for (name, interleaved) in [("attention_rotary_halves", false), ("attention_rotary_interleaved", true)] {
        let attention = Attention::new(2, true).with_rotary(Some(RotaryOptions { base: 1e4, interleaved }));
        let packed = Linear::new(24).without_bias();
        check(name, Sequential::new().then("packed", packed).then("attention", attention));
    }
    let encoder = Sequential::new()
        .then("table", Embedding::new(7, 12).with_padding(0))
        .then("attention", Attention::new(2, false))
        .then("mean", MeanOverTime::new());
    check("padded_encoder", encoder);
}

#[test]
fn a_block_of_gpt2() {
    let options = BlockOptions {
        norm: NormKind::LayerNorm,
        epsilon: 1e-5,
        attention: SelfAttentionOptions {
            heads: 4,
            kv_heads: 4,
            causal: true,
            bias: true,
            dropout: 0.0,
            rotary: None,
            init: None,
        },
        hidden: 64,
        activation: HiddenActivation::Pointwise(ActivationKind::GeluTanh),
        bias: true,
        dropout: 0.0,
        init: None,
    };
    check("transformer_block", TransformerBlock::new(options));
}

#[test]
fn pictures() {
    check("conv2d", Conv2d::new(4, [3, 3]));
    check("conv2d_stride_padding", Conv2d::new(4, [3, 2]).with_stride([2, 2]).with_padding([1, 2]).without_bias());
    check("conv2d_groups", Conv2d::new(6, [3, 3]).with_padding([1, 1]).with_groups(2));
    check("conv2d_depthwise", Conv2d::new(3, [5, 5]).with_padding([2, 2]).with_groups(3));
    check("conv2d_1x1_stride", Conv2d::new(3, [1, 1]).with_stride([2, 2]).without_bias());
    let window = Window { kernel: [3, 3], stride: [2, 2], padding: [1, 1] };
    check("max_pool2d", MaxPool2d::new(window));
    check("average_pool2d", AveragePool2d::new(window));
    check("max_pool2d_tiled", MaxPool2d::new(Window::tiled([2, 2])));
    check("average_pool2d_tiled", AveragePool2d::new(Window::tiled([2, 2])));
    check("average_pool2d_global", AveragePool2d::new(Window::global()));
}

/// The loss and the gradient of the logits are PyTorch's. A model needs a parameter: here it is the logits themselves, the
/// weight of a linear layer whose input is the identity, so that `logits[r][c] = weight[c][r]`.
fn check_loss(name: &str, loss: Loss) {
    let tensors = fixture(name);
    let [rows, width] = tensors["logits"].shape[..] else { panic!("{name}: logits of another shape") };
    let backend = Cpu::<f32>::new();
    let mut model = Model::new(Box::new(Linear::new(width).without_bias()), loss);
    let program = model.plan(&Input::Real(vec![rows]), rows, Mode::Training).unwrap();
    let mut arena = model.arena(&backend, 0, 0).unwrap();
    let mut activations = program.activations(&backend).unwrap();
    for row in 0..rows {
        for column in 0..width {
            let at = arena.layout.entries()[0].offset + column * rows + row;
            arena.parameters[at] = tensors["logits"].values[row * width + column];
        }
    }
    let Value::Real(input) = program.input else { panic!("a linear layer takes real values") };
    let start = activations.range(input).start;
    for row in 0..rows {
        activations.values[start + row * rows + row] = 1.0;
    }
    match program.target {
        Some(Value::Real(target)) => {
            let range = activations.range(target);
            activations.values[range].copy_from_slice(&tensors["target"].values);
        }
        Some(Value::Tokens(target)) => {
            let range = activations.index_range(target);
            let targets: Vec<i32> = tensors["target"].values.iter().map(|&t| t as i32).collect();
            activations.indices[range].copy_from_slice(&targets);
        }
        None => panic!("{name}: no target"),
    }
    let mut memory = Memory { arena: &mut arena, activations: &mut activations };
    backend.run(&program.ops, &mut memory, &StepContext::default()).unwrap();
    let metrics = &activations.values[activations.range(program.metrics.unwrap())];
    assert_close(&format!("{name}: loss"), &metrics[..1], &tensors["loss"].values);
    let entry = &arena.layout.entries()[0];
    let gradient: Vec<f32> =
        (0..rows * width).map(|i| arena.gradients[entry.offset + i % width * rows + i / width]).collect();
    assert_close(&format!("{name}: dlogits"), &gradient, &tensors["dlogits"].values);
}

#[test]
fn losses() {
    let cross_entropy = |label_smoothing| Loss::CrossEntropy { label_smoothing, ignore_index: -100 };
    check_loss("cross_entropy", cross_entropy(0.0));
    check_loss("cross_entropy_smoothed", cross_entropy(0.1));
    check_loss("mean_squared_error", Loss::MeanSquaredError);
    check_loss("binary_cross_entropy", Loss::BinaryCrossEntropy);
}
