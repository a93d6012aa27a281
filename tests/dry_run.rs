//! `warpstep train --dry-run` tells the memory that a run takes on its device, whether the device is there or not; and a run that
//! needs more than there is says what to change.
//!
//! The device is the emulated one, or a real one where `WARPSTEP_TEST_DEVICE=cuda` asks for it.

mod common;
#[path = "common/device.rs"]
mod device;
#[path = "common/emulator.rs"]
mod emulator;

use std::path::PathBuf;
use std::process::Output;

use common::{has_emulated_device, stderr, stdout, warpstep};
use emulator::Emulator;
use half::{bf16, f16};
use tempfile::TempDir;
use warpstep::backend::cuda::{Cuda, Device, Storage, emulated, update};
use warpstep::backend::ops::Update;
use warpstep::data::{Batch, Inputs, Targets};
use warpstep::model::presets::{CnnOptions, Fit, Goal, GptOptions, ModelOptions, Preset};
use warpstep::model::{Input, Mode, Model};
use warpstep::optim::{Clip, MuonScale, NormClip, OptimizerOptions, Rule, UpdatePlan};
use warpstep::train::memory::{RunMemory, Wanted};
use warpstep::train::step::{Trainer, TrainerParts};

/// What an allocation of nothing takes, a few times.
const SLACK: usize = 32;
/// What steps in flight take for their scalars.
const SCALARS: usize = 64;

/// Free memory is one figure of the whole device, which opening a device changes: one test of this program, and no more, opens one.
fn free(device: &Device) -> usize {
    device.memory().unwrap().0
}

fn adam() -> OptimizerOptions {
    OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.95], epsilon: 1e-8 }, 1e-3)
}

fn gpt<B: Update>() -> (Model<B>, Input) {
    let options = GptOptions { layers: 2, heads: 2, width: 16, bias: true, dropout: 0.1, ..GptOptions::default() };
    (options.build(13, 8).unwrap(), Input::Tokens(8))
}

fn cnn<B: Update>() -> (Model<B>, Input) {
    let preset = Preset::Cnn(CnnOptions { channels: vec![3, 5], hidden: 7, batch_norm: true, ..CnnOptions::default() });
    let options = ModelOptions { preset, loss: None, label_smoothing: 0.0 };
    let fit = Fit { vocabulary: None, context: None, goal: Goal::Classes(4), padding: None, outputs: 0 };
    (options.build(&fit).unwrap(), Input::Real(vec![1, 8, 8]))
}

/// So many samples of the model's input, the numbers of which do not matter.
fn samples(input: &Input, samples: usize) -> Batch {
    let tokens = |len: usize| (0..samples * len).map(|i| (i % 4) as i32).collect();
    match input {
        Input::Tokens(time) => {
            Batch { inputs: Inputs::Tokens(tokens(*time)), targets: Targets::Index(tokens(*time)), samples }
        }
        Input::Real(shape) => {
            let values = (0..samples * shape.iter().product::<usize>()).map(|i| (i % 7) as f32).collect();
            Batch { inputs: Inputs::Real(values), targets: Targets::Index(tokens(1)), samples }
        }
    }
}

