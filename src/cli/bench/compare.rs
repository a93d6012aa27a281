//! `warpstep bench compare`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::bench::compare::{compare, read};
use crate::error::Error;
use crate::tell::tell;

/// Options of `bench compare`.
#[derive(Debug, Args)]
#[command(
    after_help = "A figure got faster or slower where the quartiles of the two results do not overlap and their medians are \
                        more than 1 % apart."
)]
pub(crate) struct Options {
    /// The earlier results, as `bench --json` printed them
    #[arg(value_name = "BEFORE.json")]
    before: PathBuf,
    /// The later results
    #[arg(value_name = "AFTER.json")]
    after: PathBuf,
    /// Exit with 1 where something got slower by more than this, beyond the noise, or where what could be quoted before is refused
    /// or missing after
    #[arg(long, value_name = "PERCENT")]
    threshold: Option<f64>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if let Some(percent) = options.threshold.filter(|percent| !(*percent >= 0.0 && percent.is_finite())) {
        return Err(Error::config("--threshold", format!("found {percent}, expected a percentage of 0 or more")).into());
    }
    let found = compare(&read(&options.before)?, &read(&options.after)?);
    let mut out = std::io::stdout().lock();
    if options.json {
        serde_json::to_writer_pretty(&mut out, &found)?;
        std::io::Write::write_all(&mut out, b"\n")?;
    } else {
        found.write(&mut out)?;
    }
    let Some(percent) = options.threshold else { return Ok(ExitCode::SUCCESS) };
    let slower: Vec<&str> = found.slower_than(percent).map(|change| change.name.as_str()).collect();
    if !slower.is_empty() {
        tell(format_args!("slower by more than {percent} %: {}", slower.join(", ")));
    }
    if !found.lost.is_empty() {
        tell(format_args!("could be quoted before, and is refused or missing after: {}", found.lost.join(", ")));
    }
    Ok(if slower.is_empty() && found.lost.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
