//! The update of 50M parameters, rule by rule and clip by clip: the units of `warpstep bench update`.
//!
//! `cargo bench --bench update`; throughput counts the bytes that have to move. WARPSTEP_BENCH_PARAMETERS sets another size.

use criterion::{Criterion, Throughput};
use warpstep::backend::cpu::Cpu;
use warpstep::bench::measure::Task;
use warpstep::bench::update::UpdateTask;
use warpstep::bench::works::{Updating, clips, rules};

/// Muon multiplies matrices: seconds at the usual size.
const MUON_PARAMETERS: usize = 4_000_000;

fn main() {
    rayon::scope(|_| {
        let mut criterion = Criterion::default().configure_from_args();
        let cpu = Cpu::<f32>::new();
        let asked = std::env::var("WARPSTEP_BENCH_PARAMETERS").ok().and_then(|number| number.parse().ok());
        let usual: usize = asked.unwrap_or(50_000_000);
        let mut group = criterion.benchmark_group("update");
        group.sample_size(10);
        for (rule, _) in rules() {
            let parameters = if rule == "muon" { usual.min(MUON_PARAMETERS) } else { usual };
            for (clip, _) in clips() {
                let Some(work) = Updating::new(rule, clip, parameters, false) else { continue };
                // Made when criterion first asks for it: a filter may leave it out, and all together are too much.
                let mut made: Option<UpdateTask<Cpu<f32>>> = None;
                let bytes = UpdateTask::<Cpu<f32>>::cost_of(&work).map_or(0.0, |(bytes, _)| bytes);
                group.throughput(Throughput::Bytes(bytes as u64));
                group.bench_function(format!("{rule}+{clip}"), |b| {
                    let task = made.get_or_insert_with(|| UpdateTask::new(&cpu, &work).expect("memory for it"));
                    b.iter(|| task.run());
                });
            }
        }
        group.finish();
        criterion.final_summary();
    });
}
