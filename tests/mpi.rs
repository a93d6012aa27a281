//! Several processes over MPI train as one does: the same curves, to the bit where that is asked, at any number of processes.

mod common;
#[path = "common/mpi.rs"]
mod mpi;

use std::path::{Path, PathBuf};

use common::{data_set, fresh_seed, stderr, tensor_hashes};
use warpstep::random::{Philox, Purpose};

const DIGITS: &str = r#"
[run]
steps = 60
log_every_steps = 1

[data]
format = "digits"
batch_size = 32
split = { validation = 0.1, test = 0.1 }

[model]
preset = "mlp"
hidden = [32, 16]

[optimizer]
rule = "momentum"
learning_rate = 0.1
clip = { global_norm = 0.5 }

[evaluate]
every_steps = 25
batches = 3
"#;

const MNIST: &str = r#"
[run]
steps = 40
log_every_steps = 1

[data]
format = "idx"
path = "mnist"
batch_size = 128

[model]
preset = "mlp"
hidden = [256, 128]

[optimizer]
rule = "momentum"
learning_rate = 0.05
clip = { global_norm = 1.0 }

[evaluate]
every_steps = 0
"#;

/// A small GPT with dropout, accumulation and an average of weights.
const GPT: &str = r#"
[run]
steps = 20
log_every_steps = 1

[data]
format = "text"
path = "text.txt"
batch_size = 8
context = 16
split = { validation = 0.2 }

[model]
preset = "gpt"
layers = 2
heads = 2
width = 32
dropout = 0.1

[optimizer]
rule = "adamw"
learning_rate = 3e-3
weight_decay = 0.1
clip = { global_norm = 1.0 }
accumulate = 3
ema = 0.9
"#;

fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let file = folder.join(name);
    std::fs::write(&file, text).unwrap();
    file
}

/// Letters of which the next is often the one after, so that there is something to learn.
fn write_text(folder: &Path) {
    let stream = Philox::new(fresh_seed(), Purpose::Sampling, 0);
    let mut letter = 0;
    let text: String = (0..4000)
        .map(|i| {
            letter = if stream.below(i, 4) == 0 { stream.below(10_000 + i, 20) } else { (letter + 1) % 20 };
            char::from(b'a' + letter as u8)
        })
        .collect();
    write(folder, "text.txt", &text);
}

/// Split and loss of every line of metrics.jsonl.
fn curve(out: &Path) -> Vec<(String, f64)> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.map(|line| (line["split"].as_str().unwrap().to_owned(), line["loss"].as_f64().unwrap())).collect()
}

fn trained(processes: usize, file: &Path, out: &Path, more: &[&str]) {
    let output = mpi::train(processes, file, out, more);
    assert!(output.status.success(), "{processes} processes, {more:?}: {}", stderr(&output));
}

/// One, two and four processes have curves within 1e-6, and with `reproducible` the same bits of curves and tensors.
fn all_world_sizes_agree(folder: &Path, file: &Path, more: &[&str]) {
    let out = |kind: &str, processes: usize| folder.join(format!("{kind}-{processes}"));
    for (kind, set) in [("free", "run.reproducible=false"), ("same", "run.reproducible=true")] {
        for processes in [1, 2, 4] {
            let more = [&["--set", set], more].concat();
            trained(processes, file, &out(kind, processes), &more);
        }
    }
    let one = curve(&out("free", 1));
    assert!(one.iter().all(|(_, loss)| loss.is_finite()));
    assert_ne!(one.first().map(|(_, loss)| loss), one.last().map(|(_, loss)| loss));
    for processes in [2, 4] {
        let several = curve(&out("free", processes));
        assert_eq!(several.len(), one.len());
        let apart = one.iter().zip(&several).map(|((_, a), (_, b))| (a - b).abs()).fold(0.0, f64::max);
        println!("{processes} processes: losses at most {apart:.1e} apart");
        assert!(apart <= 1e-6, "{processes} processes: {apart}");
        assert_eq!(curve(&out("same", processes)), curve(&out("same", 1)), "{processes} processes");
        assert_eq!(tensor_hashes(&out("same", processes)), tensor_hashes(&out("same", 1)), "{processes} processes");
    }
}

