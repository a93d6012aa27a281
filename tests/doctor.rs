//! `warpstep doctor`: what it finds with nothing installed, with libraries under odd names, and on the emulated device.

mod common;

use std::path::Path;
use std::process::Output;

use common::{stderr, stdout, warpstep_apart};
use serde_json::Value;
use warpstep::backend::cuda::{emulated, is_driver_present, is_embedded};

/// `doctor` with these folders on the library path, and nothing else of this test's surroundings.
fn doctor(folders: &str, arguments: &[&str]) -> Output {
    warpstep_apart().arg("doctor").args(arguments).env("LD_LIBRARY_PATH", folders).output().unwrap()
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {} {}", stdout(output), stderr(output)))
}

fn library(report: &Value, name: &str) -> Value {
    let all = report["cuda"]["libraries"].as_array().unwrap();
    all.iter().find(|library| library["name"] == name).unwrap().clone()
}

#[test]
fn a_machine_without_a_driver_is_told_that_it_runs_on_the_cpu_and_what_installs_the_rest() {
    if is_driver_present() && !emulated::is_active() {
        println!("skipped: this machine has a driver");
        return;
    }
    let found = doctor("", &[]);
    assert_eq!(found.status.code(), Some(0), "{}", stderr(&found));
    let text = stdout(&found);
    for expected in ["no CUDA device: runs on the CPU", "pip install nvidia-nccl-cu13", "thread", "takes cpu"] {
        assert!(text.contains(expected), "{expected:?} is not in:\n{text}");
    }
    let found = report(&doctor("", &["--json"]));
    assert_eq!(found["works"], true);
    assert_eq!(found["auto"], "cpu");
    assert_eq!(library(&found, "driver")["found"], false);
    assert!(found["cpu"]["threads"].as_u64().unwrap() >= 1);
    assert_eq!(found["cuda"]["kernels"]["embedded"], is_embedded());
}

#[test]
fn a_real_device_works_and_auto_takes_it() {
    if std::env::var_os("WARPSTEP_TEST_DEVICE").is_none_or(|device| device != "cuda") {
        println!("skipped: no real device: WARPSTEP_TEST_DEVICE=cuda is not set");
        return;
    }
    let folders = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let output = doctor(&folders, &["--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    let found = report(&output);
    assert!(!found["cuda"]["devices"].as_array().unwrap().is_empty());
    assert!(found["auto"].as_str().unwrap().starts_with("cuda:"), "{}", found["auto"]);
}

#[test]
fn the_emulated_device_is_listed_and_works() {
    let Some(library_file) = emulated::find_library().filter(|_| is_embedded()) else {
        println!("skipped: the emulator was not built, or Warpstep was built without nvcc");
        return;
    };
    let output = doctor("", &["--device", "emulated", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let found = report(&output);
    assert_eq!(found["cuda"]["emulated"], true);
    let devices = found["cuda"]["devices"].as_array().unwrap();
    assert!(!devices.is_empty());
    for device in devices {
        assert_eq!(device["compute_capability"], serde_json::json!([8, 0]));
        let checks = device["checks"].as_array().unwrap();
        assert_eq!(checks.len(), 2);
        assert!(checks.iter().all(|check| check["works"] == true), "{checks:?}");
    }
    let driver = library(&found, "driver");
    assert_eq!(driver["version"], "CUDA 13.0");
    assert_eq!(Path::new(driver["path"].as_str().unwrap()), library_file.canonicalize().unwrap());
    // Emulated devices are never taken unasked.
    assert_eq!(found["auto"], "cpu");
    assert!(stdout(&doctor("", &["--device", "emulated"])).contains("a product by cuBLASLt: works"));
}

#[test]
fn a_driver_that_is_too_old_is_named_and_nothing_is_tried_with_it() {
    if emulated::find_library().is_none() || !is_embedded() {
        println!("skipped: the emulator was not built, or Warpstep was built without nvcc");
        return;
    }
    let old = |arguments: &[&str]| {
        let mut command = warpstep_apart();
        command.args(arguments).env("LD_LIBRARY_PATH", "").env("WARPSTEP_EMULATOR_DRIVER", "12040").output().unwrap()
    };
    let told = "the NVIDIA driver is too old: it supports CUDA 12.4, and Warpstep needs 13.0: ";
    let output = old(&["doctor", "--device", "emulated"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stdout(&output).contains(told) && stdout(&output).contains("580 or newer"), "{}", stdout(&output));
    assert!(!stdout(&output).contains(": works"), "{}", stdout(&output));
    let out = tempfile::tempdir().unwrap();
    let run = ["train", "examples/digits.toml", "--device", "emulated", "--out", out.path().to_str().unwrap()];
    let output = old(&run);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains(told), "{}", stderr(&output));
}

#[test]
fn libraries_are_found_by_the_names_that_packages_install() {
    if is_driver_present() && !emulated::is_active() {
        println!("skipped: this machine has a driver, and so it may have the libraries under other names as well");
        return;
    }
    let Some(stand_in) = emulated::find_library() else {
        println!("skipped: the emulator, which stands in for the libraries, was not built");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for name in ["libnccl.so.2", "libcublasLt.so.13"] {
        std::os::unix::fs::symlink(&stand_in, folder.path().join(name)).unwrap();
    }
    let found = report(&doctor(folder.path().to_str().unwrap(), &["--json"]));
    for (name, found_as) in [("NCCL", "libnccl.so.2"), ("cuBLASLt", "libcublasLt.so.13")] {
        let library = library(&found, name);
        assert_eq!(library["found"], true, "{library}");
        assert_eq!(library["found_as"], found_as);
    }
    assert!(library(&found, "NCCL")["advice"].as_str().unwrap().contains("libnccl.so"));
}

#[test]
fn a_file_that_is_no_library_is_not_found() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("libnvrtc.so"), "not a library").unwrap();
    let found = doctor(folder.path().to_str().unwrap(), &["--json"]);
    assert_eq!(found.status.code(), Some(0), "{}", stderr(&found));
    let library = library(&report(&found), "NVRTC");
    assert_ne!(library["found_as"], "libnvrtc.so");
    assert!(library["found"] == true || library["advice"].is_string());
}

#[test]
fn a_device_that_is_not_there_or_not_named_is_an_error_that_says_what_to_do() {
    for (device, expected) in [("cuda:99", "warpstep doctor"), ("gpu", "cuda:N")] {
        let found = doctor("", &["--device", device]);
        assert_eq!(found.status.code(), Some(2));
        assert!(stderr(&found).contains(expected), "{}", stderr(&found));
    }
}
