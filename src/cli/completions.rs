//! `warpstep completions`.

use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// Options of `completions`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The shell
    shell: Shell,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut super::Cli::command(), "warpstep", &mut script);
    super::say(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}