#[test]
fn a_perceptron_has_the_same_curve_at_any_number_of_processes() {
    if !mpi::is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = match data_set("mnist") {
        Some(_) => write(folder.path(), "run.toml", MNIST),
        None => write(folder.path(), "run.toml", DIGITS),
    };
    all_world_sizes_agree(folder.path(), &file, &[]);
}

#[test]
fn a_gpt_with_dropout_and_accumulation_has_the_same_curve_at_any_number_of_processes() {
    if !mpi::is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path());
    let file = write(folder.path(), "run.toml", GPT);
    // Small buckets, so that there are several.
    all_world_sizes_agree(folder.path(), &file, &["--set", "parallel.bucket_mb=0.02"]);
}

#[test]
fn batch_norm_has_the_same_bits_at_any_number_of_processes_where_that_is_asked() {
    if !mpi::is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "run.toml", &DIGITS.replace("[optimizer]", "batch_norm = true\n\n[optimizer]"));
    let out = |processes: usize| folder.path().join(processes.to_string());
    for processes in [1, 2, 4] {
        let more = ["--set", "run.reproducible=true", "--set", "run.steps=30"];
        trained(processes, &file, &out(processes), &more);
        assert_eq!(tensor_hashes(&out(processes)), tensor_hashes(&out(1)), "{processes} processes");
        assert_eq!(curve(&out(processes)), curve(&out(1)), "{processes} processes");
    }
}

#[test]
fn gradients_sent_in_bf16_and_sums_that_do_not_overlap_train_alike() {
    if !mpi::is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "run.toml", DIGITS);
    let out = |name: &str| folder.path().join(name);
    trained(2, &file, &out("f32"), &[]);
    trained(2, &file, &out("waits"), &["--set", "parallel.overlap=false"]);
    trained(2, &file, &out("bf16"), &["--set", "parallel.reduce=\"bf16\""]);
    assert_eq!(curve(&out("waits")), curve(&out("f32")), "the order of sums does not depend on when they are taken");
    let apart = curve(&out("f32")).into_iter().zip(curve(&out("bf16"))).map(|((_, a), (_, b))| (a - b).abs());
    let apart = apart.fold(0.0, f64::max);
    assert!(apart > 0.0 && apart < 0.02, "{apart}");
}

/// Makes a run what it was when it had just written the checkpoint of `step`, as if all its processes had been killed then.
fn kill_after(out: &Path, step: u64) {
    let checkpoints = out.join("checkpoints");
    let name = format!("step-{step:08}");
    for entry in std::fs::read_dir(&checkpoints).unwrap().flatten() {
        if entry.path().is_dir() && entry.file_name().to_str().unwrap() > name.as_str() {
            std::fs::remove_dir_all(entry.path()).unwrap();
        }
    }
    assert!(checkpoints.join(&name).is_dir());
    std::fs::write(checkpoints.join("latest"), name + "\n").unwrap();
    let _ = std::fs::remove_file(checkpoints.join("best"));
    std::fs::remove_file(out.join("summary.json")).unwrap();
}

#[test]
fn a_run_that_moves_from_four_processes_to_eight_and_one_ends_with_the_bits_of_one_that_did_not() {
    if !mpi::is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path());
    let file = write(folder.path(), "run.toml", GPT);
    let (whole, moved) = (folder.path().join("whole"), folder.path().join("moved"));
    let same = ["--set", "run.reproducible=true", "--set", "checkpoint.every_steps=7", "--set", "checkpoint.keep=9"];
    trained(2, &file, &whole, &same);
    trained(4, &file, &moved, &same);
    for (processes, killed_at) in [(8, 7), (1, 14)] {
        kill_after(&moved, killed_at);
        trained(processes, &file, &moved, &[&same[..], &["--resume"]].concat());
    }
    assert_eq!(tensor_hashes(&moved), tensor_hashes(&whole));
    assert_eq!(curve(&moved), curve(&whole));
}

