//! Every layer's gradients against finite differences in f64.

use std::time::{SystemTime, UNIX_EPOCH};

use warpstep::backend::cpu::Cpu;
use warpstep::model::layers::*;
use warpstep::model::{Input, Layer, Mode, Probe};
use warpstep::random::{Philox, Purpose};

/// A seed of the moment, printed, so that a failure can be seen again.
fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    println!("seed {seed}");
    seed
}

/// Checks `layer` on random real input of `shape` a sample.
fn check(layer: impl Layer<Cpu<f64>>, shape: &[usize], batch: usize) {
    let seed = fresh_seed();
    let kind = layer.kind();
    let mut probe = Probe::<f64>::new(layer, &Input::Real(shape.to_vec()), batch, Mode::Training, seed).unwrap();
    let stream = Philox::new(seed, Purpose::Augmentation, 1);
    let len = batch * shape.iter().product::<usize>();
    let values: Vec<f64> = (0..len as u64).map(|i| stream.normal(i)).collect();
    probe.set_input(&values).unwrap();
    let found = probe.check_gradients(seed, 200).unwrap();
    let (tensor, error) = found.worst();
    assert!(error < 1e-6, "{kind}: {tensor}: relative error {error:e} in {:?}", found.errors);
}

#[test]
fn linear() {
    check(Linear::new(5), &[7], 3);
    check(Linear::new(1).without_bias(), &[4, 3], 2);
}

#[test]
fn residual_and_sequential() {
    let inner = Sequential::new().then("a", Linear::new(9)).then("b", Linear::new(4));
    check(Residual::new("inner", inner), &[4], 3);
    check(Residual::new("inner", Linear::new(6)).with_shortcut("shortcut", Linear::new(6)), &[4], 3);
}

#[test]
fn a_residual_branch_that_computes_nothing_adds_its_input() {
    check(Residual::new("inner", Sequential::new()), &[4], 3);
    check(Residual::new("inner", Dropout::new(0.5)), &[4], 3);
    check(Residual::new("inner", Sequential::new()).with_shortcut("shortcut", Linear::new(4)), &[4], 3);
    check(Residual::new("inner", Flatten::new()).with_shortcut("shortcut", Sequential::new()), &[4], 3);
    let mut probe =
        Probe::<f64>::new(Residual::new("inner", Dropout::new(0.5)), &Input::Real(vec![3]), 1, Mode::Evaluation, 1)
            .unwrap();
    probe.set_input(&[1.0, -2.0, 0.5]).unwrap();
    probe.run(&[0.0; 3]).unwrap();
    assert_eq!(probe.output(), [2.0, -4.0, 1.0]);
}

/// Checks `layer` on random tokens below `vocabulary`.
fn check_tokens(layer: impl Layer<Cpu<f64>>, vocabulary: u64, time: usize, batch: usize) {
    let seed = fresh_seed();
    let kind = layer.kind();
    let mut probe = Probe::<f64>::new(layer, &Input::Tokens(time), batch, Mode::Training, seed).unwrap();
    let stream = Philox::new(seed, Purpose::Augmentation, 1);
    let tokens: Vec<i32> = (0..(batch * time) as u64).map(|i| stream.below(i, vocabulary) as i32).collect();
    probe.set_tokens(&tokens).unwrap();
    let found = probe.check_gradients(seed, 200).unwrap();
    let (tensor, error) = found.worst();
    assert!(error < 1e-6, "{kind}: {tensor}: relative error {error:e} in {:?}", found.errors);
}

#[test]
fn activations() {
    use warpstep::backend::ops::ActivationKind::*;
    for kind in [Relu, GeluTanh, Gelu, Silu, Sigmoid, Tanh] {
        check(Activation::new(kind), &[37], 3);
    }
    check(Swiglu::new(), &[5, 14], 2);
}

