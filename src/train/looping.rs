//! The loop around the step: records, evaluations, checkpoints, early stopping, signals.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::checkpoint::{self, RunState, Which};
use super::files;
use super::forensics::{LAYERS, NormShare};
use super::metrics::{MetricsWriter, Record, SplitName};
use super::options::{EarlyStopping, Length, Metric, TrainOptions};
use super::parts;
use super::resident::{self, Source};
use super::run::{End, Event, Observer, Outcome, Run, Start, Started};
use super::same::same_parameters;
use super::shadow::Shadow;
use super::sharing::{check_sharding, exchange};
use super::step::{Evaluation, LossSums, StepReport, Trainer, TrainerParts};
use super::summary::{Scores, SplitScores, Summary, peak_memory_bytes};
use crate::backend::Backend;
use crate::backend::ops::Update;
use crate::data::{Dataset, InputSpec, Loader, Prefetch, Sampler, SamplerOptions, Splits, TargetSpec};
use crate::error::{Error, Result};
use crate::model::Input;
use crate::optim::{NormClip, Schedule};
use crate::parallel::watch::Watch;
use crate::parallel::{Collective, GradientsOptions, Shard, Sharding, agree, broadcast, gather};

/// What a model's input is for samples of this kind.
pub fn model_input(spec: &InputSpec) -> Input {
    match spec {
        InputSpec::Real { shape } => Input::Real(shape.clone()),
        InputSpec::Tokens { context, .. } => Input::Tokens(*context),
    }
}

/// Trains.
///
/// # Errors
/// A folder that holds a run already, a checkpoint of another run, data that is damaged, or a training that failed.
pub fn train<B: Backend<Real = f32> + Update>(run: Run<B>, observers: &mut [&mut dyn Observer]) -> Result<Outcome> {
    let collective = Arc::clone(&run.collective);
    let prepared = agree(&*collective, Loop::prepare(run))?;
    let mut device = prepared.trainer.backend().description();
    if collective.world() > 1 {
        device += &format!(", {} processes over {}", collective.world(), collective.name());
    }
    prepared.run(&device, observers)
}

