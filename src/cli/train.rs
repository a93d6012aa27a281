//! `warpstep train`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::RunFileArgs;
use super::assemble::{Opened, build_model, open_data, open_device};
use super::dry_run::dry_run;
use super::team::{Team, Vigil};
use crate::backend::Backend;
use crate::backend::ops::Update;
use crate::backend::profile::Profiled;
use crate::config::RunFile;
use crate::data::OpenedData;
use crate::data::source::Lookup;
use crate::error::{Error, Result};
use crate::optim::NormClip;
use crate::parallel::watch::Watch;
use crate::parallel::world::World;
use crate::parallel::{Collective, agree};
use crate::train::files::write_whole;
use crate::train::looping::train;
use crate::train::profile::{Profile, Table};
use crate::train::progress::{Progress, Show};
use crate::train::report::Report;
use crate::train::run::{End, Event, Observer, Run, Start};
use crate::train::tensorboard::TensorBoard;

/// Options of `train`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  warpstep train examples/digits.toml
  warpstep train run.toml --set optimizer.learning_rate=3e-4 --out runs/second
  warpstep train run.toml --resume")]
pub(crate) struct Options {
    #[command(flatten)]
    run: RunFileArgs,
    /// Run folder (run.out, or runs/NAME, where not given)
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the run in the run folder
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    /// Replace the run in the run folder
    #[arg(long)]
    overwrite: bool,
    /// Print shapes, parameters, memory and arithmetic, and train nothing
    #[arg(long)]
    dry_run: bool,
    /// Launch each kernel of a step by itself instead of replaying a CUDA graph, to find out which one fails
    #[arg(long)]
    no_graph: bool,
    /// Time each operation for N micro-batches, and print a table of times beside their floors at the end (kept as profile.json)
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "20")]
    profile: Option<u64>,
    /// Replay a sample of every Nth update by the plain rule, and stop where it differs (run.shadow_every_steps)
    #[arg(long, value_name = "N")]
    shadow: Option<u64>,
    /// Print JSON lines
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Print nothing but errors
    #[arg(long)]
    quiet: bool,
}

impl Options {
    /// The run folder. The run file is read, and nothing else is done.
    pub(super) fn folder(&self) -> Result<PathBuf> {
        let run_file = self.run.parse()?;
        Ok(self.out.clone().unwrap_or(run_file.out))
    }
}

