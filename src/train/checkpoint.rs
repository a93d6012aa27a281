//! Checkpoints: a folder each, written aside, flushed, then renamed.
//!
//! `step-00001000/` holds `model.safetensors`, `optimizer.safetensors`, `ema.safetensors` where weights are averaged, and
//! `state.json`; where several processes share memory out, parts of these ([`super::parts`]). Beside them the files `latest` and `best` hold the name of one folder each.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files;
use super::metrics::{Interval, Record, SplitName};
use super::step::{Counters, Trainer};
use super::streamed::{self, Streamed};
use super::summary::{Scores, SplitScores};
use super::tensors::{self, HostTensor, Origin, TensorMap};
use crate::backend::ops::Update;
use crate::backend::step::LossScale;
use crate::backend::{Arena, Backend, Held};
use crate::error::{Error, Result};
use crate::model::ParamTable;
use crate::model::interop::{from_hugging_face_gpt2, is_hugging_face_gpt2};
use crate::plan::ParamLayout;

/// Version of the format of `state.json`.
const FORMAT: u32 = 1;

/// Everything of a run that is no tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Version of this format.
    pub format: u32,
    /// Steps done, skipped ones counted.
    pub step: u64,
    /// Micro-batches seen: the position in the data, and that of every random number.
    pub micro_step: u64,
    /// Updates applied.
    pub applied_steps: u64,
    /// Steps skipped.
    pub skipped_steps: u64,
    /// Key of every random number.
    pub seed: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Of these, seconds spent in steps.
    pub step_seconds: f64,
    /// Where the validation split was best.
    pub best: Option<SplitScores>,
    /// Evaluations since then.
    pub evaluations_without_improvement: u32,
    /// Whether its step has still to be evaluated: a signal came before that.
    #[serde(default)]
    pub evaluation_due: bool,
    /// First of the steps up to this one whose training losses were all not finite; none where this one's was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_finite_from: Option<u64>,
    /// Steps in a row that were skipped, up to this one.
    #[serde(default)]
    pub skipped_in_a_row: u64,
    /// What the last record of the training split told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_train: Option<Scores>,
    /// What the steps since then gave, which the next record tells with those to come.
    #[serde(default, skip_serializing_if = "Interval::is_empty")]
    pub interval: Interval,
    /// blake3 of the part of the configuration that decides the numbers.
    pub config_hash: String,
    /// The schedule, in words.
    pub schedule: String,
    /// The dynamic loss scale, where gradients need one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// Version of Warpstep that wrote it.
    pub version: String,
}

impl RunState {
    /// The state of a run that has not begun.
    pub fn new(seed: u64, config_hash: String, schedule: String) -> Self {
        RunState {
            format: FORMAT,
            step: 0,
            micro_step: 0,
            applied_steps: 0,
            skipped_steps: 0,
            seed,
            seconds: 0.0,
            step_seconds: 0.0,
            best: None,
            evaluations_without_improvement: 0,
            evaluation_due: false,
            not_finite_from: None,
            skipped_in_a_row: 0,
            last_train: None,
            interval: Interval::default(),
            config_hash,
            schedule,
            loss_scale: None,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// The counts, for the trainer.
    pub fn counters(&self) -> Counters {
        Counters {
            step: self.step,
            micro_step: self.micro_step,
            applied: self.applied_steps,
            skipped: self.skipped_steps,
        }
    }

    /// Whether a record of metrics.jsonl is kept where a run goes on from here: not one of a later step, nor one that is made again.
    pub fn keeps(&self, record: &Record) -> bool {
        let again = match record.split {
            SplitName::Train => !self.interval.is_empty(),
            SplitName::Validation | SplitName::Test => self.evaluation_due,
        };
        record.step < self.step || (record.step == self.step && !again)
    }

    /// Takes over the trainer's counts.
    pub fn set_counters(&mut self, counters: Counters) {
        self.step = counters.step;
        self.micro_step = counters.micro_step;
        self.applied_steps = counters.applied;
        self.skipped_steps = counters.skipped;
    }
}

/// Which checkpoint of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The newest.
    Latest,
    /// The one with the best validation figure.
    Best,
}

impl Which {
    fn file(self) -> &'static str {
        match self {
            Which::Latest => "latest",
            Which::Best => "best",
        }
    }
}