impl<B: Backend<Real = f32> + Update> Loop<B> {
    /// Everything before the first step. What processes do together in it, all do, or none.
    fn prepare(run: Run<B>) -> Result<Self> {
        let collective = Arc::clone(&run.collective);
        let (rank, world) = (collective.rank(), collective.world());
        let checkpoints = run.folder.join("checkpoints");
        let hash = blake3::hash(run.identity.as_bytes()).to_hex().to_string();
        let share = run.options.validate().and_then(|()| run.parallel.validate());
        let share = share.and_then(|()| run.parallel.share(rank, world, run.options.batch_size));
        let share = share.and_then(|share| check_sharding(&run).map(|()| share));
        let share = agree(&*collective, share)?;
        // One process makes the folder, and all go on from the checkpoint that it found.
        let latest = if rank == 0 { prepare_folder(&run, &checkpoints, &hash) } else { Ok(None) };
        let latest = the_same_latest(&*collective, agree(&*collective, latest)?, &checkpoints)?;
        let sampler_options = SamplerOptions {
            batch_size: run.options.batch_size,
            accumulate: run.options.accumulate,
            seed: run.options.seed,
            sampling: run.sampling,
            drop_last: run.drop_last,
            share,
        };
        let batches_per_epoch = Sampler::new(&*run.splits.train, sampler_options.clone())?.batches_per_epoch();
        let steps_per_epoch = batches_per_epoch as f64 / f64::from(run.options.accumulate);
        let steps = match run.options.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => ((epochs * steps_per_epoch).round() as u64).max(1),
        };
        run.schedule.validate(steps, run.optimizer.learning_rate)?;
        let input = run.splits.train.input();
        let sharding = run.parallel.sharding((rank, world), &share, run.options.accumulate);
        let sharding = Some(sharding).filter(|options| world > 1 && options.shard != Shard::None);
        let parts = TrainerParts {
            backend: run.backend,
            model: run.model,
            input: model_input(&input),
            batch_size: run.options.batch_size / share.of,
            accumulate: run.options.accumulate,
            optimizer: &run.optimizer,
            ema: run.options.ema,
            seed: run.options.seed,
        };
        let mut trainer = Trainer::sharded(parts, sharding)?;
        if share.of > 1 || collective.is_queued() {
            let options = GradientsOptions { share, wire: run.parallel.wire, overlap: run.parallel.overlap };
            let exchange = exchange(&trainer, options, &collective, run.parallel.bucket_elements())?;
            trainer = trainer.sharing(share, exchange);
        }
        if let (Some(weights), None) = (&run.weights, &latest) {
            let (backend, arena) = trainer.parts_mut();
            checkpoint::load_model(weights, backend, arena)?;
            trainer.restart_average()?;
        }
        let state = match &latest {
            Some(path) => checkpoint::load(path, &mut trainer)?,
            None => RunState::new(run.options.seed, hash, format!("{:?}", run.schedule)),
        };
        if rank == 0 {
            checkpoint::sweep(&checkpoints, state.step)?;
            files::write_whole(&run.folder.join("config.toml"), run.config.as_bytes())?;
            files::write_whole(&run.folder.join("preprocess.json"), run.preprocess.as_bytes())?;
        }
        let first_pass = state.step * share.passes(run.options.accumulate);
        let table = resident::table(trainer.backend(), &run.splits.train, run.resident)?;
        let source = Source::new(&run.splits.train, table, sampler_options, first_pass, run.prefetch)?;
        let tokens_per_sample = match (&input, run.splits.train.target()) {
            (InputSpec::Tokens { context, .. }, TargetSpec::NextToken) => Some(*context),
            _ => None,
        };
        let metrics =
            (rank == 0).then(|| MetricsWriter::resume(&run.folder.join("metrics.jsonl"), state.step)).transpose()?;
        let seconds_before = state.seconds;
        Ok(Loop {
            collective,
            watch: run.watch,
            compare_every: run.parallel.check_every_steps,
            trainer,
            source,
            options: run.options,
            peak: run.optimizer.learning_rate,
            clips: run.optimizer.clip.norm != NormClip::Off,
            clamps: run.optimizer.clip.value.is_some(),
            schedule: run.schedule,
            splits: run.splits,
            prefetch: run.prefetch,
            folder: run.folder,
            checkpoints,
            interrupt: run.interrupt,
            abandon_at: run.abandon_at,
            state,
            metrics,
            steps,
            steps_per_epoch,
            tokens_per_sample,
            began: Instant::now(),
            seconds_before,
            stopwatch: None,
            interval: Interval::default(),
            skipped_in_a_row: 0,
            last_step: LastStep::default(),
            last_train: None,
            last_validation: None,
            ends_after: None,
        })
    }
}

/// The checkpoint that process 0 goes on from, in every process.
fn the_same_latest(
    collective: &dyn Collective,
    latest: Option<PathBuf>,
    checkpoints: &Path,
) -> Result<Option<PathBuf>> {
    let name = latest.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    let mut bytes = name.unwrap_or_default().into_bytes();
    broadcast(collective, 0, &mut bytes)?;
    let name = String::from_utf8_lossy(&bytes).into_owned();
    Ok((!name.is_empty()).then(|| checkpoints.join(name)))
}

/// Makes or checks the run folder; returns the checkpoint to go on from.
fn prepare_folder<B: Backend>(run: &Run<B>, checkpoints: &Path, hash: &str) -> Result<Option<PathBuf>> {
    // Not `logs`: a launcher opens them before there is a run, and adds to what is there.
    const OURS: [&str; 8] = [
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "preprocess.json",
        "tensorboard",
        "checkpoints",
        "profile.json",
    ];
    let folder = &run.folder;
    let has_run = OURS.iter().any(|name| folder.join(name).exists());
    match run.start {
        Start::New if has_run => {
            return Err(Error::config(
                folder.display().to_string(),
                "holds a run already; choose another folder with --out, go on with it by --resume, or replace it by --overwrite",
            ));
        }
        Start::Overwrite => {
            for name in OURS {
                let path = folder.join(name);
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                match removed {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", path, e)),
                    _ => {}
                }
            }
        }
        Start::New | Start::Resume => {}
    }
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    if run.start != Start::Resume {
        return Ok(None);
    }
    let Some(latest) = checkpoint::find(checkpoints, Which::Latest)? else { return Ok(None) };
    let state = checkpoint::read_state(&latest)?;
    if state.config_hash != hash {
        return Err(Error::checkpoint(
            latest,
            "was made by another configuration than this run file's; resume with the run file and the --set options it was \
             made with (its config.toml lies in the run folder)",
        ));
    }
    Ok(Some(latest))
}

