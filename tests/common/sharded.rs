//! Runs whose processes share a model's memory out, against one process alone: on CPUs over MPI, or on emulated devices over NCCL.

#![allow(dead_code)] // each test file uses a part of it

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;
use warpstep::train::metrics::{SplitName, read_metrics};

use crate::common::{fresh_seed, has_emulated_device, stderr, tensor_hashes, warpstep};
use crate::{devices, mpi};

/// AdamW with both clips, accumulation and an average.
pub const ADAMW: &str = r#"rule = "adamw"
learning_rate = 2e-3
weight_decay = 0.01
clip = { global_norm = 0.2, value = 0.01 }
accumulate = 2
ema = 0.9"#;

/// Momentum with an adaptive clip.
pub const ADAPTIVE: &str = r#"rule = "momentum"
learning_rate = 0.1
clip = { adaptive = 0.01 }"#;

/// LAMB with a clip by tensor.
pub const LAMB: &str = r#"rule = "lamb"
learning_rate = 1e-2
weight_decay = 0.01
clip = { tensor_norm = 0.1 }"#;

/// Muon, whose matrices stay whole.
pub const MUON: &str = r#"rule = "muon"
learning_rate = 0.02"#;

pub const LEVELS: [&str; 3] = ["optimizer", "gradients", "parameters"];

/// What the processes run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// One CPU, over MPI.
    Cpus,
    /// An emulated device each, over NCCL's stand-in.
    Devices,
}

impl On {
    /// Whether several processes can be started so; where not, a line says so.
    pub fn is_there(self) -> bool {
        match self {
            On::Cpus => mpi::is_there(),
            On::Devices => has_emulated_device(),
        }
    }
}

/// A run file and the folders of its runs.
pub struct Bed {
    folder: TempDir,
    on: On,
}

