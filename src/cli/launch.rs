//! `warpstep launch`: several processes on this machine, that train together, or measure what they do together.

mod control;
mod gpus;
mod job;
mod mpirun;
mod outputs;
mod rank;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitCode, ExitStatus, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Parser};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{Cli, Command, count};
use crate::error::{Error, Result};
use crate::tell::tell;
use control::Control;
use job::{End, Job};
use outputs::Outputs;
pub(crate) use rank::{Options as RankOptions, run as run_rank};

/// Options of `launch`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  warpstep launch --gpus 8 -- train run.toml
  warpstep launch --gpus 8 --restarts 3 --timeout 120 -- train run.toml --out runs/large
  warpstep launch --cpus 4 -- train run.toml --device cpu
  warpstep launch --gpus 2 -- train run.toml --device emulated
  warpstep launch --gpus 8 -- bench step/gpt2

Rank 0 speaks here; the output of every other rank goes to LOGS/rank-N.log. The first rank that fails ends all.")]
pub(crate) struct Options {
    /// One process a GPU, this many
    #[arg(long, value_name = "N", conflicts_with = "cpus", required_unless_present = "cpus", value_parser = count)]
    gpus: Option<NonZeroUsize>,
    /// This many processes on the CPU, through mpirun
    #[arg(long, value_name = "N", value_parser = count)]
    cpus: Option<NonZeroUsize>,
    /// Start all again from the last checkpoint, up to R times, after a rank failed
    #[arg(long, value_name = "R", default_value_t = 0)]
    restarts: u32,
    /// Seconds that a rank may be silent or stuck until the others stop (60 where not given)
    #[arg(long, value_name = "S", value_parser = seconds, allow_negative_numbers = true)]
    timeout: Option<f64>,
    /// Folder of the ranks' outputs (`logs` in the run folder where not given)
    #[arg(long, value_name = "DIR")]
    log_dir: Option<PathBuf>,
    /// Start this program, such as one that uses the library, instead of Warpstep itself
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// The command of every process
    #[arg(last = true, value_name = "train RUN.toml .. | bench ..", required_unless_present = "program")]
    arguments: Vec<OsString>,
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.1..=1e9).contains(seconds));
    seconds.ok_or_else(|| "expected seconds, 0.1 or more".to_owned())
}

/// Runs it.
pub(crate) fn run(options: Options) -> anyhow::Result<ExitCode> {
    let mut replaced = None;
    let (starts, logs) = match &options.program {
        Some(_) => (Starts::Program, PathBuf::from("logs")),
        None => match Cli::try_parse_from(std::iter::once(OsString::from("warpstep")).chain(options.arguments.clone()))
        {
            // What every process would say is said once.
            Ok(Cli { command: Command::Train(train) }) => {
                let (run_file, folder) = train.parse()?;
                if let Some(wanted) = options.gpus {
                    gpus::are_there(run_file.device, run_file.model.has_convolutions(), wanted.get())?;
                }
                replaced = train.overwrites().then(|| Replaced::new(&folder));
                (Starts::Training, folder.join("logs"))
            }
            Ok(Cli { command: Command::Bench(bench) }) => {
                if options.restarts > 0 {
                    let found = format!("found {} with bench, expected it with train alone", options.restarts);
                    return Err(Error::config("--restarts", found).into());
                }
                if let Some(wanted) = options.gpus {
                    gpus::are_there(bench.device()?, false, wanted.get())?;
                }
                (Starts::Bench, PathBuf::from("logs"))
            }
            Ok(_) => {
                let found = options.arguments[0].to_string_lossy().into_owned();
                return Err(
                    Error::config("launch", format!("found {found:?}, expected `train RUN.toml` or `bench`")).into()
                );
            }
            Err(error) => {
                let code = if error.use_stderr() { 2 } else { 0 };
                error.print()?;
                return Ok(ExitCode::from(code));
            }
        },
    };
    let launch = Launch {
        size: options.gpus.or(options.cpus).map_or(1, NonZeroUsize::get),
        mpirun: options.cpus.map(|_| mpirun::find(starts != Starts::Program)).transpose()?,
        program: match options.program {
            Some(program) => program,
            None => std::env::current_exe().map_err(|e| Error::io("find", "warpstep", e))?,
        },
        arguments: options.arguments,
        timeout: options.timeout,
        outputs: Outputs::new(options.log_dir.unwrap_or(logs))?,
        replaced,
    };
    // Under nohup a terminal's end is neither this process's nor, since they inherit that, the ranks'.
    let heard = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|&signal| signal != SIGHUP || !is_ignored(signal));
    let signals = Signals::new(heard).map_err(|e| Error::io("listen to", "signals", e))?;
    launch.run(options.restarts, starts, signals)
}

/// Whether this process was started so that a signal does nothing.
fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: nothing is set; the system writes into room of the type that it asks for, of which zeros are a value too.
    unsafe {
        let status = libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        status == 0 && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// What each process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Starts {
    /// `warpstep train`, which goes on from its last checkpoint.
    Training,
    /// `warpstep bench`.
    Bench,
    /// A program of the user's.
    Program,
}

/// What is started, every time.
struct Launch {
    size: usize,
    mpirun: Option<mpirun::Mpirun>,
    program: PathBuf,
    arguments: Vec<OsString>,
    timeout: Option<f64>,
    outputs: Outputs,
    /// The run that `--overwrite` replaces.
    replaced: Option<Replaced>,
}

/// A run that is to be replaced, told from the one that replaces it by its config.toml, which is written once all else was removed.
struct Replaced {
    config: PathBuf,
    before: Option<(u64, SystemTime)>,
}

