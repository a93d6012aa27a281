//! `warpstep predict`.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::assemble::Trained;
use super::eval::WhichArg;
use super::{count, say};
use crate::backend::cpu::Cpu;
use crate::data::UserSample;
use crate::error::{Error, Result};
use crate::model::presets::LossKind;
use crate::train::checkpoint::Which;
use crate::train::infer::{Predictor, softmax};
use crate::train::looping::model_input;

/// Options of `predict`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  warpstep predict runs/digits seven.png
  warpstep predict runs/sentiment --text 'a joy from start to end'
  cut -d, -f1-4 new.csv | warpstep predict runs/wine - --json")]
pub(crate) struct Options {
    /// A run folder, or a checkpoint folder within one
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Pictures, recordings, tables or texts, as the model was trained on; - for a table or texts from standard input
    #[arg(value_name = "FILE", required_unless_present = "text")]
    files: Vec<PathBuf>,
    /// A line of text, or a row of a table, in place of files
    #[arg(long, conflicts_with = "files", allow_hyphen_values = true)]
    text: Option<String>,
    /// Classes to name for each sample
    #[arg(long, value_name = "K", default_value = "1", value_parser = count)]
    top: NonZeroUsize,
    /// The checkpoint; best where there is one, else latest
    #[arg(long)]
    checkpoint: Option<WhichArg>,
    /// Print a JSON object for each sample
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let trained = Trained::open(&options.run, options.checkpoint.map(Which::from))?;
    if trained.preprocess.tokenizer().is_some() {
        return Err(Error::config(
            options.run.display().to_string(),
            "holds a language model: use `warpstep generate`",
        )
        .into());
    }
    let mut predictor = Predicting { predictor: trained.predictor()?, trained: &trained, options };
    if let Some(text) = &options.text {
        let place = Path::new("--text");
        predictor.all(place, trained.preprocess.text(text, place)?)?;
    }
    // One after the other: many files need no more memory than the largest of them.
    for file in &options.files {
        let found = if file == Path::new("-") {
            let text = std::io::read_to_string(std::io::stdin()).map_err(|e| Error::io("read", file, e))?;
            trained.preprocess.text(&text, file)?
        } else {
            trained.preprocess.file(file)?
        };
        predictor.all(file, found)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A model, and how its outputs are said.
struct Predicting<'a> {
    predictor: Predictor<Cpu<f32>>,
    trained: &'a Trained,
    options: &'a Options,
}

impl Predicting<'_> {
    /// Says what the model gives for what was found at a place.
    fn all(&mut self, from: &Path, samples: Vec<UserSample>) -> Result<()> {
        if samples.is_empty() {
            return Err(Error::data(from, "found nothing in it, expected one sample or more"));
        }
        samples.iter().try_for_each(|sample| self.one(sample))
    }

    fn one(&mut self, sample: &UserSample) -> Result<()> {
        let Predicting { predictor, trained, options } = self;
        let input = model_input(&trained.preprocess.input);
        // The loss of these values takes logits, of which they are the logistic function.
        let logits = trained.run.model.loss == Some(LossKind::BinaryCrossEntropy);
        let (output, _) = predictor.run(&input, &sample.input, 1)?;
        if output.iter().any(|value| !value.is_finite()) {
            let problem = format!(
                "{}: the model's outputs are not finite, as after a training that diverged, or of values far from those it was trained \
                 on; name a checkpoint from before that, or correct the values",
                sample.name
            );
            return Err(Error::Training(problem));
        }
        let Some(names) = trained.preprocess.class_names() else {
            let value = |value: f32| if logits { 1.0 / (1.0 + (-value).exp()) } else { value };
            let output: Vec<f32> = output.into_iter().map(value).collect();
            let line = if options.json {
                serde_json::json!({ "sample": sample.name, "values": output }).to_string()
            } else {
                let values: Vec<String> = output.iter().map(f32::to_string).collect();
                format!("{}  {}", sample.name, values.join(" "))
            };
            return say(&(line + "\n"));
        };
        // One logit for two classes: logistic regression.
        let probabilities = match output.as_slice() {
            [logit] if names.len() == 2 => softmax(&[0.0, *logit]),
            logits => softmax(logits),
        };
        let mut order: Vec<usize> = (0..probabilities.len().min(names.len())).collect();
        order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
        order.truncate(options.top.get());
        let line = if options.json {
            let classes: Vec<_> = order
                .iter()
                .map(|&i| serde_json::json!({ "class": names[i], "probability": probabilities[i] }))
                .collect();
            serde_json::json!({ "sample": sample.name, "classes": classes }).to_string()
        } else {
            let classes: Vec<String> =
                order.iter().map(|&i| format!("{} {:.2} %", names[i], 100.0 * probabilities[i])).collect();
            format!("{}  {}", sample.name, classes.join("  "))
        };
        say(&(line + "\n"))
    }
}
