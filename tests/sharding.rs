//! Processes that share a model's memory out: `parallel.shard` gives the bits of one process alone, checkpoints can be read by any
//! number of them, and what a process takes of memory is what was planned.
//!
//! Real processes, which `mpirun` of Open MPI starts; where it is not there, or this build speaks no MPI, that is said.

mod common;
#[path = "common/devices.rs"]
mod devices;
#[path = "common/mpi.rs"]
mod mpi;
#[path = "common/sharded.rs"]
mod sharded;

use std::fs;
use std::process::Output;

use common::{run, stderr, stdout, tensor_hashes, warpstep};
use sharded::{
    ADAMW, ADAPTIVE, BATCH_NORM, Bed, LAMB, LEVELS, MUON, On, digits, gives_the_bits_of_one_process, gpt, losses,
    skips_alike, stays_within_a_millionth,
};
use tempfile::TempDir;
use warpstep::backend::Held;
use warpstep::backend::cpu::Cpu;
use warpstep::model::presets::GptOptions;
use warpstep::model::{Input, Model};
use warpstep::optim::{OptimizerOptions, Rule};
use warpstep::parallel::{Shard, ShardingOptions, Wire};
use warpstep::plan::Share;
use warpstep::train::memory::{RunMemory, Wanted};
use warpstep::train::step::{Trainer, TrainerParts};

#[test]
fn adamw_with_a_global_norm_accumulation_and_an_average_has_the_bits_of_one_process() {
    gives_the_bits_of_one_process(On::Cpus, &digits(ADAMW, true), &[2, 4], &LEVELS);
}

#[test]
fn momentum_with_an_adaptive_clip_has_the_bits_of_one_process() {
    gives_the_bits_of_one_process(On::Cpus, &digits(ADAPTIVE, true), &[2, 4], &LEVELS);
}

#[test]
fn lamb_has_the_bits_of_one_process() {
    gives_the_bits_of_one_process(On::Cpus, &digits(LAMB, true), &[2, 4], &LEVELS);
}

#[test]
fn lars_has_the_bits_of_one_process() {
    let optimizer = r#"rule = "lars"
learning_rate = 1.0
weight_decay = 1e-4"#;
    gives_the_bits_of_one_process(On::Cpus, &digits(optimizer, true), &[2], &LEVELS);
}

#[test]
fn muon_whose_matrices_stay_whole_has_the_bits_of_one_process() {
    gives_the_bits_of_one_process(On::Cpus, &digits(MUON, true), &[2, 4], &LEVELS);
}

#[test]
fn steps_whose_gradients_are_not_finite_are_skipped_by_all_alike() {
    skips_alike(On::Cpus);
}

#[test]
fn running_statistics_of_batch_norm_have_the_bits_of_one_process() {
    gives_the_bits_of_one_process(On::Cpus, BATCH_NORM, &[2, 4], &["gradients", "parameters"]);
}

#[test]
fn a_small_gpt_with_dropout_and_a_shared_table_has_the_bits_of_one_process() {
    let prose = TempDir::new().unwrap();
    gives_the_bits_of_one_process(On::Cpus, &gpt(prose.path()), &[2, 4], &["gradients", "parameters"]);
}

#[test]
fn without_an_order_of_sums_the_curves_stay_within_a_millionth() {
    stays_within_a_millionth(On::Cpus);
}

