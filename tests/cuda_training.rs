//! Whole runs on a CUDA device, through the program: the CPU's curve, the same bits twice, checkpoints that change devices.
//!
//! The device is the emulated one, or a real one where `WARPSTEP_TEST_DEVICE=cuda` asks for it.

mod common;

use std::path::{Path, PathBuf};

use common::device;
use serde_json::Value;
use tempfile::TempDir;

const RUN: &str = r#"
[run]
steps = 200
log_every_steps = 1

[data]
format = "digits"
batch_size = 32
split = { validation = 0.1, test = 0.2 }

[model]
preset = "mlp"
hidden = [64, 32]
dropout = 0.1

[optimizer]
rule = "adamw"
learning_rate = 2e-3
weight_decay = 0.01
clip = { global_norm = 1.0 }

[evaluate]
every_steps = 100

[checkpoint]
every_steps = 100
"#;

struct Place {
    folder: TempDir,
    file: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("run.toml");
        std::fs::write(&file, RUN).unwrap();
        Place { folder, file }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Trains into a folder, with further arguments.
    fn train(&self, name: &str, device: &str, more: &[&str]) -> PathBuf {
        self.train_as(name, device, more, &[])
    }

    /// As [`Place::train`], with environment variables.
    fn train_as(&self, name: &str, device: &str, more: &[&str], variables: &[(&str, &str)]) -> PathBuf {
        let out = self.out(name);
        let ran = common::warpstep()
            .envs(variables.iter().copied())
            .args(["train", "--quiet", "--device", device, "--out"])
            .args([&out, &self.file])
            .args(more)
            .output()
            .unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        out
    }
}

/// The lines of metrics.jsonl, without times.
fn curve(run: &Path) -> Vec<(String, u64, f64)> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let line =
        |v: Value| (v["split"].as_str().unwrap().to_owned(), v["step"].as_u64().unwrap(), v["loss"].as_f64().unwrap());
    lines.map(line).collect()
}

/// The tensors of the last checkpoint, without the header, whose remarks have no order.
fn weights(run: &Path) -> Vec<u8> {
    let latest = std::fs::read_to_string(run.join("checkpoints/latest")).unwrap();
    let bytes = std::fs::read(run.join("checkpoints").join(latest.trim()).join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].to_vec()
}

fn assert_close(found: &[(String, u64, f64)], expected: &[(String, u64, f64)], allowed: f64) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!((&found.0, found.1), (&expected.0, expected.1));
        assert!((found.2 - expected.2).abs() <= allowed, "{found:?} for {expected:?}");
    }
}

#[test]
fn two_hundred_steps_have_the_cpu_s_losses_and_the_same_bits_twice() {
    let Some(device) = device() else { return };
    let place = Place::new();
    let expected = curve(&place.train("cpu", "cpu", &[]));
    assert!(expected.len() >= 200);
    let first = place.train("first", device, &[]);
    assert_close(&curve(&first), &expected, 1e-4);
    let second = place.train("second", device, &[]);
    assert!(curve(&first) == curve(&second), "another curve the second time");
    assert!(weights(&first) == weights(&second), "other weights the second time");
}

/// One process of one, as a launcher would start it, speaks NCCL with itself.
#[test]
fn one_process_over_nccl_has_the_bits_of_one_without() {
    let Some(device) = device() else { return };
    let place = Place::new();
    let alone = place.train("alone", device, &[]);
    let variables = [("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")];
    let over_nccl = place.train_as("nccl", device, &[], &variables);
    assert_close(&curve(&over_nccl), &curve(&alone), 0.0);
    assert!(weights(&alone) == weights(&over_nccl), "other weights over NCCL");
}

#[test]
fn bf16_learns_what_f32_learns() {
    let Some(device) = device() else { return };
    let place = Place::new();
    let expected = curve(&place.train("cpu", "cpu", &[]));
    let found = curve(&place.train("bf16", device, &["--set", "run.precision=\"bf16\""]));
    assert_close(&found[found.len() - 1..], &expected[expected.len() - 1..], 0.03);
}

#[test]
fn checkpoints_go_on_on_the_other_device() {
    let Some(device) = device() else { return };
    let place = Place::new();
    let whole = curve(&place.train("whole", "cpu", &[]));
    for (name, devices) in [("up", ["cpu", device]), ("down", [device, "cpu"]), ("same", [device, device])] {
        let out = place.train(name, devices[0], &[]);
        // As if the run had been stopped there.
        let checkpoints = out.join("checkpoints");
        std::fs::remove_dir_all(checkpoints.join("step-00000200")).unwrap();
        std::fs::write(checkpoints.join("latest"), "step-00000100").unwrap();
        let out = place.train(name, devices[1], &["--resume"]);
        assert_close(&curve(&out), &whole, 1e-4);
    }
    let straight = place.train("straight", device, &[]);
    assert!(weights(&straight) == weights(&place.out("same")), "a run that stopped and went on has other bits");
}
