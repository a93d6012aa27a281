//! The run file: typed, validated, every error with file, line, key, what was found and what was expected.
//!
//! Each part of Warpstep owns its options; this composes them. Read by the command line alone.

mod data;
mod model;
mod optimizer;
mod parallel;
mod section;
mod tree;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Item, TableLike};

use section::{Read, Section};
use tree::{Entry, Node};

use crate::backend::cpu::wrong_threads;
use crate::data::DataOptions;
use crate::error::{Error, Result};
use crate::model::presets::{ModelOptions, Preset};
use crate::optim::{OptimizerOptions, Schedule};
use crate::parallel::ParallelOptions;
use crate::train::options::{Cadence, EarlyStopping, Length, Metric, TrainOptions};

/// What to train on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best that works.
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device by its number; without one the first, or of several processes of a machine each its own.
    Cuda(Option<u32>),
    /// A CUDA device in software.
    Emulated,
}

impl DeviceChoice {
    /// The device of this name: `cuda:1`.
    ///
    /// # Errors
    /// No such name: what was found, what was expected.
    pub fn parse(name: &str) -> std::result::Result<Self, String> {
        match name {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "emulated" => Ok(DeviceChoice::Emulated),
            "cuda" => Ok(DeviceChoice::Cuda(None)),
            other => match other.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(number)) => Ok(DeviceChoice::Cuda(Some(number))),
                _ => Err(format!("found {other:?}, expected auto, cpu, cuda, cuda:N or emulated")),
            },
        }
    }
}

/// What activations are stored and products computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 throughout.
    F32,
    /// f32, the inputs of products rounded to tf32.
    Tf32,
    /// Activations and a copy of the parameters in bf16, the parameters themselves in f32.
    Bf16,
    /// As [`Precision::Bf16`], in f16; losses are scaled so that small gradients do not vanish.
    F16,
}

/// A run file, read and checked.
#[derive(Clone, Debug)]
pub struct RunFile {
    /// The file.
    pub path: PathBuf,
    /// Folder that relative paths are looked for in first.
    pub base: PathBuf,
    /// `run.name`: name of the run; that of the file where not given.
    pub name: String,
    /// `run.out`: the run folder; `runs/NAME` where not given.
    pub out: PathBuf,
    /// `run.device`.
    pub device: DeviceChoice,
    /// `run.precision`.
    pub precision: Precision,
    /// `run.reproducible`: the same bits on every device of a kind, by choices that measure nothing, and for every number of
    /// processes, by sums in one order.
    pub reproducible: bool,
    /// `[parallel]`.
    pub parallel: ParallelOptions,
    /// `run.threads`: threads of the CPU backend; one a processor where not given.
    pub threads: Option<usize>,
    /// The trainer's options.
    pub train: TrainOptions,
    /// `[data]`.
    pub data: DataOptions,
    /// `[model]`.
    pub model: ModelOptions,
    /// `model.weights`: a safetensors file of initial weights, looked for as data is.
    pub weights: Option<PathBuf>,
    /// `[optimizer]`.
    pub optimizer: OptimizerOptions,
    /// `[schedule]`.
    pub schedule: Schedule,
    /// The run file with every default filled in.
    pub resolved: String,
    /// The part of it that decides the numbers.
    pub identity: String,
    tree: Entry,
}

/// Keys that do not decide the numbers of a run.
const NOT_IDENTITY: [&str; 7] = ["name", "out", "base", "device", "threads", "log_every_steps", "shadow_every_steps"];