/// Name of the folder of the checkpoint at `step`.
pub fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Writes a checkpoint into `folder` (a run's `checkpoints`) and makes it the latest: `state` with the trainer's counters and loss
/// scale. Where that of the trainer's step is there already, its tensors are what would be written, and its state alone is written
/// anew. Returns its folder.
///
/// # Errors
/// What the operating system or the device refuses; what was there before stays whole.
pub fn save<B: Backend + Update>(folder: &Path, trainer: &Trainer<B>, state: &RunState) -> Result<PathBuf> {
    let state = &at(trainer, state);
    let path = folder.join(folder_name(state.step));
    match begin(folder, &path)? {
        None => write_state(&path, trainer, state)?,
        Some(aside) => {
            let written = write_tensors(&aside, trainer, state).and_then(|()| end(&aside, &path, trainer, state));
            if written.is_err() {
                // A disk that is full gets its room back; what cannot be removed, a next run sweeps.
                let _ = fs::remove_dir_all(&aside);
            }
            written?;
        }
    }
    point(folder, Which::Latest, &folder_name(state.step))?;
    Ok(path)
}

/// `state` at the step that the trainer stands at.
pub(super) fn at<B: Backend + Update>(trainer: &Trainer<B>, state: &RunState) -> RunState {
    let mut state = state.clone();
    state.set_counters(trainer.counters());
    state
}

fn write_tensors<B: Backend + Update>(aside: &Path, trainer: &Trainer<B>, state: &RunState) -> Result<()> {
    let metadata = metadata(state);
    let (arena, backend) = (trainer.arena(), trainer.backend());
    streamed::write(&aside.join("model.safetensors"), model_tensors(trainer), metadata.clone())?;
    let slots = arena.slots.iter().zip(trainer.update_plan().slots);
    let of_slot = |(slot, name)| streamed::of_layout(backend, slot, &arena.layout, &format!("{name}."));
    streamed::write(&aside.join("optimizer.safetensors"), slots.flat_map(of_slot).collect(), metadata.clone())?;
    let Some(average) = trainer.average() else { return Ok(()) };
    let mut tensors = streamed::of_layout(backend, average, &arena.layout, "");
    tensors.extend(streamed::of_layout(backend, &arena.state, &arena.state_layout, ""));
    streamed::write(&aside.join("ema.safetensors"), tensors, metadata)
}

/// Makes the folder that a checkpoint is written into before it gets its name, `path`; none where it is there already: the same step
/// of the same run has the same bits, and what is there is what would be written.
pub(super) fn begin(folder: &Path, path: &Path) -> Result<Option<PathBuf>> {
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    if path.exists() {
        return Ok(None);
    }
    let aside = files::aside(path);
    remove(&aside)?;
    fs::create_dir(&aside).map_err(|e| Error::io("create", &aside, e))?;
    Ok(Some(aside))
}

/// Writes `state.json` beside the tensors, and gives the checkpoint its name.
pub(super) fn end<B: Backend + Update>(
    aside: &Path,
    path: &Path,
    trainer: &Trainer<B>,
    state: &RunState,
) -> Result<()> {
    write_state(aside, trainer, state)?;
    files::sync(aside)?;
    files::rename(aside, path)
}

fn write_state<B: Backend + Update>(path: &Path, trainer: &Trainer<B>, state: &RunState) -> Result<()> {
    let file = path.join("state.json");
    let state = RunState { loss_scale: trainer.loss_scale()?, ..state.clone() };
    let mut text = serde_json::to_vec_pretty(&state).map_err(|e| Error::io("write", &file, e.into()))?;
    text.push(b'\n');
    files::write_whole(&file, &text)
}

/// What the files of a checkpoint say of themselves.
pub(super) fn metadata(state: &RunState) -> HashMap<String, String> {
    HashMap::from([
        ("format".to_owned(), "pt".to_owned()),
        ("warpstep".to_owned(), state.version.clone()),
        ("step".to_owned(), state.step.to_string()),
    ])
}

/// The tensors of the model, and what it keeps.
pub(super) fn model_tensors<B: Backend + Update>(trainer: &Trainer<B>) -> Vec<Streamed<'_>> {
    let (arena, backend) = (trainer.arena(), trainer.backend());
    let mut model = streamed::parameters(backend, arena);
    model.extend(streamed::of_layout(backend, &arena.state, &arena.state_layout, ""));
    model
}