/// The memory that is planned, but for what is allocated later, is what a trainer takes; and all of it is what the device has handed
/// out once it has trained and evaluated, when it has taken nothing back, so that it never had handed out more.
fn check<S: Storage>(
    emulator: &Emulator,
    make: fn() -> (Model<Cuda<S>>, Input),
    optimizer: &OptimizerOptions,
    ema: Option<f64>,
) {
    // One that has opened no library, and has no scratch memory.
    let device = &device::device().unwrap();
    let (mut model, input) = make();
    let wanted = Wanted {
        input: input.clone(),
        batch_size: 5,
        left: Some(3),
        evaluations: vec![2, 5],
        optimizer,
        average: ema.is_some(),
        share: None,
    };
    let backend = Cuda::<S>::new(device.clone());
    let (_, memory) = RunMemory::plan_on(&mut model, &wanted, Some(&backend)).unwrap();
    let planned = |name: &str| memory.parts.iter().find(|part| part.name == name).map_or(0, |part| part.bytes);
    assert!(planned("scratch") > 0 && planned("libraries") == 32 << 20, "{:#?}", memory.parts);
    let later = planned("tables of the update");
    let before = free(device);
    emulator.reset();
    let parts = TrainerParts {
        backend,
        model: make().0,
        input: input.clone(),
        batch_size: 5,
        accumulate: 1,
        optimizer,
        ema,
        seed: 1,
    };
    let mut trainer = Trainer::new(parts).unwrap();
    trainer.plan_smaller(3).unwrap();
    trainer.plan_evaluations(&wanted.evaluations).unwrap();
    let taken = before - free(device);
    assert!(taken.abs_diff(memory.total() - later) <= SLACK, "{taken} bytes were taken of {:#?}", memory.parts);
    // Run as they are, recorded for either slot, replayed.
    for step in 0..10 {
        trainer.step(&[samples(&input, if step % 2 == 0 { 5 } else { 3 })], 0.01).unwrap();
    }
    for _ in 0..3 {
        trainer.evaluate([2, 5].into_iter().map(|some| Ok(samples(&input, some)))).unwrap();
    }
    let taken = before - free(device);
    let off = taken.abs_diff(memory.total());
    assert!(off <= SLACK + SCALARS, "{taken} bytes were taken in the end of {}: {:#?}", memory.total(), memory.parts);
    assert_eq!(emulator.host().frees, 0);
    let before = free(device);
    let evaluated = [2, 5].map(|samples| {
        let program = make().0.plan(&input, samples, Mode::Evaluation).unwrap();
        program.activations(trainer.backend()).unwrap()
    });
    let taken = before - free(device);
    let of_evaluations = planned("evaluation");
    assert!(taken.abs_diff(of_evaluations) <= SLACK, "{taken} bytes for evaluations, not {of_evaluations}");
    drop(evaluated);
    let before = free(device);
    let prepared = update::Prepared::new(device, trainer.update_plan()).unwrap();
    let (taken, planned) =
        (before - free(device), Cuda::<S>::table_bytes(trainer.update_plan(), &trainer.arena().own_elements()));
    assert!(taken.abs_diff(planned) <= SLACK, "{taken} bytes for tables, not {planned}");
    drop(prepared);
}

#[test]
fn the_memory_told_is_the_memory_taken_in_every_precision() {
    if !emulated::is_active() {
        println!("skipped: only the emulated device tells free memory to the byte");
        return;
    }
    if device::device().is_none() {
        return;
    }
    let Some(emulator) = &Emulator::find() else { return };
    let adaptive = Clip { value: None, norm: NormClip::Adaptive { clipping: 0.1, epsilon: 1e-3 } };
    let sgd = OptimizerOptions { clip: adaptive, ..OptimizerOptions::new(Rule::Sgd, 0.1) };
    // Its iteration needs more than the operations of so small a network.
    let muon = Rule::Muon { momentum: 0.95, nesterov: true, steps: 2, scale: MuonScale::Original };
    check::<f32>(emulator, gpt, &adam(), Some(0.9));
    check::<f32>(emulator, gpt, &OptimizerOptions::new(muon, 1e-3), None);
    check::<bf16>(emulator, gpt, &adam(), Some(0.9));
    check::<bf16>(emulator, gpt, &OptimizerOptions { master: false, ..adam() }, None);
    check::<f16>(emulator, gpt, &sgd, None);
    check::<f32>(emulator, cnn, &sgd, None);
    check::<bf16>(emulator, cnn, &adam(), Some(0.5));
    scratch_memory_is_the_largest_programs_alone();
}

/// What a program leaves that is gone is given back when a larger one comes; what a recording names stays as long as that.
fn scratch_memory_is_the_largest_programs_alone() {
    let device = &device::device().unwrap();
    let optimizer = adam();
    let trainer = |batch_size: usize| {
        let parts = TrainerParts {
            backend: Cuda::<f32>::new(device.clone()),
            model: gpt().0,
            input: Input::Tokens(8),
            batch_size,
            accumulate: 1,
            optimizer: &optimizer,
            ema: None,
            seed: 1,
        };
        Trainer::new(parts).unwrap()
    };
    let trained = |trainer: &mut Trainer<Cuda<f32>>, batch_size: usize| {
        (0..4).map(|_| trainer.step(&[samples(&Input::Tokens(8), batch_size)], 0.01).unwrap()).last()
    };
    let scratch = |batch_size: usize| {
        let program = gpt::<Cuda<f32>>().0.plan(&Input::Tokens(8), batch_size, Mode::Training).unwrap();
        program.workspace(None).unwrap().scratch
    };
    assert!(scratch(2) < scratch(9) && scratch(9) < scratch(40));
    let none = free(device);
    trained(&mut trainer(2), 2);
    // With the library that it opened.
    let small = free(device);
    let mut kept = trainer(9);
    trained(&mut kept, 9);
    let with_both = free(device);
    trained(&mut trainer(40), 40);
    assert_eq!(with_both - free(device), scratch(40), "the recording of the one that is kept names its own");
    let mut alone = trainer(9);
    trained(&mut alone, 9);
    assert_eq!(trained(&mut kept, 9), trained(&mut alone, 9));
    drop(alone);
    drop(kept);
    assert_eq!(none - free(device), (none - small) + scratch(40) - scratch(2), "it goes with the recording");
}

