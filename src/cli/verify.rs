//! `warpstep verify-resume`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;

use super::RunFileArgs;
use super::assemble::open_data;
use super::train::make_run;
use crate::backend::cpu::Cpu;
use crate::error::Error;
use crate::parallel::Single;
use crate::train::options::Length;
use crate::train::verify::verify_resume;

/// Options of `verify-resume`.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  warpstep verify-resume run.toml --steps 60")]
pub(crate) struct Options {
    #[command(flatten)]
    run: RunFileArgs,
    /// Steps of each run
    #[arg(long, value_name = "N", default_value_t = 30)]
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
    let mut run_file = options.run.read()?;
    run_file.train.length = Length::Steps(options.steps);
    let data = open_data(&run_file)?;
    let name = format!("warpstep-verify-resume-{}", std::process::id());
    let folder = options.keep.clone().unwrap_or_else(|| std::env::temp_dir().join(name));
    let result = verify_resume(&folder, options.steps, |folder, start| {
        make_run(Cpu::<f32>::new(), Arc::new(Single), &run_file, &data, folder, start)
    });
    if options.keep.is_none() {
        let _ = std::fs::remove_dir_all(&folder);
    }
    let found = result.map_err(|e| run_file.locate(e))?;
    println!(
        "{} steps; the second run was stopped at micro-batch {}, resumed from step {}",
        found.steps, found.stopped_at_micro_batch, found.resumed_from_step
    );
    for tensor in &found.tensors {
        let same = if tensor.whole == tensor.resumed { "same" } else { "DIFFERS" };
        println!("{same:<8} {}  {}", &tensor.whole[..16], tensor.name);
    }
    if found.holds() {
        println!("all {} tensors have the same bits", found.tensors.len());
        return Ok(ExitCode::SUCCESS);
    }
    let count = found.tensors.iter().filter(|t| t.whole != t.resumed).count();
    Err(Error::Training(format!("{count} of {} tensors differ after the resume", found.tensors.len())).into())
}