/// Writes which checkpoint is the latest or the best.
///
/// # Errors
/// What the operating system refuses.
pub fn point(folder: &Path, which: Which, name: &str) -> Result<()> {
    files::write_whole(&folder.join(which.file()), format!("{name}\n").as_bytes())
}

/// Makes the checkpoint of a step the best, or none.
///
/// # Errors
/// What the operating system refuses.
pub fn point_best(folder: &Path, step: Option<u64>) -> Result<()> {
    let file = folder.join(Which::Best.file());
    match step {
        Some(step) => point(folder, Which::Best, &folder_name(step)),
        None if file.exists() => fs::remove_file(&file).map_err(|e| Error::io("remove", file, e)),
        None => Ok(()),
    }
}

/// Whether the checkpoint of a step is there.
pub fn is_there(folder: &Path, step: u64) -> bool {
    folder.join(folder_name(step)).join("state.json").is_file()
}

/// The checkpoint that `latest` or `best` names; none where the run has none yet. Where the file `latest` is missing, as in a copy
/// of some checkpoints of a run, it is the one of the most steps.
///
/// # Errors
/// A name that is no checkpoint of this run.
pub fn find(folder: &Path, which: Which) -> Result<Option<PathBuf>> {
    let Some(name) = pointed(folder, which)? else {
        let newest = || all(folder).ok()?.into_iter().rev().find(|path| path.join("state.json").is_file());
        return Ok(if which == Which::Latest { newest() } else { None });
    };
    let path = folder.join(&name);
    if name.is_empty() || !path.join("state.json").is_file() {
        return Err(Error::checkpoint(
            folder.join(which.file()),
            format!("found `{name}`, expected the name of a checkpoint folder beside it"),
        ));
    }
    Ok(Some(path))
}

/// What `latest` or `best` names, whether it is there or not; none where there is no such file.
fn pointed(folder: &Path, which: Which) -> Result<Option<String>> {
    let file = folder.join(which.file());
    match fs::read_to_string(&file) {
        Ok(name) => Ok(Some(name.trim().to_owned())),
        // Where the folder is a file, nothing is there either.
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(Error::io("read", file, e)),
    }
}

/// The checkpoints of a run, by their steps.
fn all(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io("read", folder, e))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut found: Vec<(u64, String)> = names.filter_map(|name| Some((step_of(&name)?, name))).collect();
    found.sort();
    Ok(found.into_iter().map(|(_, name)| folder.join(name)).collect())
}

/// The error of a newest checkpoint that cannot be used, with what to do about it where there is one before it.
pub(super) fn or_before(error: Error, folder: &Path, newest: &Path) -> Error {
    let older = all(folder).unwrap_or_default().into_iter().take_while(|path| path != newest);
    let before = older.filter(|path| path.join("state.json").is_file()).last();
    match (error, before.as_deref().and_then(Path::file_name)) {
        (Error::Checkpoint { path, problem }, Some(name)) => {
            let (name, latest) = (name.to_string_lossy(), folder.join(Which::Latest.file()));
            let advice = format!("to go on from the one before it, write {name} into {}", latest.display());
            Error::checkpoint(path, format!("{problem}; {advice}"))
        }
        (error, _) => error,
    }
}

/// The step that a checkpoint's name tells.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse().ok() } else { None }
}

/// Removes all but the newest `keep` checkpoints; the one that `best` names stays besides, and so do folders of other names.
///
/// # Errors
/// What the operating system refuses: nothing that a run needs has been touched, and the next time it is tried again.
pub fn prune(folder: &Path, keep: usize) -> Result<()> {
    let found = all(folder)?;
    let best = pointed(folder, Which::Best)?.map(|name| folder.join(name));
    let old = found[..found.len().saturating_sub(keep)].iter().filter(|path| best.as_ref() != Some(path));
    let mut first = Ok(());
    for path in old {
        // One that stays does not keep others.
        first = first.and(remove(path));
    }
    first
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io("remove", path, e)),
    }
}

