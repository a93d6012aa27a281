//! Attention, forward, and forward and backward, from packed queries, keys and values.
//!
//! `cargo bench --bench attention`; throughput counts tokens.

use criterion::{Criterion, Throughput};
use warpstep::model::layers::Attention;
use warpstep::model::{Input, Mode, Probe};

/// Batch, time, heads, key heads, head size, causal: nanoGPT's CPU configuration; GPT-2; grouped queries; an encoder.
const SHAPES: [(usize, usize, usize, usize, usize, bool); 4] =
    [(12, 64, 4, 4, 32, true), (2, 512, 12, 12, 64, true), (2, 512, 12, 4, 64, true), (32, 64, 4, 4, 32, false)];

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for (name, mode) in [("forward", Mode::Evaluation), ("forward and backward", Mode::Training)] {
        let mut group = criterion.benchmark_group(format!("attention/{name}"));
        group.sample_size(20);
        for (batch, time, heads, kv_heads, size, causal) in SHAPES {
            let packed = (heads + 2 * kv_heads) * size;
            let layer = Attention::new(heads, causal).with_kv_heads(kv_heads);
            let mut probe =
                Probe::<f32>::new(layer, &Input::Real(vec![time, packed]), batch, mode, 1).expect("an attention");
            let values: Vec<f32> = (0..batch * time * packed).map(|i| (i as f32 * 0.7).sin()).collect();
            probe.set_input(&values).expect("input of the planned size");
            let dy = vec![0.25; batch * time * heads * size];
            group.throughput(Throughput::Elements((batch * time) as u64));
            let mask = if causal { "causal" } else { "full" };
            let id = format!("{batch}x{time}, {heads}/{kv_heads} heads of {size}, {mask}");
            group.bench_function(id, |b| b.iter(|| probe.run(&dy)));
        }
        group.finish();
    }
    criterion.final_summary();
}
