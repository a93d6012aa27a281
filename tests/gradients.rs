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
