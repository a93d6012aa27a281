//! Operations on the CUDA device against the CPU in f32, given the same inputs, rounded to what the device stores.

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

struct SingleValues {
    kind: ActivationKind,
    len: usize,
}

impl Case for SingleValues {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let SingleValues { kind, len } = *self;
        let (x, dy) = (bed.real(&draw.normal(0, len)), bed.real(&draw.normal(1, len)));
        let (y, dx) = (bed.empty(len), bed.empty(len));
        let forward = bed.run(&ActivationForward { x, y, kind, len }).unwrap().get(y);
        vec![forward, bed.run(&ActivationBackward { x, dy, dx, kind, len }).unwrap().get(dx)]
    }
}

#[test]
fn functions_of_single_values() {
    use ActivationKind::*;
    let cases: Vec<_> = [Relu, GeluTanh, Gelu, Silu, Sigmoid, Tanh]
        .into_iter()
        .flat_map(|kind| [1, 7, 8, 9, 2049].map(|len| SingleValues { kind, len }))
        .collect();
    in_all_types("activation", &cases);
}

struct Gated([usize; 2]);

impl Case for Gated {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let [rows, width] = self.0;
        let (x, dy) = (bed.real(&draw.normal(0, 2 * rows * width)), bed.real(&draw.normal(1, rows * width)));
        let (y, dx) = (bed.empty(rows * width), bed.empty(2 * rows * width));
        let forward = bed.run(&SwigluForward { x, y, rows, width }).unwrap().get(y);
        vec![forward, bed.run(&SwigluBackward { x, dy, dx, rows, width }).unwrap().get(dx)]
    }
}

#[test]
fn gated_halves() {
    in_all_types("swiglu", &[[1, 1], [3, 5], [33, 129]].map(Gated));
}

struct Dropped(usize);

impl Case for Dropped {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let len = self.0;
        let (x, y) = (bed.real(&draw.normal(0, len)), bed.empty(len));
        // The device reads the micro-step of its own memory, which programs write; an operation alone finds 0 there.
        bed.step.micro_step = 0;
        let dropped = |stream| DropoutApply { x, y, probability: 0.25, stream, len };
        [1, 2].map(|stream| bed.run(&dropped(stream)).unwrap().get(y)).into()
    }
}

#[test]
fn dropout_draws_what_the_cpu_draws() {
    in_all_types("dropout", &[1, 3, 4, 1001].map(Dropped));
}

struct Classes {
    rows: usize,
    classes: usize,
    label_smoothing: f64,
}

impl Case for Classes {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let Classes { rows, classes, label_smoothing } = *self;
        let mut targets = whole(draw.seed, 1, rows, classes as u64);
        targets.iter_mut().step_by(3).for_each(|target| *target = -100);
        let (logits, targets) = (bed.real(&draw.normal(0, rows * classes)), bed.whole(&targets));
        let (metrics, gradient) = (bed.empty_statistic(METRICS), bed.empty(rows * classes));
        let dlogits = Some(gradient);
        let op = CrossEntropy { logits, targets, metrics, dlogits, rows, classes, label_smoothing, ignore_index: -100 };
        let ran = bed.run(&op).unwrap();
        let alone = bed.run(&CrossEntropy { dlogits: None, ..op }).unwrap();
        let [found, without] = [&ran, &alone].map(|ran| ran.get_statistic(metrics)[..METRICS].to_vec());
        // Counts are exact, whatever the type.
        assert_eq!(found[2..], without[2..]);
        vec![found[..2].to_vec(), found[2..].to_vec(), without[..2].to_vec(), ran.get(gradient)]
    }
}

#[test]
fn cross_entropy_and_its_gradient() {
    let cases: Vec<_> = [(1, 1), (2, 2), (9, 10), (17, 65), (5, 1025), (3, 3001)]
        .into_iter()
        .flat_map(|(rows, classes)| [0.0, 0.1].map(|label_smoothing| Classes { rows, classes, label_smoothing }))
        .collect();
    in_all_types("cross-entropy", &cases);
}

struct Pointwise(usize);

impl Case for Pointwise {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let len = self.0;
        let targets: Vec<f64> = whole(draw.seed, 1, len, 5).iter().map(|&t| f64::from(t) / 4.0).collect();
        let (x, target) = (bed.real(&draw.normal(0, len)), bed.real(&targets));
        let (metrics, gradient) = (bed.empty_statistic(METRICS), bed.empty(len));
        let d = Some(gradient);
        let squares = MeanSquaredError { prediction: x, target, metrics, dprediction: d, len };
        let squares = bed.run(&squares).unwrap();
        let binary = bed.run(&BinaryCrossEntropy { logits: x, target, metrics, dlogits: d, len }).unwrap();
        [squares, binary]
            .iter()
            .flat_map(|ran| [ran.get_statistic(metrics)[..METRICS].to_vec(), ran.get(gradient)])
            .collect()
    }
}

#[test]
fn losses_over_single_values() {
    in_all_types("pointwise loss", &[1, 15, 300, 70_001].map(Pointwise));
}

struct Affine {
    rows: usize,
    inputs: usize,
    outputs: usize,
    accumulate: bool,
}

impl Case for Affine {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let Affine { rows, inputs, outputs, accumulate } = *self;
        bed.step.accumulate = accumulate;
        let (x, dy) = (bed.real(&draw.normal(0, rows * inputs)), bed.real(&draw.normal(1, rows * outputs)));
        let weight = bed.parameter(&draw.normal(2, outputs * inputs));
        let bias = bed.parameter(&draw.normal(3, outputs));
        let (y, dx) = (bed.empty(rows * outputs), bed.empty(rows * inputs));
        let forward = LinearForward { x, weight, bias: Some(bias), y, rows, inputs, outputs };
        let forward = bed.run(&forward).unwrap().get(y);
        let dweight = first(weight);
        let dbias = Some(first(bias));
        let back = LinearBackward { x, weight, dy, dx: Some(dx), dweight, dbias, rows, inputs, outputs };
        let back = bed.run(&back).unwrap();
        vec![forward, back.get(dx), back.gradient(weight), back.gradient(bias)]
    }
}

#[test]
fn affine_maps_and_their_gradients() {
    let sizes = [[1, 1, 1], [3, 5, 7], [17, 33, 9], [64, 784, 10]];
    let cases: Vec<_> = sizes
        .into_iter()
        .flat_map(|[rows, inputs, outputs]| {
            [false, true].map(|accumulate| Affine { rows, inputs, outputs, accumulate })
        })
        .collect();
    in_all_types("linear", &cases);
}