#[test]
fn convolution() {
    check(Conv2d::new(4, [3, 3]), &[2, 6, 5], 3);
    check(Conv2d::new(4, [3, 2]).with_stride([2, 2]).with_padding([1, 1]).without_bias(), &[2, 7, 6], 2);
    check(Conv2d::new(6, [3, 3]).with_groups(2).with_padding([1, 1]), &[4, 5, 5], 2);
    check(Conv2d::new(3, [3, 3]).with_groups(3).with_stride([1, 2]), &[3, 5, 6], 20);
    check(Conv2d::new(5, [1, 1]), &[3, 4, 4], 2);
    check(Conv2d::new(5, [1, 1]).with_stride([2, 2]), &[3, 5, 5], 2);
    check(Conv2d::new(2, [5, 5]).with_padding([2, 2]), &[1, 3, 4], 2);
}

#[test]
fn pooling() {
    check(MaxPool2d::new(Window::tiled([2, 2])), &[2, 5, 6], 2);
    check(MaxPool2d::new(Window { kernel: [3, 3], stride: [2, 2], padding: [1, 1] }), &[2, 7, 6], 2);
    check(MaxPool2d::new(Window { kernel: [0, 1], stride: [1, 1], padding: [0, 0] }), &[2, 7, 1], 2);
    check(AveragePool2d::new(Window::tiled([2, 2])), &[2, 5, 6], 2);
    check(AveragePool2d::new(Window { kernel: [3, 3], stride: [2, 2], padding: [1, 1] }), &[2, 7, 6], 2);
    check(AveragePool2d::new(Window::global()), &[3, 4, 5], 2);
}

#[test]
fn normalization() {
    check(BatchNorm::new(), &[3, 4, 5], 4);
    check(BatchNorm::new(), &[7], 6);
    check(LayerNorm::new(1e-5), &[3, 17], 2);
    check(LayerNorm::new(1e-5).without_bias(), &[33], 70);
    check(RmsNorm::new(1e-6), &[3, 17], 30);
}

#[test]
fn embeddings_and_positions() {
    let table = Sequential::new().then("table", Embedding::new(11, 6)).then("positions", Positions::new(9));
    check_tokens(table, 11, 7, 3);
    check(Positions::new(5), &[5, 4], 3);
}

#[test]
fn attention() {
    for time in [1, 5, 70] {
        check(Attention::new(2, true), &[time, 24], 2);
        check(Attention::new(2, false), &[time, 24], 1);
        check(Attention::new(4, true).with_kv_heads(2), &[time, 32], 2);
        // Rotary positions turn the packed tensor in place, so it must not be the probe's own input.
        let rotary = |layer: Attention| Sequential::new().then("packed", Linear::new(24)).then("attention", layer);
        check(rotary(Attention::new(2, true).with_rotary(Some(RotaryOptions::default()))), &[time, 5], 2);
        let interleaved = RotaryOptions { interleaved: true, ..RotaryOptions::default() };
        check(rotary(Attention::new(2, false).with_dropout(0.3).with_rotary(Some(interleaved))), &[time, 5], 2);
    }
    let options = SelfAttentionOptions {
        heads: 3,
        kv_heads: 3,
        causal: true,
        bias: true,
        dropout: 0.0,
        rotary: None,
        init: None,
    };
    check(SelfAttention::new(options), &[6, 12], 2);
}

#[test]
fn an_encoder_with_padding() {
    let encoder = Sequential::new()
        .then("table", Embedding::new(7, 12).with_padding(0))
        .then("attention", Attention::new(2, false))
        .then("mean", MeanOverTime::new());
    check_tokens(encoder, 7, 5, 4);
}

#[test]
fn dropout_and_shapes() {
    check(Dropout::new(0.4), &[53], 3);
    check(Sequential::new().then("flat", Flatten::new()).then("out", Linear::new(3)), &[2, 3, 4], 2);
    let branch = |k: usize| -> Box<dyn Layer<Cpu<f64>>> {
        Box::new(Sequential::new().then("c", Conv2d::new(3, [k, 4])).then("f", Flatten::new()))
    };
    let branches = vec![("a".to_string(), branch(2)), ("b".to_string(), branch(3))];
    check(Sequential::new().then("p", AsPicture::new()).then("x", Parallel::new(branches)), &[5, 4], 2);
}