impl Replaced {
    fn new(folder: &Path) -> Self {
        let config = folder.join("config.toml");
        Replaced { before: Self::mark(&config), config }
    }

    fn mark(config: &Path) -> Option<(u64, SystemTime)> {
        let found = std::fs::metadata(config).ok()?;
        Some((found.ino(), found.modified().ok()?))
    }

    /// Whether its successor has begun.
    fn is_gone(&self) -> bool {
        let now = Self::mark(&self.config);
        now.is_some() && now != self.before
    }
}

impl Launch {
    fn run(&self, restarts: u32, starts: Starts, mut signals: Signals) -> anyhow::Result<ExitCode> {
        for attempt in 0..=restarts {
            let outputs = self.outputs.begin(attempt, self.size)?;
            let arguments = if starts == Starts::Training && attempt > 0 && self.has_begun() {
                resuming(&self.arguments)
            } else {
                self.arguments.clone()
            };
            let job = self.start(attempt, &arguments)?;
            let (rank, status) = match job.wait(&mut signals, &outputs)? {
                End::Done => return Ok(ExitCode::SUCCESS),
                End::Interrupted(signal) => return Ok(ExitCode::from(128 + signal as u8)),
                End::Failed { rank, status } => (rank, status),
            };
            tell(outputs.report(rank, &how(status)));
            let code = exit_code(status);
            // Wrong input stays wrong.
            if code == 2 || attempt == restarts {
                return Ok(ExitCode::from(code));
            }
            let from = if self.has_begun() { "the last checkpoint" } else { "the beginning" };
            tell(format_args!("restart {} of {restarts}, from {from}", attempt + 1));
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Whether the run in the folder is this launch's own.
    fn has_begun(&self) -> bool {
        self.replaced.as_ref().is_none_or(Replaced::is_gone)
    }

    fn start(&self, attempt: u32, arguments: &[OsString]) -> Result<Job> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let run = format!("{}-{}-{attempt}", std::process::id(), now.as_millis());
        let port = free_port()?;
        let prepare = |command: &mut Process| {
            command.env("WARPSTEP_ADDRESS", "127.0.0.1").env("WARPSTEP_PORT", port.to_string());
            command.env("WARPSTEP_RUN", &run).env("WARPSTEP_RESTART", attempt.to_string()).stdin(Stdio::null());
            if let Some(timeout) = self.timeout {
                command.env("WARPSTEP_TIMEOUT", timeout.to_string());
            }
            share_machine(command, self.size);
        };
        match &self.mpirun {
            Some(mpirun) => {
                let control = Control::new(&run, self.size)?;
                let folders = [self.outputs.folder(), control.folder()];
                let mut command = mpirun.command(self.size, folders, &self.program, arguments)?;
                prepare(&mut command);
                // It gives ranks a terminal of its own, whatever it writes into itself: no rank is to draw where nobody sees it.
                if !std::io::stdout().is_terminal() {
                    command.env("TERM", "dumb");
                }
                Job::through_mpirun(command, control)
            }
            None => Job::of_ranks(self.size, |rank| {
                let mut command = Process::new(&self.program);
                command.args(arguments);
                prepare(&mut command);
                command.env("WARPSTEP_RANK", rank.to_string()).env("WARPSTEP_WORLD_SIZE", self.size.to_string());
                command.env("WARPSTEP_LOCAL_RANK", rank.to_string());
                command.env("WARPSTEP_LOCAL_WORLD_SIZE", self.size.to_string());
                if rank > 0 {
                    let [out, err] = outputs::open(self.outputs.folder(), rank)?;
                    command.stdout(out).stderr(err);
                }
                Ok(command)
            }),
        }
    }
}

/// The processes of a machine share its cores, and an emulated driver shows a device for each; where a user says otherwise, that
/// stands.
fn share_machine(command: &mut Process, size: usize) {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    for (name, value) in [("RAYON_NUM_THREADS", (cores / size).max(1)), (gpus::EMULATED, size)] {
        if std::env::var_os(name).is_none() {
            command.env(name, value.to_string());
        }
    }
}

/// A port of this machine that is free now. Who takes it before rank 0 does, makes it say so.
fn free_port() -> Result<u16> {
    let address = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
    Ok(address.map_err(|e| Error::io("find a port of", "127.0.0.1", e))?.port())
}

/// The arguments of `train`, to go on with what the first attempt left, be it no checkpoint yet.
fn resuming(arguments: &[OsString]) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.iter().filter(|one| *one != "--overwrite").cloned().collect();
    if !arguments.iter().any(|one| one == "--resume") {
        arguments.insert(1, "--resume".into());
    }
    arguments
}

/// `exited with code 2`, `was ended by SIGKILL`.
fn how(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => {
            let name = signal_hook::low_level::signal_name(signal).map_or_else(|| signal.to_string(), str::to_owned);
            format!("was ended by {name}")
        }
        (None, None) => "ended".into(),
    }
}

/// As a shell gives it.
fn exit_code(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_run_is_gone_when_its_successor_has_written_its_config() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.toml");
        assert!(!Replaced::new(folder.path()).is_gone(), "nothing there, and nothing begun");
        std::fs::write(&config, "old").unwrap();
        let replaced = Replaced::new(folder.path());
        assert!(!replaced.is_gone(), "the old run");
        std::fs::remove_file(&config).unwrap();
        assert!(!replaced.is_gone(), "it is being removed");
        crate::train::files::write_whole(&config, b"new").unwrap();
        assert!(replaced.is_gone());
    }
}
