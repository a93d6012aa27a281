//! From a run file to typed parts: data, model, run.

use std::path::{Path, PathBuf};

use super::RunFileArgs;
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::config::{DeviceChoice, RunFile};
use crate::data::{InputSpec, OpenedData, Preprocess, Recipe, TargetSpec};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::presets::{Fit, Goal};
use crate::train::checkpoint::{self, Which};
use crate::train::infer::Predictor;
use crate::train::looping::model_input;

/// The token that fills a line of words up.
const PADDING: i32 = 0;

impl RunFileArgs {
    /// Reads the run file with the overrides applied, and sets the threads up.
    pub fn read(&self) -> Result<RunFile> {
        let mut set = self.set.clone();
        if let Some(device) = &self.device {
            set.push(format!("run.device={device:?}"));
        }
        if let Some(threads) = self.threads {
            set.push(format!("run.threads={threads}"));
        }
        let run = RunFile::read(&self.file, &set)?;
        choose_device(&run)?;
        Ok(run)
    }
}

/// Checks that the device is there, and sets the threads of the CPU backend up.
pub fn choose_device(run: &RunFile) -> Result<()> {
    match run.device {
        DeviceChoice::Auto | DeviceChoice::Cpu => {}
        DeviceChoice::Cuda(_) | DeviceChoice::Emulated => {
            return Err(Error::Device(
                "this build of Warpstep has no CUDA backend yet; use device = \"cpu\" or \"auto\"".into(),
            ));
        }
    }
    if let Some(threads) = run.threads {
        // A pool that is there already keeps its threads; results do not depend on their number.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    Ok(())
}

/// Opens the data of a run file.
pub fn open_data(run: &RunFile) -> Result<OpenedData> {
    crate::data::open(&run.data, Some(&run.base), run.train.seed).map_err(|e| run.locate(e))
}

/// The model of a run file for data that was opened, or remembered.
pub fn build_model<B: Backend>(run: &RunFile, data: &Preprocess) -> Result<Model<B>> {
    let (vocabulary, context) = match &data.input {
        InputSpec::Tokens { vocabulary, context } => (Some(*vocabulary), Some(*context)),
        InputSpec::Real { .. } => (None, None),
    };
    let goal = match &data.target {
        TargetSpec::Class { names } => Goal::Classes(names.len()),
        TargetSpec::Real { width } => Goal::Values(*width),
        TargetSpec::NextToken => Goal::NextToken,
    };
    let padding = matches!(data.recipe, Recipe::Line { .. }).then_some(PADDING);
    let fit = Fit { vocabulary, context, goal, padding, outputs: 0 };
    run.model.build(&fit).map_err(|e| run.locate(e))
}

/// A trained model: its run file, what it remembers of its data, and where its weights are.
pub struct Trained {
    /// The run file with all defaults, from the run folder.
    pub run: RunFile,
    /// What turns a file into an input.
    pub preprocess: Preprocess,
    /// The checkpoint.
    pub checkpoint: PathBuf,
}

impl Trained {
    /// Opens a run folder (its best checkpoint where it has one, or its latest) or a checkpoint folder within one.
    pub fn open(path: &Path, which: Option<Which>) -> Result<Self> {
        let (folder, checkpoint) = if path.join("state.json").is_file() {
            let folder = path.parent().and_then(Path::parent).map(Path::to_owned).unwrap_or_default();
            (folder, path.to_owned())
        } else {
            let checkpoints = path.join("checkpoints");
            let wanted = match which {
                Some(which) => checkpoint::find(&checkpoints, which)?,
                None => match checkpoint::find(&checkpoints, Which::Best)? {
                    Some(best) => Some(best),
                    None => checkpoint::find(&checkpoints, Which::Latest)?,
                },
            };
            let found = wanted.ok_or_else(|| {
                Error::checkpoint(path, "holds no checkpoint; expected a run folder, as `warpstep train` leaves one")
            })?;
            (path.to_owned(), found)
        };
        let run = RunFile::read(&folder.join("config.toml"), &[])?;
        choose_device(&run)?;
        let file = folder.join("preprocess.json");
        let text = std::fs::read_to_string(&file).map_err(|e| Error::io("read", &file, e))?;
        let preprocess =
            Preprocess::from_json(&text).map_err(|e| Error::data(&file, format!("cannot be used: {e}")))?;
        Ok(Trained { run, preprocess, checkpoint })
    }

    /// The model with its weights.
    pub fn predictor(&self) -> Result<Predictor<Cpu<f32>>> {
        let model = build_model(&self.run, &self.preprocess)?;
        let input = model_input(&self.preprocess.input);
        Predictor::new(Cpu::new(), model, &input, &checkpoint::weights_file(&self.checkpoint))
    }
}
