//! Operations on the CUDA device against the CPU in f32, given the same inputs, rounded to what the device stores.

mod activation;
mod attention;
mod batch_norm;
mod conv;
mod dropout;
mod elementwise;
mod embedding;
mod layer_norm;
mod linear;
mod loss;
mod mel;
mod pool;

use half::{bf16, f16};
use warpstep::backend::Backend;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::cuda::{Cuda, DeviceOptions, Storage};
use warpstep::backend::ops::*;

use crate::device::{device, device_with};
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
fn compare<S: Storage>(what: &str, cases: &[impl Case], tolerance: [f64; 2]) {
    compare_with::<S>(DeviceOptions::default(), what, cases, tolerance);
}

/// As [`compare`], on a device that is used in another way.
fn compare_with<S: Storage>(options: DeviceOptions, what: &str, cases: &[impl Case], [relative, smallest]: [f64; 2]) {
    let Some(device) = device_with(options) else { return };
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

/// What results may differ by in each type.
const F32: [f64; 2] = [1e-5, 0.0];
const BF16: [f64; 2] = [3.0 / 256.0, 0.0];
const F16: [f64; 2] = [3.0 / 2048.0, 5.960_464_477_539_063e-8];

/// In f32 within 1e-5 of the largest value, in 16 bits within a few roundings.
fn in_all_types(what: &str, cases: &[impl Case]) {
    compare::<f32>(what, cases, F32);
    compare::<bf16>(what, cases, BF16);
    compare::<f16>(what, cases, F16);
}
