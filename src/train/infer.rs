//! A trained model at work: outputs for inputs, and text that goes on.

use std::collections::HashMap;
use std::path::Path;

use super::checkpoint;
use crate::backend::{Activations, Arena, Backend, Memory, StepContext};
use crate::data::Inputs;
use crate::error::{Error, Result};
use crate::model::{Input, Mode, Model, Program, Value};
use crate::random::{Philox, Purpose};
use crate::real::Element;

/// A model with the weights of a checkpoint.
pub struct Predictor<B: Backend> {
    backend: B,
    model: Model<B>,
    arena: Arena<B>,
    programs: HashMap<(Input, usize), (Program<B>, Activations<B>)>,
}

impl<B: Backend> Predictor<B> {
    /// The model with the weights of `file` (a safetensors file); `input` is what it was trained on.
    ///
    /// # Errors
    /// A file that is missing, damaged or of another model.
    pub fn new(backend: B, mut model: Model<B>, input: &Input, file: &Path) -> Result<Self> {
        model.plan(input, 1, Mode::Inference)?;
        let mut arena = model.arena(&backend, 0, 0)?;
        checkpoint::load_model(file, &backend, &mut arena)?;
        Ok(Predictor { backend, model, arena, programs: HashMap::new() })
    }

    /// The model's outputs for `samples` samples, and their shape, samples first.
    ///
    /// # Errors
    /// Inputs that do not fit, or a device that failed.
    pub fn run(&mut self, input: &Input, inputs: &Inputs, samples: usize) -> Result<(Vec<f32>, Vec<usize>)> {
        let key = (input.clone(), samples);
        if !self.programs.contains_key(&key) {
            let program = self.model.plan(input, samples, Mode::Inference)?;
            let activations = program.activations(&self.backend)?;
            self.programs.insert(key.clone(), (program, activations));
        }
        let Some((program, activations)) = self.programs.get_mut(&key) else {
            return Err(Error::shape("predict", "a planned program", "none"));
        };
        outputs(&self.backend, &mut self.arena, (program, activations), inputs)
    }
}

/// What a program for inference gives for inputs, and its shape, samples first.
pub(super) fn outputs<B: Backend>(
    backend: &B,
    arena: &mut Arena<B>,
    (program, activations): (&Program<B>, &mut Activations<B>),
    inputs: &Inputs,
) -> Result<(Vec<f32>, Vec<usize>)> {
    match (inputs, program.input) {
        (Inputs::Real(values), Value::Real(act)) => {
            let range = activations.range(act);
            check_len(range.len(), values.len())?;
            let values: Vec<B::Storage> = values.iter().map(|&v| B::Storage::from_f32(v)).collect();
            backend.upload(&mut activations.values, range.start, &values)?;
        }
        (Inputs::Tokens(values), Value::Tokens(indices)) => {
            let range = activations.index_range(indices);
            check_len(range.len(), values.len())?;
            backend.upload(&mut activations.indices, range.start, values)?;
        }
        (Inputs::Real(_), Value::Tokens(_)) => return Err(Error::shape("predict", "tokens", "real values")),
        (Inputs::Tokens(_), Value::Real(_)) => return Err(Error::shape("predict", "real values", "tokens")),
    }
    backend.run(&program.ops, &mut Memory { arena, activations: &mut *activations }, &StepContext::default())?;
    let range = activations.range(program.output);
    let mut values = vec![B::Storage::default(); range.len()];
    backend.download(&activations.values, range.start, &mut values)?;
    Ok((values.into_iter().map(Element::f32).collect(), program.output_shape.clone()))
}

fn check_len(expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::shape("model input", format!("{expected} values"), found.to_string()))
}

/// `softmax(logits)`, in f64.
pub fn softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f64> = logits.iter().map(|&x| f64::from(x - max).exp()).collect();
    let total: f64 = exponentials.iter().sum();
    exponentials.into_iter().map(|e| e / total).collect()
}

/// How the next token is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0, to which the draws of ever smaller ones come, takes the most probable token.
    pub temperature: f64,
    /// Only so many of the most probable tokens are drawn from.
    pub top_k: Option<usize>,
    /// Key of the draws.
    pub seed: u64,
}

