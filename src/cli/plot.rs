//! `warpstep plot`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::assemble::{open_data, steps_alone};
use super::{RunFileArgs, say};
use crate::error::Error;
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

/// Points of a schedule's curve at most.
const MOST: u64 = 4096;

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let output = match options {
        Options::Schedule(options) => {
            let run = options.run.read()?;
            let steps = match run.train.length {
                Length::Steps(steps) => steps,
                // Data are needed for it.
                Length::Epochs(_) => steps_alone(&run, &open_data(&run, true)?)?,
            };
            let peak = run.optimizer.learning_rate;
            // No more steps than a picture can show.
            let stride = steps.div_ceil(MOST);
            let mut shown: Vec<u64> = (0..steps.div_ceil(stride)).map(|point| point * stride).collect();
            shown.extend((stride > 1).then_some(steps - 1));
            shown.dedup();
            let rates: Vec<f64> = shown.iter().map(|&step| run.schedule.at(step, steps, peak)).collect();
            let mut chart = schedule_chart(&run.name, &rates);
            let points = chart.curves.iter_mut().flat_map(|curve| &mut curve.points);
            points.zip(&shown).for_each(|((x, _), &step)| *x = step as f64);
            write(&[chart], &options.output)?;
            &options.output
        }
        Options::Runs(options) => {
            let mut records = Vec::new();
            for (folder, name) in options.runs.iter().zip(names(&options.runs)) {
                let file = folder.join("metrics.jsonl");
                if !file.is_file() {
                    let problem = "holds no metrics.jsonl; expected a run folder, as `warpstep train` leaves one";
                    return Err(Error::data(folder, problem).into());
                }
                records.push((name, read_metrics(&file)?));
            }
            let named: Vec<(&str, &[_])> = records.iter().map(|(n, r)| (n.as_str(), r.as_slice())).collect();
            write(&charts(&named, None), &options.output)?;
            &options.output
        }
    };
    say(&format!("{}\n", output.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// What each run is called: as its folder, or by its path where another folder is called so, or the path names none.
fn names(folders: &[PathBuf]) -> Vec<String> {
    let name = |folder: &PathBuf| folder.file_name().map(|name| name.to_string_lossy().into_owned());
    let alone = |wanted: &Option<String>| folders.iter().filter(|folder| name(folder) == *wanted).count() == 1;
    let path = |folder: &PathBuf| folder.display().to_string();
    folders.iter().map(|folder| name(folder).filter(|_| alone(&name(folder))).unwrap_or_else(|| path(folder))).collect()
}