/// Removes what a killed run left unfinished, and checkpoints after `step`.
///
/// # Errors
/// What the operating system refuses.
pub fn sweep(folder: &Path, step: u64) -> Result<()> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let later = step_of(&name).is_some_and(|n| n > step);
        let unfinished = name.starts_with('.') && name.ends_with(".tmp");
        if later || (unfinished && entry.path().is_dir()) {
            remove(&entry.path())?;
        } else if unfinished {
            fs::remove_file(entry.path()).map_err(|e| Error::io("remove", entry.path(), e))?;
        }
    }
    Ok(())
}

/// Reads `state.json` of a checkpoint.
///
/// # Errors
/// A file that is missing, damaged, or of another format.
pub fn read_state(path: &Path) -> Result<RunState> {
    let file = path.join("state.json");
    let text = fs::read(&file).map_err(|e| Error::io("read", &file, e))?;
    let state: RunState = serde_json::from_slice(&text)
        .map_err(|e| Error::checkpoint(&file, format!("expected the state of a run, found a damaged file ({e})")))?;
    if state.format != FORMAT {
        let problem = format!("found format {}, expected {FORMAT}; use the Warpstep it was made with", state.format);
        return Err(Error::checkpoint(file, problem));
    }
    Ok(state)
}

/// Reads a checkpoint into a trainer.
///
/// # Errors
/// A file that is missing or damaged, or a checkpoint of another model or optimizer.
pub fn load<B: Backend + Update>(path: &Path, trainer: &mut Trainer<B>) -> Result<RunState> {
    let state = read_state(path)?;
    let slots = trainer.update_plan().slots;
    let (backend, arena) = trainer.parts_mut();
    load_model(&path.join("model.safetensors"), backend, arena)?;
    let file = path.join("optimizer.safetensors");
    let (mut optimizer, from) = (tensors::read(&file)?, Origin::of_run(&file));
    let own = arena.own_elements();
    for (slot, name) in arena.slots.iter_mut().zip(slots) {
        let prefix = format!("{name}.");
        tensors::upload_part(backend, (slot, 0), &arena.layout, &own, &prefix, &mut optimizer, from)?;
    }
    tensors::nothing_left(&optimizer, from)?;
    let layout = arena.layout.clone();
    if let Some((backend, average)) = trainer.average_mut() {
        let file = path.join("ema.safetensors");
        let mut values = tensors::read(&file)?;
        tensors::upload_part(backend, (average, 0), &layout, &own, "", &mut values, Origin::of_run(&file))?;
    }
    trainer.set_counters(state.counters());
    if let Some(scale) = state.loss_scale {
        let (backend, arena) = trainer.parts_mut();
        backend.set_loss_scale(arena, scale)?;
    }
    Ok(state)
}

/// Reads a model's parameters and kept tensors from a safetensors file, under our names or as Hugging Face lays GPT-2 out.
///
/// # Errors
/// A file that is missing or damaged, or is of another model.
pub fn load_model<B: Backend>(file: &Path, backend: &B, arena: &mut Arena<B>) -> Result<()> {
    load_tensors(tensors::read(file)?, Origin::of_run(file), backend, arena)
}

/// As [`load_model`], for the weights that a run begins with.
///
/// # Errors
/// As [`load_model`]; a value that is not finite, with its tensor.
pub fn load_weights<B: Backend>(file: &Path, backend: &B, arena: &mut Arena<B>) -> Result<()> {
    load_tensors(initial(file)?, Origin::of_weights(file), backend, arena)
}

/// Whether a run can begin with these weights: all that [`load_weights`] would refuse, without a device.
///
/// # Errors
/// As [`load_weights`].
pub fn check_weights(file: &Path, parameters: &ParamTable) -> Result<()> {
    let from = Origin::of_weights(file);
    let (layout, _) = parameters.layout()?;
    let mut model = in_our_names(initial(file)?, &layout, from)?;
    tensors::take(&layout, &mut model, from)?;
    tensors::take(&parameters.state_layout()?, &mut model, from)?;
    tensors::nothing_left(&model, from)
}

