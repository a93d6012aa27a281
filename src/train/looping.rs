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
use super::run::{End, Event, Observer, Outcome, Run, Start, Started};
use super::shadow::Shadow;
use super::step::{LossSums, StepReport, Trainer, TrainerParts};
use super::summary::{Scores, SplitScores, Summary, peak_memory_bytes};
use crate::backend::Backend;
use crate::backend::ops::Update;
use crate::data::{Dataset, InputSpec, Loader, Prefetch, Sampler, SamplerOptions, Share, Splits, TargetSpec};
use crate::error::{Error, Result};
use crate::model::Input;
use crate::optim::{NormClip, Schedule};

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
pub fn train<B: Backend + Update>(run: Run<B>, observers: &mut [&mut dyn Observer]) -> Result<Outcome> {
    run.options.validate()?;
    let checkpoints = run.folder.join("checkpoints");
    let hash = blake3::hash(run.identity.as_bytes()).to_hex().to_string();
    let latest = prepare_folder(&run, &checkpoints, &hash)?;
    let sampler_options = SamplerOptions {
        batch_size: run.options.batch_size,
        seed: run.options.seed,
        sampling: run.sampling,
        drop_last: run.drop_last,
        share: Share { rank: 0, world: 1 },
    };
    let batches_per_epoch = Sampler::new(&*run.splits.train, sampler_options.clone())?.batches_per_epoch();
    let steps_per_epoch = batches_per_epoch as f64 / f64::from(run.options.accumulate);
    let steps = match run.options.length {
        Length::Steps(steps) => steps,
        Length::Epochs(epochs) => ((epochs * steps_per_epoch).round() as u64).max(1),
    };
    run.schedule.validate(steps, run.optimizer.learning_rate)?;
    let input = run.splits.train.input();
    let mut trainer = Trainer::new(TrainerParts {
        backend: run.backend,
        model: run.model,
        input: model_input(&input),
        batch_size: run.options.batch_size,
        accumulate: run.options.accumulate,
        optimizer: &run.optimizer,
        ema: run.options.ema,
        seed: run.options.seed,
    })?;
    if let (Some(weights), None) = (&run.weights, &latest) {
        let (backend, arena) = trainer.parts_mut();
        checkpoint::load_model(weights, backend, arena)?;
        trainer.restart_average()?;
    }
    let state = match &latest {
        Some(path) => checkpoint::load(path, &mut trainer)?,
        None => RunState::new(run.options.seed, hash, format!("{:?}", run.schedule)),
    };
    checkpoint::sweep(&checkpoints, state.step)?;
    files::write_whole(&run.folder.join("config.toml"), run.config.as_bytes())?;
    files::write_whole(&run.folder.join("preprocess.json"), run.preprocess.as_bytes())?;
    let loader = Loader::train(Arc::clone(&run.splits.train), sampler_options, state.micro_step, run.prefetch)?;
    let tokens_per_sample = match (&input, run.splits.train.target()) {
        (InputSpec::Tokens { context, .. }, TargetSpec::NextToken) => Some(*context),
        _ => None,
    };
    let metrics = MetricsWriter::resume(&run.folder.join("metrics.jsonl"), state.step)?;
    let device = trainer.backend().description();
    let mut running = Loop {
        trainer,
        loader,
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
        seconds_before: 0.0,
        stopwatch: None,
        interval: Interval::default(),
        skipped_in_a_row: 0,
        last_step: LastStep::default(),
        last_train: None,
        last_validation: None,
    };
    running.seconds_before = running.state.seconds;
    running.run(&device, observers)
}