#[test]
fn without_a_device_to_ask_convolutions_are_told_to_take_the_most_that_they_may() {
    let optimizer = adam();
    let scratch = |(mut model, input): (Model<Cuda<bf16>>, Input)| {
        let evaluations = vec![5];
        let wanted = Wanted {
            input,
            batch_size: 5,
            left: None,
            evaluations,
            optimizer: &optimizer,
            average: false,
            share: None,
        };
        let (_, memory) = RunMemory::plan(&mut model, &wanted).unwrap();
        memory.parts.into_iter().find(|part| part.name == "scratch").unwrap()
    };
    let (convolutions, others) = (scratch(cnn()), scratch(gpt()));
    assert!(convolutions.bytes > 512 << 20 && convolutions.of.contains("at most"), "{convolutions:?}");
    assert!(others.bytes < 1 << 20 && !others.of.contains("at most"), "{others:?}");
}

#[test]
fn the_tables_of_an_update_are_counted_with_the_units_of_an_adaptive_clip() {
    let (mut model, input) = gpt::<Cuda<f32>>();
    model.plan(&input, 1, Mode::Training).unwrap();
    let (layout, _) = model.parameters().layout().unwrap();
    let bytes = |norm| {
        let options = OptimizerOptions { clip: Clip { value: None, norm }, ..adam() };
        Cuda::<f32>::table_bytes(&UpdatePlan::new(&options, &layout).unwrap(), &(0..layout.padded_len()))
    };
    assert!(bytes(NormClip::Adaptive { clipping: 0.1, epsilon: 1e-3 }) > bytes(NormClip::Off));
}

const RUN: &str = r#"
[run]
steps = 2
precision = "bf16"

[data]
format = "digits"
batch_size = 32
split = { validation = 0.1, test = 0.2 }

[model]
preset = "mlp"
hidden = [64, 32]
batch_norm = true

[optimizer]
rule = "adamw"
learning_rate = 2e-3
ema = 0.9
"#;

struct Place {
    _folder: TempDir,
    file: PathBuf,
    out: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let (file, out) = (folder.path().join("run.toml"), folder.path().join("out"));
        std::fs::write(&file, RUN).unwrap();
        Place { _folder: folder, file, out }
    }

    /// Trains on a device of so many bytes.
    fn train(&self, device: &str, bytes: usize, more: &[&str]) -> Output {
        let mut command = warpstep();
        command.args(["train", "--device", device, "--out"]).args([&self.out, &self.file]).args(more);
        // This program may run on the emulated device; what it starts is to choose for itself.
        command.env_remove("LD_LIBRARY_PATH").env_remove("WARPSTEP_EMULATED");
        match device {
            "emulated" => command.env("WARPSTEP_EMULATOR_MEMORY", bytes.to_string()),
            // As on a machine without a GPU.
            _ => command.env("CUDA_VISIBLE_DEVICES", ""),
        };
        command.output().unwrap()
    }
}

/// The lines of the memory's table: name and MiB of each part.
fn parts(told: &str) -> Vec<(String, f64)> {
    let lines = told.lines().skip_while(|line| *line != "memory of the device").skip(1);
    let part = |line: &str| {
        let (name, rest) = line.trim_start().split_once("  ")?;
        let mib = rest.split_whitespace().next()?.parse().ok()?;
        Some((name.trim().to_owned(), mib))
    };
    lines.map_while(part).collect()
}