/// Sums since the last record of the training split.
#[derive(Default)]
struct Interval {
    losses: f64,
    sums: LossSums,
    steps: u64,
    clipped: u64,
    clamped: u64,
    shadow_ulp: Option<f64>,
    samples: u64,
    seconds: f64,
}

/// Figures of the last step.
#[derive(Default)]
struct LastStep {
    rate: f64,
    norm: f64,
    /// Of each tensor's gradients.
    squares: Vec<f64>,
}

struct Loop<B: Backend + Update> {
    /// The processes that train.
    collective: Arc<dyn Collective>,
    /// The watch over the others.
    watch: Option<Arc<Watch>>,
    /// Steps between two comparisons of their parameters.
    compare_every: u64,
    trainer: Trainer<B>,
    source: Source,
    options: TrainOptions,
    peak: f64,
    clips: bool,
    clamps: bool,
    schedule: Schedule,
    splits: Splits,
    prefetch: Prefetch,
    folder: PathBuf,
    checkpoints: PathBuf,
    interrupt: Arc<AtomicUsize>,
    abandon_at: Option<u64>,
    state: RunState,
    /// In process 0 alone.
    metrics: Option<MetricsWriter>,
    steps: u64,
    steps_per_epoch: f64,
    tokens_per_sample: Option<usize>,
    began: Instant,
    seconds_before: f64,
    /// Since when steps take time that was not counted yet.
    stopwatch: Option<Instant>,
    interval: Interval,
    skipped_in_a_row: u64,
    last_step: LastStep,
    last_train: Option<Scores>,
    last_validation: Option<(u64, Scores)>,
    /// The step after which the run ends because a process was told to.
    ends_after: Option<u64>,
}

fn tell(observers: &mut [&mut dyn Observer], event: &Event<'_>) -> Result<()> {
    observers.iter_mut().try_for_each(|observer| observer.event(event))
}

/// Tells the other processes that this one goes on, though no step is done.
fn alive(watch: Option<&Watch>) {
    if let Some(watch) = watch {
        watch.progress();
    }
}

/// Whether predictions of these targets can be right.
fn has_accuracy(dataset: &dyn Dataset) -> bool {
    !matches!(dataset.target(), TargetSpec::Real { .. })
}

fn scores(sums: LossSums, accuracy: bool) -> Scores {
    let loss = sums.mean();
    Scores { loss: loss.is_finite().then_some(loss), accuracy: accuracy.then(|| sums.accuracy()) }
}