/// Goes on with `tokens` by `count` tokens. `context` is what the model can look back on; `vocabulary` the number of tokens
/// that may be drawn. `each` is told of every new token and may end it by returning false.
///
/// # Errors
/// A prompt that is empty, a model whose logits are not finite, or what it reports.
pub fn generate<B: Backend>(
    predictor: &mut Predictor<B>,
    tokens: &mut Vec<i32>,
    count: usize,
    [context, vocabulary]: [usize; 2],
    sampling: Sampling,
    mut each: impl FnMut(i32) -> Result<bool>,
) -> Result<()> {
    if tokens.is_empty() {
        return Err(Error::config("--prompt", "found nothing, expected one token or more"));
    }
    let stream = Philox::new(sampling.seed, Purpose::Sampling, 0);
    for drawn in 0..count {
        let window = &tokens[tokens.len().saturating_sub(context)..];
        // Lengths are rounded up, so that few programs are planned; what fills up comes after what counts.
        let length = window.len().next_power_of_two().min(context);
        let mut padded = window.to_vec();
        padded.resize(length, 0);
        let (logits, shape) = predictor.run(&Input::Tokens(length), &Inputs::Tokens(padded), 1)?;
        let width = shape.last().copied().unwrap_or(1);
        let logits = &logits[(window.len() - 1) * width..][..vocabulary.min(width)];
        if logits.iter().any(|logit| !logit.is_finite()) {
            let problem = "the model tells no probabilities of tokens: its outputs are not finite, as after a training that \
                           diverged; name a checkpoint from before that";
            return Err(Error::Training(problem.into()));
        }
        let token = draw(logits, sampling, &stream, drawn as u64) as i32;
        tokens.push(token);
        if !each(token)? {
            break;
        }
    }
    Ok(())
}

fn draw(logits: &[f32], sampling: Sampling, stream: &Philox, position: u64) -> usize {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let Some(&best) = order.first().filter(|_| sampling.temperature > 0.0) else {
        return order.first().copied().unwrap_or(0);
    };
    order.truncate(sampling.top_k.unwrap_or(logits.len()).max(1));
    // Less the largest before they are divided: quotients of their own may be larger than any number.
    let weight = |&token: &usize| ((f64::from(logits[token]) - f64::from(logits[best])) / sampling.temperature).exp();
    let weights: Vec<f64> = order.iter().map(weight).collect();
    let mut left = f64::from(stream.uniform(position)) * weights.iter().sum::<f64>();
    for (&token, weight) in order.iter().zip(weights) {
        left -= weight;
        if left < 0.0 {
            return token;
        }
    }
    order.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(logits: &[f32], temperature: f64) -> Vec<usize> {
        let stream = Philox::new(1, Purpose::Sampling, 0);
        let sampling = Sampling { temperature, top_k: None, seed: 1 };
        (0..200).map(|position| draw(logits, sampling, &stream, position)).collect()
    }

    #[test]
    fn the_smaller_the_temperature_the_more_probable_the_token_down_to_the_smallest() {
        let logits = [-3.0, 2.0, 1.9, -80.0];
        assert_eq!(drawn(&logits, 0.0), [1; 200]);
        for temperature in [1e-3, 1e-30, 1e-300, f64::from_bits(1)] {
            assert_eq!(drawn(&logits, temperature), [1; 200], "{temperature}");
        }
        // Tokens that are equally probable stay so.
        let equal = drawn(&[5.0, 5.0, -5.0], f64::from_bits(1));
        assert!(equal.contains(&0) && equal.contains(&1) && !equal.contains(&2), "{equal:?}");
    }

    #[test]
    fn draws_have_the_shares_that_the_temperature_gives() {
        for (temperature, share) in [(1.0, 1.0 / 1.1), (2.0, 1.0 / (1.0 + 0.1f64.sqrt())), (1e300, 0.5)] {
            let first = drawn(&[0.0, 0.1f32.ln()], temperature).iter().filter(|&&token| token == 0).count();
            // Four deviations of 200 draws.
            let deviation = (200.0 * share * (1.0 - share)).sqrt();
            assert!((first as f64 - 200.0 * share).abs() < 4.0 * deviation, "{temperature}: {first}");
        }
    }
}
