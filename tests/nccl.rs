//! Several processes of the program on the emulated device, joined by the emulated NCCL: the numbers of one process, in one graph
//! launch a step.

mod common;
#[path = "common/devices.rs"]
mod devices;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::Duration;

use common::{curve, has_emulated_device};
use serde_json::Value;
use tempfile::TempDir;

const MLP: &str = r#"
[run]
steps = 6
log_every_steps = 1

[data]
format = "digits"
batch_size = 16
split = { validation = 0.1 }

[model]
preset = "mlp"
hidden = [24, 16]
dropout = 0.2

[optimizer]
rule = "momentum"
learning_rate = 0.02
momentum = 0.9
clip = { global_norm = 1.0 }
accumulate = 2

[evaluate]
every_steps = 3
batches = 2

[checkpoint]
every_steps = 3

[parallel]
bucket_mb = 0.002
"#;

const GPT: &str = r#"
[run]
steps = 4
log_every_steps = 1

[data]
format = "text"
path = "text.txt"
batch_size = 8
context = 8
split = { validation = 0.1 }

[model]
preset = "gpt"
layers = 1
heads = 2
width = 16
dropout = 0.1

[optimizer]
rule = "sgd"
learning_rate = 0.05
clip = { global_norm = 1.0 }

[evaluate]
batches = 1

[parallel]
bucket_mb = 0.004
"#;

struct Place {
    folder: TempDir,
    file: PathBuf,
}

impl Place {
    fn new(run: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("run.toml");
        std::fs::write(&file, run).unwrap();
        let text: String = (0..900u32).map(|i| char::from(b'a' + (i * i / 7 % 11) as u8)).collect();
        std::fs::write(folder.path().join("text.txt"), text).unwrap();
        Place { folder, file }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program, training into a folder.
    fn command(&self, name: &str, set: &[&str]) -> Command {
        let mut command = common::warpstep();
        command.args(["train", "--quiet", "--out"]).args([&self.out(name), &self.file]);
        command.args(set.iter().flat_map(|set| ["--set", set]));
        command
    }

    /// One process that knows of no other.
    fn alone(&self, name: &str, set: &[&str]) -> PathBuf {
        let ran = devices::on_device(&mut self.command(name, set)).output().unwrap();
        assert!(ran.status.success(), "{}", common::stderr(&ran));
        self.out(name)
    }

    /// So many processes, as a launcher starts them.
    fn start(&self, name: &str, world: usize, set: &[&str], more: &[&str]) -> Vec<Child> {
        devices::start(world, || {
            let mut command = self.command(name, set);
            command.args(more);
            command
        })
    }

    fn together(&self, name: &str, world: usize, set: &[&str]) -> PathBuf {
        self.run(name, world, set, &[])
    }

    fn run(&self, name: &str, world: usize, set: &[&str], more: &[&str]) -> PathBuf {
        let ran: Vec<Output> =
            self.start(name, world, set, more).into_iter().map(|process| process.wait_with_output().unwrap()).collect();
        let told: Vec<String> = ran.iter().map(common::stderr).collect();
        assert!(ran.iter().all(|ran| ran.status.success()), "{told:#?}");
        self.out(name)
    }
}

/// Losses, accuracies and norms of two curves are as close as sums in another order make them.
fn assert_near(found: &[Value], expected: &[Value], allowed: f64) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        for key in ["step", "split", "epoch", "lr"] {
            assert_eq!(found.get(key), expected.get(key), "{found} for {expected}");
        }
        for key in ["loss", "accuracy", "grad_norm"] {
            let [a, b] = [found, expected].map(|line| line.get(key).and_then(Value::as_f64));
            let near = match (a, b) {
                (Some(a), Some(b)) => (a - b).abs() <= allowed * b.abs().max(1.0),
                (a, b) => a == b,
            };
            assert!(near, "{key}: {found} for {expected}");
        }
    }
}

fn assert_same(what: &str, found: &Path, expected: &Path) {
    assert_eq!(curve(found), curve(expected), "{what}: another curve");
    assert_eq!(common::tensor_hashes(found), common::tensor_hashes(expected), "{what}: other weights");
}

#[test]
fn one_process_through_nccl_has_the_bits_of_one_without() {
    if !has_emulated_device() {
        return;
    }
    for run in [MLP, GPT] {
        let place = Place::new(run);
        let alone = place.alone("alone", &[]);
        assert_same("one process", &place.together("through", 1, &[]), &alone);
    }
}

#[test]
fn two_and_four_processes_have_the_curve_of_one() {
    if !has_emulated_device() {
        return;
    }
    for run in [MLP, GPT] {
        let place = Place::new(run);
        let alone = curve(&place.alone("alone", &[]));
        for world in [2, 4] {
            assert_near(&curve(&place.together(&format!("{world}"), world, &[])), &alone, 1e-6);
        }
    }
}