#[test]
fn without_a_gpu_a_run_on_one_is_planned_all_the_same() {
    let place = Place::new();
    let told = |more: &[&str]| {
        let mut arguments = vec!["--dry-run"];
        arguments.extend(more);
        let ran = place.train("cuda", 16 << 30, &arguments);
        assert!(ran.status.success(), "{}", stderr(&ran));
        stdout(&ran)
    };
    // Large enough that MiB tell the difference.
    let wide = "model.hidden=[4096, 2048]";
    let (low, full) = (told(&["--set", wide]), told(&["--set", wide, "--set", "run.precision=\"f32\""]));
    assert!(low.contains("planned without a device"), "{low}");
    let (low, full) = (parts(&low), parts(&full));
    let of = |parts: &[(String, f64)], name: &str| parts.iter().find(|part| part.0 == name).map(|part| part.1);
    let parameters = of(&low, "parameters").unwrap();
    assert!(parameters > 30.0);
    assert!((of(&low, "copy of parameters").unwrap() - parameters / 2.0).abs() < 0.1);
    assert_eq!(of(&full, "copy of parameters"), None);
    for (name, times) in [("gradients", 1.0), ("optimizer slots", 2.0), ("average of weights", 1.0)] {
        assert!((of(&low, name).unwrap() - times * parameters).abs() < 0.2, "{name}: {low:?}");
    }
    let [half, whole] = [&low, &full].map(|parts| of(parts, "activations").unwrap());
    // Running sums and means have 4 bytes in both.
    assert!(half >= whole / 2.0 && half < 0.6 * whole, "{half} and {whole}");
    for parts in [low, full] {
        let together = of(&parts, "together").unwrap();
        let sum: f64 = parts.iter().filter(|part| part.0 != "together").map(|part| part.1).sum();
        assert!((sum - together).abs() < 0.06 * parts.len() as f64, "{parts:?}");
    }
}

/// What is asked of the data's size: a training split of 1258 samples.
#[test]
fn what_training_refuses_a_dry_run_refuses_in_the_same_words() {
    let place = Place::new();
    for more in [
        ["data.batch_size=4000", "run.steps=3"],
        ["run.epochs=1", "schedule.warmup_steps=39"],
        ["run.epochs=0.5", "schedule={ kind = \"wsd\", decay_steps = 21 }"],
        ["data.drop_last=false", "data.batch_size=1257"],
    ] {
        let more = ["--set", "run.precision=f32", "--set", more[0], "--set", more[1]];
        let [dry, ran] = [&["--dry-run"][..], &[]].map(|dry| place.train("cpu", 0, &[&more[..], dry].concat()));
        assert_eq!((dry.status.code(), ran.status.code()), (Some(2), Some(2)), "{more:?}: {}", stdout(&dry));
        assert_eq!(stderr(&dry), stderr(&ran));
        assert!(!place.out.exists());
    }
}

#[test]
fn where_the_device_is_there_what_is_free_is_told_and_whether_it_fits() {
    if !has_emulated_device() {
        return;
    }
    let place = Place::new();
    let fits = place.train("emulated", 64 << 20, &["--dry-run"]);
    assert!(fits.status.success(), "{}", stderr(&fits));
    let told = stdout(&fits);
    assert!(told.contains("memory, free") && told.contains("of 64.0 MiB"), "{told}");
    assert!(!told.contains("does not fit") && told.contains("most activations at once"), "{told}");
    let absent = stdout(&place.train("cuda", 0, &["--dry-run"]));
    assert_eq!(parts(&told), parts(&absent));
    let told = stdout(&place.train("emulated", 100 << 10, &["--dry-run"]));
    assert!(told.contains("it does not fit") && told.contains("model.recompute"), "{told}");
    assert!(!place.out.exists());
}

#[test]
fn a_run_that_needs_more_memory_than_there_is_says_what_to_change() {
    if !has_emulated_device() {
        return;
    }
    let place = Place::new();
    // Too little for the parameters, and, below, for what libraries take in the first step.
    for bytes in [60 << 10, 8 << 20] {
        let ran = place.train("emulated", bytes, &["--overwrite"]);
        let told = stderr(&ran);
        assert_eq!(ran.status.code(), Some(2), "{told}");
        let sentence = told.lines().find(|line| line.contains("not enough memory")).expect(&told);
        for part in ["MiB were asked for", "MiB are free", "data.batch_size", "model.recompute", "run.precision"] {
            assert!(sentence.contains(part), "{sentence}");
        }
        assert!(!told.contains("panicked"), "{told}");
    }
}