/// Runs it.
pub(crate) fn run(options: Options) -> anyhow::Result<ExitCode> {
    let mut options = options;
    options.run.set.extend(options.shadow.map(|every| format!("run.shadow_every_steps={every}")));
    let run_file = options.run.read()?;
    let world = World::detect()?;
    // Before anything is read: an emulated device starts the program again.
    let device = open_device(&run_file, &world, !options.no_graph);
    if options.dry_run {
        let text = dry_run(&run_file, &world, device)?;
        // One process speaks for all.
        if world.rank == 0 {
            print!("{text}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let device = device?;
    let folder = options.out.clone().unwrap_or_else(|| run_file.out.clone());
    let vigil = Vigil {
        timeout: Duration::from_secs_f64(run_file.parallel.timeout),
        log: folder.join("logs").join(format!("rank-{}.log", world.rank)),
    };
    let team = Team::join(&world, &device, vigil)?;
    let started = Arc::new(AtomicBool::new(false));
    let trained = train_in_team(&options, &run_file, &folder, device, &team, &started);
    let Err(error) = trained else {
        team.goodbye();
        return trained;
    };
    // Before the first step all processes know of an error, and one says it; after that it is one process's own.
    let own = started.load(Ordering::Relaxed) && !matches!(error.downcast_ref(), Some(Error::Peer { .. }));
    if let Some(Error::Collective(_)) = error.downcast_ref() {
        team.await_cause();
    }
    if !own {
        team.goodbye();
    } else if !team.fail(&format!("{error:#}")) {
        let exit_code = error.downcast_ref().map_or(1, Error::exit_code);
        return Err(Error::Peer { rank: 0, problem: String::new(), exit_code }.into());
    }
    Err(error)
}

/// Trains as one of a team.
fn train_in_team(
    options: &Options,
    run_file: &RunFile,
    folder: &Path,
    device: Opened,
    team: &Team,
    started: &Arc<AtomicBool>,
) -> anyhow::Result<ExitCode> {
    let collective = Arc::clone(&team.collective);
    let data = agree(&*collective, open_data(run_file))?;
    let start = match (options.resume, options.overwrite) {
        (true, _) => Start::Resume,
        (false, true) => Start::Overwrite,
        (false, false) => Start::New,
    };
    let show = match (options.json, options.quiet) {
        // One process speaks for all.
        _ if collective.rank() > 0 => Show::Log(collective.rank()),
        (true, _) => Show::Json,
        (false, true) => Show::Quiet,
        (false, false) => Show::Auto,
    };
    let (watch, started, profile) = (team.watch.clone(), Arc::clone(started), options.profile);
    let go = Go { collective, watch, started, run_file, data: &data, folder, start, show, profile };
    match device {
        Opened::Cpu(backend) => go.train(backend),
        Opened::Cuda(backend) => go.train(backend),
        Opened::CudaBf16(backend) => go.train(backend),
        Opened::CudaF16(backend) => go.train(backend),
    }
}

/// A run that only wants its device.
struct Go<'a> {
    collective: Arc<dyn Collective>,
    watch: Option<Arc<Watch>>,
    /// Set when the first step is about to be taken.
    started: Arc<AtomicBool>,
    run_file: &'a RunFile,
    data: &'a OpenedData,
    folder: &'a Path,
    start: Start,
    show: Show,
    profile: Option<u64>,
}

impl Go<'_> {
    fn train<B: Backend<Real = f32> + Update + Profiled>(self, backend: B) -> anyhow::Result<ExitCode> {
        let Go { collective, watch, started, run_file, data, folder, start, show, profile } = self;
        let mut run = make_run(backend, Arc::clone(&collective), run_file, data, folder, start)?;
        let profile =
            profile.map(|count| Profile::new(&run.backend, &mut run.model, &run.optimizer, count)).transpose()?;
        let profile = profile.map(|profile| profile.accumulating(run_file.train.accumulate));
        run.interrupt = signals()?;
        run.watch = watch;
        let mut begun = Begun(started);
        let clip = match run_file.optimizer.clip.norm {
            NormClip::Global { max_norm } => Some(max_norm),
            NormClip::Off | NormClip::Tensor { .. } | NormClip::Adaptive { .. } => None,
        };
        // The report reads what the run wrote, so it comes before the progress says that all is done.
        let (mut board, mut report, mut progress) = (TensorBoard::new(), Report::new(clip), Progress::new(show));
        let observers: &mut [&mut dyn Observer] = if collective.rank() == 0 {
            &mut [&mut begun, &mut board, &mut report, &mut progress]
        } else {
            &mut [&mut begun, &mut progress]
        };
        let outcome = train(run, observers);
        // Its live line goes before anything else is said.
        drop(progress);
        let outcome = outcome.map_err(|e| run_file.locate(e))?;
        if let Some(profile) = profile {
            keep_profile(&profile.table()?, folder, show)?;
        }
        match outcome.end {
            End::Interrupted(signal) => {
                if matches!(show, Show::Auto | Show::Json) {
                    eprintln!("interrupted: a checkpoint was written; go on with --resume");
                }
                Ok(ExitCode::from(128 + signal as u8))
            }
            End::Completed | End::StoppedEarly | End::Abandoned => Ok(ExitCode::SUCCESS),
        }
    }
}

/// Says that the first step is about to be taken.
struct Begun(Arc<AtomicBool>);

impl Observer for Begun {
    fn event(&mut self, event: &Event<'_>) -> Result<()> {
        if let Event::Started(_) = event {
            self.0.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Leaves a profile in the run folder, and prints it.
fn keep_profile(table: &Table, folder: &Path, show: Show) -> anyhow::Result<()> {
    let mut json = serde_json::to_vec_pretty(table)?;
    json.push(b'\n');
    write_whole(&folder.join("profile.json"), &json)?;
    let mut out = std::io::stdout().lock();
    match show {
        Show::Auto => write!(out, "\n{}", table.text())?,
        Show::Json => writeln!(out, "{}", serde_json::json!({ "profile": table }))?,
        Show::Quiet | Show::Log(_) => {}
    }
    Ok(())
}

/// The run of a run file in this folder.
pub(crate) fn make_run<B: Backend>(
    backend: B,
    collective: Arc<dyn Collective>,
    run: &RunFile,
    data: &OpenedData,
    folder: &Path,
    start: Start,
) -> Result<Run<B>> {
    Ok(Run {
        backend,
        model: build_model(run, &data.preprocess)?,
        options: run.train.clone(),
        optimizer: run.optimizer.clone(),
        schedule: run.schedule.clone(),
        splits: data.splits.clone(),
        sampling: data.sampling,
        drop_last: data.drop_last,
        prefetch: data.prefetch,
        resident: data.resident,
        collective,
        watch: None,
        parallel: run.parallel.clone(),
        folder: folder.to_owned(),
        config: run.resolved.clone(),
        identity: run.identity.clone(),
        preprocess: data.preprocess.to_json()?,
        weights: run.weights.as_deref().map(|path| Lookup::new(Some(&run.base)).find(path)).transpose()?,
        start,
        interrupt: Arc::default(),
        abandon_at: None,
    })
}

/// A number that SIGINT and SIGTERM set to their own. A second signal ends the process at once.
fn signals() -> Result<Arc<AtomicUsize>> {
    let interrupt = Arc::new(AtomicUsize::new(0));
    let second = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&second))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&second)))
            .and_then(|_| signal_hook::flag::register_usize(signal, Arc::clone(&interrupt), signal as usize))
            .map_err(|e| Error::io("listen to", "signals", e))?;
    }
    Ok(interrupt)
}