/// Makes or checks the run folder; returns the checkpoint to go on from.
fn prepare_folder<B: Backend>(run: &Run<B>, checkpoints: &Path, hash: &str) -> Result<Option<PathBuf>> {
    const OURS: [&str; 7] = [
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "preprocess.json",
        "tensorboard",
        "checkpoints",
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
    trainer: Trainer<B>,
    loader: Loader,
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
    metrics: MetricsWriter,
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
}

fn tell(observers: &mut [&mut dyn Observer], event: &Event<'_>) -> Result<()> {
    observers.iter_mut().try_for_each(|observer| observer.event(event))
}

/// Whether predictions of these targets can be right.
fn has_accuracy(dataset: &dyn Dataset) -> bool {
    !matches!(dataset.target(), TargetSpec::Real { .. })
}

fn scores(sums: LossSums, accuracy: bool) -> Scores {
    let loss = sums.mean();
    Scores { loss: loss.is_finite().then_some(loss), accuracy: accuracy.then(|| sums.accuracy()) }
}

impl<B: Backend + Update> Loop<B> {
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
        while self.trainer.queued().step < self.steps {
            let watched = due(self.options.shadow_every_steps, self.trainer.queued().step + 1);
            let queued = if watched { self.watched_step(observers)? } else { self.queue_step()? };
            if !queued {
                return Ok(Outcome { end: End::Abandoned, summary: None });
            }
            let step = self.trainer.queued().step;
            let last = step == self.steps;
            let (evaluate, save) = (due(evaluate_every, step) && !last, due(checkpoint_every, step) && !last);
            // Whatever looks at the parameters waits for the steps before it; nothing else does.
            let signal = self.interrupt.load(Ordering::Relaxed);
            let settle = evaluate || save || last || signal != 0;
            while let Some(report) = self.trainer.finished(settle)? {
                self.take_report(report, observers)?;
            }
            if !settle {
                continue;
            }
            if evaluate && self.validate(self.options.evaluate_batches, observers)? {
                end = End::StoppedEarly;
            }
            if signal != 0 {
                self.record_training(observers)?;
                self.save(observers)?;
                return Ok(Outcome { end: End::Interrupted(signal as i32), summary: None });
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
        (1..=self.options.accumulate).try_fold(true, |on, micro_batch| {
            Ok(on && self.queue_micro_batch((micro_batch == self.options.accumulate).then_some(rate))?)
        })
    }

    /// The learning rate of the step that is queued next.
    fn rate_of_next(&self) -> f64 {
        self.schedule.at(self.trainer.queued().step, self.steps, self.peak)
    }

    /// Queues a micro-batch, and given a learning rate the update after it. Returns whether to go on.
    fn queue_micro_batch(&mut self, rate: Option<f64>) -> Result<bool> {
        if self.abandon_at.is_some_and(|at| self.trainer.queued().micro_step >= at) {
            return Ok(false);
        }
        let batch = self.loader.next().ok_or_else(|| Error::Training("the data ended before the run".into()))??;
        self.trainer.queue(&batch, rate)?;
        self.loader.recycle(batch);
        Ok(true)
    }

    /// Takes one step whose update is replayed by the plain rule, everything before it waited for. Returns whether to go on.
    fn watched_step(&mut self, observers: &mut [&mut dyn Observer]) -> Result<bool> {
        let rate = self.rate_of_next();
        for _ in 1..self.options.accumulate {
            if !self.queue_micro_batch(None)? {
                return Ok(false);
            }
        }
        while let Some(report) = self.trainer.finished(true)? {
            self.take_report(report, observers)?;
        }
        let params = self.trainer.step_params(rate)?;
        let shadow = Shadow::new(self.options.seed);
        let (backend, arena, plan) = (self.trainer.backend(), self.trainer.arena(), self.trainer.update_plan());
        let watched = shadow.before(backend, arena, plan, &params)?;
        // The last micro-batch and the update in one piece of work, as in any step: what is watched is what runs.
        if !self.queue_micro_batch(Some(rate))? {
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

    /// Takes over what a step found, and records it where it is time to.
    fn take_report(&mut self, report: StepReport, observers: &mut [&mut dyn Observer]) -> Result<()> {
        let StepReport { loss, sums, samples, outcome, norm_squares } = report;
        let rate = self.schedule.at(self.state.step, self.steps, self.peak);
        self.state.set_counters(self.trainer.counters());
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
        self.metrics.append(&record)?;
        tell(observers, &Event::Record(&record))
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
        let loader = Loader::batches(Arc::clone(dataset), size, self.prefetch)?;
        let sums = self.trainer.evaluate(loader.take(batches.unwrap_or(usize::MAX)))?;
        let scores = scores(sums, has_accuracy(&**dataset));
        self.state.seconds = self.seconds_before + self.began.elapsed().as_secs_f64();
        let record = Record { loss: sums.mean(), accuracy: scores.accuracy, ..self.blank_record(split) };
        self.metrics.append(&record)?;
        tell(observers, &Event::Record(&record))?;
        Ok(scores)
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
            let path = checkpoint::save(&self.checkpoints, &self.trainer, &self.state)?;
            checkpoint::point(&self.checkpoints, Which::Best, &checkpoint::folder_name(self.state.step))?;
            checkpoint::prune(&self.checkpoints, self.options.keep)?;
            tell(observers, &Event::Checkpoint(&path))?;
            return Ok(false);
        }
        self.state.evaluations_without_improvement += 1;
        Ok(self
            .options
            .early_stopping
            .is_some_and(|EarlyStopping { patience, .. }| self.state.evaluations_without_improvement >= patience))
    }

    fn save(&mut self, observers: &mut [&mut dyn Observer]) -> Result<()> {
        let path = checkpoint::save(&self.checkpoints, &self.trainer, &self.state)?;
        checkpoint::prune(&self.checkpoints, self.options.keep)?;
        tell(observers, &Event::Checkpoint(&path))
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
            let loader =
                Loader::batches(Arc::clone(&dataset), self.options.batch_size.min(dataset.len()), self.prefetch)?;
            best.test = Some(scores(self.trainer.evaluate(loader)?, has_accuracy(&*dataset)));
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
        summary.write(&self.folder.join("summary.json"))?;
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
