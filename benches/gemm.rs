//! Matrix products as linear layers need them: forward (one product), and forward and backward (three).
//!
//! `cargo bench --bench gemm`; throughput counts a multiplication and an addition as one element, so `Gelem/s` times 2 is
//! GFLOP/s.

use criterion::{Criterion, Throughput};
use warpstep::model::layers::Linear;
use warpstep::model::{Input, Mode, Probe};

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
    let mut criterion = Criterion::default().configure_from_args();
    for (name, mode, products) in [("forward", Mode::Evaluation, 1), ("forward and backward", Mode::Training, 3)] {
        let mut group = criterion.benchmark_group(format!("gemm/{name}"));
        group.sample_size(20);
        for [rows, inputs, outputs] in SHAPES {
            let layer = Linear::new(outputs).without_bias();
            let mut probe =
                Probe::<f32>::new(layer, &Input::Real(vec![inputs]), rows, mode, 1).expect("a linear layer");
            probe.set_input(&vec![0.5; rows * inputs]).expect("input of the planned size");
            let dy = vec![0.25; rows * outputs];
            group.throughput(Throughput::Elements((products * rows * inputs * outputs) as u64));
            group.bench_function(format!("{rows}x{inputs}x{outputs}"), |b| b.iter(|| probe.run(&dy)));
        }
        group.finish();
    }
    criterion.final_summary();
}
