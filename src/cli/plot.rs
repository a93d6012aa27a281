//! `warpstep plot`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::RunFileArgs;
use super::assemble::open_data;
use crate::train::metrics::read_metrics;
use crate::train::options::Length;
use crate::train::plot::{charts, schedule_chart, write};

/// Commands of `plot`.
#[derive(Debug, Subcommand)]
pub(crate) enum Options {
    /// The learning rate over a run file's steps
    Schedule(Schedule),
    /// Curves of one run or several on one page
    Runs(Runs),
}

/// Options of `plot schedule`.
#[derive(Debug, Args)]
pub(crate) struct Schedule {
    #[command(flatten)]
    run: RunFileArgs,
    /// Picture to write: .svg or .png
    #[arg(short, long, value_name = "FILE", default_value = "schedule.svg")]
    output: PathBuf,
}

/// Options of `plot runs`.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  warpstep plot runs runs/first runs/second -o curves.png")]
pub(crate) struct Runs {
    /// Run folders
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// Picture to write: .svg or .png
    #[arg(short, long, value_name = "FILE", default_value = "curves.svg")]
    output: PathBuf,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let output = match options {
        Options::Schedule(options) => {
            let run = options.run.read()?;
            let steps = match run.train.length {
                Length::Steps(steps) => steps,
                Length::Epochs(epochs) => {
                    let batches = open_data(&run)?.batches_per_epoch(run.train.batch_size)?;
                    ((epochs * batches as f64 / f64::from(run.train.accumulate)).round() as u64).max(1)
                }
            };
            let peak = run.optimizer.learning_rate;
            run.schedule.validate(steps, peak).map_err(|e| run.locate(e))?;
            let rates: Vec<f64> = (0..steps).map(|step| run.schedule.at(step, steps, peak)).collect();
            write(&[schedule_chart(&run.name, &rates)], &options.output)?;
            &options.output
        }
        Options::Runs(options) => {
            let mut records = Vec::new();
            for folder in &options.runs {
                let name = folder.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
                records.push((name, read_metrics(&folder.join("metrics.jsonl"))?));
            }
            let named: Vec<(&str, &[_])> = records.iter().map(|(n, r)| (n.as_str(), r.as_slice())).collect();
            write(&charts(&named, None), &options.output)?;
            &options.output
        }
    };
    println!("{}", output.display());
    Ok(ExitCode::SUCCESS)
}