#[test]
fn a_batch_that_cannot_be_shared_out_is_said_once() {
    if !mpi::is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "run.toml", DIGITS);
    let output = mpi::train(3, &file, &folder.path().join("out"), &[]);
    assert!(!output.status.success());
    let text = stderr(&output);
    assert_eq!(text.matches("data.batch_size").count(), 1, "{text}");
    assert!(text.contains("found 32, expected a multiple of 3"), "{text}");
    let output = mpi::train(3, &file, &folder.path().join("out"), &["--set", "run.reproducible=true"]);
    assert!(
        stderr(&output).contains("parallel.parts: a batch of 32 in 8 parts is not for 3 processes"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn launch_starts_processes_on_cpus_and_keeps_their_outputs_apart() {
    if !mpi::is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "run.toml", DIGITS);
    let (alone, launched) = (folder.path().join("alone"), folder.path().join("launched"));
    let same = ["--set", "run.reproducible=true", "--set", "run.steps=20", "--threads", "1"];
    trained(1, &file, &alone, &same[..4]);
    let (file, out) = (file.display().to_string(), launched.display().to_string());
    let arguments = [&["launch", "--cpus", "2", "--", "train", &file, "--out", &out][..], &same].concat();
    let output = common::run(&arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = common::stdout(&output);
    assert!(text.contains("2 processes over MPI") && text.contains("done: 20 steps"), "{text}");
    let log = std::fs::read_to_string(launched.join("logs/rank-1.log")).unwrap();
    assert!(log.contains("step 20/20") && !text.contains("checkpoint "), "{log}");
    assert_eq!(curve(&launched), curve(&alone));
    // Again in the same folder: one process says why not, and nothing is overwritten.
    let output = common::run(&arguments);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert_eq!(stderr(&output).matches("holds a run already").count(), 1, "{}", stderr(&output));
}

#[test]
fn sums_over_processes_are_timed_by_size_and_are_right() {
    if !mpi::is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("found.json").display().to_string();
    let what = ["bench", "all_reduce/4KiB", "--device", "cpu", "--threads", "1", "--seconds", "0.05", "--json", &json];
    let output = mpi::output(&mut mpi::mpirun(2, &what));
    assert!(output.status.success(), "{}", stderr(&output));
    let text = common::stdout(&output);
    assert_eq!(text.matches("4KiB/2_processes").count(), 1, "{text}");
    let found: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let figures = found["figures"].as_array().unwrap();
    assert_eq!(figures.len(), 1);
    assert_eq!((figures[0]["suite"].as_str(), figures[0]["bytes"].as_f64()), (Some("all_reduce"), Some(4096.0)));
    let refused = figures[0]["refused"].as_str().unwrap_or_default();
    assert!(!refused.contains("the sum was not taken"), "{refused}");
}

/// How a process is lost.
#[derive(Clone, Copy, Debug)]
enum Lost {
    Killed,
    Stopped,
}

/// Trains without end in three processes, loses one of them in the middle, and gives what was printed, and how it ended.
fn lose_one(folder: &Path, file: &Path, turn: usize, lost: Lost) -> (std::process::Output, std::time::Duration) {
    let out = folder.join(format!("{lost:?}-{turn}")).display().to_string();
    let file = file.display().to_string();
    let endless = ["--set", "run.steps=100000000", "--set", "parallel.timeout=2", "--set", "data.batch_size=33"];
    let command = ["train", &file, "--threads", "1", "--quiet", "--out", &out];
    let mut child = mpi::mpirun(3, &[&command[..], &endless].concat());
    child.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let child = child.spawn().unwrap();
    let metrics = Path::new(&out).join("metrics.jsonl");
    let began = std::time::Instant::now();
    while std::fs::metadata(&metrics).map_or(0, |file| file.len()) < 500 {
        assert!(began.elapsed().as_secs() < 60, "no step was recorded");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let rank = turn % 3;
    let pid = ranks_of(child.id())[&rank];
    let signal = match lost {
        Lost::Killed => libc::SIGKILL,
        Lost::Stopped => libc::SIGSTOP,
    };
    // SAFETY: a signal to a process that this test started.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    let lost_at = std::time::Instant::now();
    let output = mpi::ended(child);
    (output, lost_at.elapsed())
}

/// The processes below `mpirun` by their ranks.
fn ranks_of(mpirun: u32) -> std::collections::HashMap<usize, i32> {
    let children = std::fs::read_to_string(format!("/proc/{mpirun}/task/{mpirun}/children")).unwrap();
    let rank = |pid: &str| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
        let mut variables = environment.split(|&byte| byte == 0);
        let found = variables.find_map(|v| std::str::from_utf8(v).ok()?.strip_prefix("OMPI_COMM_WORLD_RANK="))?;
        Some((found.parse().ok()?, pid.parse().ok()?))
    };
    children.split_whitespace().filter_map(rank).collect()
}

/// Each of ten times the others end within the timeout, with one sentence that names the rank and its last step.
fn ten_of_ten(lost: Lost, what: &str) {
    if !mpi::is_there() || !cfg!(target_os = "linux") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "run.toml", DIGITS);
    for turn in 0..10 {
        let (output, time) = lose_one(folder.path(), &file, turn, lost);
        let text = stderr(&output);
        assert!(!output.status.success());
        let sentences: Vec<&str> = text.lines().filter(|line| line.starts_with("error: rank ")).collect();
        assert_eq!(sentences.len(), 1, "{lost:?} {turn}: {text}");
        assert!(sentences[0].starts_with(&format!("error: rank {} on host ", turn % 3)), "{turn}: {}", sentences[0]);
        assert!(sentences[0].contains(what) && sentences[0].contains(" after step "), "{turn}: {}", sentences[0]);
        println!("{lost:?} {turn}: over after {:.1} s: {}", time.as_secs_f64(), sentences[0]);
    }
}

#[test]
fn a_process_that_is_killed_ends_the_others_with_one_sentence_ten_times_of_ten() {
    ten_of_ten(Lost::Killed, "died");
}

#[test]
fn a_process_that_is_stopped_ends_the_others_with_one_sentence_ten_times_of_ten() {
    ten_of_ten(Lost::Stopped, "gave no sign of life");
}

/// Open MPI's mpirun crashed, or did not end, in an eighth of such ends, where processes left MPI and lived on for a while.
#[test]
fn an_error_that_all_processes_know_of_ends_them_and_mpirun_ten_times_of_ten() {
    if !mpi::is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let far = DIGITS.replace("steps = 60", "steps = 4").replace("rate = 0.1", "rate = 1e37");
    let file = write(folder.path(), "run.toml", &far);
    for turn in 0..10 {
        let output = mpi::train(2, &file, &folder.path().join(turn.to_string()), &[]);
        let errors = stderr(&output).lines().filter(|line| line.starts_with("error:")).count();
        assert_eq!((output.status.code(), errors), (Some(1), 1), "{}", stderr(&output));
    }
}

#[test]
fn gpus_whose_ranks_only_mpi_knows_meet_all_the_same() {
    if !mpi::is_there() || !mpi::is_open_mpi() || !common::has_emulated_device() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "run.toml", &DIGITS.replace("steps = 60", "steps = 2"));
    let out = folder.path().join("out");
    // As MPICH numbers its processes, which tells them no address.
    let script = "export PMI_RANK=$OMPI_COMM_WORLD_RANK PMI_SIZE=$OMPI_COMM_WORLD_SIZE MPI_LOCALNRANKS=2; \
                  export MPI_LOCALRANKID=$PMI_RANK; unset OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE; exec \"$@\"";
    let mut command = mpi::bare();
    command.args(["-n", "2", "sh", "-c", script, "sh"]).arg(common::warpstep().get_program());
    command.arg("train").arg(&file).args(["--device", "emulated", "--out"]).arg(&out);
    command.env("WARPSTEP_EMULATOR_DEVICES", "2");
    let output = mpi::output(command.env("WARPSTEP_EMULATOR_CHECKS", "off"));
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(common::stdout(&output).contains("2 processes over NCCL"), "{}", common::stdout(&output));
    assert!(out.join("checkpoints/step-00000002/state.json").is_file());
}