impl RunFile {
    /// Reads and checks a run file, with `--set` assignments applied.
    ///
    /// # Errors
    /// A file that cannot be read, is no TOML, or holds something that is not expected.
    pub fn read(path: &Path, assignments: &[String]) -> Result<Self> {
        if path.is_dir() {
            let kept = path.join("config.toml");
            let advice = match kept.is_file() {
                true => format!("that of this run is {}", kept.display()),
                false => "name one within it".to_owned(),
            };
            return Err(Error::config(
                path.display().to_string(),
                format!("is a folder, expected a run file; {advice}"),
            ));
        }
        let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
        let name = path.display().to_string();
        let text = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            Error::config(name.clone(), format!("found bytes that are no UTF-8 at byte {at}, expected a TOML text"))
        })?;
        Self::from_text(&text, path, assignments)
    }

    /// As [`RunFile::read`], from the text of the file at `path`.
    ///
    /// # Errors
    /// As [`RunFile::read`].
    pub fn from_text(text: &str, path: &Path, assignments: &[String]) -> Result<Self> {
        let mut tree = tree::parse(text, &path.display().to_string())?;
        for assignment in assignments {
            tree::set(&mut tree, assignment)?;
        }
        let mut root = Section::root(tree.clone())?;
        root.only(&SECTIONS)?;
        let mut run = root.section("run")?;
        let stem = path.file_stem().map_or_else(|| "run".into(), |stem| stem.to_string_lossy().into_owned());
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
        let name: String = run.or("name", stem)?;
        if run.has("name") && Path::new(&name).file_name() != Some(OsStr::new(&name)) {
            let problem = format!(
                "found {name:?}, expected the name of a folder within runs, without a /; run.out takes any path"
            );
            return Err(run.error("name", problem));
        }
        let out = run.or("out", Path::new("runs").join(&name))?;
        // Where a resume by this record finds the run again, from wherever it is started.
        run.record("out", std::path::absolute(&out).unwrap_or_else(|_| out.clone()).write());
        let base = run.or("base", absolute)?;
        let device = device(&mut run)?;
        let precision = precision(&mut run, device)?;
        let reproducible = run.or("reproducible", false)?;
        let threads = run.optional("threads")?;
        if let Some(problem) = wrong_threads(threads) {
            return Err(run.error("threads", problem));
        }

        let mut data_section = root.section("data")?;
        let data = data::data(&mut data_section)?;
        let batch_size = data_section.or("batch_size", 32usize)?;
        if u32::try_from(batch_size).is_err() {
            let problem = format!("found {batch_size}, expected {} samples at most", u32::MAX);
            return Err(data_section.error("batch_size", problem));
        }
        let mut model_section = root.section("model")?;
        let model = model::model(&mut model_section)?;
        let weights = model_section.optional("weights")?;
        let language_model = matches!(model.preset, Preset::Gpt(_) | Preset::TextEncoder(_));
        let mut optimizer_section = root.section("optimizer")?;
        let optimizer = optimizer::optimizer(&mut optimizer_section, language_model)?;
        if !optimizer.optimizer.master && precision != Precision::Bf16 {
            let problem = "false keeps parameters in bf16 alone; expected true, or run.precision = \"bf16\"";
            return Err(optimizer_section.error("master", problem));
        }
        let mut schedule_section = root.section("schedule")?;
        let schedule = optimizer::schedule(&mut schedule_section)?;
        let parallel = parallel::parallel(&mut root, reproducible)?;
        let train = train_options(&mut root, &mut run, batch_size, optimizer.accumulate, optimizer.ema)?;

        root.close("run", run, false)?;
        root.close("data", data_section, false)?;
        root.close("model", model_section, false)?;
        root.close("optimizer", optimizer_section, false)?;
        root.close("schedule", schedule_section, false)?;
        let mut document = DocumentMut::new();
        *document.as_table_mut() = section::table(in_order(root.finish()?));
        let resolved = document.to_string();
        let run_file = RunFile {
            path: path.to_owned(),
            base,
            name,
            out,
            device,
            precision,
            reproducible,
            parallel,
            threads,
            train,
            data,
            model,
            weights,
            optimizer: optimizer.optimizer,
            schedule,
            resolved,
            identity: identity(document),
            tree,
        };
        run_file.check().map_err(|e| run_file.locate(e))?;
        Ok(run_file)
    }

    fn check(&self) -> Result<()> {
        self.train.validate()?;
        self.optimizer.validate()?;
        self.parallel.validate()?;
        if let Length::Steps(steps) = self.train.length {
            self.schedule.validate(steps, self.optimizer.learning_rate)?;
        }
        Ok(())
    }

    /// Puts file and line before the key of an error that a part reported.
    pub fn locate(&self, error: Error) -> Error {
        let Error::Config { place, problem } = error else { return error };
        let mut node = &self.tree.node;
        let mut found = None;
        for key in place.split('.') {
            let (key, index) = match key.split_once('[') {
                Some((key, index)) => (key, index.trim_end_matches(']').parse::<usize>().ok()),
                None => (key, None),
            };
            let Node::Table(entries) = node else { break };
            let Some(mut entry) = entries.get(key) else { break };
            if let (Some(index), Node::Array(items)) = (index, &entry.node) {
                entry = items.get(index).unwrap_or(entry);
            }
            found = Some(&entry.place);
            node = &entry.node;
        }
        match found {
            Some(at) => Error::config(format!("{at}: {place}"), problem),
            None if SECTIONS.iter().any(|s| place.starts_with(s)) => {
                Error::config(format!("{}: {place}", self.path.display()), problem)
            }
            None => Error::config(place, problem),
        }
    }
}

const SECTIONS: [&str; 9] =
    ["run", "data", "model", "optimizer", "schedule", "evaluate", "checkpoint", "early_stopping", "parallel"];

/// The sections in the order in which a reader expects them.
fn in_order(mut resolved: Vec<(String, Item)>) -> Vec<(String, Item)> {
    resolved.sort_by_key(|(key, _)| SECTIONS.iter().position(|s| s == key).unwrap_or(SECTIONS.len()));
    resolved
}

fn identity(mut document: DocumentMut) -> String {
    document.remove("checkpoint");
    if let Some(run) = document.get_mut("run").and_then(Item::as_table_mut) {
        NOT_IDENTITY.iter().for_each(|key| {
            run.remove(key);
        });
    }
    if let Some(data) = document.get_mut("data").and_then(Item::as_table_mut) {
        ["prefetch", "threads", "resident"].iter().for_each(|key| {
            data.remove(key);
        });
    }
    if let Some(parallel) = document.get_mut("parallel").and_then(Item::as_table_mut) {
        parallel::NOT_IDENTITY.iter().for_each(|key| {
            parallel.remove(key);
        });
    }
    if let Some(model) = document.get_mut("model").and_then(Item::as_table_like_mut) {
        remove_recompute(model);
    }
    document.to_string()
}

