//! From a run file to typed parts: data, model, run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use half::{bf16, f16};

use super::{RunArgs, RunFileArgs};
use crate::backend::Backend;
use crate::backend::cpu::{self, Cpu};
use crate::backend::cuda::auto::{Choice, Machine, choose};
use crate::backend::cuda::doctor::check;
use crate::backend::cuda::{Cuda, Device, DeviceOptions, device_count, emulated, is_embedded};
use crate::config::{DeviceChoice, Precision, RunFile};
use crate::data::{InputSpec, OpenedData, Preprocess, Reading, Recipe, SamplerOptions, TargetSpec, open_watched};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::layers::LogMel;
use crate::model::presets::{Fit, Goal, LossKind, Preset};
use crate::parallel::world::World;
use crate::plan::Share;
use crate::tell::tell;
use crate::text::grouped;
use crate::train::checkpoint::{self, Which};
use crate::train::infer::Predictor;
use crate::train::looping::model_input;
use crate::train::run::steps_of;

/// The token that fills a line of words up.
const PADDING: i32 = 0;

impl RunFileArgs {
    /// Reads the run file with the overrides applied, and sets the threads up.
    pub fn read(&self) -> Result<RunFile> {
        self.with(Vec::new()).inspect(set_threads)
    }

    /// Reads the run file with the overrides and `more` of them applied.
    fn with(&self, more: Vec<String>) -> Result<RunFile> {
        let threads = self.threads.map(|threads| format!("run.threads={threads}"));
        let set: Vec<String> = self.set.iter().cloned().chain(more).chain(threads).collect();
        RunFile::read(&self.file, &set)
    }
}

impl RunArgs {
    /// Reads the run file with the overrides applied, and sets the threads up.
    pub fn read(&self) -> Result<RunFile> {
        self.parse(Vec::new()).inspect(set_threads)
    }

    /// Reads the run file with the overrides and `more` of them applied.
    pub fn parse(&self, more: Vec<String>) -> Result<RunFile> {
        let device = self.device.as_ref().map(|device| assign("run.device", device));
        self.file.with(more.into_iter().chain(device).collect())
    }
}

/// An override of `key` by a string, whatever is in it.
pub fn assign(key: &str, text: &str) -> String {
    format!("{key}={}", toml_edit::Value::from(text))
}

/// Sets the threads of the CPU up.
pub fn set_threads(run: &RunFile) {
    // A pool that is there already keeps its threads; results do not depend on their number.
    let _ = cpu::set_threads(run.threads);
}

/// A device that was opened.
pub enum Opened {
    /// The CPU.
    Cpu(Cpu<f32>),
    /// A CUDA device that stores activations in f32.
    Cuda(Cuda<f32>),
    /// A CUDA device that stores activations in bf16.
    CudaBf16(Cuda<bf16>),
    /// A CUDA device that stores activations in f16.
    CudaF16(Cuda<f16>),
}

impl Opened {
    /// The GPU; none where it is the CPU.
    pub fn gpu(&self) -> Option<&Arc<Device>> {
        match self {
            Opened::Cpu(_) => None,
            Opened::Cuda(backend) => Some(backend.device()),
            Opened::CudaBf16(backend) => Some(backend.device()),
            Opened::CudaF16(backend) => Some(backend.device()),
        }
    }
}

