//! Whole runs of the program: the same bits wherever the data lies, and what the program tells of it.

use crate::common::{stderr, stdout, tensor_hashes, warpstep};
use crate::device;
use warpstep::backend::cuda::emulated;
use warpstep::train::checkpoint::{Which, find};

const RUN: &str = r#"
[run]
steps = 8

[data]
format = "digits"
batch_size = 32

[model]
preset = "mlp"
hidden = [16]

[optimizer]
rule = "momentum"
learning_rate = 0.05
accumulate = 2

[evaluate]
every_steps = 4
"#;

/// The command on a device of so many bytes.
fn command(device: &str, bytes: usize, arguments: &[&str]) -> std::process::Output {
    let mut command = warpstep();
    command.args(arguments).args(["--device", device]);
    // This program may run on the emulated device; what it starts is to choose for itself.
    command.env_remove("LD_LIBRARY_PATH").env_remove("WARPSTEP_EMULATED");
    command.env("WARPSTEP_EMULATOR_MEMORY", bytes.to_string()).output().unwrap()
}

#[test]
fn runs_end_with_the_same_bits_wherever_the_data_lies_also_when_resumed_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    std::fs::write(&file, RUN).unwrap();
    let file = file.display().to_string();
    let run = |device: &str, bytes, name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        let told = out.display().to_string();
        let ran = command(device, bytes, &[&["train", &file, "--quiet", "--out", &told], more].concat());
        assert!(ran.status.success(), "{name}: {}", stderr(&ran));
        tensor_hashes(&out)
    };
    let set = |value: &str| ["--set".to_owned(), format!("data.resident={value}")];
    let devices = if device::device().is_some() && emulated::is_active() { &["cpu", "emulated"][..] } else { &["cpu"] };
    for &on in devices {
        let [never, always] = ["false", "true"].map(set);
        let expected = run(on, 1 << 30, &format!("{on}-copied"), &[&never[0], &never[1]]);
        assert_eq!(run(on, 1 << 30, &format!("{on}-kept"), &[&always[0], &always[1]]), expected);
        assert_eq!(run(on, 1 << 30, &format!("{on}-auto"), &[]), expected);
        // Six steps one way, two the other: the setting is no part of what a run is.
        let name = format!("{on}-moved");
        run(on, 1 << 30, &name, &[&never[0], &never[1], "--set", "checkpoint.every_steps=6"]);
        let checkpoints = folder.path().join(&name).join("checkpoints");
        std::fs::remove_dir_all(checkpoints.join("step-00000008")).unwrap();
        std::fs::write(checkpoints.join("latest"), "step-00000006").unwrap();
        assert_eq!(find(&checkpoints, Which::Latest).unwrap(), Some(checkpoints.join("step-00000006")));
        let moved = run(on, 1 << 30, &name, &["--resume", &always[0], &always[1], "--set", "checkpoint.every_steps=6"]);
        assert_eq!(moved, expected);
    }
}

#[test]
fn the_memory_plan_counts_it_and_a_setting_that_means_nothing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    std::fs::write(&file, RUN).unwrap();
    let file = file.display().to_string();
    let dry = |device: &str, bytes, value: &str| {
        let set = format!("data.resident={value}");
        let ran = command(device, bytes, &["train", &file, "--dry-run", "--set", &set]);
        (ran.status.code(), stdout(&ran), stderr(&ran))
    };
    let told = |device: &str, bytes, value: &str| {
        let (code, told, error) = dry(device, bytes, value);
        assert_eq!(code, Some(0), "{error}");
        told.lines().any(|line| line.trim_start().starts_with("data set "))
    };
    assert!(!told("cpu", 0, "true"));
    if device::device().is_some() && emulated::is_active() {
        assert!(told("emulated", 64 << 20, "\"auto\"") && !told("emulated", 64 << 20, "false"));
        // 1,438 digits of 64 values take 374 kB.
        assert!(!told("emulated", 1 << 20, "\"auto\"") && told("emulated", 1 << 20, "true"));
    }
    let (code, _, error) = dry("cpu", 0, "\"never\"");
    assert_eq!(code, Some(2));
    for part in ["data.resident", "\"never\"", "\"auto\", true or false"] {
        assert!(error.contains(part), "{error}");
    }
    let augmented = ["train", &file, "--dry-run", "--set", "data.resident=true", "--set", "data.augment.crop=1"];
    let ran = command("cpu", 0, &augmented);
    assert_eq!(ran.status.code(), Some(2));
    assert!(stderr(&ran).contains("data.resident") && stderr(&ran).contains("augmented"), "{}", stderr(&ran));
}
