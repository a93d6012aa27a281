//! Whole training steps: forward, loss, backward, clip, update: the units of `warpstep bench step`.
//!
//! `cargo bench --bench step`; throughput counts samples, or tokens.

use criterion::{Criterion, Throughput};
use warpstep::backend::cpu::Cpu;
use warpstep::bench::measure::Task;
use warpstep::bench::step::StepTask;
use warpstep::bench::works::training;

/// Those whose step takes milliseconds on a CPU.
const MODELS: [&str; 4] = ["mlp", "cnn", "gpt_cpu", "audio_cnn"];

fn main() {
    rayon::scope(|_| {
        let mut criterion = Criterion::default().configure_from_args();
        let cpu = Cpu::<f32>::new();
        let mut group = criterion.benchmark_group("step");
        group.sample_size(20);
        for name in MODELS {
            let work = training(&cpu, name).expect("a model that is known");
            let mut task = StepTask::new(&cpu, &work).expect("memory for it");
            group.throughput(Throughput::Elements(work.amount().0 as u64));
            group.bench_function(name, |b| b.iter(|| task.run()));
        }
        group.finish();
        criterion.final_summary();
    });
}
