//! What several tests share.

#![allow(dead_code)] // each test file uses a part of it

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use warpstep::backend::cuda::{emulated, is_embedded};
use warpstep::train::checkpoint::{Which, find};
use warpstep::train::tensors;

/// A seed of the moment, printed, so that a failure can be seen again.
pub fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    println!("seed {seed}");
    seed
}

/// The `warpstep` command that this test run built, or that `WARPSTEP_BIN` names: where tests run without cargo.
pub fn warpstep() -> Command {
    let named = std::env::var_os("WARPSTEP_BIN").filter(|path| !path.is_empty());
    Command::new(named.unwrap_or_else(|| env!("CARGO_BIN_EXE_warpstep").into()))
}

/// A port that is free now and that no connection is given by itself: Linux takes those from 32768 on (`ip_local_port_range`). It is
/// not listened at to find out: a process that another thread starts in that moment would listen on for a while.
pub fn free_port() -> u16 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    loop {
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let port = 10_000 + (std::process::id().wrapping_mul(97).wrapping_add(number) % 20_000) as u16;
        if std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            return port;
        }
    }
}

/// The same, started as if from outside of this test: neither on the emulated device nor with a library path, which it may be given.
pub fn warpstep_apart() -> Command {
    let mut command = warpstep();
    command.env_remove("LD_LIBRARY_PATH").env_remove("WARPSTEP_EMULATED");
    // Cargo may leave several builds of the emulator: the program takes the one that this test sees.
    if let Some(library) = emulated::find_library() {
        command.env("WARPSTEP_EMULATOR", library);
    }
    command
}

/// Whether the program can run on the emulated device; a line that says so, where it cannot.
pub fn has_emulated_device() -> bool {
    let found = is_embedded() && emulated::find_library().is_some();
    if !found {
        println!("skipped: no CUDA device: the emulator was not built, or Warpstep was built without nvcc");
    }
    found
}

/// What `run.device` is for tests that take a real device where `WARPSTEP_TEST_DEVICE=cuda` asks for it; none where there is none.
pub fn device() -> Option<&'static str> {
    if std::env::var("WARPSTEP_TEST_DEVICE").is_ok_and(|device| device == "cuda") {
        return Some("cuda");
    }
    has_emulated_device().then_some("emulated")
}

/// Runs `warpstep` to its end.
pub fn run(arguments: &[&str]) -> Output {
    warpstep().args(arguments).output().unwrap()
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Standard output as text.
pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The folder `name` of the real data sets; none, and a line that says so, where it is not at hand.
pub fn data_set(name: &str) -> Option<PathBuf> {
    let places =
        std::env::var_os("WARPSTEP_DATA").map(PathBuf::from).into_iter().chain([PathBuf::from("../shared/data")]);
    for place in places {
        let folder = place.join(name);
        if folder.is_dir() {
            return Some(folder);
        }
    }
    println!("skipped: data set {name} is neither in $WARPSTEP_DATA nor in ../shared/data");
    None
}

/// Name and hash of every tensor of a run's latest checkpoint.
pub fn tensor_hashes(run: &Path) -> Vec<(String, String)> {
    let checkpoint = find(&run.join("checkpoints"), Which::Latest).unwrap().expect("a checkpoint");
    let mut hashes = Vec::new();
    for file in ["model.safetensors", "optimizer.safetensors", "ema.safetensors"] {
        let path = checkpoint.join(file);
        if tensors::exists(&path) {
            for (name, tensor) in tensors::read(&path).unwrap() {
                hashes.push((format!("{file}: {name}"), tensors::hash(&tensor).to_hex().to_string()));
            }
        }
    }
    hashes
}

/// The lines of metrics.jsonl, without times and speeds.
pub fn curve(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        ["time_s", "samples_per_s", "tokens_per_s", "mfu"].iter().for_each(|key| drop(line.remove(*key)));
    }
    lines
}
