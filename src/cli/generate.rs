//! `warpstep generate`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::assemble::Trained;
use super::eval::WhichArg;
use super::{number, whole};
use crate::data::{InputSpec, Recipe, no_tokenizer};
use crate::error::Error;
use crate::train::checkpoint::Which;
use crate::train::infer::{Sampling, generate};

/// Options of `generate`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  warpstep generate runs/shakespeare_char --prompt 'ROMEO:' --tokens 300
  warpstep generate runs/shakespeare_char --temperature 0")]
pub(crate) struct Options {
    /// A run folder, or a checkpoint folder within one
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Text to go on with
    #[arg(long, default_value = "\n")]
    prompt: String,
    /// Tokens to add
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = whole::<usize>, allow_negative_numbers = true)]
    tokens: usize,
    /// Spread of the draws; 0 takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.8, value_parser = number, allow_negative_numbers = true)]
    temperature: f64,
    /// Draw from the K most probable tokens only
    #[arg(long, value_name = "K", value_parser = whole::<usize>, allow_negative_numbers = true)]
    top_k: Option<usize>,
    /// Key of the draws
    #[arg(long, default_value_t = 1337, value_parser = whole::<u64>, allow_negative_numbers = true)]
    seed: u64,
    /// The checkpoint; best where there is one, else latest
    #[arg(long)]
    checkpoint: Option<WhichArg>,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if !(options.temperature >= 0.0 && options.temperature.is_finite()) {
        let problem = format!("found {}, expected a finite number of 0 or more", options.temperature);
        return Err(Error::config("--temperature", problem).into());
    }
    if options.top_k == Some(0) {
        return Err(Error::config("--top-k", "found 0, expected 1 or more").into());
    }
    let trained = Trained::open(&options.run, options.checkpoint.map(Which::from))?;
    let (Some(tokenizer), InputSpec::Tokens { context, vocabulary }) =
        (trained.preprocess.tokenizer(), &trained.preprocess.input)
    else {
        let problem = match trained.preprocess.recipe {
            Recipe::Tokens { vocabulary, .. } => {
                format!("holds a model that continues tokens, {}", no_tokenizer(vocabulary))
            }
            _ => "holds a model that does not go on with text: use `warpstep predict`".to_owned(),
        };
        return Err(Error::config(options.run.display().to_string(), problem).into());
    };
    let mut tokens = tokenizer.encode(&options.prompt).map_err(|e| match e {
        Error::Data { problem, .. } => Error::config("--prompt", problem),
        other => other,
    })?;
    let mut predictor = trained.predictor()?;
    let mut out = std::io::stdout().lock();
    let told = |e| Error::io("write to", "standard output", e);
    out.write_all(options.prompt.as_bytes()).map_err(told)?;
    let sampling = Sampling { temperature: options.temperature, top_k: options.top_k, seed: options.seed };
    let mut written = Ok(());
    generate(&mut predictor, &mut tokens, options.tokens, [*context, *vocabulary], sampling, |token| {
        written = out.write_all(&tokenizer.decode_bytes(&[token])).and_then(|()| out.flush());
        Ok(written.is_ok())
    })?;
    written.and_then(|()| writeln!(out)).map_err(told)?;
    Ok(ExitCode::SUCCESS)
}