/// Takes `recompute`, which changes memory alone, out of a table of layers and those within.
fn remove_recompute(layers: &mut dyn TableLike) {
    layers.remove("recompute");
    for layer in layers.iter_mut().filter_map(|(_, item)| item.as_array_mut()).flat_map(|array| array.iter_mut()) {
        if let Some(layer) = layer.as_inline_table_mut() {
            remove_recompute(layer);
        }
    }
}

fn device(run: &mut Section) -> Result<DeviceChoice> {
    let found: String = run.or("device", "auto".to_owned())?;
    DeviceChoice::parse(&found).map_err(|problem| run.error("device", problem))
}

fn precision(run: &mut Section, device: DeviceChoice) -> Result<Precision> {
    let choices =
        [("f32", Precision::F32), ("tf32", Precision::Tf32), ("bf16", Precision::Bf16), ("f16", Precision::F16)];
    let found = run.choice_or("precision", &choices, "f32")?;
    if device == DeviceChoice::Cpu && found != Precision::F32 {
        return Err(run.error("precision", "the CPU computes in f32; expected \"f32\" (the others need a CUDA device)"));
    }
    Ok(found)
}

fn train_options(
    root: &mut Section,
    run: &mut Section,
    batch_size: usize,
    accumulate: u32,
    ema: Option<f64>,
) -> Result<TrainOptions> {
    let defaults = TrainOptions::default();
    let seed = run.or("seed", defaults.seed)?;
    let (steps, epochs) = (run.optional("steps")?, run.optional("epochs")?);
    let log_every_steps = run.or("log_every_steps", defaults.log_every_steps)?;
    let max_skipped_steps = run.or("max_skipped_steps", defaults.max_skipped_steps)?;
    if max_skipped_steps == 0 {
        return Err(run.error("max_skipped_steps", "found 0, expected 1 or more"));
    }
    let shadow_every_steps = run.optional("shadow_every_steps")?;
    let length = match (steps, epochs) {
        (Some(steps), None) => Length::Steps(steps),
        (None, Some(epochs)) => Length::Epochs(epochs),
        (None, None) => return Err(run.missing_of_all("steps", "run.steps or run.epochs")),
        (Some(_), Some(_)) => return Err(run.error("epochs", "found both steps and epochs, expected one of them")),
    };
    let mut evaluate = root.section("evaluate")?;
    let evaluate_cadence = cadence(&mut evaluate, defaults.evaluate)?;
    let evaluate_batches = evaluate.optional("batches")?;
    let best = evaluate.choice_or("best", &[("loss", Metric::Loss), ("accuracy", Metric::Accuracy)], "loss")?;
    root.close("evaluate", evaluate, false)?;
    let mut checkpoint = root.section("checkpoint")?;
    let checkpoint_cadence = cadence(&mut checkpoint, defaults.checkpoint)?;
    let keep = checkpoint.or("keep", defaults.keep)?;
    root.close("checkpoint", checkpoint, false)?;
    let early_stopping = if root.has("early_stopping") {
        let mut section = root.section("early_stopping")?;
        let options =
            EarlyStopping { patience: section.required("patience")?, min_delta: section.or("min_delta", 0.0)? };
        if options.patience == 0 {
            return Err(section.error("patience", "found 0, expected 1 or more"));
        }
        root.close("early_stopping", section, false)?;
        Some(options)
    } else {
        root.section("early_stopping")?;
        None
    };
    Ok(TrainOptions {
        seed,
        length,
        batch_size,
        accumulate,
        log_every_steps,
        evaluate: evaluate_cadence,
        evaluate_batches,
        best,
        checkpoint: checkpoint_cadence,
        keep,
        early_stopping,
        ema,
        max_skipped_steps,
        shadow_every_steps,
    })
}

/// `every_steps` or `every_epochs`; 0 stands for never.
fn cadence(section: &mut Section, default: Cadence) -> Result<Cadence> {
    match (section.optional("every_steps")?, section.optional::<f64>("every_epochs")?) {
        (Some(0), None) => Ok(Cadence::Never),
        (Some(steps), None) => Ok(Cadence::Steps(steps)),
        (None, Some(0.0)) => Ok(Cadence::Never),
        (None, Some(epochs)) => Ok(Cadence::Epochs(epochs)),
        (Some(_), Some(_)) => {
            Err(section.error("every_epochs", "found both every_steps and every_epochs, expected one of them"))
        }
        (None, None) => {
            match default {
                Cadence::Steps(steps) => section.or("every_steps", steps).map(drop)?,
                Cadence::Epochs(epochs) => section.or("every_epochs", epochs).map(drop)?,
                Cadence::Never => {}
            }
            Ok(default)
        }
    }
}
