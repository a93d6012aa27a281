//! `warpstep data`.

use std::process::ExitCode;

use clap::Subcommand;

use super::assemble::open_data;
use super::{RunFileArgs, say};

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
            let data = open_data(&run.read()?, true)?;
            let text = crate::data::inspect(&data)?;
            say(&text)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