#[test]
fn srun_without_mpi_is_told_what_is_missing_once() {
    if !mpi::is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = write(folder.path(), "run.toml", DIGITS);
    let said = ["0", "1"].map(|rank| {
        let step = [("SLURM_STEP_ID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_PROCID", rank), ("SLURM_LOCALID", rank)];
        let mut command = common::warpstep();
        command.arg("train").arg(&file).args(["--device", "cpu"]).current_dir(folder.path()).envs(step);
        let output = command.envs([("SLURM_JOB_ID", "5"), ("SLURM_STEP_NODELIST", "here")]).output().unwrap();
        assert!(!output.status.success());
        stderr(&output)
    });
    assert!(said[0].contains("MPI joined 1 of them: expected srun --mpi=pmix"), "{}", said[0]);
    assert_eq!(said[1], "");
}

#[test]
fn processes_that_would_not_train_the_same_are_refused() {
    if !mpi::is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let rows = |count: usize| -> String { (0..count).map(|i| format!("{i},{}\n", 2 * i)).collect() };
    for (name, count) in [("rows.csv", 40), ("copy.csv", 40), ("older.csv", 32)] {
        write(folder.path(), name, &rows(count));
    }
    let text = "[run]\nsteps = 2\n[data]\nformat = \"csv\"\npath = \"rows.csv\"\nheader = false\ntarget_type = \"real\"\n\
                batch_size = 8\n[model]\npreset = \"linear\"\n[optimizer]\nrule = \"sgd\"\nlearning_rate = 1e-5\n";
    let file = write(folder.path(), "run.toml", text);
    // What process 1 alone is given, and what is said of it; nothing where it trains the same.
    for (number, (set, said)) in [
        (
            "optimizer.learning_rate=2e-5",
            "optimizer.learning_rate: found 0.00002 in process 1, expected 0.00001, as in process 0",
        ),
        ("optimizer.ema=0.9", "optimizer.ema: found 0.9 in process 1, expected nothing, as in process 0"),
        ("parallel.bucket_mb=1", "parallel.bucket_mb: found 1.0 in process 1, expected 16.0, as in process 0"),
        ("data.path=\"older.csv\"", "older.csv is not what process 0 has: found 32 samples"),
        ("data.path=\"copy.csv\"", ""),
        ("run.device=\"cpu\"", ""),
    ]
    .into_iter()
    .enumerate()
    {
        let script =
            format!("if [ \"$OMPI_COMM_WORLD_RANK$PMI_RANK\" = 1 ]; then set -- \"$@\" --set '{set}'; fi; exec \"$@\"");
        let out = folder.path().join(format!("out{number}"));
        let mut command = mpi::bare();
        command.args(["-n", "2", "sh", "-c", &script, "sh"]).arg(common::warpstep().get_program());
        command.arg("train").arg(&file).args(["--device", "cpu", "--threads", "1", "--quiet", "--out"]).arg(&out);
        let output = mpi::output(&mut command);
        assert_eq!(output.status.success(), said.is_empty(), "{set}: {}", stderr(&output));
        assert!(stderr(&output).contains(said), "{set}: {}", stderr(&output));
        assert_eq!(out.join("summary.json").is_file(), said.is_empty(), "{set}");
    }
}
