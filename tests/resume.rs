//! A run that is stopped, by whatever means, and resumed ends with the same bits as one that never stopped.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use common::{curve, fresh_seed, run, stderr, stdout, tensor_hashes, warpstep};
use serde_json::Value;
use warpstep::random::{Philox, Purpose};

/// Dropout, batch norm, accumulation, an average of weights: everything that has a state.
const RUN: &str = r#"
[run]
steps = 120
log_every_steps = 5

[data]
format = "digits"
batch_size = 16
split = { validation = 0.1, test = 0.1 }

[model]
preset = "mlp"
hidden = [32, 16]
dropout = 0.2
batch_norm = true

[optimizer]
rule = "adamw"
learning_rate = 2e-3
clip = { global_norm = 1.0 }
accumulate = 3
ema = 0.98

[schedule]
kind = "cosine"
warmup_steps = 10

[evaluate]
every_steps = 30

[checkpoint]
every_steps = 7
keep = 2
"#;

fn write_run(folder: &Path) -> String {
    let file = folder.join("run.toml");
    std::fs::write(&file, RUN).unwrap();
    file.display().to_string()
}

#[test]
fn fifty_runs_killed_at_random_moments_and_resumed_end_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let file = write_run(folder.path());
    let whole = folder.path().join("whole");
    let began = Instant::now();
    let output = run(&["train", &file, "--quiet", "--out", &whole.display().to_string()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let mut length = began.elapsed();
    let expected = tensor_hashes(&whole);
    let metrics = std::fs::read_to_string(whole.join("metrics.jsonl")).unwrap();
    assert!(!expected.is_empty());
    let stream = Philox::new(fresh_seed(), Purpose::Sampling, 0);
    let mut killed = 0;
    for attempt in 0..50 {
        let out = folder.path().join(format!("killed-{attempt}"));
        let out_name = out.display().to_string();
        // Killed once or several times, each time after another part of the run.
        for kill in 0..=attempt % 3 {
            let mut child = warpstep()
                .args(["train", &file, "--quiet", "--resume", "--out", &out_name])
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let share = f64::from(stream.uniform(4 * attempt + kill));
            std::thread::sleep(Duration::from_secs_f64(length.as_secs_f64() * share));
            if child.try_wait().unwrap().is_none() {
                killed += 1;
            } else {
                // The first run went slower, other tests beside it.
                length = length.mul_f64(0.8);
            }
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let output = run(&["train", &file, "--quiet", "--resume", "--out", &out_name]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(tensor_hashes(&out), expected, "attempt {attempt}");
        let steps = |text: &str| text.lines().filter(|l| l.contains("\"train\"")).count();
        let resumed = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        assert!(steps(&resumed) >= steps(&metrics), "metrics lost in attempt {attempt}");
        std::fs::remove_dir_all(&out).unwrap();
    }
    assert!(killed >= 40, "only {killed} kills met a run that was still going");
}

#[test]
fn sigint_and_sigterm_write_a_checkpoint_and_exit_with_their_codes() {
    let folder = tempfile::tempdir().unwrap();
    let file = write_run(folder.path());
    let whole = folder.path().join("whole");
    let long = ["--set", "run.steps=4000"];
    let output = run(&[&["train", &file, "--quiet", "--out", &whole.display().to_string()][..], &long].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let out = folder.path().join(signal);
        let out_name = out.display().to_string();
        let arguments = [&["train", &file, "--out", &out_name][..], &long].concat();
        let child = warpstep().args(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while !out.join("checkpoints/latest").exists() {
            std::thread::sleep(Duration::from_millis(2));
        }
        let pid = child.id().to_string();
        assert!(std::process::Command::new("kill").args([&format!("-{signal}"), &pid]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        assert!(!out.join("summary.json").exists());
        let output = run(&[&["train", &file, "--quiet", "--resume", "--out", &out_name][..], &long].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(tensor_hashes(&out), tensor_hashes(&whole));
    }
}

#[test]
fn a_run_is_never_written_over_and_never_resumed_under_another_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let file = write_run(folder.path());
    let out = folder.path().join("run").display().to_string();
    let short = ["--set", "run.steps=24"];
    let train = |more: &[&str]| run(&[&["train", &file, "--quiet", "--out", &out][..], &short, more].concat());
    assert!(train(&[]).status.success());
    let before = tensor_hashes(Path::new(&out));
    let again = train(&[]);
    assert_eq!(again.status.code(), Some(2));
    assert!(stderr(&again).contains("holds a run already"), "{}", stderr(&again));
    let other = train(&["--resume", "--set", "optimizer.learning_rate=0.5"]);
    assert_eq!(other.status.code(), Some(2));
    assert!(stderr(&other).contains("was made with "), "{}", stderr(&other));
    assert_eq!(tensor_hashes(Path::new(&out)), before);
    assert!(train(&["--overwrite", "--set", "run.seed=2"]).status.success());
    assert_ne!(tensor_hashes(Path::new(&out)), before);
}

#[test]
fn verify_resume_proves_it_on_the_users_own_run() {
    let folder = tempfile::tempdir().unwrap();
    let file = write_run(folder.path());
    let output = run(&["verify-resume", &file, "--steps", "12"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.contains("stopped at micro-batch 25, resumed from step 8"), "{text}");
    assert!(text.contains("tensors have the same bits"), "{text}");
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let file = write_run(folder.path());
    let hashes: Vec<_> = ["1", "2", "3", "5"]
        .iter()
        .map(|threads| {
            let out = folder.path().join(threads);
            let arguments = ["train", &file, "--quiet", "--threads", threads, "--set", "run.steps=20", "--out"];
            let output = run(&[&arguments[..], &[&out.display().to_string()]].concat());
            assert!(output.status.success(), "{}", stderr(&output));
            tensor_hashes(&out)
        })
        .collect();
    assert!(hashes.iter().all(|h| *h == hashes[0]));
}

/// A short run, in a folder of its own.
struct Short {
    folder: tempfile::TempDir,
    file: String,
}

impl Short {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = write_run(folder.path());
        Short { folder, file }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn try_train(&self, name: &str, more: &[&str]) -> Output {
        let out = self.out(name).display().to_string();
        let short = ["--set", "run.steps=24", "--set", "evaluate.every_steps=10"];
        run(&[&["train", &self.file, "--quiet", "--out", &out][..], &short, more].concat())
    }

    fn train(&self, name: &str, more: &[&str]) -> PathBuf {
        let output = self.try_train(name, more);
        assert!(output.status.success(), "{}", stderr(&output));
        self.out(name)
    }
}

/// Split and step of every line of metrics.jsonl.
fn records(out: &Path) -> Vec<(String, u64)> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let of = |line: &str| -> (String, u64) {
        let record: Value = serde_json::from_str(line).unwrap();
        (record["split"].as_str().unwrap().to_owned(), record["step"].as_u64().unwrap())
    };
    text.lines().map(of).collect()
}

fn summary(out: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(out.join("summary.json")).unwrap()).unwrap()
}

#[test]
fn a_run_that_has_ended_is_left_as_it_is() {
    let short = Short::new();
    let out = short.train("run", &[]);
    let files = ["metrics.jsonl", "summary.json", "checkpoints/step-00000024/state.json"];
    let read = || files.map(|file| std::fs::read(out.join(file)).unwrap());
    let before = read();
    short.train("run", &["--resume"]);
    assert!(read() == before, "resuming changed what a run that had ended left");
    // Killed before it wrote its summary: the same records and scores again.
    let (told, lines) = (summary(&out), records(&out));
    std::fs::remove_file(out.join("summary.json")).unwrap();
    short.train("run", &["--resume"]);
    assert_eq!(records(&out), lines);
    let again = summary(&out);
    assert_eq!((&again["final"], &again["best"]), (&told["final"], &told["best"]));
    assert!(again["final"]["train"]["loss"].is_f64(), "{again}");
}

#[test]
fn a_copy_of_some_checkpoints_is_gone_on_from() {
    let short = Short::new();
    let whole = short.train("whole", &["--set", "checkpoint.keep=9"]);
    let copy = short.out("copy").join("checkpoints");
    for step in ["step-00000007", "step-00000014"] {
        let to = copy.join(step);
        std::fs::create_dir_all(&to).unwrap();
        for file in std::fs::read_dir(whole.join("checkpoints").join(step)).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    let out = short.train("copy", &["--resume", "--set", "checkpoint.keep=9"]);
    assert_eq!(tensor_hashes(&out), tensor_hashes(&whole));
    assert!(copy.join("step-00000007").is_dir(), "a checkpoint that was there before is gone");
    // It began after step 14.
    assert_eq!(records(&out)[0], ("train".to_owned(), 15));
}

/// The remedy for a damaged last checkpoint: `latest` is made to name the one before, which `best` does not.
#[test]
fn a_run_goes_back_to_an_older_checkpoint() {
    let short = Short::new();
    let out = short.train("run", &["--set", "checkpoint.keep=9"]);
    let expected = tensor_hashes(&out);
    let best = std::fs::read_to_string(out.join("checkpoints/best")).unwrap();
    assert!(best.as_str() > "step-00000007", "{best}");
    // What to do is said by the run that cannot go on.
    let checkpoints = out.join("checkpoints");
    let newest = checkpoints.join(std::fs::read_to_string(checkpoints.join("latest")).unwrap().trim());
    std::fs::File::options().write(true).open(newest.join("optimizer.safetensors")).unwrap().set_len(100).unwrap();
    std::fs::remove_file(out.join("summary.json")).unwrap();
    let error = stderr(&short.try_train("run", &["--resume", "--set", "checkpoint.keep=9"]));
    let advice = format!("write step-00000021 into {}", checkpoints.join("latest").display());
    assert!(error.contains("optimizer.safetensors") && error.contains(&advice), "{error}");
    std::fs::write(out.join("checkpoints/latest"), "step-00000007\n").unwrap();
    let out = short.train("run", &["--resume", "--set", "checkpoint.keep=9"]);
    assert_eq!(tensor_hashes(&out), expected);
    assert_eq!(std::fs::read_to_string(out.join("checkpoints/best")).unwrap(), best);
}

#[test]
fn a_run_is_replaced_only_by_one_that_can_begin() {
    let short = Short::new();
    let out = short.train("run", &[]);
    let before = tensor_hashes(&out);
    let refused = short.try_train("run", &["--overwrite", "--set", "data.batch_size=100000"]);
    assert_eq!(refused.status.code(), Some(2));
    assert_eq!(tensor_hashes(&out), before);
    // Nor does one that cannot begin leave a folder.
    assert_eq!(short.try_train("other", &["--set", "data.batch_size=100000"]).status.code(), Some(2));
    assert!(!short.out("other").exists());
}

#[test]
fn two_runs_do_not_train_in_one_folder() {
    let short = Short::new();
    let out = short.out("run").display().to_string();
    let arguments = ["train", &short.file, "--quiet", "--out", &out, "--set", "run.steps=1000000"];
    let mut first = warpstep().args(arguments).stderr(Stdio::null()).spawn().unwrap();
    while !short.out("run").join("checkpoints/latest").exists() {
        std::thread::sleep(Duration::from_millis(2));
    }
    let second = run(&[&arguments[..], &["--resume"]].concat());
    first.kill().unwrap();
    first.wait().unwrap();
    assert_eq!(second.status.code(), Some(2));
    assert!(stderr(&second).contains("another process trains in this folder"), "{}", stderr(&second));
}

#[test]
fn all_files_of_a_run_are_for_the_same_users() {
    use std::os::unix::fs::PermissionsExt;
    let short = Short::new();
    let out = short.train("run", &[]);
    let checkpoint = out.join("checkpoints/step-00000024");
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode();
    for file in ["model.safetensors", "optimizer.safetensors", "ema.safetensors"] {
        assert_eq!(mode(checkpoint.join(file)), mode(out.join("config.toml")), "{file}");
    }
}

/// The last evaluations may take long: the last checkpoint comes before them, and a signal during them ends the run.
#[test]
fn a_signal_during_the_last_evaluations_ends_the_run() {
    let short = Short::new();
    let out = short.out("run").display().to_string();
    let slow = [
        "train",
        &short.file,
        "--quiet",
        "--out",
        &out,
        "--set",
        "run.steps=1",
        "--set",
        "schedule.warmup_steps=0",
        "--set",
        "model.hidden=[3000, 3000]",
        "--set",
        "data.split={ test = 0.8 }",
    ];
    let child = warpstep().args(slow).stderr(Stdio::null()).spawn().unwrap();
    while !short.out("run").join("checkpoints/latest").exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(143));
    assert_eq!(records(&short.out("run")), [("train".to_owned(), 1)]);
    let output = run(&[&slow[..], &["--resume"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(records(&short.out("run")), [("train".to_owned(), 1), ("test".to_owned(), 1)]);
}

/// What is left at the end of a pass over the data is a batch too, where it is asked for.
#[test]
fn a_last_batch_that_is_not_full_is_trained_on() {
    let short = Short::new();
    let more = ["--set", "data.drop_last=false", "--set", "optimizer.accumulate=1"];
    let too_many = short.try_train("refused", &["--set", "data.batch_size=4000"]);
    let text = stderr(&too_many);
    let (_, after) = text.split_once("the training split holds ").expect(&text);
    let samples: u64 = after.split_once(' ').unwrap().0.parse().unwrap();
    // In parts, all batches are as large, and it is no way out.
    let parts = ["--set", "run.reproducible=true", "--set", "data.batch_size=4000"];
    let in_parts = stderr(&short.try_train("parts", &[&more[..], &parts].concat()));
    assert!(in_parts.contains(&format!("set it to {samples} at most\n")), "{in_parts}");
    // All samples as a batch of their own size, and as what is left of a larger one.
    let size = format!("data.batch_size={samples}");
    let whole = short.train("whole", &["--set", &size, "--set", "optimizer.accumulate=1"]);
    let left = short.train("left", &[&more[..], &["--set", "data.batch_size=4000"]].concat());
    assert_eq!(tensor_hashes(&left), tensor_hashes(&whole));
    // Full ones and one that is not, in turn: three a pass. The gradient is that of each one's own mean.
    let size = format!("data.batch_size={}", samples * 2 / 5);
    let mixed = [&more[..], &["--set", &size]].concat();
    let expected = short.train("cpu", &mixed);
    let one_left = format!("data.batch_size={}", samples - 1);
    let refused = short.try_train("refused", &[&more[..], &["--set", &one_left]].concat());
    assert!(
        stderr(&refused).contains("data.drop_last: with false, what is left for the last batch is 1:"),
        "{}",
        stderr(&refused)
    );
    assert_eq!(summary(&expected)["steps"], 24);
    let Some(device) = common::device() else { return };
    let found = short.train("device", &[&mixed[..], &["--device", device]].concat());
    let loss = |out: &Path| summary(out)["final"]["train"]["loss"].as_f64().unwrap();
    assert!((loss(&found) - loss(&expected)).abs() < 1e-4, "{} for {}", loss(&found), loss(&expected));
}

#[test]
fn a_run_that_stopped_early_does_not_go_on() {
    let short = Short::new();
    // No evaluation improves by so much on the first.
    let more = ["--set", "early_stopping.patience=1", "--set", "early_stopping.min_delta=1e6"];
    let out = short.train("run", &more);
    let (told, lines, expected) = (summary(&out), records(&out), tensor_hashes(&out));
    assert_eq!(told["steps"], 20);
    std::fs::remove_file(out.join("summary.json")).unwrap();
    short.train("run", &[&more[..], &["--resume"]].concat());
    assert_eq!((summary(&out)["steps"].as_u64(), tensor_hashes(&out)), (Some(20), expected));
    assert_eq!(records(&out), lines);
}

/// What a run that is killed leaves: a run's folder at one of its checkpoints, and records of later steps.
fn killed_after(whole: &Path, step: u64, out: &Path) {
    let copied = std::process::Command::new("cp").arg("-r").args([whole, out]).status().unwrap();
    assert!(copied.success());
    std::fs::remove_file(out.join("summary.json")).unwrap();
    std::fs::write(out.join("checkpoints/latest"), format!("step-{step:08}")).unwrap();
}

/// Checkpoints come between two records, which tell means over the steps since the last one.
#[test]
fn the_curves_do_not_depend_on_where_a_run_was_stopped() {
    let short = Short::new();
    let more = ["--set", "checkpoint.keep=9", "--set", "optimizer.clip.value=1e-3"];
    let whole = short.train("whole", &more);
    let same = |out: &Path| {
        assert_eq!(curve(out), curve(&whole), "{}", out.display());
        for scores in ["final", "best"] {
            assert_eq!(summary(out)[scores], summary(&whole)[scores], "{}", out.display());
        }
    };
    for step in [7, 14, 21] {
        let name = format!("killed-{step}");
        killed_after(&whole, step, &short.out(&name));
        same(&short.train(&name, &[&more[..], &["--resume"]].concat()));
    }
    // A signal may end it anywhere; the record of what came until then is a part of the next one.
    let out = short.out("signal").display().to_string();
    let signal = ["--set", "run.steps=300", "--set", "evaluate.every_steps=10", "--quiet", "--out", &out];
    let arguments = [&["train", &short.file][..], &signal, &more].concat();
    let child = warpstep().args(&arguments).stderr(Stdio::null()).spawn().unwrap();
    while !short.out("signal").join("checkpoints/latest").exists() {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    let stopped = records(&short.out("signal"));
    assert!(stopped.iter().any(|(split, _)| split == "train"), "nothing of it is recorded: {stopped:?}");
    let output = run(&[&arguments[..], &["--resume"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let steps: Vec<u64> =
        records(&short.out("signal")).into_iter().filter(|(split, _)| split == "train").map(|(_, step)| step).collect();
    assert_eq!(steps, (5..=300).step_by(5).collect::<Vec<u64>>());
}

/// Steps whose gradients are not finite end a run where it would have ended without a stop between them.
#[test]
fn skipped_steps_before_a_stop_count_after_it() {
    let short = Short::new();
    // The losses are finite, and the gradients too large for f32.
    let text = r#"
        run = { steps = 40, max_skipped_steps = 10 }
        data = { format = "inline", inputs = [[3e19], [3e19]], targets = [1e19, 1e19], batch_size = 2 }
        model = { preset = "linear" }
        optimizer = { learning_rate = 0.1 }
        checkpoint = { every_steps = 4 }
    "#;
    std::fs::write(&short.file, text).unwrap();
    let out = short.out("run").display().to_string();
    let arguments = ["train", &short.file, "--quiet", "--device", "cpu", "--out", &out];
    let ended = run(&arguments);
    assert_eq!(ended.status.code(), Some(1), "{}", stderr(&ended));
    assert!(stderr(&ended).contains("for 10 steps in a row, up to step 10:"), "{}", stderr(&ended));
    assert!(short.out("run").join("checkpoints/step-00000008").is_dir());
    let again = run(&[&arguments[..], &["--resume"]].concat());
    assert_eq!(stderr(&again), stderr(&ended));
}

/// A run that a signal ended before an evaluation was resumed, made it, and was killed before its next checkpoint.
#[test]
fn an_evaluation_that_is_made_again_is_recorded_once() {
    let short = Short::new();
    let more = ["--set", "checkpoint.keep=9", "--set", "evaluate.every_steps=7"];
    let whole = short.train("whole", &more);
    let out = short.out("run");
    killed_after(&whole, 14, &out);
    let file = out.join("checkpoints/step-00000014/state.json");
    let mut state: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    state["evaluation_due"] = true.into();
    std::fs::write(&file, state.to_string()).unwrap();
    short.train("run", &[&more[..], &["--resume"]].concat());
    assert_eq!(records(&out), records(&whole));
}

/// A signal may come where a step is to be evaluated: it ends the run at once, and the resume evaluates first.
#[test]
fn no_evaluation_is_lost_or_done_twice() {
    let short = Short::new();
    let out = short.out("run").display().to_string();
    let each = ["--set", "evaluate.every_steps=1", "--set", "run.steps=300"];
    let arguments = [&["train", &short.file, "--quiet", "--out", &out][..], &each].concat();
    let child = warpstep().args(&arguments).stderr(Stdio::null()).spawn().unwrap();
    while !short.out("run").join("checkpoints/latest").exists() {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    let output = run(&[&arguments[..], &["--resume"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let evaluated: Vec<u64> = records(&short.out("run"))
        .into_iter()
        .filter(|(split, _)| split == "validation")
        .map(|(_, step)| step)
        .collect();
    assert_eq!(evaluated, (1..=300).collect::<Vec<u64>>());
}