impl<B: Backend<Real = f32> + Update> Loop<B> {
    fn run(mut self, device: &str, observers: &mut [&mut dyn Observer]) -> Result<Outcome> {
        tell(
            observers,
            &Event::Started(Started {
                folder: &self.folder,
                device,
                parameters: self.trainer.arena().layout.parameters(),
                samples: self.splits.train.len(),
                first_step: self.state.step,
                steps: self.steps,
                steps_per_epoch: self.steps_per_epoch,
            }),
        )?;
        let evaluate_every = self.options.evaluate.in_steps(self.steps_per_epoch);
        let checkpoint_every = self.options.checkpoint.in_steps(self.steps_per_epoch);
        let due = |every: Option<u64>, step: u64| every.is_some_and(|every| step.is_multiple_of(every));
        let mut end = End::Completed;
        self.stopwatch = Some(Instant::now());
        let alone = self.collective.world() == 1;
        // Where parameters are shared out, no two processes hold the same.
        let all_alike = !alone && !matches!(self.trainer.sharding(), Some(Sharding { parameters: Some(_), .. }));
        let compare_every = all_alike.then_some(self.compare_every);
        while self.trainer.queued().step < self.steps {
            // One process alone ends at once; several agree on a step that none has gone beyond.
            if !alone && self.interrupt.load(Ordering::Relaxed) != 0 {
                self.trainer.raise_flag();
            }
            let watched = due(self.options.shadow_every_steps, self.trainer.queued().step + 1);
            let queued = if watched { self.watched_step(observers)? } else { self.queue_step()? };
            if !queued {
                return Ok(Outcome { end: End::Abandoned, summary: None });
            }
            let step = self.trainer.queued().step;
            let last = step == self.steps;
            let (evaluate, save) = (due(evaluate_every, step) && !last, due(checkpoint_every, step) && !last);
            let compare = due(compare_every, step) || (last && all_alike);
            // Whatever looks at the parameters waits for the steps before it; nothing else does.
            let signal = self.interrupt.load(Ordering::Relaxed);
            self.take_reports(false, observers)?;
            let told = |ends_after: Option<u64>| {
                if alone { signal != 0 } else { ends_after.is_some_and(|end| step >= end) }
            };
            if !(evaluate || save || compare || last || told(self.ends_after)) {
                continue;
            }
            self.take_reports(true, observers)?;
            let told = told(self.ends_after);
            if compare {
                let trainer = &self.trainer;
                same_parameters(&*self.collective, trainer.backend(), trainer.arena(), step)?;
            }
            if evaluate && self.validate(self.options.evaluate_batches, observers)? {
                end = End::StoppedEarly;
            }
            if told {
                self.record_training(observers)?;
                self.save(observers)?;
                let signal = if signal == 0 { libc::SIGTERM } else { signal as i32 };
                return Ok(Outcome { end: End::Interrupted(signal), summary: None });
            }
            if end == End::StoppedEarly {
                self.record_training(observers)?;
                break;
            }
            if save {
                self.save(observers)?;
            }
            self.stopwatch = Some(Instant::now());
        }
        let summary = self.finish(device, observers)?;
        Ok(Outcome { end, summary: Some(summary) })
    }

    /// Queues one step. Returns whether to go on: not when the run is to be abandoned.
    fn queue_step(&mut self) -> Result<bool> {
        let rate = self.rate_of_next();
        let passes = self.trainer.passes_per_step();
        (1..=passes).try_fold(true, |on, pass| Ok(on && self.queue_pass((pass == passes).then_some(rate))?))
    }

    /// The learning rate of the step that is queued next.
    fn rate_of_next(&self) -> f64 {
        self.schedule.at(self.trainer.queued().step, self.steps, self.peak)
    }

    /// Queues a pass, and given a learning rate the update after it. Returns whether to go on.
    fn queue_pass(&mut self, rate: Option<f64>) -> Result<bool> {
        if self.abandon_at.is_some_and(|at| self.trainer.queued().micro_step >= at) {
            return Ok(false);
        }
        self.source.queue_next(&mut self.trainer, rate)?;
        alive(self.watch.as_deref());
        Ok(true)
    }

    /// Takes one step whose update is replayed by the plain rule, everything before it waited for. Returns whether to go on.
    fn watched_step(&mut self, observers: &mut [&mut dyn Observer]) -> Result<bool> {
        let rate = self.rate_of_next();
        for _ in 1..self.trainer.passes_per_step() {
            if !self.queue_pass(None)? {
                return Ok(false);
            }
        }
        self.take_reports(true, observers)?;
        let params = self.trainer.step_params(rate)?;
        let shadow = Shadow::new(self.options.seed);
        let (backend, arena, plan) = (self.trainer.backend(), self.trainer.arena(), self.trainer.update_plan());
        let watched = shadow.before(backend, arena, plan, &params)?;
        // The last micro-batch and the update in one piece of work, as in any step: what is watched is what runs.
        if !self.queue_pass(Some(rate))? {
            return Ok(false);
        }
        let Some(report) = self.trainer.finished(true)? else {
            return Err(Error::Training("the update that was queued did not end".into()));
        };
        let (backend, arena, plan) = (self.trainer.backend(), self.trainer.arena(), self.trainer.update_plan());
        let found = watched.after(backend, arena, plan, &params, &report.outcome)?;
        let worst = self.interval.shadow_ulp.map_or(found.ulp, |ulp| ulp.max(found.ulp));
        self.interval.shadow_ulp = Some(worst);
        self.take_report(report, observers)?;
        Ok(true)
    }

