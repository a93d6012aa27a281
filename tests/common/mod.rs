//! What several tests share.

#![allow(dead_code)] // each test file uses a part of it

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{SystemTime, UNIX_EPOCH};

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
