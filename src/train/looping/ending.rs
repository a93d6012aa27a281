//! Evaluations and checkpoints, and the end of a run.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Loop, alive, has_accuracy, tell};
use crate::backend::Backend;
use crate::backend::ops::Update;
use crate::data::{Dataset, Loader};
use crate::error::Result;
use crate::parallel::watch::Busy;
use crate::parallel::{Sharding, agree, any, broadcast, gather};
use crate::tell::tell as tell_user;
use crate::train::checkpoint::{self, Which};
use crate::train::metrics::{Record, SplitName};
use crate::train::options::{EarlyStopping, Metric};
use crate::train::parts;
use crate::train::run::{End, Event, Observer};
use crate::train::step::{Evaluation, LossSums};
use crate::train::summary::{Scores, SplitScores, Summary, peak_memory_bytes};

fn scores(sums: LossSums, accuracy: bool) -> Scores {
    Scores::new(sums.mean(), accuracy.then(|| sums.accuracy()))
}

impl<B: Backend<Real = f32> + Update> Loop<B> {
    /// How the run ended, where no step is left.
    pub(super) fn over(&self) -> Option<End> {
        let patience = self.options.early_stopping.map(|options| options.patience);
        let waited = self.state.evaluations_without_improvement;
        if self.state.step >= self.steps {
            Some(End::Completed)
        } else {
            patience.filter(|&patience| waited > 0 && waited >= patience).map(|_| End::StoppedEarly)
        }
    }

    /// Of a run that has no step left, the summary that it wrote. Where it did not come to that, the evaluations of its last step are
    /// dropped, since they are done again.
    pub(super) fn go_on_at_the_end(&mut self) -> Result<Option<Summary>> {
        let mut text = Vec::new();
        if self.collective.rank() == 0 {
            let step = self.state.step;
            let written = Summary::read(&self.folder.join("summary.json")).ok().filter(|summary| summary.steps == step);
            if let Some(summary) = written {
                text = summary.text();
            } else if let Some(metrics) = &mut self.metrics {
                metrics.forget_evaluations_of(step)?;
            }
        }
        broadcast(&*self.collective, 0, &mut text)?;
        if text.is_empty() { Ok(None) } else { Summary::parse(&self.folder.join("summary.json"), &text).map(Some) }
    }

    /// Loss and accuracy of a split, recorded; none where a signal came before the last batch.
    fn evaluate(
        &mut self,
        dataset: &Arc<dyn Dataset>,
        split: SplitName,
        batches: Option<usize>,
        observers: &mut [&mut dyn Observer],
    ) -> Result<Option<Scores>> {
        let Some(sums) = self.sums(dataset, batches.unwrap_or(usize::MAX))? else { return Ok(None) };
        let scores = scores(sums, has_accuracy(&**dataset));
        self.state.seconds = self.seconds_before + self.began.elapsed().as_secs_f64();
        let record = Record { loss: sums.mean(), accuracy: scores.accuracy, ..self.blank_record(split) };
        self.append(&record, observers)?;
        Ok(Some(scores))
    }

    /// The sums of a split, of `most` batches at most, of which each process takes its turn of parts: as many samples at a time as it
    /// trains on. They are added up in the order of parts. None, in all processes, where a signal came to one before its last one.
    fn sums(&mut self, dataset: &Arc<dyn Dataset>, most: usize) -> Result<Option<LossSums>> {
        let size = (self.options.batch_size / self.parts).min(dataset.len().max(1));
        let most = most.saturating_mul(self.parts);
        let (rank, world) = (self.collective.rank(), self.collective.world());
        let loader = Loader::every(Arc::clone(dataset), size, (rank, world), most, self.prefetch);
        let interrupt = Arc::clone(&self.interrupt);
        let signal = || interrupt.load(Ordering::Relaxed) != 0;
        let found = match self.trainer.sharding() {
            Some(Sharding { parameters: Some(_), .. }) => {
                let mut loader = agree(&*self.collective, loader)?;
                let turns = dataset.len().div_ceil(size).min(most).div_ceil(world);
                let collective = Arc::clone(&self.collective);
                let turn = |_| match (any(&*collective, signal()), loader.next().transpose()) {
                    (Ok(true), _) => None,
                    (told, batch) => {
                        let batch = agree(&*collective, told.and(batch));
                        Some(batch.map(|batch| batch.map_or(Evaluation::PassOn { samples: size }, Evaluation::Batch)))
                    }
                };
                self.trainer.evaluate_together((0..turns).map_while(turn))
            }
            _ => loader.and_then(|loader| {
                let watch = self.watch.clone();
                let loader = loader.take_while(|_| !signal()).inspect(|_| alive(watch.as_deref()));
                self.trainer.evaluate(loader)
            }),
        };
        let own = agree(&*self.collective, found)?;
        if any(&*self.collective, signal())? {
            return Ok(None);
        }
        let numbers: Vec<f64> = own.iter().flat_map(|sums| [sums.loss, sums.counted, sums.right]).collect();
        let all = gather(&*self.collective, bytemuck::cast_slice(&numbers))?;
        let all: Vec<Vec<f64>> = all.iter().map(|bytes| bytemuck::pod_collect_to_vec(bytes)).collect();
        let mut total = LossSums::default();
        for turn in 0..all.first().map_or(0, |first| first.len() / 3) {
            for sums in all.iter().filter_map(|rank| rank.get(3 * turn..3 * (turn + 1))) {
                total.add(LossSums { loss: sums[0], counted: sums[1], right: sums[2] });
            }
        }
        Ok(Some(total))
    }