    /// Takes over what steps found that are done; with `wait` what all found.
    fn take_reports(&mut self, wait: bool, observers: &mut [&mut dyn Observer]) -> Result<()> {
        while let Some(report) = self.trainer.finished(wait)? {
            self.take_report(report, observers)?;
        }
        Ok(())
    }

    /// Takes over what a step found, and records it where it is time to.
    fn take_report(&mut self, report: StepReport, observers: &mut [&mut dyn Observer]) -> Result<()> {
        let StepReport { loss, sums, samples, outcome, norm_squares, flag } = report;
        if flag && self.ends_after.is_none() {
            // The report lags behind by as many steps as are in flight, in one process more than in another.
            let in_flight = if B::INPUT_SLOTS > 1 { B::INPUT_SLOTS as u64 } else { 0 };
            self.ends_after = Some(self.trainer.counters().step + in_flight);
        }
        let rate = self.schedule.at(self.state.step, self.steps, self.peak);
        self.state.set_counters(self.trainer.counters());
        if let Some(watch) = &self.watch {
            watch.step(self.state.step);
        }
        let interval = &mut self.interval;
        interval.losses += loss;
        interval.sums.add(sums);
        interval.samples += samples;
        interval.steps += 1;
        interval.clipped += u64::from(outcome.clip_coefficient < 1.0);
        interval.clamped += outcome.clamped;
        if let Some(since) = self.stopwatch.replace(Instant::now()) {
            let seconds = since.elapsed().as_secs_f64();
            interval.seconds += seconds;
            self.state.step_seconds += seconds;
        }
        self.state.seconds = self.seconds_before + self.began.elapsed().as_secs_f64();
        self.last_step = LastStep { rate, norm: outcome.grad_norm, squares: norm_squares };
        let step = self.state.step;
        self.skipped_in_a_row = if outcome.skipped { self.skipped_in_a_row + 1 } else { 0 };
        if self.skipped_in_a_row >= self.options.max_skipped_steps {
            return Err(Error::Training(format!(
                "the gradients were not finite for {} steps in a row, up to step {step}: lower \
                 optimizer.learning_rate, or set optimizer.clip = {{ global_norm = 1.0 }}",
                self.skipped_in_a_row
            )));
        }
        if step.is_multiple_of(self.options.log_every_steps) || step == self.steps {
            self.record_training(observers)?;
        }
        Ok(())
    }

    fn blank_record(&self, split: SplitName) -> Record {
        Record {
            step: self.state.step,
            epoch: self.state.step as f64 / self.steps_per_epoch,
            split,
            loss: f64::NAN,
            accuracy: None,
            lr: None,
            grad_norm: None,
            skipped: self.state.skipped_steps,
            clipped: None,
            clamped: None,
            norm_share: None,
            shadow_ulp: None,
            samples_per_s: None,
            tokens_per_s: None,
            mfu: None,
            time_s: self.state.seconds,
        }
    }

    fn record_training(&mut self, observers: &mut [&mut dyn Observer]) -> Result<()> {
        let Interval { losses, sums, steps, clipped, clamped, shadow_ulp, samples, seconds } =
            std::mem::take(&mut self.interval);
        if steps == 0 {
            return Ok(());
        }
        let loss = losses / steps as f64;
        let accuracy = has_accuracy(&*self.splits.train).then(|| sums.accuracy());
        let speed = samples as f64 / seconds;
        let layout = &self.trainer.arena().layout;
        let values = (steps * layout.parameters() as u64) as f64;
        let record = Record {
            loss,
            accuracy,
            lr: Some(self.last_step.rate),
            grad_norm: self.last_step.norm.is_finite().then_some(self.last_step.norm),
            clipped: self.clips.then(|| clipped as f64 / steps as f64),
            clamped: self.clamps.then(|| clamped as f64 / values),
            norm_share: NormShare::largest(layout, &self.last_step.squares, LAYERS),
            shadow_ulp,
            samples_per_s: self.tokens_per_sample.is_none().then_some(speed),
            tokens_per_s: self.tokens_per_sample.map(|tokens| speed * tokens as f64),
            ..self.blank_record(SplitName::Train)
        };
        self.last_train = Some(Scores { loss: loss.is_finite().then_some(loss), accuracy });
        self.append(&record, observers)
    }