#[test]
fn a_run_moved_from_4_processes_to_2_and_to_1_ends_with_the_bits_of_one_never_moved() {
    if !mpi::is_there() {
        return;
    }
    let optimizer = r#"rule = "adamw"
learning_rate = 2e-3
clip = { global_norm = 0.2 }
ema = 0.9"#;
    let text =
        digits(optimizer, true).replace("steps = 4", "steps = 7") + "\n[checkpoint]\nevery_steps = 2\nkeep = 9\n";
    let bed = Bed::new(On::Cpus, &text);
    bed.alone("alone", &[]);
    bed.together(4, "parameters", "moved", &[]);
    let parts = fs::read_dir(bed.path("moved/checkpoints/step-00000002")).unwrap();
    let mut names: Vec<String> = parts.map(|part| part.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let of = |stem: &str| (1..=4).map(|n| format!("{stem}-{n:05}-of-00004.safetensors")).collect::<Vec<_>>();
    assert_eq!(names, [of("ema"), of("model"), of("optimizer"), vec!["state.json".into()]].concat());
    bed.rewind("moved", 2);
    bed.together(2, "gradients", "moved", &["--resume"]);
    bed.rewind("moved", 4);
    bed.together(2, "optimizer", "moved", &["--resume"]);
    bed.rewind("moved", 6);
    bed.alone("moved", &["--resume"]);
    assert_eq!(tensor_hashes(&bed.path("moved")), tensor_hashes(&bed.path("alone")));
    assert_eq!(losses(&bed.path("moved")), losses(&bed.path("alone")));
}

#[test]
fn a_model_in_parts_is_evaluated_as_one_in_a_single_file() {
    if !mpi::is_there() {
        return;
    }
    let bed = Bed::new(On::Cpus, &digits("rule = \"adamw\"\nlearning_rate = 2e-3\nema = 0.8", true));
    bed.alone("alone", &[]);
    bed.together(2, "parameters", "parts", &[]);
    let evaluated = |out: &str| {
        let output = run(&["eval", &bed.path(out).display().to_string(), "--checkpoint", "latest", "--json"]);
        assert!(output.status.success(), "{}", stderr(&output));
        let mut value: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
        value.as_object_mut().unwrap().remove("checkpoint");
        value
    };
    assert_eq!(evaluated("parts"), evaluated("alone"));
    let part = bed.path("parts/checkpoints/step-00000004/ema-00002-of-00002.safetensors");
    fs::remove_file(&part).unwrap();
    let output = run(&["eval", &bed.path("parts").display().to_string(), "--checkpoint", "latest"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("expected ema-00001-of-00002.safetensors, .. ema-00002-of-00002"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_process_that_cannot_write_its_part_ends_all_and_leaves_nothing_half_written() {
    if !mpi::is_there() {
        return;
    }
    let text =
        digits("rule = \"adamw\"\nlearning_rate = 2e-3", false).replace("hidden = [260, 90]", "hidden = [1400, 1400]");
    let bed = Bed::new(On::Cpus, &text.replace("steps = 4", "steps = 1"));
    // The second process may write files of 6 MiB at most; its part of the optimizer's slots takes 8.
    let program = warpstep().get_program().to_owned();
    let arguments = bed.arguments("out", &["--set", "parallel.shard=\"gradients\""]);
    let limited = "trap '' XFSZ; ulimit -f 6144; exec \"$@\"";
    let mut command = mpi::bare();
    command.args(["-n", "1"]).arg(&program).args(&arguments);
    command.args([":", "-n", "1", "bash", "-c", limited, "bash"]).arg(&program).args(&arguments);
    let output = mpi::output(&mut command);
    assert!(!output.status.success());
    let said = stderr(&output);
    assert!(said.contains("optimizer-00002-of-00002.safetensors"), "{said}");
    let left = fs::read_dir(bed.path("out/checkpoints")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
    bed.together(2, "gradients", "out", &["--resume"]);
    assert!(bed.path("out/checkpoints/step-00000001/optimizer-00002-of-00002.safetensors").is_file());
}

/// `mpirun` of two processes that train with these arguments, and the second with `more` besides.
fn second_with(arguments: &[String], more: &[&str]) -> Output {
    let program = warpstep().get_program().to_owned();
    let mut command = mpi::bare();
    command.args(["-n", "1"]).arg(&program).args(arguments).args([":", "-n", "1"]);
    mpi::output(command.arg(&program).args(arguments).args(more))
}

#[test]
fn a_run_is_not_replaced_where_one_process_of_the_next_cannot_begin() {
    if !mpi::is_there() {
        return;
    }
    let bed = Bed::new(On::Cpus, &digits("rule = \"sgd\"\nlearning_rate = 0.1", false));
    bed.together(2, "none", "out", &[]);
    bed.alone("other", &["--set", "model.hidden=[7]"]);
    let other = bed.path("other/checkpoints/step-00000004/model.safetensors");
    let before = tensor_hashes(&bed.path("out"));
    let weights = format!("model.weights=\"{}\"", other.display());
    let output = second_with(&bed.arguments("out", &["--overwrite"]), &["--set", &weights]);
    assert!(!output.status.success());
    let errors: Vec<String> =
        stderr(&output).lines().filter(|line| line.starts_with("error:")).map(str::to_owned).collect();
    assert!(matches!(&errors[..], [error] if error.contains("other/checkpoints")), "{}", stderr(&output));
    assert_eq!(tensor_hashes(&bed.path("out")), before);
    assert!(bed.path("out/summary.json").is_file());
}

#[test]
fn what_one_process_finds_in_its_turn_of_an_evaluation_is_said() {
    if !mpi::is_there() {
        return;
    }
    let folder = TempDir::new().unwrap();
    for split in ["train", "validation"] {
        for (class, shade) in [("a", 50), ("b", 200)] {
            let of_class = folder.path().join(split).join(class);
            fs::create_dir_all(&of_class).unwrap();
            for number in 0..2 {
                let picture = image::GrayImage::from_pixel(8, 8, image::Luma([shade]));
                picture.save(of_class.join(format!("{number}.png"))).unwrap();
            }
        }
    }
    // The last picture, which is in the second process's batch.
    let damaged = folder.path().join("validation/b/1.png");
    let whole = fs::read(&damaged).unwrap();
    fs::write(&damaged, &whole[..whole.len() - 20]).unwrap();
    let text = format!(
        "[run]\nsteps = 1\n[data]\nformat = \"images\"\npath = \"{}\"\ncache = false\nnormalize = \"unit\"\nbatch_size = 4\n\
         [model]\npreset = \"mlp\"\nhidden = [8]\n[optimizer]\nrule = \"sgd\"\nlearning_rate = 0.1\n",
        folder.path().display()
    );
    for shard in ["none", "parameters"] {
        let said = stderr(&Bed::new(On::Cpus, &text).start(2, shard, "out", &[])[0]);
        assert!(said.contains("failed after step 1: ") && said.contains("validation/b/1.png"), "{shard}: {said}");
    }
}

#[test]
fn what_cannot_be_combined_is_said() {
    let bed = Bed::new(On::Cpus, &digits("rule = \"sgd\"\nlearning_rate = 0.1", false));
    let file = bed.path("run.toml").display().to_string();
    let output = run(&["train", &file, "--dry-run", "--set", "parallel.shard=\"weights\""]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("parallel.shard"), "{}", stderr(&output));
    let set =
        ["optimizer.master=false", "run.precision=\"bf16\"", "run.device=\"cuda\"", "parallel.shard=\"optimizer\""];
    let set = set.iter().flat_map(|&set| ["--set", set]);
    let output = run(&["train", &file, "--dry-run"].into_iter().chain(set).collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("found false with parallel.shard"), "{}", stderr(&output));
    if mpi::is_there() {
        let output = bed.start(2, "gradients", "out", &["--shadow", "2"]);
        let output = &output[0];
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(output).contains("run.shadow_every_steps: looks at all gradients"), "{}", stderr(output));
    }
}

#[test]
fn memory_falls_from_level_to_level_and_is_what_was_planned() {
    let options = GptOptions { layers: 6, heads: 2, width: 64, bias: true, ..GptOptions::default() };
    let make = || -> (Model<Cpu<f32>>, Input) { (options.clone().build(97, 16).unwrap(), Input::Tokens(16)) };
    let optimizer = OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.95], epsilon: 1e-8 }, 1e-3);
    let world = 4;
    let mut totals = Vec::new();
    for shard in [Shard::None, Shard::Optimizer, Shard::Gradients, Shard::Parameters] {
        let mut updated = 0;
        let mut most = 0;
        for rank in 0..world {
            let sharding = ShardingOptions { shard, rank, world, bucket: 20_000, adds_up: false, wire: Wire::F32 };
            let (mut model, input) = make();
            let share = Share::of_rank(rank, world);
            let wanted = Wanted {
                input: input.clone(),
                batch_size: 2,
                left: None,
                evaluations: vec![8],
                optimizer: &optimizer,
                average: true,
                share: Some((share, sharding)),
            };
            let (_, memory) = RunMemory::plan(&mut model, &wanted).unwrap();
            let parts = TrainerParts {
                backend: Cpu::new(),
                model: make().0,
                input,
                batch_size: 2,
                accumulate: 1,
                optimizer: &optimizer,
                ema: Some(0.9),
                seed: 1,
            };
            let trainer = Trainer::sharded(parts, (shard != Shard::None).then_some(sharding)).unwrap();
            let arena = trainer.arena();
            let planned = |name: &str| memory.parts.iter().find(|part| part.name == name).map_or(0, |part| part.bytes);
            let (own, windows) = match &arena.held {
                None => ([arena.parameters.len(), arena.gradients.len()], [0, 0]),
                Some(Held { parameters, gradients, .. }) => {
                    let of = |own: &Option<Vec<f32>>, seen: &Vec<f32>| match own {
                        Some(own) => (own.len(), seen.len()),
                        None => (seen.len(), 0),
                    };
                    let (parameters, gradients) = (of(parameters, &arena.parameters), of(gradients, &arena.gradients));
                    ([parameters.0, gradients.0], [parameters.1, gradients.1])
                }
            };
            let slots: usize = arena.slots.iter().map(Vec::len).sum();
            let average = trainer.average().unwrap().len();
            let taken = [own[0], windows[0], own[1], windows[1], slots, average].map(|elements| 4 * elements);
            let names = ["parameters", "window of parameters", "gradients", "window of gradients", "optimizer slots"];
            let told = [names.map(planned).as_slice(), &[planned("average of weights")]].concat();
            assert_eq!(told, taken, "{shard:?}, rank {rank}");
            updated += average;
            most = most.max(taken.iter().sum::<usize>());
        }
        let len = make_len(&make);
        assert_eq!(updated, if shard == Shard::None { world * len } else { len });
        totals.push(most);
    }
    // Without: parameters, gradients, two slots and an average, 5 of each element; then 2 and 3/4, 1 and 4/4, 5/4, and the windows.
    println!("bytes by level: {totals:?}");
    assert!(totals.is_sorted_by(|more, less| less < more), "{totals:?}");
    assert!(2 * totals[3] < totals[0], "{totals:?}");
}

fn make_len(make: &dyn Fn() -> (Model<Cpu<f32>>, Input)) -> usize {
    let (mut model, input) = make();
    model.plan(&input, 2, warpstep::model::Mode::Training).unwrap();
    model.parameters().layout().unwrap().0.padded_len()
}
