//! Whole models on a CUDA device, through the program: the CPU's losses, whatever the layers are.
//!
//! The device is the emulated one, or a real one where `WARPSTEP_TEST_DEVICE=cuda` asks for it.

mod common;

use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;
use warpstep::backend::cuda::{emulated, is_embedded};

const RUN: &str = r#"
[run]
steps = 8
log_every_steps = 1

[data]
format = "digits"
batch_size = 16
split = { validation = 0.05, test = 0.5 }

[optimizer]
rule = "momentum"
learning_rate = 0.02
momentum = 0.9
clip = { global_norm = 1.0 }

[evaluate]
every_steps = 8
"#;

/// What `run.device` is for these tests; none where there is no device.
fn device() -> Option<&'static str> {
    if std::env::var("WARPSTEP_TEST_DEVICE").is_ok_and(|device| device == "cuda") {
        return Some("cuda");
    }
    let found = is_embedded() && emulated::find_library().is_some();
    if !found {
        println!("skipped: no CUDA device: the emulator was not built, or Warpstep was built without nvcc");
    }
    found.then_some("emulated")
}

/// Trains, and gives (split, step, loss) of every line of metrics.jsonl.
fn train(folder: &Path, file: &Path, device: &str, more: &[&str]) -> Vec<(String, u64, f64)> {
    let out = folder.join(format!("{device}{}", more.len()));
    let ran = common::warpstep()
        .args(["train", "--quiet", "--overwrite", "--device", device, "--out"])
        .args([&out, file])
        .args(more)
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let v: Value = serde_json::from_str(line).unwrap();
        (v["split"].as_str().unwrap().to_owned(), v["step"].as_u64().unwrap(), v["loss"].as_f64().unwrap())
    };
    text.lines().map(line).collect()
}

/// The model's losses on the device are the CPU's, those in evaluation too, and the same twice; in bf16 they are near.
fn same_losses_as_the_cpu(model: &str) {
    let folder = TempDir::new().unwrap();
    same_losses_of_a_run(folder.path(), &format!("{RUN}\n[model]\n{model}"));
}

/// As [`same_losses_as_the_cpu`], for a whole run file, in a folder that holds its data.
fn same_losses_of_a_run(folder: &Path, run: &str) {
    let Some(device) = device() else { return };
    let file = folder.join("run.toml");
    std::fs::write(&file, run).unwrap();
    let expected = train(folder, &file, "cpu", &[]);
    assert!(expected.iter().any(|(split, ..)| split == "validation"), "{expected:?}");
    let found = train(folder, &file, device, &[]);
    assert!(found == train(folder, &file, device, &[]), "other losses the second time");
    let low = train(folder, &file, device, &["--set", "run.precision=\"bf16\""]);
    for (found, allowed) in [(found, 1e-4), (low, 0.1)] {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!((&found.0, found.1), (&expected.0, expected.1));
            assert!((found.2 - expected.2).abs() <= allowed, "{found:?} for {expected:?}");
        }
    }
}

#[test]
fn a_convolutional_network_has_the_cpu_s_losses() {
    same_losses_as_the_cpu("preset = \"cnn\"\nchannels = [4, 6]\nhidden = 16\nbatch_norm = true");
}

#[test]
fn a_residual_network_has_the_cpu_s_losses() {
    same_losses_as_the_cpu("preset = \"resnet\"\nblocks = [1, 1]\nchannels = [4, 8]");
}

/// A GPT with heads of 64, dropout, accumulation and averaged weights, on a text of its own.
#[test]
fn a_gpt_has_the_cpu_s_losses() {
    let folder = TempDir::new().unwrap();
    let text: String = (0..3000u32).map(|i| char::from(b'a' + ((i * i / 7 + i) % 9) as u8)).collect();
    std::fs::write(folder.path().join("text.txt"), text).unwrap();
    same_losses_of_a_run(
        folder.path(),
        r#"
[run]
steps = 8
log_every_steps = 1

[data]
format = "text"
path = "text.txt"
batch_size = 2
context = 24
split = { validation = 0.05 }

[model]
preset = "gpt"
layers = 2
heads = 1
width = 64
dropout = 0.1
bias = true

[optimizer]
rule = "adamw"
learning_rate = 3e-3
weight_decay = 0.1
accumulate = 2
ema = 0.9
clip = { global_norm = 1.0 }

[evaluate]
every_steps = 8
batches = 2
"#,
    );
}