    /// Writes a record, and tells of it.
    fn append(&mut self, record: &Record, observers: &mut [&mut dyn Observer]) -> Result<()> {
        if let Some(metrics) = &mut self.metrics {
            metrics.append(record)?;
        }
        tell(observers, &Event::Record(record))
    }

    /// Loss and accuracy of a split, recorded.
    fn evaluate(
        &mut self,
        dataset: &Arc<dyn Dataset>,
        split: SplitName,
        batches: Option<usize>,
        observers: &mut [&mut dyn Observer],
    ) -> Result<Scores> {
        let size = self.options.batch_size.min(dataset.len().max(1));
        let sums = self.sums(dataset, size, batches.unwrap_or(usize::MAX))?;
        let scores = scores(sums, has_accuracy(&**dataset));
        self.state.seconds = self.seconds_before + self.began.elapsed().as_secs_f64();
        let record = Record { loss: sums.mean(), accuracy: scores.accuracy, ..self.blank_record(split) };
        self.append(&record, observers)?;
        Ok(scores)
    }

    /// The sums of a split, of which each process takes its turn of batches. They are added up in the order of batches.
    fn sums(&mut self, dataset: &Arc<dyn Dataset>, size: usize, most: usize) -> Result<LossSums> {
        let (rank, world) = (self.collective.rank(), self.collective.world());
        let loader = Loader::every(Arc::clone(dataset), size, (rank, world), most, self.prefetch);
        let found = match self.trainer.sharding() {
            Some(Sharding { parameters: Some(_), .. }) => {
                let mut loader = agree(&*self.collective, loader)?;
                let turns = dataset.len().div_ceil(size).min(most).div_ceil(world);
                let collective = Arc::clone(&self.collective);
                let turns = (0..turns).map(|_| {
                    let batch = agree(&*collective, loader.next().transpose())?;
                    Ok(batch.map_or(Evaluation::PassOn { samples: size }, Evaluation::Batch))
                });
                self.trainer.evaluate_together(turns)
            }
            _ => loader.and_then(|loader| {
                let watch = self.watch.clone();
                self.trainer.evaluate(loader.inspect(|_| alive(watch.as_deref())))
            }),
        };
        let own = agree(&*self.collective, found)?;
        let numbers: Vec<f64> = own.iter().flat_map(|sums| [sums.loss, sums.counted, sums.right]).collect();
        let all = gather(&*self.collective, bytemuck::cast_slice(&numbers))?;
        let all: Vec<Vec<f64>> = all.iter().map(|bytes| bytemuck::pod_collect_to_vec(bytes)).collect();
        let mut total = LossSums::default();
        for turn in 0..all.first().map_or(0, |first| first.len() / 3) {
            for sums in all.iter().filter_map(|rank| rank.get(3 * turn..3 * (turn + 1))) {
                total.add(LossSums { loss: sums[0], counted: sums[1], right: sums[2] });
            }
        }
        Ok(total)
    }

    /// Evaluates the validation split and keeps the best checkpoint. Returns whether to stop early.
    fn validate(&mut self, batches: Option<usize>, observers: &mut [&mut dyn Observer]) -> Result<bool> {
        let Some(dataset) = self.splits.validation.clone() else { return Ok(false) };
        let found = self.evaluate(&dataset, SplitName::Validation, batches, observers)?;
        self.last_validation = Some((self.state.step, found));
        let min_delta = self.options.early_stopping.map_or(0.0, |e| e.min_delta);
        let before = self.state.best.and_then(|best| best.validation);
        if improves(self.options.best, before, found, min_delta) {
            self.state.best = Some(SplitScores {
                step: self.state.step,
                train: self.last_train,
                validation: Some(found),
                test: None,
            });
            self.state.evaluations_without_improvement = 0;
            self.write_checkpoint(true, observers)?;
            return Ok(false);
        }
        self.state.evaluations_without_improvement += 1;
        Ok(self
            .options
            .early_stopping
            .is_some_and(|EarlyStopping { patience, .. }| self.state.evaluations_without_improvement >= patience))
    }

