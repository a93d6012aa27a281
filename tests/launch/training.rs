//! `warpstep launch` of a training that is killed.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::common::{run, stderr, tensor_hashes, warpstep};

const RUN: &str = r#"
[run]
steps = 400

[data]
format = "digits"
batch_size = 32

[model]
preset = "mlp"
hidden = [64, 32]

[optimizer]
rule = "momentum"
learning_rate = 0.05

[checkpoint]
every_steps = 20
"#;

/// The processes that this one started.
fn children(pid: u32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn kill_after_a_checkpoint(launcher: u32, out: &Path) {
    let began = Instant::now();
    let (pid, found) = loop {
        assert!(began.elapsed() < Duration::from_secs(60), "no checkpoint was written");
        let checkpoint = std::fs::read_to_string(out.join("checkpoints/latest"));
        if let (Some(&pid), Ok(found)) = (children(launcher).first(), checkpoint) {
            break (pid, found);
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    // SAFETY: a process that the launcher started and that runs.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    println!("killed after {}", found.trim());
}

#[test]
fn a_training_that_was_killed_goes_on_from_its_last_checkpoint_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    std::fs::write(&file, RUN).unwrap();
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let [file, whole_out] = [file.to_str().unwrap(), whole.to_str().unwrap()];
    let output = run(&["train", file, "--device", "cpu", "--quiet", "--out", whole_out]);
    assert!(output.status.success(), "{}", stderr(&output));
    let launcher = warpstep()
        .args([
            "launch",
            "--gpus",
            "1",
            "--restarts",
            "1",
            "--",
            "train",
            file,
            "--device",
            "cpu",
            "--quiet",
            "--overwrite",
            "--out",
        ])
        .arg(&killed)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    kill_after_a_checkpoint(launcher.id(), &killed);
    let output = launcher.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let told = "error: rank 0 was ended by SIGKILL\nrestart 1 of 1, from the last checkpoint\n";
    assert_eq!(stderr(&output), told);
    assert_eq!(tensor_hashes(&whole), tensor_hashes(&killed));
}