/// Opens the run's device; `graphs`: whether a GPU replays steps as graphs. `auto` is a GPU where one works, else the CPU; where
/// there are signs of a GPU, it says why.
///
/// # Errors
/// No such device, or no emulator; an emulated device starts the program again and does not come back.
pub fn open_device(run: &RunFile, world: &World, graphs: bool) -> Result<Opened> {
    let tf32 = run.precision == Precision::Tf32;
    // What is measured on one machine may come out otherwise on the next.
    let measure = DeviceOptions::default().measure && !run.reproducible;
    let options = |ordinal| DeviceOptions { ordinal, tf32, graphs, measure, ..DeviceOptions::default() };
    let device = match run.device {
        DeviceChoice::Cpu => return Ok(Opened::Cpu(Cpu::new())),
        DeviceChoice::Auto => match choose(&Machine::look(), run.model.has_convolutions()) {
            // Several processes go the same way: what one of them cannot open fails for all.
            Choice::Cuda(ordinal) if world.size > 1 => Device::open(options(own_device(world).unwrap_or(ordinal)))?,
            choice => match open_chosen(choice, options) {
                Ok(device) => device,
                Err(reason) => {
                    if run.precision != Precision::F32 {
                        return Err(run.locate(Error::config(
                            "run.precision",
                            format!(
                                "the CPU computes in f32; expected \"f32\" (the others need a CUDA device: {})",
                                reason.as_deref().unwrap_or("none was found")
                            ),
                        )));
                    }
                    if let Some(reason) = reason {
                        tell(format_args!(
                            "device = \"auto\": the CPU is used: {reason}; `warpstep doctor` tells more"
                        ));
                    }
                    return Ok(Opened::Cpu(Cpu::new()));
                }
            },
        },
        DeviceChoice::Cuda(ordinal) => {
            Device::open(options(ordinal.map_or_else(|| own_device(world).unwrap_or(0), |ordinal| ordinal as usize)))?
        }
        DeviceChoice::Emulated => {
            enter_emulated()?;
            Device::open(options(own_device(world).unwrap_or(0)))?
        }
    };
    Ok(match run.precision {
        Precision::Bf16 => Opened::CudaBf16(Cuda::new(device)),
        Precision::F16 => Opened::CudaF16(Cuda::new(device)),
        Precision::F32 | Precision::Tf32 => Opened::Cuda(Cuda::new(device)),
    })
}

/// The GPU that was chosen, where it works; else why none is taken, where there are signs of one.
fn open_chosen(
    choice: Choice,
    options: impl Fn(usize) -> DeviceOptions,
) -> std::result::Result<Arc<Device>, Option<String>> {
    match choice {
        Choice::Cuda(ordinal) => Device::open(options(ordinal))
            .and_then(|device| check(&device).map(|()| device))
            .map_err(|error| Some(format!("cuda:{ordinal} does not work: {error}"))),
        Choice::Cpu(reason) => Err(reason),
    }
}

/// The device of this process, where several of a machine were started: each its own, but where each sees no other.
fn own_device(world: &World) -> Option<usize> {
    (world.size > 1 && device_count() > 1).then_some(world.local_rank)
}

/// Makes sure that this process runs on the emulated device: it starts again where it does not, and does not come back.
///
/// # Errors
/// No emulator, or no kernels in this build.
pub fn enter_emulated() -> Result<()> {
    if !is_embedded() {
        // NVRTC takes the emulated driver for a real one, and does not survive it.
        return Err(Error::Device(
            "device = \"emulated\": this Warpstep was built without nvcc, and the emulated device executes embedded kernels alone: \
             build it where nvcc is on the path, or as `NVCC=$(scripts/nvcc) cargo build --workspace`"
                .into(),
        ));
    }
    if emulated::is_active() {
        return Ok(());
    }
    tell(
        "device = \"emulated\": no GPU is used. A CUDA device in software runs every kernel, instruction by instruction: right, \
         and thousands of times slower than a GPU",
    );
    Err(emulated::start_again())
}

/// The number of the GPU that `auto` takes for all that there is; none for the CPU. Where there are signs of a GPU that does not
/// work, it says why.
pub fn choose_auto() -> Option<usize> {
    match open_chosen(choose(&Machine::look(), true), |ordinal| DeviceOptions { ordinal, ..DeviceOptions::default() }) {
        Ok(device) => Some(device.options().ordinal),
        Err(reason) => {
            if let Some(reason) = reason {
                tell(format_args!("device = \"auto\": the CPU is used: {reason}; `warpstep doctor` tells more"));
            }
            None
        }
    }
}

