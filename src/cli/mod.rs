//! The command line: one file a command.

mod assemble;
mod bench;
mod completions;
mod data;
mod doctor;
mod dry_run;
mod eval;
mod generate;
mod launch;
mod plan;
mod plot;
mod predict;
mod team;
mod train;
mod verify;

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};

use crate::error::{Error, Result};
use crate::tell::tell;

/// Trains models: a run file goes in; a trained model, its curves and its checkpoints come out.
#[derive(Debug, Parser)]
#[command(name = "warpstep", version, about, arg_required_else_help = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model from a run file
    Train(train::Options),
    /// Loss and accuracy of a trained model on a split of its data
    Eval(eval::Options),
    /// Class and probability, or value, for files
    Predict(predict::Options),
    /// Text from a trained GPT
    Generate(generate::Options),
    /// Draw curves of runs, or a schedule, as SVG or PNG
    #[command(subcommand)]
    Plot(plot::Options),
    /// Look at a run's data
    #[command(subcommand)]
    Data(data::Options),
    /// Prove on your own run that stopping and resuming changes no bit
    VerifyResume(verify::Options),
    /// What a run would take on many GPUs: memory, communication, time, scaling
    Plan(plan::Options),
    /// What this machine can do, what training gets out of it, and what the limits are
    Bench(bench::Options),
    /// Start several processes on this machine that train one model
    Launch(launch::Options),
    /// What mpirun starts for `launch`
    #[command(hide = true)]
    LaunchRank(launch::RankOptions),
    /// Tell what of CUDA is on this machine, whether it works, and what installs the rest
    Doctor(doctor::Options),
    /// Completions for a shell
    Completions(completions::Options),
}

/// A run file and what changes it.
#[derive(Debug, Args)]
pub(crate) struct RunFileArgs {
    /// The run file
    #[arg(value_name = "RUN.toml")]
    pub file: PathBuf,
    /// Override a key, as in --set optimizer.learning_rate=3e-4 (may be given several times)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Threads of the CPU backend
    #[arg(long, value_name = "N", value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub threads: Option<usize>,
}

/// A run file, what changes it, and what it runs on.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub file: RunFileArgs,
    /// Device: auto, cpu, cuda, cuda:N or emulated
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
}

/// A number of things that are needed.
fn count(text: &str) -> std::result::Result<NonZeroUsize, String> {
    text.parse().map_err(|_| "expected a whole number of 1 or more".to_owned())
}

/// A whole number on the command line.
fn whole<T: FromStr>(text: &str) -> std::result::Result<T, String> {
    text.parse().map_err(|_| "expected a whole number of 0 or more".to_owned())
}

/// A number on the command line.
fn number(text: &str) -> std::result::Result<f64, String> {
    text.parse().map_err(|_| "expected a number, as in 0.5".to_owned())
}

/// Prints, now: a reader that has gone, or a full disk, is an error like any other ([`report`]).
fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Error::io("write to", "standard output", e))
}

/// Parses the arguments, runs the command, prints the error: the exit code is 0 when done, 1 when the run failed, 2 when the
/// input was wrong, 130 and 143 after SIGINT and SIGTERM.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version go to standard output with 0, a usage error to standard error with 2.
            let code = if e.use_stderr() { 2 } else { 0 };
            let _ = e.print();
            return ExitCode::from(code);
        }
    };
    let result = match cli.command {
        Command::Train(options) => train::run(options),
        Command::Eval(options) => eval::run(&options),
        Command::Predict(options) => predict::run(&options),
        Command::Generate(options) => generate::run(&options),
        Command::Plot(options) => plot::run(&options),
        Command::Data(options) => data::run(options),
        Command::VerifyResume(options) => verify::run(options),
        Command::Plan(options) => plan::run(options),
        Command::Bench(options) => bench::run(&options),
        Command::Launch(options) => launch::run(options),
        Command::LaunchRank(options) => launch::run_rank(&options),
        Command::Doctor(options) => doctor::run(&options),
        Command::Completions(options) => completions::run(&options),
    };
    match result {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}

/// Prints an error in one line and gives its exit code. A reader of our output that has gone is none.
fn report(error: &anyhow::Error) -> ExitCode {
    let broken_pipe = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    let ours = error.downcast_ref::<Error>();
    let gone = match ours {
        Some(Error::Io { cause, .. }) => broken_pipe(cause),
        _ => error.downcast_ref::<std::io::Error>().is_some_and(broken_pipe),
    };
    if gone {
        return ExitCode::SUCCESS;
    }
    if let Some(Error::Peer { exit_code, .. }) = ours {
        // The process that failed has said why.
        return ExitCode::from(*exit_code);
    }
    let text = format!("{error:#}");
    let line: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    tell(format_args!("error: {}", line.join(" ")));
    ExitCode::from(ours.map_or(1, Error::exit_code))
}
