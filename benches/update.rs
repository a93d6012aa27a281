//! The update beside a copy of the same memory on the same threads.
//!
//! `cargo bench --bench update` first prints, for each rule, bytes a second over those of the copy, the two timed in turn;
//! then criterion's own tables. Bytes are those read and those written: 8 an element for the copy; for an update with a
//! norm 4 (the norm reads gradients) and what the rule touches. WARPSTEP_BENCH_PARAMETERS sets another size than 50 million.

use std::hint::black_box;
use std::time::Instant;

use criterion::{Criterion, Throughput};
use rayon::prelude::*;
use warpstep::backend::cpu;
use warpstep::optim::{Clip, MomentumForm, NormClip, OptimizerOptions, Rule, StepParams, UpdatePlan};
use warpstep::plan::{ParamLayout, ParamSpec};

const ADAM: Rule = Rule::Adam { betas: [0.9, 0.95], epsilon: 1e-8 };
const MOMENTUM: Rule =
    Rule::Momentum { form: MomentumForm::Pytorch, momentum: 0.9, dampening: 0.0, nesterov: false, gamma: 1.0 };
/// Name, rule, bytes a parameter with the global-norm clip.
const RULES: [(&str, Rule, u64); 4] = [
    ("sgd", Rule::Sgd, 16),
    ("momentum", MOMENTUM, 24),
    ("lion", Rule::Lion { betas: [0.9, 0.99] }, 24),
    ("adamw", ADAM, 32),
];

/// Arenas of one matrix, and what updates them.
struct Run {
    plan: UpdatePlan,
    theta: Vec<f32>,
    gradients: Vec<f32>,
    slots: Vec<Vec<f32>>,
    zero_gradients: bool,
    step: u64,
}

impl Run {
    fn new(rule: Rule, norm: NormClip, shapes: &[Vec<usize>]) -> Self {
        let spec =
            |(i, shape): (usize, &Vec<usize>)| ParamSpec { name: format!("layer.{i}.weight"), shape: shape.clone() };
        let specs: Vec<ParamSpec> = shapes.iter().enumerate().map(spec).collect();
        let layout = ParamLayout::new(&specs).unwrap();
        let mut options = OptimizerOptions::new(rule, 1e-3);
        options.clip = Clip { value: None, norm };
        options.weight_decay = 0.01;
        options.decoupled = true;
        let plan = UpdatePlan::new(&options, &layout).unwrap();
        let len = layout.padded_len();
        let values = |scale: f32| (0..len).map(|i| ((i % 1009) as f32 / 1009.0 - 0.5) * scale).collect::<Vec<f32>>();
        let slots = vec![vec![0.0; len]; plan.slots.len()];
        Run { plan, theta: values(0.1), gradients: values(1e-3), slots, zero_gradients: false, step: 0 }
    }

    fn update(&mut self) {
        self.step += 1;
        let step =
            StepParams { learning_rate: 1e-4, step: self.step, divisor: 1.0, zero_gradients: self.zero_gradients };
        let mut slots: Vec<&mut [f32]> = self.slots.iter_mut().map(Vec::as_mut_slice).collect();
        black_box(cpu::update(&mut self.theta, &mut self.gradients, &mut slots, &self.plan, &step).unwrap());
    }
}

/// Each thread copies one part of the whole in one go: large enough for the C library to write past the caches.
fn copy(to: &mut [f32], from: &[f32]) {
    let part = from.len().div_ceil(rayon::current_num_threads());
    to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
    black_box(to);
}

fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Times update and copy in turn, 25 times, and prints medians and their ratio.
fn beside_a_copy(parameters: usize) {
    const TIMES: usize = 25;
    let (from, mut to) = (vec![1.0f32; parameters], vec![0.0f32; parameters]);
    println!(
        "{parameters} parameters, f32, global-norm clip, {} threads, medians of {TIMES}:",
        rayon::current_num_threads()
    );
    let zeroed = [("momentum, gradients set to 0", MOMENTUM, 28)];
    for (name, rule, bytes) in RULES.into_iter().chain(zeroed) {
        let mut run = Run::new(rule, NormClip::Global { max_norm: 1e9 }, &[vec![parameters]]);
        run.zero_gradients = bytes == 28;
        (0..2).for_each(|_| run.update());
        let timed: Vec<(f64, f64)> =
            (0..TIMES).map(|_| (seconds(|| copy(&mut to, &from)), seconds(|| run.update()))).collect();
        let copied = median(timed.iter().map(|t| t.0).collect());
        let updated = median(timed.iter().map(|t| t.1).collect());
        let rate = |bytes: u64, seconds: f64| bytes as f64 * parameters as f64 / seconds / 1e9;
        println!(
            "  {name:30} {:9.3} ms  {:5.1} GB/s at {bytes} bytes; copy {:5.1} GB/s; ratio {:.2}",
            updated * 1e3,
            rate(bytes, updated),
            rate(8, copied),
            rate(bytes, updated) / rate(8, copied)
        );
    }
}

fn tables(criterion: &mut Criterion, name: &str, shapes: &[Vec<usize>]) {
    let parameters: u64 = shapes.iter().map(|shape| shape.iter().product::<usize>() as u64).sum();
    let mut group = criterion.benchmark_group(format!("update/{name}"));
    group.sample_size(10);
    let global = NormClip::Global { max_norm: 1e9 };
    for (name, rule, bytes) in RULES {
        let mut run = Run::new(rule, global, shapes);
        group.throughput(Throughput::Bytes(bytes * parameters));
        group.bench_function(name, |b| b.iter(|| run.update()));
    }
    group.throughput(Throughput::Elements(parameters));
    let adaptive = NormClip::Adaptive { clipping: 1e-2, epsilon: 1e-3 };
    let others = [
        ("momentum, tensor clip", MOMENTUM, NormClip::Tensor { max_norm: 1e9 }),
        ("momentum, adaptive clip", MOMENTUM, adaptive),
        ("lars", Rule::Lars { momentum: 0.9, trust: 1e-3 }, global),
        ("lamb", Rule::Lamb { betas: [0.9, 0.999], epsilon: 1e-6 }, global),
    ];
    for (name, rule, clip) in others {
        let mut run = Run::new(rule, clip, shapes);
        group.bench_function(name, |b| b.iter(|| run.update()));
    }
    group.finish();
}

fn main() {
    // Within the pool, as the trainer runs its steps: no thread has to be woken to begin.
    rayon::scope(|_| {
        let parameters = std::env::var("WARPSTEP_BENCH_PARAMETERS").ok().and_then(|n| n.parse().ok());
        beside_a_copy(parameters.unwrap_or(50_000_000));
        let mut criterion = Criterion::default().configure_from_args();
        let mlp = [(256, 784), (128, 256), (10, 128)];
        let mlp = mlp.map(|(outputs, inputs)| [vec![outputs, inputs], vec![outputs]]).concat();
        tables(&mut criterion, "mlp 784-256-128-10", &mlp);
        tables(&mut criterion, "12 blocks of 768", &vec![vec![3072, 768]; 12]);
        criterion.final_summary();
    });
}
