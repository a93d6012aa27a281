//! A build without nvcc: NVRTC compiles the kernels on the machine where they run, into a cache.
//!
//! `WARPSTEP_TEST_NVRTC` names NVRTC's folder, as scripts/test does; `WARPSTEP_NVRTC=1` passes over what was embedded. NVRTC takes the
//! emulated driver for a real one, so that the kernels are compiled ahead, and runs on the emulated device find them in the
//! cache.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{has_emulated_device, stderr, stdout, tensor_hashes, warpstep_apart};

const RUN: &str = r#"
[run]
steps = 12
device = "emulated"
log_every_steps = 1

[data]
format = "digits"
batch_size = 32
split = { validation = 0.1, test = 0.2 }

[model]
preset = "mlp"
hidden = [32]
dropout = 0.1

[optimizer]
rule = "adamw"
learning_rate = 2e-3
clip = { global_norm = 1.0 }

[checkpoint]
every_steps = 12
"#;

/// The program with a cache of its own.
fn program(cache: &Path) -> Command {
    let mut command = warpstep_apart();
    command.env("XDG_CACHE_HOME", cache);
    command
}

/// Trains into `out`, with the kernels that were embedded or, where `nvrtc` is 1, with those of the cache.
fn train(cache: &Path, out: &Path, nvrtc: &str) -> Output {
    let file = out.with_extension("toml");
    std::fs::write(&file, RUN).unwrap();
    program(cache).arg("train").arg(&file).arg("--out").arg(out).env("WARPSTEP_NVRTC", nvrtc).output().unwrap()
}

/// The files of the cache and when each was written.
fn cached(cache: &Path) -> Vec<(PathBuf, std::time::SystemTime)> {
    let files = std::fs::read_dir(cache.join("warpstep")).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<_> = files.map(|file| (file.path(), file.metadata().unwrap().modified().unwrap())).collect();
    files.sort_unstable();
    files
}

#[test]
fn kernels_that_nvrtc_compiled_ahead_train_to_the_bits_of_those_that_were_embedded() {
    let Some(folder) = std::env::var_os("WARPSTEP_TEST_NVRTC") else {
        println!("skipped: WARPSTEP_TEST_NVRTC does not name a folder with NVRTC");
        return;
    };
    let place = tempfile::tempdir().unwrap();
    let cache = place.path().join("cache");
    // The compute capability of the emulated device.
    let compile =
        || program(&cache).args(["doctor", "--compile", "8.0"]).env("LD_LIBRARY_PATH", &folder).output().unwrap();
    let output = compile();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let files = cached(&cache);
    // Machine code for a GPU, and PTX for the emulated device.
    let of =
        |ending: &str| files.iter().filter(|(path, _)| path.extension().is_some_and(|found| found == ending)).count();
    assert_eq!([of("cubin"), of("ptx")], [files.len() / 2; 2]);
    assert!(stdout(&output).contains(&format!("the kernels of {} files", files.len() / 2)), "{}", stdout(&output));
    assert_eq!(compile().status.code(), Some(0));
    assert_eq!(cached(&cache), files, "what is in the cache is not compiled again");
    if !has_emulated_device() {
        return;
    }
    let parameters = |name: &str, nvrtc: &str| {
        let out = place.path().join(name);
        let output = train(&cache, &out, nvrtc);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        tensor_hashes(&out)
    };
    let embedded = parameters("embedded", "0");
    assert!(!embedded.is_empty());
    assert!(parameters("compiled", "1") == embedded, "NVRTC's kernels do not have the bits of nvcc's");
}

#[test]
fn without_nvrtc_a_build_that_holds_no_kernels_says_what_installs_it() {
    let place = tempfile::tempdir().unwrap();
    let output = program(place.path()).args(["doctor", "--compile", "9.0"]).output().unwrap();
    if output.status.success() {
        println!("skipped: this machine has NVRTC");
        return;
    }
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("pip install nvidia-cuda-nvrtc"), "{}", stderr(&output));
    if has_emulated_device() {
        let output = train(place.path(), &place.path().join("run"), "1");
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains("pip install nvidia-cuda-nvrtc"), "{}", stderr(&output));
    }
    let output = program(place.path()).args(["doctor", "--compile", "nine"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("expected a compute capability, as 9.0"), "{}", stderr(&output));
}
