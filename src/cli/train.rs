//! `warpstep train`.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;

use super::assemble::{Opened, assign, build_model, open_data, open_device, set_threads};
use super::dry_run::dry_run;
use super::team::{Team, Vigil};
use super::{RunArgs, count, report, say};
use crate::backend::Backend;
use crate::backend::ops::Update;
use crate::backend::profile::Profiled;
use crate::config::RunFile;
use crate::data::source::Lookup;
use crate::data::{FormatOptions, OpenedData, TargetSpec};
use crate::error::{Error, Result};
use crate::model::presets::Preset;
use crate::optim::NormClip;
use crate::parallel::watch::Watch;
use crate::parallel::world::World;
use crate::parallel::{Collective, agree};
use crate::tell::tell;
use crate::train::checkpoint::{self, Which};
use crate::train::files::write_whole;
use crate::train::looping::train;
use crate::train::profile::{Profile, Table};
use crate::train::progress::{Progress, Show};
use crate::train::report::Report;
use crate::train::run::{End, Event, Observer, Run, Start};
use crate::train::signals;
use crate::train::tensorboard::TensorBoard;

/// Options of `train`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  warpstep train examples/digits.toml
  warpstep train run.toml --set optimizer.learning_rate=3e-4 --out runs/second
  warpstep train run.toml --resume")]
pub(crate) struct Options {
    #[command(flatten)]
    run: RunArgs,
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
    #[arg(long, conflicts_with_all = ["json", "quiet"])]
    dry_run: bool,
    /// Launch each kernel of a step by itself instead of replaying a CUDA graph, to find out which one fails
    #[arg(long)]
    no_graph: bool,
    /// Time each operation for N micro-batches, and print a table of times beside their floors at the end (kept as profile.json)
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "20", value_parser = count)]
    profile: Option<NonZeroUsize>,
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
    /// The run file and the run folder. Nothing is made.
    pub(super) fn parse(&self) -> Result<(RunFile, PathBuf)> {
        let out = self.out.as_ref().map(|out| assign("run.out", &out.to_string_lossy()));
        let shadow = self.shadow.map(|every| format!("run.shadow_every_steps={every}"));
        let run_file = self.run.parse(out.into_iter().chain(shadow).collect())?;
        let folder = self.out.clone().unwrap_or_else(|| run_file.out.clone());
        if folder.exists() && !folder.is_dir() {
            let place = if self.out.is_some() { "--out" } else { "run.out" };
            let problem = format!("{} is a file, expected a folder", folder.display());
            return Err(run_file.locate(Error::config(place, problem)));
        }
        Ok((run_file, folder))
    }

    fn start(&self) -> Start {
        match (self.resume, self.overwrite) {
            (true, _) => Start::Resume,
            (false, true) => Start::Overwrite,
            (false, false) => Start::New,
        }
    }

    /// Whether a run in the folder is to be replaced.
    pub(super) fn overwrites(&self) -> bool {
        self.overwrite
    }
}

/// Runs it.
pub(crate) fn run(options: Options) -> anyhow::Result<ExitCode> {
    let (run_file, folder) = options.parse()?;
    set_threads(&run_file);
    let world = World::detect()?;
    // Before anything is read: an emulated device starts the program again.
    let device = open_device(&run_file, &world, !options.no_graph);
    if options.dry_run {
        let weights = initial_weights(&run_file, &folder, options.start())?;
        let text = dry_run(&run_file, &world, device, weights.as_deref())?;
        // One process speaks for all.
        if world.rank == 0 {
            say(&text)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let device = device?;
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
        // It is said first: the end may wait for processes that never come.
        let code = report(&error);
        team.goodbye();
        return Ok(code);
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
    let data = agree(&*collective, open_data(run_file, collective.rank() == 0 && !options.quiet))?;
    let start = options.start();
    if start == Start::Resume && collective.rank() == 0 && matches!(latest(folder), Ok(None)) {
        tell(format_args!("no checkpoint in {}: begins at step 0", folder.display()));
    }
    if collective.rank() == 0
        && let Some(note) = values_for_classes(run_file, &data)
    {
        tell(note);
    }
    let show = match (options.json, options.quiet) {
        // One process speaks for all.
        _ if collective.rank() > 0 => Show::Log(collective.rank()),
        (true, _) => Show::Json,
        (false, true) => Show::Quiet,
        (false, false) => Show::Auto,
    };
    let profile = options.profile.map(|count| count.get() as u64);
    let (watch, started) = (team.watch.clone(), Arc::clone(started));
    let go = Go { collective, watch, started, run_file, data: &data, folder, start, show, profile };
    match device {
        Opened::Cpu(backend) => go.train(backend),
        Opened::Cuda(backend) => go.train(backend),
        Opened::CudaBf16(backend) => go.train(backend),
        Opened::CudaF16(backend) => go.train(backend),
    }
}

/// What a user should know whose logistic regression is none: its targets were read as values.
fn values_for_classes(run: &RunFile, data: &OpenedData) -> Option<String> {
    let plain = matches!(run.model.preset, Preset::Logistic(_)) && run.model.loss.is_none();
    let (read, key) = match &run.data.format {
        FormatOptions::Csv(_) => ("the target column was", "set data.target_type = \"class\""),
        FormatOptions::Inline(_) => ("data.targets were", "give them as strings"),
        _ => return None,
    };
    (plain && matches!(data.target(), TargetSpec::Real { .. })).then(|| {
        format!(
            "preset = \"logistic\": {read} read as values, which are fitted by least squares; {key} where they are classes, or \
             model.loss = \"binary_cross_entropy\" where they are probabilities"
        )
    })
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
        let make = || {
            let mut run = make_run(backend, Arc::clone(&collective), run_file, data, folder, start)?;
            signals::listen(&run.interrupt)?;
            let profile =
                profile.map(|count| Profile::new(&run.backend, &mut run.model, &run.optimizer, count)).transpose()?;
            Ok((run, profile.map(|profile| profile.accumulating(run_file.train.accumulate))))
        };
        // One process may lack what the others have.
        let (mut run, profile) = agree(&*collective, make())?;
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
            // How the run ended does not depend on it.
            match profile.table() {
                Ok(table) => keep_profile(&table, folder, show)?,
                Err(error) => tell(format_args!("no profile: {error}")),
            }
        }
        match outcome.end {
            End::Interrupted(signal) => {
                if matches!(show, Show::Auto | Show::Json) {
                    tell("interrupted: a checkpoint was written; go on with --resume");
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
    match show {
        Show::Auto => say(&format!("\n{}", table.text()))?,
        Show::Json => say(&format!("{}\n", serde_json::json!({ "profile": table })))?,
        Show::Quiet | Show::Log(_) => {}
    }
    Ok(())
}

/// The checkpoint that a resume in this run folder goes on from.
fn latest(folder: &Path) -> Result<Option<PathBuf>> {
    checkpoint::find(&folder.join("checkpoints"), Which::Latest)
}

/// The file of weights that a run in this folder begins with; none where it goes on, as a checkpoint has weights of its own.
fn initial_weights(run: &RunFile, folder: &Path, start: Start) -> Result<Option<PathBuf>> {
    let begins = start != Start::Resume || latest(folder)?.is_none();
    let named = run.weights.as_deref().filter(|_| begins);
    named.map(|path| Lookup::new(Some(&run.base)).file_for("model.weights", path)).transpose()
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
        source: data.source.clone(),
        weights: initial_weights(run, folder, start)?,
        start,
        interrupt: Arc::default(),
        abandon_at: None,
    })
}