    fn save(&mut self, observers: &mut [&mut dyn Observer]) -> Result<()> {
        self.write_checkpoint(false, observers)
    }

    /// Writes a checkpoint, which is there for every process when this returns.
    fn write_checkpoint(&mut self, best: bool, observers: &mut [&mut dyn Observer]) -> Result<()> {
        alive(self.watch.as_deref());
        if self.trainer.sharding().is_some() {
            parts::save(&self.checkpoints, &self.trainer, &self.state, &*self.collective)?;
        }
        let written = if self.collective.rank() == 0 { self.write_files(best).map(Some) } else { Ok(None) };
        match agree(&*self.collective, written)? {
            Some(path) => tell(observers, &Event::Checkpoint(&path)),
            None => Ok(()),
        }
    }

    /// What one process writes for all: the checkpoint, where its parts are not there already, and which is the best.
    fn write_files(&self, best: bool) -> Result<PathBuf> {
        let path = checkpoint::save(&self.checkpoints, &self.trainer, &self.state)?;
        if best {
            checkpoint::point(&self.checkpoints, Which::Best, &checkpoint::folder_name(self.state.step))?;
        }
        checkpoint::prune(&self.checkpoints, self.options.keep)?;
        Ok(path)
    }

    /// The last evaluations, the last checkpoint, summary.json.
    fn finish(&mut self, device: &str, observers: &mut [&mut dyn Observer]) -> Result<Summary> {
        let whole = self.options.evaluate_batches.is_none();
        if !(whole && self.last_validation.is_some_and(|(step, _)| step == self.state.step)) {
            self.validate(None, observers)?;
        }
        let test = match self.splits.test.clone() {
            Some(dataset) => Some(self.evaluate(&dataset, SplitName::Test, None, observers)?),
            None => None,
        };
        self.save(observers)?;
        let last = SplitScores {
            step: self.state.step,
            train: self.last_train,
            validation: self.last_validation.map(|(_, scores)| scores),
            test,
        };
        let mut best = self.state.best.unwrap_or(last);
        if best.step == last.step {
            best.test = test;
        } else if let (Some(dataset), Some(path)) = (self.splits.test.clone(), self.best_checkpoint()?) {
            let (backend, arena) = self.trainer.parts_mut();
            checkpoint::load_model(&checkpoint::weights_file(&path), backend, arena)?;
            self.trainer.drop_average();
            let sums = self.sums(&dataset, self.options.batch_size.min(dataset.len()), usize::MAX)?;
            best.test = Some(scores(sums, has_accuracy(&*dataset)));
        }
        let summary = Summary {
            last,
            best,
            steps: self.state.step,
            seconds: self.state.seconds,
            steps_per_s: self.state.step as f64 / self.state.step_seconds.max(1e-9),
            device: device.to_owned(),
            parameters: self.trainer.arena().layout.parameters(),
            skipped_steps: self.state.skipped_steps,
            peak_memory_bytes: peak_memory_bytes(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        if self.collective.rank() == 0 {
            summary.write(&self.folder.join("summary.json"))?;
        }
        tell(observers, &Event::Finished(&summary))?;
        Ok(summary)
    }

    fn best_checkpoint(&self) -> Result<Option<PathBuf>> {
        checkpoint::find(&self.checkpoints, Which::Best)
    }
}

/// Whether `found` is better than `before` by more than `min_delta`.
fn improves(metric: Metric, before: Option<Scores>, found: Scores, min_delta: f64) -> bool {
    let Some(before) = before else { return true };
    match (metric, before.accuracy, found.accuracy) {
        (Metric::Accuracy, Some(before), Some(found)) => found > before + min_delta,
        _ => match (before.loss, found.loss) {
            (Some(before), Some(found)) => found < before - min_delta,
            (before, found) => before.is_none() && found.is_some(),
        },
    }
}
