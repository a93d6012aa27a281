//! `warpstep bench`.

use std::io::Write;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::bench::place::{Place, Precision};
use crate::error::Error;
use crate::train::bench::{NAMES, bench};

mod compare;
mod peers;

use peers::Peers;

#[derive(Debug, Subcommand)]
enum Command {
    /// What got faster or slower between two results
    Compare(compare::Options),
}

/// Options of `bench`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Names:
  gpt_cpu  nanoGPT's configuration for CPUs, a whole step
  mlp      784-256-128-10, batch 128, a whole step
  update   global-norm clip and momentum over 50M parameters, beside the copy bandwidth"
)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    peers: Peers,
    /// What to time; all where not given
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Seconds for each
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Threads of the CPU backend
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print a JSON object for each
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if let Some(Command::Compare(options)) = &options.command {
        return compare::run(options);
    }
    if !(options.seconds > 0.0 && options.seconds.is_finite()) {
        return Err(Error::config("--seconds", format!("found {}, expected a number above 0", options.seconds)).into());
    }
    if let Some(threads) = options.threads {
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    let names: Vec<&str> =
        if options.names.is_empty() { NAMES.to_vec() } else { options.names.iter().map(String::as_str).collect() };
    let mut out = std::io::stdout().lock();
    if options.peers.asked() {
        let works = Peers::works(&names);
        options.peers.run(&works, Place::Cpu, Precision::F32, options.seconds, &mut out)?;
        return Ok(ExitCode::SUCCESS);
    }
    for name in names {
        let found = bench(name, options.seconds)?;
        if options.json {
            writeln!(out, "{}", serde_json::to_string(&found)?)?;
            continue;
        }
        let speed = if found.flops > 0 {
            format!("  {:.0} GFLOP/s", found.flops as f64 / found.median_ms / 1e6)
        } else {
            format!("  {:.1} GB/s", found.bytes as f64 / found.median_ms / 1e6)
        };
        let floor = found
            .floor_ms
            .map_or_else(String::new, |f| format!("  floor {f:.2} ms ({:.0} % of it)", 100.0 * f / found.median_ms));
        writeln!(
            out,
            "{name:<8} median {:.3} ms  min {:.3} ms  {} runs{speed}{floor}  {}",
            found.median_ms, found.min_ms, found.count, found.device
        )?;
    }
    Ok(ExitCode::SUCCESS)
}
