//! `warpstep data`.

use std::io::Write;
use std::process::ExitCode;

use clap::Subcommand;

use super::RunFileArgs;
use super::assemble::open_data;

/// Commands of `data`.
#[derive(Debug, Subcommand)]
pub(crate) enum Options {
    /// Splits, shapes, classes, values and first samples, as a run would see them
    Inspect(RunFileArgs),
}

/// Runs it.
pub(crate) fn run(options: Options) -> anyhow::Result<ExitCode> {
    match options {
        Options::Inspect(run) => {
            let data = open_data(&run.read()?)?;
            let text = crate::data::inspect(&data)?;
            std::io::stdout().lock().write_all(text.as_bytes())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