    /// Evaluates the validation split and keeps the best checkpoint. Returns whether to stop early; none where a signal came first.
    pub(super) fn validate(
        &mut self,
        batches: Option<usize>,
        observers: &mut [&mut dyn Observer],
    ) -> Result<Option<bool>> {
        let Some(dataset) = self.splits.validation.clone() else { return Ok(Some(false)) };
        let Some(found) = self.evaluate(&dataset, SplitName::Validation, batches, observers)? else { return Ok(None) };
        self.last_validation = Some((self.state.step, found));
        let min_delta = self.options.early_stopping.map_or(0.0, |e| e.min_delta);
        let before = self.state.best.and_then(|best| best.validation);
        if improves(self.options.best, before, found, min_delta) {
            self.state.best = Some(SplitScores {
                step: self.state.step,
                train: self.state.last_train,
                validation: Some(found),
                test: None,
            });
            self.state.evaluations_without_improvement = 0;
            self.write_checkpoint(true, observers)?;
            return Ok(Some(false));
        }
        self.state.evaluations_without_improvement += 1;
        let waited = self.state.evaluations_without_improvement;
        Ok(Some(self.options.early_stopping.is_some_and(|EarlyStopping { patience, .. }| waited >= patience)))
    }

    pub(super) fn save(&mut self, observers: &mut [&mut dyn Observer]) -> Result<()> {
        self.write_checkpoint(false, observers)
    }

    /// Writes a checkpoint, which is there for every process when this returns.
    fn write_checkpoint(&mut self, best: bool, observers: &mut [&mut dyn Observer]) -> Result<()> {
        let arena = self.trainer.arena();
        let bytes = (arena.layout.parameters() * (2 + arena.slots.len()) * size_of::<f32>()) as u64;
        let _busy = self.watch.clone().map(|watch| Busy::new(watch, bytes));
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
        // A server may hold on to what another process still reads: that is room, not the training.
        if let Err(error) = checkpoint::prune(&self.checkpoints, self.options.keep) {
            tell_user(format_args!("an old checkpoint stays: {error}"));
        }
        Ok(path)
    }

    /// The last checkpoint, the last evaluations, summary.json; none where a signal came during the evaluations.
    pub(super) fn finish(&mut self, device: &str, observers: &mut [&mut dyn Observer]) -> Result<Option<Summary>> {
        // Before evaluations, which may take long: what was trained is not lost.
        self.save(observers)?;
        let some = self.options.evaluate_batches;
        if self.last_validation.is_none_or(|(step, _)| step != self.state.step)
            && self.validate(some, observers)?.is_none()
        {
            return Ok(None);
        }
        let mut validation = self.last_validation.map(|(_, scores)| scores);
        if let (Some(_), Some(dataset)) = (some, self.splits.validation.clone()) {
            validation = self.evaluate(&dataset, SplitName::Validation, None, observers)?;
            if validation.is_none() {
                return Ok(None);
            }
        }
        let mut test = None;
        if let Some(dataset) = self.splits.test.clone() {
            test = self.evaluate(&dataset, SplitName::Test, None, observers)?;
            if test.is_none() {
                return Ok(None);
            }
        }
        if self.collective.rank() == 0 {
            checkpoint::save(&self.checkpoints, &self.trainer, &self.state)?;
        }
        let last = SplitScores { step: self.state.step, train: self.state.last_train, validation, test };
        let mut best = self.state.best.unwrap_or(last);
        if best.step == last.step {
            (best.validation, best.test) = (validation, test);
        } else if let (Some(dataset), Some(path)) = (self.splits.test.clone(), self.best_checkpoint()?) {
            let (backend, arena) = self.trainer.parts_mut();
            checkpoint::load_model(&checkpoint::weights_file(&path), backend, arena)?;
            self.trainer.drop_average();
            let Some(sums) = self.sums(&dataset, usize::MAX)? else { return Ok(None) };
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
            not_finite_from: self.state.not_finite_from,
            peak_memory_bytes: peak_memory_bytes(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        if self.collective.rank() == 0 {
            summary.write(&self.folder.join("summary.json"))?;
        }
        tell(observers, &Event::Finished(&summary))?;
        Ok(Some(summary))
    }

    fn best_checkpoint(&self) -> Result<Option<PathBuf>> {
        checkpoint::find(&self.checkpoints, Which::Best)
    }
}

/// Whether `found` is better than `before` by more than `min_delta`. A model whose loss is not finite is none to keep, however many of
/// its predictions happen to be right.
fn improves(metric: Metric, before: Option<Scores>, found: Scores, min_delta: f64) -> bool {
    let Some(loss) = found.loss else { return false };
    let Some((before, loss_before)) = before.and_then(|before| Some((before, before.loss?))) else { return true };
    match (metric, before.accuracy, found.accuracy) {
        (Metric::Accuracy, Some(before), Some(found)) => found > before + min_delta,
        _ => loss < loss_before - min_delta,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_that_is_not_finite_is_never_the_best() {
        let scores = |loss: f64, accuracy: f64| Scores::new(loss, Some(accuracy));
        let (good, diverged) = (scores(0.5, 0.1), scores(f64::NAN, 0.9));
        for metric in [Metric::Loss, Metric::Accuracy] {
            assert!(!improves(metric, None, diverged, 0.0), "{metric:?}");
            assert!(!improves(metric, Some(good), diverged, 0.0), "{metric:?}");
            assert!(improves(metric, None, good, 0.0), "{metric:?}");
            // A state of before may hold one.
            assert!(improves(metric, Some(diverged), good, 0.0), "{metric:?}");
        }
        assert!(improves(Metric::Accuracy, Some(good), scores(0.7, 0.2), 0.0));
        assert!(!improves(Metric::Loss, Some(good), scores(0.7, 0.2), 0.0));
    }
}
