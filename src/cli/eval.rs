//! `warpstep eval`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, ValueEnum};

use super::assemble::{Trained, build_model, open_data};
use super::say;
use crate::backend::cpu::Cpu;
use crate::data::{Held, TargetSpec, as_trained};
use crate::error::Error;
use crate::optim::{OptimizerOptions, Rule};
use crate::text;
use crate::train::checkpoint::{self, Which};
use crate::train::looping::model_input;
use crate::train::step::{LossSums, Trainer, TrainerParts};

/// Which split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Split {
    /// Trained on
    Train,
    /// Looked at during training
    Validation,
    /// Looked at once, at the end
    Test,
}

/// Which checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WhichArg {
    /// The newest
    Latest,
    /// The one with the best validation figure
    Best,
}

impl From<WhichArg> for Which {
    fn from(which: WhichArg) -> Self {
        match which {
            WhichArg::Latest => Which::Latest,
            WhichArg::Best => Which::Best,
        }
    }
}

/// Options of `eval`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  warpstep eval runs/digits
  warpstep eval runs/digits/checkpoints/step-00001000 --split validation")]
pub(crate) struct Options {
    /// A run folder, or a checkpoint folder within one
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// The split; test where there is one, else validation
    #[arg(long)]
    split: Option<Split>,
    /// The checkpoint; best where there is one, else latest
    #[arg(long)]
    checkpoint: Option<WhichArg>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let trained = Trained::open(&options.run, options.checkpoint.map(Which::from))?;
    let data = open_data(&trained.run, true)?;
    let (name, which) = match options.split {
        Some(Split::Train) => ("train", Held::No),
        Some(Split::Validation) => ("validation", Held::Validation),
        Some(Split::Test) => ("test", Held::Test),
        None if data.splits.test.is_some() => ("test", Held::Test),
        None => ("validation", Held::Validation),
    };
    let (asked, base) = (&trained.run.data, Some(&*trained.run.base));
    let dataset = as_trained(asked, base, &data, which, &trained.preprocess).map_err(|e| trained.run.locate(e))?;
    let dataset = &dataset.ok_or_else(|| {
        let problem = match options.split {
            Some(_) => format!("the run's data has no {name} split; set data.split.{name}, or choose another"),
            None => "the run's data has no test and no validation split; give --split train".to_owned(),
        };
        Error::config(if options.split.is_some() { "--split" } else { "eval" }, problem)
    })?;
    // Nothing is updated: of all rules this one keeps nothing beside the parameters, which the CPU has in f32, whatever the run did.
    let optimizer = OptimizerOptions::new(Rule::Sgd, trained.run.optimizer.learning_rate);
    let mut trainer = Trainer::new(TrainerParts {
        backend: Cpu::<f32>::new(),
        model: build_model(&trained.run, &trained.preprocess)?,
        input: model_input(&trained.preprocess.input),
        batch_size: 1.max(trained.run.train.batch_size.min(2)),
        accumulate: 1,
        optimizer: &optimizer,
        ema: None,
        seed: trained.run.train.seed,
    })?;
    let (backend, arena) = trainer.parts_mut();
    checkpoint::load_model(&checkpoint::weights_file(&trained.checkpoint), backend, arena)?;
    let size = trained.run.train.batch_size.min(dataset.len().max(1));
    let mut sums = LossSums::default();
    for batch in trainer.evaluate(data.batches(&Arc::clone(dataset), size)?)? {
        sums.add(batch);
    }
    let accuracy = (!matches!(dataset.target(), TargetSpec::Real { .. })).then(|| sums.accuracy());
    if options.json {
        let value = serde_json::json!({
            "split": name, "samples": dataset.len(), "loss": sums.mean(), "accuracy": accuracy,
            "checkpoint": trained.checkpoint.display().to_string(),
        });
        say(&format!("{value}\n"))?;
    } else {
        let accuracy = accuracy.map_or_else(String::new, |a| format!("  accuracy {:.2} %", 100.0 * a));
        let (samples, loss, checkpoint) = (dataset.len(), text::loss(sums.mean()), trained.checkpoint.display());
        say(&format!("{name}  {samples} samples  loss {loss}{accuracy}  ({checkpoint})\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}
