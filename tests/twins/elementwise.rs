//! Sums, joins and means on the CUDA device, against the CPU.

use half::{bf16, f16};
use warpstep::backend::Backend;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::cuda::{Cuda, Storage};
use warpstep::backend::ops::*;

use crate::device::device;
use crate::*;

/// The sum of two, three parts side by side and taken apart again, the mean over time with and without padding.
fn run<B: Backend>(backend: impl Fn() -> B, seed: u64, [batch, time, width]: [usize; 3]) -> Vec<Vec<f64>> {
    let (rows, len) = (batch * time, batch * time * width);
    let (a, b) = (normal(seed, 0, len), normal(seed, 1, len));
    let mut bed = Bed::new(backend());
    let (x, z, y) = (bed.real(&a), bed.real(&b), bed.empty(len));
    let sum = bed.run(&Add { a: x, b: z, y, len }).unwrap().get(y);
    let widths = vec![width, 3, width];
    let parts = vec![x, bed.real(&normal(seed, 2, rows * 3)), z];
    let whole = bed.empty(rows * (2 * width + 3));
    let joined = bed.run(&Concatenate { parts, widths: widths.clone(), y: whole, rows }).unwrap().get(whole);
    let from = bed.real(&joined);
    let parts: Vec<_> = widths.iter().map(|width| bed.empty(rows * width)).collect();
    let apart = bed.run(&Split { x: from, parts: parts.clone(), widths, rows }).unwrap();
    let mut found = vec![sum, joined];
    found.extend(parts.into_iter().map(|part| apart.get(part)));
    let tokens = bed.whole(&whole_numbers(seed, rows));
    for padding in [None, Some(Padding { tokens, pad: 0 })] {
        let (mean, dy) = (bed.empty(batch * width), bed.real(&normal(seed, 3, batch * width)));
        let dx = bed.empty(len);
        found.push(bed.run(&MeanTimeForward { x, y: mean, batch, time, width, padding }).unwrap().get(mean));
        found.push(bed.run(&MeanTimeBackward { dy, dx, batch, time, width, padding }).unwrap().get(dx));
    }
    found
}

fn whole_numbers(seed: u64, len: usize) -> Vec<i32> {
    whole(seed, 9, len, 3)
}

fn compare<S: Storage>(relative: f64) {
    let Some(device) = device() else { return };
    let seed = fresh_seed();
    for size in [[1, 1, 1], [2, 3, 7], [3, 5, 8], [2, 17, 129], [1, 2, 1000]] {
        let found = run(|| Cuda::<S>::new(device.clone()), seed, size);
        let expected = run(Cpu::<f32>::new, seed, size);
        for (tensor, (found, expected)) in found.iter().zip(&expected).enumerate() {
            for (found, expected) in found.iter().zip(expected) {
                let allowed = relative * (1.0 + expected.abs());
                assert!((found - expected).abs() <= allowed, "{size:?}, tensor {tensor}: {found} for {expected}");
            }
        }
    }
}

#[test]
fn the_device_adds_joins_and_averages_as_the_cpu_does() {
    compare::<f32>(1e-6);
}

#[test]
fn the_device_adds_joins_and_averages_in_sixteen_bits() {
    compare::<bf16>(4.0 / 256.0);
    compare::<f16>(4.0 / 2048.0);
}
