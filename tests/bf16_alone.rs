//! Runs whose parameters are kept in bf16 alone: they learn, replay, and go on after a stop as if there had been none.

mod common;

use std::path::{Path, PathBuf};

use common::{device, run, stderr, tensor_hashes};
use half::bf16;
use tempfile::TempDir;
use warpstep::train::checkpoint::{Which, find};
use warpstep::train::metrics::{Record, SplitName, read_metrics};
use warpstep::train::tensors;

const RUN: &str = r#"
[run]
steps = 100
precision = "bf16"

[data]
format = "digits"
batch_size = 16
split = { validation = 0.1 }

[model]
preset = "mlp"
hidden = [48]

[optimizer]
rule = "adamw"
learning_rate = 5e-3
weight_decay = 0.01
clip = { global_norm = 1.0 }

[evaluate]
every_steps = 50

[checkpoint]
every_steps = 50
"#;

/// Trains into a folder of its own, with further arguments.
fn train(folder: &Path, name: &str, device: &str, more: &[&str]) -> PathBuf {
    let (file, out) = (folder.join("run.toml"), folder.join(name));
    std::fs::write(&file, RUN).unwrap();
    let [file, to] = [&file, &out].map(|path| path.display().to_string());
    let mut arguments = vec!["train", "--quiet", "--device", device, "--out", &to, &file];
    arguments.extend(more);
    let ran = run(&arguments);
    assert!(ran.status.success(), "{}", stderr(&ran));
    out
}

fn records(run: &Path) -> Vec<Record> {
    read_metrics(&run.join("metrics.jsonl")).unwrap()
}

/// Validation loss at the end.
fn last(run: &Path) -> f64 {
    records(run).iter().rfind(|record| record.split == SplitName::Validation).unwrap().loss
}

#[test]
fn a_run_without_a_master_copy_learns_replays_and_resumes_to_the_bit() {
    let Some(device) = device() else { return };
    let folder = TempDir::new().unwrap();
    let (folder, alone) = (folder.path(), "optimizer.master=false");
    let expected = last(&train(folder, "f32", "cpu", &["--set", "run.precision=\"f32\""]));
    let whole = train(folder, "whole", device, &["--set", alone, "--shadow", "10"]);
    let found = last(&whole);
    assert!((found - expected).abs() < 0.1 && found < 0.5, "{found} for {expected}");
    let replays: Vec<_> = records(&whole).iter().filter_map(|record| record.shadow_ulp).collect();
    assert!(replays.len() >= 10 && replays.iter().all(|&ulp| ulp == 0.0), "{replays:?}");
    let checkpoint = find(&whole.join("checkpoints"), Which::Latest).unwrap().unwrap();
    for (name, tensor) in tensors::read(&checkpoint.join("model.safetensors")).unwrap() {
        assert!(tensor.values.iter().all(|&value| bf16::from_f32(value).to_f32() == value), "{name} is not bf16");
    }
    // As if the run had been stopped at step 50.
    let stopped = train(folder, "stopped", device, &["--set", alone]);
    std::fs::remove_dir_all(stopped.join("checkpoints/step-00000100")).unwrap();
    std::fs::write(stopped.join("checkpoints/latest"), "step-00000050").unwrap();
    let stopped = train(folder, "stopped", device, &["--set", alone, "--resume"]);
    assert_eq!(tensor_hashes(&stopped), tensor_hashes(&whole));
}

#[test]
fn what_does_not_go_with_it_is_told() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("run.toml");
    std::fs::write(&file, RUN).unwrap();
    let file = file.display().to_string();
    let wrong = |set: &[&str]| {
        let mut arguments = vec!["train", "--dry-run", "--device", "emulated", &file];
        set.iter().for_each(|set| arguments.extend(["--set", set]));
        let ran = run(&arguments);
        assert_eq!(ran.status.code(), Some(2), "{set:?}");
        stderr(&ran)
    };
    let told = wrong(&["optimizer.master=false", "run.precision=\"f32\""]);
    assert!(told.contains("optimizer.master") && told.contains("run.precision = \"bf16\""), "{told}");
    let told = wrong(&["optimizer.master=false", "optimizer.ema=0.9"]);
    assert!(told.contains("optimizer.ema") && told.contains("master = false"), "{told}");
}
