//! Traffic through memory and products of matrices: the units of `warpstep bench device`.
//!
//! `cargo bench --bench device`.

use criterion::{Criterion, Throughput};
use warpstep::backend::cpu::Cpu;
use warpstep::backend::profile::Traffic;
use warpstep::bench::device::{ProductTask, TrafficTask};
use warpstep::bench::measure::Task;

/// Rows, inputs, outputs: MNIST's first layer, nanoGPT's CPU configuration, GPT-2's feed-forward layer, a large square.
const SHAPES: [[usize; 3]; 7] = [
    [128, 784, 256],
    [768, 128, 128],
    [768, 128, 384],
    [768, 128, 512],
    [768, 512, 128],
    [256, 768, 3072],
    [2048, 2048, 2048],
];

fn main() {
    // Within the pool, as the trainer runs its steps: no thread has to be woken to begin.
    rayon::scope(|_| {
        let mut criterion = Criterion::default().configure_from_args();
        let cpu = Cpu::<f32>::new();
        let mut group = criterion.benchmark_group("device/traffic");
        group.sample_size(20);
        for traffic in [Traffic::Copy, Traffic::Read, Traffic::Write] {
            let mut task = TrafficTask::in_memory(&cpu, traffic).expect("memory for two buffers");
            group.throughput(Throughput::Bytes(task.bytes() as u64));
            group.bench_function(format!("{traffic:?}"), |b| b.iter(|| task.run()));
        }
        group.finish();
        let mut group = criterion.benchmark_group("device/product");
        group.sample_size(20);
        for [rows, inputs, outputs] in SHAPES {
            let mut task = ProductTask::new(&cpu, [rows, inputs, outputs]).expect("memory for three matrices");
            // A multiplication and an addition are two.
            group.throughput(Throughput::Elements(task.flops() as u64));
            group.bench_function(format!("{rows}x{inputs}x{outputs}"), |b| b.iter(|| task.run()));
        }
        group.finish();
        criterion.final_summary();
    });
}