/// Time after which whoever waits for data is told how far they are, again and again.
const PATIENCE: Duration = Duration::from_secs(10);

/// Opens the data of a run file; where `told`, lines on standard error say how far that is while it takes long.
pub fn open_data(run: &RunFile, told: bool) -> Result<OpenedData> {
    let reading = Reading::default();
    let data = std::thread::scope(|scope| {
        let (opened, waits) = channel::<()>();
        if told {
            let reading = &reading;
            scope.spawn(move || {
                while waits.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    tell(waiting(reading));
                }
            });
        }
        let data = open_watched(&run.data, Some(&run.base), run.train.seed, &reading);
        drop(opened);
        data
    });
    let data = data.map_err(|e| run.locate(e))?;
    if run.model.loss == Some(LossKind::BinaryCrossEntropy) {
        let advice = "correct it, or set model.loss = \"mean_squared_error\"";
        data.check_targets(0.0..=1.0, advice).map_err(|e| run.locate(e))?;
    }
    Ok(data)
}

/// How far data are.
fn waiting(reading: &Reading) -> String {
    match reading.files() {
        Some((done, all)) => format!("reading data: {} of {} files", grouped(done as u64), grouped(all as u64)),
        None => "reading data".to_owned(),
    }
}

/// How a process of this share puts batches together.
pub fn sampler_options(run: &RunFile, data: &OpenedData, share: Share) -> SamplerOptions {
    let options = data.sampler_options(run.train.batch_size, run.train.seed);
    SamplerOptions { accumulate: run.train.accumulate, share, ..options }
}

/// The steps of a run, for which its schedule is checked.
pub fn steps(run: &RunFile, data: &OpenedData, sampler: SamplerOptions) -> Result<u64> {
    let peak = run.optimizer.learning_rate;
    let counted = steps_of(&*data.splits.train, sampler, run.train.length, (&run.schedule, peak));
    counted.map(|(steps, _)| steps).map_err(|e| run.locate(e))
}

/// The steps of a run on one process.
pub fn steps_alone(run: &RunFile, data: &OpenedData) -> Result<u64> {
    let share = run.parallel.share(0, 1, run.train.batch_size).map_err(|e| run.locate(e))?;
    steps(run, data, sampler_options(run, data, share))
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
    let model = run.model.build(&fit).map_err(|e| run.locate(e))?;
    let Some(pictures) = &data.pictures else {
        let samples = matches!(&data.input, InputSpec::Real { shape } if shape.len() == 1);
        if samples && matches!(run.model.preset, Preset::AudioCnn(_)) {
            return Err(run.locate(Error::config(
                "data.mel",
                "found none, but preset = \"audio_cnn\" makes log-mel pictures of waveforms; expected mel = {} for the defaults, \
                 or data.features = \"log_mel\"",
            )));
        }
        return Ok(model);
    };
    let [scale, shift] = pictures.normalization()?;
    let layer = pictures.transform().map(|transform| LogMel::new(transform).normalized(scale, shift));
    Ok(model.preceded_by("log_mel", layer.map_err(|e| run.locate(e))?))
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
            // However few of its folders the path names.
            let whole = std::path::absolute(path).map_err(|e| Error::io("find", path, e))?;
            let folder = whole.parent().and_then(Path::parent).map(Path::to_owned).unwrap_or_default();
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
                let others =
                    which == Some(Which::Best) && matches!(checkpoint::find(&checkpoints, Which::Latest), Ok(Some(_)));
                let problem = if others {
                    "holds no best checkpoint, for which a validation split is evaluated; give --checkpoint latest"
                } else {
                    "holds no checkpoint; expected a run folder, as `warpstep train` leaves one"
                };
                Error::checkpoint(path, problem)
            })?;
            (path.to_owned(), found)
        };
        let run = RunFile::read(&folder.join("config.toml"), &[])?;
        set_threads(&run);
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
