//! Operations alone, forward and backward, their data out of memory: the units of `warpstep bench kernel`.
//!
//! `cargo bench --bench kernel`; `cargo bench --bench kernel -- attention` for some of them.

use criterion::Criterion;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::profile::Kind;
use warpstep::bench::kernel::{KernelTask, Way};
use warpstep::bench::layers::cases;
use warpstep::bench::measure::Task;

fn main() {
    rayon::scope(|_| {
        let mut criterion = Criterion::default().configure_from_args();
        for case in cases(Kind::Host) {
            let mut group = criterion.benchmark_group(format!("kernel/{}", case.name));
            group.sample_size(10);
            // Made when criterion first asks for it: a filter may leave it out.
            let mut made: Option<KernelTask<Cpu<f32>>> = None;
            for way in [Way::Forward, Way::Backward] {
                group.bench_function(format!("{way:?}"), |b| {
                    let task = made.get_or_insert_with(|| KernelTask::new(&Cpu::new(), &case).expect("memory for it"));
                    if task.go(way).expect("a device that works") {
                        b.iter(|| task.run());
                    } else {
                        // Criterion wants a time: that of nothing.
                        b.iter(|| ());
                    }
                });
            }
            group.finish();
        }
        criterion.final_summary();
    });
}
