//! Whole models on a CUDA device, through the program: the CPU's losses, whatever the layers are.
//!
//! The device is the emulated one, or a real one where `WARPSTEP_TEST_DEVICE=cuda` asks for it.

mod common;

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use common::device;
use serde_json::Value;
use tempfile::TempDir;
use warpstep::random::{Philox, Purpose};

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

/// The run file: 200 steps on a real device, as few as it says on the emulated one, which is slow.
fn long(run: &str) -> String {
    if device() != Some("cuda") {
        return run.to_owned();
    }
    run.replace("\nsteps = 8", "\nsteps = 200")
        .replace("\nsteps = 6", "\nsteps = 200")
        .replace("every_steps = 8", "every_steps = 200")
}

/// Steps over which rounding to bf16 has not led anywhere else yet.
const FIRST: usize = 6;

/// The folder of a run.
fn out(folder: &Path, device: &str, more: &[&str]) -> PathBuf {
    folder.join(format!("{device}{}", more.len()))
}

/// Trains, and gives (split, step, loss) of every line of metrics.jsonl.
fn train(folder: &Path, file: &Path, device: &str, more: &[&str]) -> Vec<(String, u64, f64)> {
    let out = out(folder, device, more);
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
    std::fs::write(&file, long(run)).unwrap();
    let expected = train(folder, &file, "cpu", &[]);
    assert!(expected.iter().any(|(split, ..)| split == "validation"), "{expected:?}");
    let found = train(folder, &file, device, &[]);
    assert!(found == train(folder, &file, device, &[]), "other losses the second time");
    let low = train(folder, &file, device, &["--set", "run.precision=\"bf16\""]);
    near(&found, &expected, 1e-4);
    near(&low[..FIRST], &expected[..FIRST], 0.1);
}

fn near(found: &[(String, u64, f64)], expected: &[(String, u64, f64)], allowed: f64) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!((&found.0, found.1), (&expected.0, expected.1));
        assert!((found.2 - expected.2).abs() <= allowed, "{found:?} for {expected:?}");
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
learning_rate = 1e-3
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

const SOUNDS: &str = r#"
[run]
steps = 6
log_every_steps = 1

[data]
format = "audio"
path = "sounds"
samples = 611
features = "log_mel"
mel = { n_fft = 128, hop = 60, mels = 12 }
batch_size = 8
split = { test = 0.25 }

[model]
preset = "audio_cnn"
channels = [4, 6]

[optimizer]
rule = "adamw"
learning_rate = 1e-2
"#;

const WAVEFORM: [&str; 2] = ["--set", "data.features=\"waveform\""];

/// A run file, and recordings of two classes, a low and a high tone in noise, of many lengths.
fn sounds(folder: &Path) -> PathBuf {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    println!("seed {seed}");
    let noise = Philox::new(seed, Purpose::Sampling, 0);
    let spec =
        hound::WavSpec { channels: 1, sample_rate: 8000, bits_per_sample: 16, sample_format: hound::SampleFormat::Int };
    for (class, pitch) in [("low", 0.2), ("high", 1.1)] {
        let place = folder.join("sounds").join(class);
        std::fs::create_dir_all(&place).unwrap();
        for i in 0..16u64 {
            let mut writer = hound::WavWriter::create(place.join(format!("{i}.wav")), spec).unwrap();
            for t in 0..500 + 20 * i {
                let value = (pitch * t as f64).sin() / 3.0 + noise.normal(1000 * i + t) / 12.0;
                writer.write_sample((value * 32767.0).clamp(-32768.0, 32767.0) as i16).unwrap();
            }
            writer.finalize().unwrap();
        }
    }
    let file = folder.join("run.toml");
    std::fs::write(&file, long(SOUNDS)).unwrap();
    file
}

#[test]
fn pictures_made_within_the_step_are_those_made_while_data_is_read_to_the_bit() {
    let folder = TempDir::new().unwrap();
    let file = sounds(folder.path());
    let read = train(folder.path(), &file, "cpu", &[]);
    let made = train(folder.path(), &file, "cpu", &WAVEFORM);
    assert_eq!(read, made);
    let predicted = |more: &[&str]| {
        let ran = common::warpstep()
            .args(["predict", "--json", "--top", "2"])
            .arg(out(folder.path(), "cpu", more))
            .args(["low/3.wav", "high/5.wav"].map(|name| folder.path().join("sounds").join(name)))
            .output()
            .unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8(ran.stdout).unwrap()
    };
    let answers = predicted(&[]);
    assert_eq!(answers.lines().count(), 2);
    assert_eq!(answers, predicted(&WAVEFORM));
}

#[test]
fn a_network_of_waveforms_has_the_cpu_s_losses() {
    let Some(device) = device() else { return };
    let folder = TempDir::new().unwrap();
    let file = sounds(folder.path());
    let expected = train(folder.path(), &file, "cpu", &WAVEFORM);
    let found = train(folder.path(), &file, device, &WAVEFORM);
    near(&found, &expected, 1e-4);
    assert!(found == train(folder.path(), &file, device, &WAVEFORM), "other losses the second time");
    let low = train(folder.path(), &file, device, &[&WAVEFORM[..], &["--set", "run.precision=\"bf16\""]].concat());
    near(&low[..FIRST], &expected[..FIRST], 0.1);
}

#[test]
fn what_waveforms_cannot_have_is_told() {
    let folder = TempDir::new().unwrap();
    let file = sounds(folder.path());
    let refused = |more: &[&str], parts: &[&str]| {
        let ran = common::warpstep()
            .args(["train", "--quiet", "--device", "cpu", "--out"])
            .arg(folder.path().join("refused"))
            .arg(&file)
            .args(WAVEFORM)
            .args(more)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!(ran.status.code(), Some(2), "{told}");
        parts.iter().for_each(|part| assert!(told.contains(part), "{told} does not tell of {part}"));
    };
    refused(&["--set", "data.augment={ time_mask = 3 }"], &["data.augment.time_mask", "log_mel"]);
    refused(&["--set", "data.augment={ frequency_mask = 3 }"], &["data.augment.frequency_mask", "log_mel"]);
    refused(&["--set", "data.mel={ n_fft = 4096 }"], &["data.mel.n_fft", "611"]);
    let text = std::fs::read_to_string(&file).unwrap();
    let without: Vec<&str> = text.lines().filter(|line| !line.starts_with("mel =")).collect();
    std::fs::write(&file, without.join("\n")).unwrap();
    refused(&[], &["data.mel", "audio_cnn"]);
}