impl Bed {
    pub fn new(on: On, text: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let seed = fresh_seed() % 1_000_000;
        fs::write(folder.path().join("run.toml"), text.replace("SEED", &seed.to_string())).unwrap();
        Bed { folder, on }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn arguments(&self, out: &str, more: &[&str]) -> Vec<String> {
        let (file, out) = (self.path("run.toml").display().to_string(), self.path(out).display().to_string());
        let fixed = ["train", &file, "--threads", "1", "--quiet", "--out", &out].map(str::to_owned);
        fixed.into_iter().chain(more.iter().map(|&argument| argument.to_owned())).collect()
    }

    /// Trains as one process.
    pub fn alone(&self, out: &str, more: &[&str]) {
        let output = self.start_alone(out, more);
        assert!(output.status.success(), "{}", stderr(&output));
    }

    /// As [`Bed::alone`], to any end.
    pub fn start_alone(&self, out: &str, more: &[&str]) -> Output {
        let mut command = warpstep();
        command.args(self.arguments(out, more));
        let command: &mut Command = match self.on {
            On::Cpus => &mut command,
            On::Devices => devices::on_device(&mut command),
        };
        command.output().unwrap()
    }

    /// Trains as several processes that share out.
    pub fn together(&self, world: usize, shard: &str, out: &str, more: &[&str]) {
        for output in self.start(world, shard, out, more) {
            assert!(output.status.success(), "{world} processes, {shard}: {}", stderr(&output));
        }
    }

    /// As [`Bed::together`], to any end: what each process said, or the one that started them.
    pub fn start(&self, world: usize, shard: &str, out: &str, more: &[&str]) -> Vec<Output> {
        let set = format!("parallel.shard=\"{shard}\"");
        let arguments = self.arguments(out, &[&["--set", set.as_str()], more].concat());
        match self.on {
            On::Cpus => {
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                vec![mpi::output(&mut mpi::mpirun(world, &arguments))]
            }
            On::Devices => devices::run(world, || {
                let mut command = warpstep();
                command.args(&arguments);
                command
            }),
        }
    }

    /// Makes the checkpoint of an earlier step the latest, as if the run had been ended there.
    pub fn rewind(&self, out: &str, step: u64) {
        let checkpoints = self.path(out).join("checkpoints");
        fs::write(checkpoints.join("latest"), format!("step-{step:08}\n")).unwrap();
        fs::remove_file(checkpoints.join("best")).unwrap();
    }
}

/// Every sharding, at so many processes, ends with the bits of one process.
pub fn gives_the_bits_of_one_process(on: On, text: &str, worlds: &[usize], levels: &[&str]) {
    if !on.is_there() {
        return;
    }
    let bed = Bed::new(on, text);
    bed.alone("alone", &[]);
    let alone = tensor_hashes(&bed.path("alone"));
    let losses = losses(&bed.path("alone"));
    for &world in worlds {
        for shard in levels {
            let out = format!("{world}-{shard}");
            bed.together(world, shard, &out, &[]);
            assert_eq!(self::losses(&bed.path(&out)), losses, "{world} processes, {shard}");
            assert_eq!(tensor_hashes(&bed.path(&out)), alone, "{world} processes, {shard}");
        }
    }
}

/// A record: split, loss; gradient norm, share of steps that were clipped, and of gradients that were clamped.
pub type Figures = (SplitName, f64, [Option<f64>; 3]);

/// The records of a run.
pub fn losses(out: &Path) -> Vec<Figures> {
    let records = read_metrics(&out.join("metrics.jsonl")).unwrap();
    records.into_iter().map(|r| (r.split, r.loss, [r.grad_norm, r.clipped, r.clamped])).collect()
}

/// A run of digits through a small network, whose matrices are several pieces of an update; buckets hold about one each.
pub fn digits(optimizer: &str, reproducible: bool) -> String {
    format!(
        r#"
[run]
steps = 4
seed = SEED
log_every_steps = 1
reproducible = {reproducible}

[data]
format = "digits"
batch_size = 16
split = {{ validation = 0.05 }}

[model]
preset = "mlp"
hidden = [260, 90]

[optimizer]
{optimizer}

[parallel]
bucket_mb = 0.05
"#
    )
}

/// A run of digits through convolutions with batch norm, whose running statistics all processes keep.
pub const BATCH_NORM: &str = r#"
[run]
steps = 3
seed = SEED
log_every_steps = 1
reproducible = true

[data]
format = "digits"
batch_size = 16
split = { validation = 0.05 }

[model]
preset = "cnn"
channels = [6, 10]
hidden = 24
batch_norm = true

[optimizer]
rule = "momentum"
learning_rate = 0.05
ema = 0.5

[parallel]
bucket_mb = 0.002
"#;

const GPT: &str = r#"
[run]
steps = 3
seed = SEED
log_every_steps = 1
reproducible = true

[data]
format = "text"
path = "PROSE"
batch_size = 8
context = 16
split = { validation = 0.3 }

[model]
preset = "gpt"
layers = 2
heads = 2
width = 32
dropout = 0.2

[optimizer]
rule = "adamw"
learning_rate = 1e-3
clip = { global_norm = 1.0 }

[parallel]
bucket_mb = 0.01
"#;

const PROSE: &str = "The processes that train one model share its memory out, and each of them keeps a part of it; what a process does not have, others send before it is used. Whatever the number of processes, the sums are taken in one order, and the bits are the same. ";

/// A run of a small GPT with dropout and a table that its input and output share.
pub fn gpt(folder: &Path) -> String {
    let file = folder.join("prose.txt");
    fs::write(&file, PROSE.repeat(4)).unwrap();
    GPT.replace("PROSE", &file.display().to_string())
}

/// Steps whose gradients are not finite are skipped by all processes alike, and one says what came of it.
pub fn skips_alike(on: On) {
    if !on.is_there() {
        return;
    }
    // The first update throws the parameters so far that nothing after it is finite.
    let bed = Bed::new(on, &digits("rule = \"momentum\"\nlearning_rate = 1e37", true));
    let skipped = |out: &str| {
        let records = read_metrics(&bed.path(out).join("metrics.jsonl")).unwrap();
        records.iter().map(|record| record.skipped).max().unwrap()
    };
    let failed = |outputs: &[Output]| {
        assert!(outputs.iter().all(|output| output.status.code() == Some(1)), "{outputs:?}");
        let told: String = outputs.iter().map(stderr).collect();
        let errors: Vec<&str> = told.lines().filter(|line| line.starts_with("error:")).collect();
        let one = matches!(errors[..], [error] if error.contains("the training loss was not finite from step 2 on"));
        assert!(one, "{told}");
    };
    failed(&[bed.start_alone("alone", &[])]);
    assert_eq!(skipped("alone"), 3);
    for shard in LEVELS {
        failed(&bed.start(2, shard, shard, &[]));
        assert_eq!(tensor_hashes(&bed.path(shard)), tensor_hashes(&bed.path("alone")), "{shard}");
        assert_eq!(skipped(shard), 3, "{shard}");
    }
}

/// Where the order of sums is free, the losses stay within a millionth of those of one process.
pub fn stays_within_a_millionth(on: On) {
    if !on.is_there() {
        return;
    }
    let optimizer = r#"rule = "adamw"
learning_rate = 1e-3
clip = { global_norm = 0.5 }
accumulate = 3"#;
    let bed = Bed::new(on, &digits(optimizer, false).replace("batch_size = 16", "batch_size = 24"));
    bed.alone("alone", &[]);
    let alone = losses(&bed.path("alone"));
    for (world, shard) in [(2, "optimizer"), (2, "gradients"), (2, "parameters"), (3, "parameters"), (4, "gradients")] {
        let out = format!("{world}-{shard}");
        bed.together(world, shard, &out, &[]);
        let found = losses(&bed.path(&out));
        assert_eq!(found.len(), alone.len());
        for (found, alone) in found.iter().zip(&alone) {
            let near = (found.1 - alone.1).abs() <= 1e-6 * alone.1;
            assert!(near, "{world} processes, {shard}: {found:?}, not {alone:?}");
        }
    }
}
