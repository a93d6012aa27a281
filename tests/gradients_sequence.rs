//! Gradients of the transformer's parts and of whole sequence models against finite differences in f64.

use std::time::{SystemTime, UNIX_EPOCH};

use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::ActivationKind;
use warpstep::model::layers::*;
use warpstep::model::{Init, Input, Layer, Mode, Probe};
use warpstep::random::{Philox, Purpose};

/// A seed of the moment, printed, so that a failure can be seen again.
fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    println!("seed {seed}");
    seed
}

fn judge(kind: &str, probe: &mut Probe<f64>, seed: u64) {
    let found = probe.check_gradients(seed, 120).unwrap();
    let (tensor, error) = found.worst();
    assert!(error < 1e-6, "{kind}: {tensor}: relative error {error:e} in {:?}", found.errors);
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
    judge(kind, &mut probe, seed);
}

/// Checks `layer` on random tokens below `vocabulary`.
fn check_tokens(layer: impl Layer<Cpu<f64>>, vocabulary: u64, time: usize, batch: usize) {
    let seed = fresh_seed();
    let kind = layer.kind();
    let mut probe = Probe::<f64>::new(layer, &Input::Tokens(time), batch, Mode::Training, seed).unwrap();
    let stream = Philox::new(seed, Purpose::Augmentation, 1);
    let tokens: Vec<i32> = (0..(batch * time) as u64).map(|i| stream.below(i, vocabulary) as i32).collect();
    probe.set_tokens(&tokens).unwrap();
    judge(kind, &mut probe, seed);
}

fn block(norm: NormKind, activation: HiddenActivation, kv_heads: usize, dropout: f64) -> BlockOptions {
    let rotary = (kv_heads == 2).then(RotaryOptions::default);
    let attention = SelfAttentionOptions { heads: 4, kv_heads, causal: true, bias: true, dropout, rotary, init: None };
    BlockOptions { norm, epsilon: 1e-5, attention, hidden: 24, activation, bias: true, dropout, init: None }
}

#[test]
fn feed_forward() {
    for activation in [HiddenActivation::Pointwise(ActivationKind::GeluTanh), HiddenActivation::Swiglu] {
        check(FeedForward::new(10, activation, true, None), &[3, 8], 2);
        check(FeedForward::new(10, activation, false, Some([Init::Normal { std: 0.5 }; 2])), &[8], 2);
    }
}

#[test]
fn transformer_blocks() {
    let gelu = HiddenActivation::Pointwise(ActivationKind::GeluTanh);
    check(TransformerBlock::new(block(NormKind::LayerNorm, gelu, 4, 0.0)), &[5, 16], 3);
    check(TransformerBlock::new(block(NormKind::RmsNorm, HiddenActivation::Swiglu, 2, 0.0)), &[5, 16], 3);
    check(TransformerBlock::new(block(NormKind::LayerNorm, gelu, 1, 0.2)), &[5, 16], 3);
}

#[test]
fn a_whole_network_whose_output_shares_the_token_table() {
    let gelu = HiddenActivation::Pointwise(ActivationKind::GeluTanh);
    let network = Sequential::new()
        .then("transformer", TokenAndPosition::new(13, 9, 16))
        .then("transformer.h.0", TransformerBlock::new(block(NormKind::LayerNorm, gelu, 4, 0.0)))
        .then("transformer.ln_f", LayerNorm::new(1e-5))
        .then("lm_head", TiedLinear::new("transformer.wte.weight"));
    check_tokens(network, 13, 7, 3);
}

/// Norms that take the sum before them and add the residual's gradient, and those that cannot: the first of a network, one
/// whose gradient and whose residual's are the same, one behind an activation.
#[test]
fn norms_within_and_after_residual_sums() {
    let residual = |layers| Residual::<Cpu<f64>>::new("layers", layers);
    let network = Sequential::new()
        .then("0", residual(Sequential::new().then("norm", LayerNorm::new(1e-5)).then("linear", Linear::new(6))))
        .then("1", residual(Sequential::new().then("norm", RmsNorm::new(1e-5))))
        .then("2", residual(Sequential::new().then("norm", LayerNorm::new(1e-5).without_bias())))
        .then("3", residual(Sequential::new().then("linear", Linear::new(6)).then("norm", RmsNorm::new(1e-5))))
        .then("4", Activation::new(ActivationKind::Tanh))
        .then("5", LayerNorm::new(1e-5));
    check(network, &[4, 6], 3);
}