/// Weights that a run begins with, all of them finite.
fn initial(file: &Path) -> Result<TensorMap> {
    let model = tensors::read(file)?;
    let found = |(name, tensor): (_, &HostTensor)| {
        tensor.values.iter().position(|value| !value.is_finite()).map(|at| (name, at, tensor.values[at]))
    };
    // Of several, always the same one is told.
    if let Some((name, at, value)) = model.iter().filter_map(found).min_by_key(|(name, ..)| *name) {
        let problem = format!(
            "value {at} of the tensor `{name}` is {value}, expected finite numbers; let model.weights name those of a run that did \
             not diverge"
        );
        return Err(Error::checkpoint(file, problem));
    }
    Ok(model)
}

/// Tensors of Hugging Face's GPT-2 as those of ours, where this is the layout of one; any others as they are.
fn in_our_names(model: TensorMap, layout: &ParamLayout, from: Origin<'_>) -> Result<TensorMap> {
    let theirs = layout.get("transformer.wte.weight").is_some() && is_hugging_face_gpt2(&model);
    if theirs { from_hugging_face_gpt2(model, from.path()) } else { Ok(model) }
}

fn load_tensors<B: Backend>(model: TensorMap, from: Origin<'_>, backend: &B, arena: &mut Arena<B>) -> Result<()> {
    let mut model = in_our_names(model, &arena.layout, from)?;
    let (alone, copied) = (backend.stores_alone(arena), arena.shares_out_masters());
    let Arena { layout, parameters, stored, state_layout, state, held, .. } = arena;
    if alone {
        tensors::upload(backend, stored, layout, "", &mut model, from)?;
    } else if let Some(Held { elements, parameters: Some(own), .. }) = held {
        if copied {
            tensors::upload(backend, stored, layout, "", &mut model.clone(), from)?;
        }
        tensors::upload_part(backend, (own, 0), layout, elements, "", &mut model, from)?;
    } else {
        tensors::upload(backend, parameters, layout, "", &mut model, from)?;
    }
    tensors::upload(backend, state, state_layout, "", &mut model, from)?;
    tensors::nothing_left(&model, from)?;
    backend.parameters_changed(arena)
}

/// The file of a checkpoint that a model is evaluated by: the average of weights where there is one.
pub fn weights_file(path: &Path) -> PathBuf {
    let average = path.join("ema.safetensors");
    if tensors::exists(&average) { average } else { path.join("model.safetensors") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_that_of_the_most_steps_however_many_digits_they_have() {
        let folder = tempfile::tempdir().unwrap();
        for step in [99_999_000, 100_000_000, 7] {
            let path = folder.path().join(folder_name(step));
            fs::create_dir(&path).unwrap();
            fs::write(path.join("state.json"), "{}").unwrap();
        }
        fs::create_dir(folder.path().join("step-copy")).unwrap();
        let newest = folder.path().join("step-100000000");
        assert_eq!(find(folder.path(), Which::Latest).unwrap(), Some(newest.clone()));
        assert_eq!(find(folder.path(), Which::Best).unwrap(), None);
        prune(folder.path(), 1).unwrap();
        assert_eq!(all(folder.path()).unwrap(), [newest]);
        assert!(folder.path().join("step-copy").exists());
        assert!(is_there(folder.path(), 100_000_000) && !is_there(folder.path(), 7));
    }

    #[test]
    fn what_cannot_be_removed_keeps_no_other_and_a_best_that_is_gone_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for step in [2, 3, 4] {
            fs::create_dir(folder.path().join(folder_name(step))).unwrap();
        }
        // No folder, which is what removing asks for.
        fs::write(folder.path().join(folder_name(1)), "").unwrap();
        fs::write(folder.path().join("best"), folder_name(0)).unwrap();
        let error = prune(folder.path(), 1).unwrap_err().to_string();
        assert!(error.contains("step-00000001"), "{error}");
        assert_eq!(all(folder.path()).unwrap(), [1, 4].map(|step| folder.path().join(folder_name(step))));
    }
}
