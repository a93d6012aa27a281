//! A run that is stopped, by whatever means, and resumed ends with the same bits as one that never stopped.

mod common;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{fresh_seed, run, stderr, stdout, tensor_hashes, warpstep};
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
    let length = began.elapsed();
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
    assert!(stderr(&other).contains("another configuration"), "{}", stderr(&other));
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
