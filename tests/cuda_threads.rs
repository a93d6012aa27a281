//! Threads that share a device: each trains as if it were alone, and a trainer goes on in another thread than it began in.

#[path = "common/device.rs"]
mod device;

use std::sync::{Arc, Barrier};
use std::thread;

use half::bf16;
use warpstep::backend::cuda::{Cuda, Device, Storage};
use warpstep::data::{Batch, Inputs, Targets};
use warpstep::model::Input;
use warpstep::model::presets::{Fit, Goal, GptOptions, ModelOptions, Preset};
use warpstep::optim::{OptimizerOptions, Rule};
use warpstep::train::step::{StepReport, Trainer, TrainerParts};

const TOKENS: usize = 19;
const STEPS: usize = 9;

fn batch(number: usize, [samples, time]: [usize; 2]) -> Batch {
    let tokens =
        |shift: usize| (shift..shift + samples * time).map(|i| ((i * 7 + number * 3) % TOKENS) as i32).collect();
    Batch { inputs: Inputs::Tokens(tokens(0)), targets: Targets::Index(tokens(1)), samples }
}

/// Normalizations, embeddings, attention and biases, which leave sums for their own next kernel, and dropout, which goes by the scalars
/// of its step.
fn trainer<S: Storage>(device: &Arc<Device>, seed: u64, [samples, time]: [usize; 2]) -> Trainer<Cuda<S>> {
    let options = GptOptions { layers: 1, heads: 2, width: 16, bias: true, dropout: 0.2, ..GptOptions::default() };
    let fit =
        Fit { vocabulary: Some(TOKENS), context: Some(time), goal: Goal::NextToken, padding: None, outputs: TOKENS };
    let model = ModelOptions { preset: Preset::Gpt(options), loss: None, label_smoothing: 0.0 };
    let parts = TrainerParts {
        backend: Cuda::<S>::new(device.clone()),
        model: model.build(&fit).unwrap(),
        input: Input::Tokens(time),
        batch_size: samples,
        accumulate: 1,
        optimizer: &OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.99], epsilon: 1e-8 }, 0.01),
        ema: None,
        seed,
    };
    Trainer::new(parts).unwrap()
}

/// Plans, steps in flight and evaluations.
fn train<S: Storage>(device: &Arc<Device>, seed: u64, sizes: [usize; 2]) -> (Vec<StepReport>, Vec<u64>) {
    let mut trainer = trainer::<S>(device, seed, sizes);
    let (mut reports, mut losses) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        trainer.queue(&batch(step, sizes), Some(0.01)).unwrap();
        if step % 3 == 2 {
            while let Some(report) = trainer.finished(true).unwrap() {
                reports.push(report);
            }
            let found = trainer.evaluate(std::iter::once(Ok(batch(step + 1, sizes)))).unwrap();
            losses.extend(found.iter().map(|sums| sums.loss.to_bits()));
        }
    }
    (reports, losses)
}

#[test]
fn trainers_on_threads_that_share_a_device_find_what_each_finds_alone() {
    let Some(device) = device::device() else { return };
    // Rows in several parts, so that sums pass through scratch memory, of another size each.
    let sizes = [[18, 8], [10, 16], [24, 8]];
    let expected = sizes.map(|sizes| train::<f32>(&device, 3, sizes));
    drop(device);
    let Some(device) = device::device() else { return };
    let together = Barrier::new(sizes.len());
    let found = thread::scope(|scope| {
        let threads = sizes.map(|sizes| {
            let (device, together) = (&device, &together);
            scope.spawn(move || {
                together.wait();
                train::<f32>(device, 3, sizes)
            })
        });
        threads.map(|thread| thread.join().unwrap())
    });
    assert_eq!(found, expected);
}

#[test]
fn a_trainer_goes_on_in_a_thread_that_has_not_used_the_device() {
    let Some(device) = device::device() else { return };
    let sizes = [4, 8];
    let run = |moves: bool| {
        let mut trainer = trainer::<bf16>(&device, 5, sizes);
        let mut found = Vec::new();
        for step in 0..5 {
            let mut one = || found.push(trainer.step(&[batch(step, sizes)], 0.01).unwrap());
            if moves { thread::scope(|scope| scope.spawn(one).join().unwrap()) } else { one() }
        }
        found
    };
    assert_eq!(run(true), run(false));
}
