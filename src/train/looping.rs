//! The loop around the step: records, evaluations, checkpoints, early stopping, signals.

mod ending;
mod prepare;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::checkpoint::RunState;
use super::forensics::{LAYERS, NormShare};
use super::metrics::{Interval, MetricsWriter, Record, SplitName};
use super::options::TrainOptions;
use super::resident::Source;
use super::run::{End, Event, Observer, Outcome, Run, Started};
use super::same::same_parameters;
use super::shadow::Shadow;
use super::step::{StepReport, Trainer};
use super::summary::{Scores, Summary};
use crate::backend::Backend;
use crate::backend::ops::Update;
use crate::data::{Dataset, InputSpec, Prefetch, Splits, TargetSpec};
use crate::error::{Error, Result};
use crate::model::Input;
use crate::optim::Schedule;
use crate::parallel::watch::Watch;
use crate::parallel::{Collective, Sharding, agree};

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

struct Loop<B: Backend + Update> {
    /// The processes that train.
    collective: Arc<dyn Collective>,
    /// The watch over the others.
    watch: Option<Arc<Watch>>,
    /// Steps between two comparisons of their parameters.
    compare_every: u64,
    trainer: Trainer<B>,
    source: Source,
    /// Parts of a batch, a pass each.
    parts: usize,
    options: TrainOptions,
    peak: f64,
    clips: bool,
    clamps: bool,
    schedule: Schedule,
    splits: Splits,
    prefetch: Prefetch,
    folder: PathBuf,
    /// Held as long as the run trains in its folder, in process 0 alone.
    _lock: Option<File>,
    checkpoints: PathBuf,
    interrupt: Arc<AtomicUsize>,
    abandon_at: Option<u64>,
    state: RunState,
    /// In process 0 alone.
    metrics: Option<MetricsWriter>,
    steps: u64,
    steps_per_epoch: f64,
    tokens_per_sample: Option<usize>,
    /// Of this process's device, the share of its peak arithmetic that one sample a second takes; none where the peak is not known.
    utilization_of_sample: Option<f64>,
    began: Instant,
    seconds_before: f64,
    /// Since when steps take time that was not counted yet.
    stopwatch: Option<Instant>,
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
        let mut over = self.over();
        if let Some(end) = over
            && let Some(summary) = self.go_on_at_the_end()?
        {
            tell(observers, &Event::Note("this run has ended: there is nothing to go on with"))?;
            tell(observers, &Event::Finished(&summary))?;
            return self.ended(end, summary);
        }
        if over.is_none() && std::mem::take(&mut self.state.evaluation_due) {
            match self.validate(self.options.evaluate_batches, observers)? {
                None => return self.end_by_signal(true, observers),
                Some(false) => {}
                Some(true) => {
                    over = Some(End::StoppedEarly);
                    self.record_training(observers)?;
                }
            }
        }
        self.stopwatch = Some(Instant::now());
        let alone = self.collective.world() == 1;
        // Where parameters are shared out, no two processes hold the same.
        let all_alike = !alone && !matches!(self.trainer.sharding(), Some(Sharding { parameters: Some(_), .. }));
        let compare_every = all_alike.then_some(self.compare_every);
        while over.is_none() && self.trainer.queued().step < self.steps {
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
            if told {
                return self.end_by_signal(evaluate, observers);
            }
            if evaluate {
                match self.validate(self.options.evaluate_batches, observers)? {
                    None => return self.end_by_signal(true, observers),
                    Some(false) => {}
                    Some(true) => {
                        over = Some(End::StoppedEarly);
                        self.record_training(observers)?;
                        break;
                    }
                }
            }
            // Of a training that diverged none is written, for which one from before would go.
            if save && self.state.not_finite_from.is_none() {
                self.save(observers)?;
            }
            self.stopwatch = Some(Instant::now());
        }
        match self.finish(device, observers)? {
            Some(summary) => self.ended(over.unwrap_or(End::Completed), summary),
            None => Ok(self.ended_by_signal()),
        }
    }

    /// The end of a run that has a summary, by which it may have failed.
    fn ended(&self, end: End, summary: Summary) -> Result<Outcome> {
        let Some(problem) = summary.failure() else { return Ok(Outcome { end, summary: Some(summary) }) };
        // All know it, and one says it.
        Err(match self.collective.rank() {
            0 => Error::Training(problem),
            _ => Error::Peer { rank: 0, problem, exit_code: 1 },
        })
    }

    /// Writes a checkpoint, since a signal asked to end; `evaluation_due`: whether its step has still to be evaluated. What the last
    /// steps gave is recorded, and kept for the record of which it would have become a part.
    fn end_by_signal(&mut self, evaluation_due: bool, observers: &mut [&mut dyn Observer]) -> Result<Outcome> {
        if let Some(record) = self.training_record() {
            self.append(&record, observers)?;
        }
        self.state.evaluation_due = evaluation_due && self.splits.validation.is_some();
        self.save(observers)?;
        Ok(self.ended_by_signal())
    }

    fn ended_by_signal(&self) -> Outcome {
        let signal = self.interrupt.load(Ordering::Relaxed);
        // Where another process was told, this one was not.
        let signal = if signal == 0 { libc::SIGTERM } else { signal as i32 };
        Outcome { end: End::Interrupted(signal), summary: None }
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
        let worst = &mut self.state.interval.shadow_ulp;
        *worst = Some(worst.map_or(found.ulp, |ulp| ulp.max(found.ulp)));
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
        let interval = &mut self.state.interval;
        interval.losses += loss;
        interval.sums.add(sums);
        interval.samples += samples;
        interval.steps += 1;
        interval.clipped += u64::from(outcome.clip_coefficient < 1.0);
        interval.clamped += outcome.clamped;
        interval.rate = rate;
        interval.norm = Some(outcome.grad_norm).filter(|norm| norm.is_finite());
        interval.squares = if norm_squares.iter().all(|square| square.is_finite()) { norm_squares } else { Vec::new() };
        if let Some(since) = self.stopwatch.replace(Instant::now()) {
            let seconds = since.elapsed().as_secs_f64();
            interval.seconds += seconds;
            self.state.step_seconds += seconds;
        }
        self.state.seconds = self.seconds_before + self.began.elapsed().as_secs_f64();
        let step = self.state.step;
        if sums.loss.is_finite() {
            self.state.not_finite_from = None;
        } else {
            self.state.not_finite_from.get_or_insert(step);
        }
        let in_a_row = if outcome.skipped { self.state.skipped_in_a_row + 1 } else { 0 };
        self.state.skipped_in_a_row = in_a_row;
        if outcome.skipped && in_a_row >= self.options.max_skipped_steps {
            return Err(Error::Training(format!(
                "the gradients were not finite for {in_a_row} steps in a row, up to step {step}: lower \
                 optimizer.learning_rate, or set optimizer.clip = {{ global_norm = 1.0 }}"
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

    /// A record of the steps since the last one of the training split; none where there were none.
    fn training_record(&self) -> Option<Record> {
        let Interval { losses, sums, steps, clipped, clamped, shadow_ulp, samples, seconds, rate, norm, ref squares } =
            self.state.interval;
        if steps == 0 {
            return None;
        }
        let loss = losses / steps as f64;
        let accuracy = has_accuracy(&*self.splits.train).then(|| sums.accuracy());
        let speed = samples as f64 / seconds;
        let of_each = speed / self.collective.world() as f64;
        let layout = &self.trainer.arena().layout;
        let values = (steps * layout.parameters() as u64) as f64;
        Some(Record {
            loss,
            accuracy,
            lr: Some(rate),
            grad_norm: norm,
            clipped: self.clips.then(|| clipped as f64 / steps as f64),
            clamped: self.clamps.then(|| clamped as f64 / values),
            norm_share: NormShare::largest(layout, squares, LAYERS),
            shadow_ulp,
            samples_per_s: self.tokens_per_sample.is_none().then_some(speed),
            tokens_per_s: self.tokens_per_sample.map(|tokens| speed * tokens as f64),
            mfu: self.utilization_of_sample.map(|of_sample| of_sample * of_each),
            ..self.blank_record(SplitName::Train)
        })
    }

    /// Records the steps since the last record of the training split, and begins anew to add up.
    fn record_training(&mut self, observers: &mut [&mut dyn Observer]) -> Result<()> {
        let Some(record) = self.training_record() else { return Ok(()) };
        self.state.interval = Interval::default();
        self.state.last_train = Some(Scores::new(record.loss, record.accuracy));
        self.append(&record, observers)
    }

    /// Writes a record, and tells of it.
    fn append(&mut self, record: &Record, observers: &mut [&mut dyn Observer]) -> Result<()> {
        if let Some(metrics) = &mut self.metrics {
            metrics.append(record)?;
        }
        tell(observers, &Event::Record(record))
    }
}
