//! Operations on the CUDA device against the CPU in f32, given the same inputs, rounded to what the device stores.

mod activation;
mod batch_norm;
mod conv;
mod dropout;
mod linear;
mod loss;
mod pool;

use half::{bf16, f16};
use warpstep::backend::Backend;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::cuda::{Cuda, Storage};
use warpstep::backend::ops::*;

use crate::device::device;
use crate::*;

/// Draws the inputs of a case: the same for both backends, held exactly by the device's type.
struct Draw {
    seed: u64,
    round: fn(f64) -> f64,
}

impl Draw {
    fn normal(&self, tensor: u32, len: usize) -> Vec<f64> {
        normal(self.seed, tensor, len).into_iter().map(self.round).collect()
    }
}

/// A case of an operation on any backend: what it leaves.
trait Case {
    fn run<B: Backend>(&self, bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>>;
}

/// What results may differ by: `relative` of the largest, and one of the smallest values of the type.
fn compare<S: Storage>(what: &str, cases: &[impl Case], [relative, smallest]: [f64; 2]) {
    let Some(device) = device() else { return };
    let draw = Draw { seed: fresh_seed(), round: |x| S::from_f64(x).f64() };
    for (number, case) in cases.iter().enumerate() {
        let found = case.run(Bed::new(Cuda::<S>::new(device.clone())), &draw);
        let again = case.run(Bed::new(Cuda::<S>::new(device.clone())), &draw);
        let expected = case.run(Bed::<Cpu<f32>>::cpu(), &draw);
        for (tensor, ((found, again), expected)) in found.iter().zip(&again).zip(&expected).enumerate() {
            let same = found.iter().zip(again).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{what} {number} in {}: tensor {tensor} has other bits the second time", S::NAME);
            let size = expected.iter().map(|x| x.abs()).fold(0.0, f64::max);
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                assert!(
                    (found - expected).abs() <= relative * size + smallest,
                    "{what} {number} in {}: tensor {tensor}, value {i}: {found} for {expected}, values up to {size}",
                    S::NAME
                );
            }
        }
    }
}

/// In f32 within 1e-5 of the largest value, in 16 bits within a few roundings.
fn in_all_types(what: &str, cases: &[impl Case]) {
    compare::<f32>(what, cases, [1e-5, 0.0]);
    compare::<bf16>(what, cases, [3.0 / 256.0, 0.0]);
    compare::<f16>(what, cases, [3.0 / 2048.0, f64::from(f16::MIN_POSITIVE_SUBNORMAL)]);
}
