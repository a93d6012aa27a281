//! `warpstep verify-resume`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::assemble::{Opened, open_data, open_device, steps_alone};
use super::train::make_run;
use super::{RunArgs, say, whole};
use crate::backend::Backend;
use crate::backend::ops::Update;
use crate::config::RunFile;
use crate::data::OpenedData;
use crate::error::{Error, Result};
use crate::parallel::Single;
use crate::parallel::world::World;
use crate::train::verify::{Verification, verify_resume};

/// Options of `verify-resume`.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  warpstep verify-resume run.toml --steps 60")]
pub(crate) struct Options {
    #[command(flatten)]
    run: RunArgs,
    /// Steps of each run, of which the run file's own schedule begins; rounded up to a multiple of 3
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = whole::<u64>, allow_negative_numbers = true)]
    steps: u64,
    /// Folder for the two runs; a temporary one, removed afterwards, where not given
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// Runs it.
pub(crate) fn run(options: Options) -> anyhow::Result<ExitCode> {
    if options.steps < 2 {
        return Err(Error::config("--steps", format!("found {}, expected 2 or more", options.steps)).into());
    }
    let run_file = options.run.read()?;
    let world = World::detect()?;
    if world.size > 1 {
        let problem = format!("{} started {} processes, expected one", world.how, world.size);
        return Err(Error::config("verify-resume", problem).into());
    }
    // Before anything is read: an emulated device starts the program again.
    let device = open_device(&run_file, &world, true)?;
    let data = open_data(&run_file, true)?;
    let whole = steps_alone(&run_file, &data)?;
    if whole < 2 {
        return Err(run_file.locate(Error::config("run.steps", "the run has 1 step, expected 2 or more")).into());
    }
    let name = format!("warpstep-verify-resume-{}", std::process::id());
    let proof = Proof {
        folder: options.keep.clone().unwrap_or_else(|| std::env::temp_dir().join(name)),
        // A checkpoint is written after every third, the last of them at the end.
        steps: if options.steps < 3 { options.steps } else { options.steps.next_multiple_of(3) }.min(whole),
        whole,
        run_file: &run_file,
        data: &data,
    };
    if options.keep.is_none() {
        remove_when_interrupted(proof.folder.clone())?;
    }
    let result = match &device {
        Opened::Cpu(backend) => proof.on(backend),
        Opened::Cuda(backend) => proof.on(backend),
        Opened::CudaBf16(backend) => proof.on(backend),
        Opened::CudaF16(backend) => proof.on(backend),
    };
    if options.keep.is_none() {
        let _ = std::fs::remove_dir_all(&proof.folder);
    }
    let found = result.map_err(|e| run_file.locate(e))?;
    let mut text = format!(
        "{} of {whole} steps; the second run was stopped at micro-batch {}, resumed from step {}\n",
        found.steps, found.stopped_at_micro_batch, found.resumed_from_step
    );
    for tensor in &found.tensors {
        let same = if tensor.whole == tensor.resumed { "same" } else { "DIFFERS" };
        text += &format!("{same:<8} {}  {}\n", &tensor.whole[..16], tensor.name);
    }
    if found.holds() {
        say(&(text + &format!("all {} tensors have the same bits\n", found.tensors.len())))?;
        return Ok(ExitCode::SUCCESS);
    }
    say(&text)?;
    let count = found.tensors.iter().filter(|t| t.whole != t.resumed).count();
    Err(Error::Training(format!("{count} of {} tensors differ after the resume", found.tensors.len())).into())
}

/// Removes the folder and ends the process when a signal asks for its end.
fn remove_when_interrupted(folder: PathBuf) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(|e| Error::io("listen to", "signals", e))?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let _ = std::fs::remove_dir_all(folder);
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// What is proved.
struct Proof<'a> {
    folder: PathBuf,
    /// Steps of each run.
    steps: u64,
    /// Steps that the run file asks for, over which its schedule goes.
    whole: u64,
    run_file: &'a RunFile,
    data: &'a OpenedData,
}

impl Proof<'_> {
    fn on<B: Backend<Real = f32> + Update + Clone>(&self, backend: &B) -> Result<Verification> {
        let Proof { folder, steps, whole, run_file, data } = self;
        say(&format!("{}\n", backend.description()))?;
        let share = run_file.parallel.share(0, 1, run_file.train.batch_size)?;
        // Where a batch is in parts, a step's last pass comes after all its micro-batches were begun.
        let end = steps * u64::from(run_file.train.accumulate) + u64::from(share.count > 1);
        verify_resume(folder, *steps, |folder, start| {
            let mut run = make_run(backend.clone(), Arc::new(Single), run_file, data, folder, start)?;
            run.abandon_at = (steps < whole).then_some(end);
            Ok(run)
        })
    }
}