#[test]
fn reproducible_runs_have_the_same_bits_in_one_two_and_four_processes() {
    if !has_emulated_device() {
        return;
    }
    let set = ["run.reproducible=true", "parallel.parts=4"];
    for (run, more) in [(MLP, "model.batch_norm=true"), (GPT, "optimizer.accumulate=1")] {
        let place = Place::new(run);
        let set = [set[0], set[1], more];
        let one = place.alone("one", &set);
        for world in [2, 4] {
            assert_same(&format!("{world} processes"), &place.together(&format!("{world}"), world, &set), &one);
        }
    }
}

#[test]
fn a_run_goes_on_in_another_number_of_processes_with_the_same_bits() {
    if !has_emulated_device() {
        return;
    }
    let set = ["run.reproducible=true", "parallel.parts=4", "optimizer.rule=\"adamw\"", "optimizer.ema=0.9"];
    let place = Place::new(&MLP.replace("momentum = 0.9\n", ""));
    let whole = place.alone("whole", &set);
    let stopped = place.together("stopped", 4, &set);
    // As if it had been stopped there.
    std::fs::remove_dir_all(stopped.join("checkpoints/step-00000006")).unwrap();
    std::fs::write(stopped.join("checkpoints/latest"), "step-00000003").unwrap();
    assert_same("resumed", &place.run("stopped", 2, &set, &["--resume"]), &whole);
}

/// Waits until a run has told of so many steps.
fn wait_for_steps(run: &Path, steps: usize) {
    let told = || std::fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
    while told() < steps {
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_process_that_is_killed_ends_the_others_with_a_sentence() {
    if !has_emulated_device() {
        return;
    }
    for killed in [0, 1] {
        let place = Place::new(MLP);
        let mut processes = place.start("killed", 2, &["run.steps=100000", "evaluate.every_steps=100000"], &[]);
        wait_for_steps(&place.out("killed"), 8);
        let mut gone = processes.remove(killed);
        gone.kill().unwrap();
        gone.wait().unwrap();
        let other = processes.remove(0).wait_with_output().unwrap();
        let told = common::stderr(&other);
        assert_eq!(other.status.code(), Some(1), "{told}");
        // What the emulated NCCL says of a peer that is gone, or of the abort, may come before and after.
        let errors: Vec<&str> = told.lines().filter(|line| line.starts_with("error:")).collect();
        let sentence = format!("error: rank {killed} on host");
        assert!(matches!(errors[..], [one] if one.starts_with(&sentence) && one.contains("died")), "{told}");
    }
}

/// Tells the second of some processes to end, and waits for all, which end by that.
fn all_end_by_a_signal_to_one(processes: Vec<Child>) {
    // SAFETY: a signal to a process that this test started and has not waited for.
    unsafe { libc::kill(processes[1].id() as i32, libc::SIGTERM) };
    for process in processes {
        let ended = process.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(128 + libc::SIGTERM), "{}", common::stderr(&ended));
    }
}

#[test]
fn a_signal_to_one_process_ends_all_after_the_same_step_with_a_checkpoint() {
    if !has_emulated_device() {
        return;
    }
    let place = Place::new(MLP);
    let never = ["run.steps=100000", "evaluate.every_steps=100000", "checkpoint.every_steps=100000"];
    let processes = place.start("told", 2, &never, &[]);
    wait_for_steps(&place.out("told"), 5);
    all_end_by_a_signal_to_one(processes);
    assert!(!common::tensor_hashes(&place.out("told")).is_empty());
}

/// An evaluation may take longer than the time that a cluster leaves between its signal and the end.
#[test]
fn a_signal_to_one_process_ends_an_evaluation_of_all_and_it_is_done_again() {
    if !has_emulated_device() {
        return;
    }
    let long = [
        "run.steps=4",
        "data.split={ validation = 0.6 }",
        "evaluate.every_steps=2",
        "evaluate.batches=1000000",
        "checkpoint.every_steps=100000",
        "model.hidden=[1000, 1000]",
    ];
    for shard in ["none", "parameters"] {
        let place = Place::new(MLP);
        let sharded = format!("parallel.shard=\"{shard}\"");
        let set = [&long[..], &[&sharded]].concat();
        let processes = place.start("told", 2, &set, &[]);
        wait_for_steps(&place.out("told"), 2);
        all_end_by_a_signal_to_one(processes);
        let splits = |out: &Path| -> Vec<String> { curve(out).iter().map(|line| line["split"].to_string()).collect() };
        let told = splits(&place.out("told"));
        assert!(told.iter().all(|split| split == "\"train\""), "{shard}: {told:?}");
        place.run("told", 2, &set, &["--resume"]);
        assert_same(shard, &place.out("told"), &place.together("whole", 2, &set));
    }
}

#[test]
fn gradients_sent_as_bf16_stay_near() {
    if !has_emulated_device() {
        return;
    }
    let place = Place::new(MLP);
    let exact = curve(&place.together("f32", 2, &[]));
    let rounded = curve(&place.together("bf16", 2, &["parallel.reduce=\"bf16\""]));
    assert_near(&rounded, &exact, 1e-2);
    assert_ne!(rounded, exact, "nothing was rounded");
}
