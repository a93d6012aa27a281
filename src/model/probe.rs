//! A layer run alone: to compare it with a reference, and its gradients with finite differences.

use super::layer::{Layer, Value};
use super::parameters::ParamTable;
use super::planner::Planner;
use super::program::Program;
use super::{Input, Mode};
use crate::backend::cpu::Cpu;
use crate::backend::{Act, Activations, Arena, Backend, Memory, StepContext};
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};
use crate::real::Real;

/// A layer planned alone on the CPU, with its parameters and the memory of one batch.
///
/// For own layers: set the inputs and the parameters, [`Probe::run`], and look at the output and the gradients; or let
/// [`Probe::check_gradients`] compare all gradients with finite differences.
pub struct Probe<R: Real> {
    program: Program<Cpu<R>>,
    arena: Arena<Cpu<R>>,
    activations: Activations<Cpu<R>>,
    dy: Act,
    dx: Option<Act>,
    step: StepContext,
}

/// A layer planned alone, on any backend.
pub struct Alone<B: Backend> {
    /// Forward, and backward where it was planned for training.
    pub program: Program<B>,
    /// Its parameters.
    pub parameters: ParamTable,
    /// The gradient of its output, which the backward reads. Of the output's shape.
    pub dy: Act,
    /// The gradient of its input; none where there is no backward, or the input is tokens.
    pub dx: Option<Act>,
}

impl<B: Backend> Alone<B> {
    /// Plans `layer` for batches of `batch` samples.
    ///
    /// # Errors
    /// A shape that does not fit.
    pub fn plan(layer: &mut dyn Layer<B>, input: &Input, batch: usize, mode: Mode) -> Result<Self> {
        let mut parameters = ParamTable::default();
        let mut planner = Planner::new(&mut parameters, mode);
        let mut x = planner.input(input, batch)?;
        x.needs_gradient = matches!(x.value, Value::Real(_)) && mode == Mode::Training;
        let value = x.value;
        let y = layer.forward(&mut planner, x)?;
        let (output, shape) = (y.real("probe")?, y.shape.clone());
        planner.keep(output);
        let (dy, gradient) = planner.tensor(&shape, true);
        planner.keep(dy);
        let mut dx = None;
        if mode == Mode::Training {
            planner.start_backward();
            if let Some(tensor) = layer.backward(&mut planner, gradient)? {
                let act = tensor.real("probe")?;
                planner.keep(act);
                dx = Some(act);
            }
        }
        let program = planner.finish(value, None, None, output, shape)?;
        Ok(Alone { program, parameters, dy, dx })
    }
}

/// What [`Probe::check_gradients`] found.
#[derive(Clone, Debug)]
pub struct GradientCheck {
    /// Norm of (finite difference - gradient) over the sum of their norms, for each tensor; `input` is the layer's input.
    pub errors: Vec<(String, f64)>,
}

impl GradientCheck {
    /// The largest error and the tensor it stands at; one that is not a number, of a gradient that is none, is larger than any.
    pub fn worst(&self) -> (&str, f64) {
        let largest = self.errors.iter().max_by(|(_, a), (_, b)| a.abs().total_cmp(&b.abs()));
        largest.map_or(("", 0.0), |(name, error)| (name, *error))
    }
}

impl<R: Real> Probe<R> {
    /// Plans `layer` for batches of `batch` samples; parameters get their initial values under `seed`.
    ///
    /// # Errors
    /// A shape that does not fit.
    pub fn new(mut layer: impl Layer<Cpu<R>>, input: &Input, batch: usize, mode: Mode, seed: u64) -> Result<Self> {
        let backend = Cpu::<R>::new();
        let Alone { program, parameters, dy, dx } = Alone::plan(&mut layer, input, batch, mode)?;
        let arena = parameters.arena(&backend, seed, 0)?;
        let activations = program.activations(&backend)?;
        Ok(Probe { program, arena, activations, dy, dx, step: StepContext { seed, ..StepContext::default() } })
    }

    /// Shape of the output, samples first.
    pub fn output_shape(&self) -> &[usize] {
        &self.program.output_shape
    }

    /// Names and shapes of the parameters, in arena order.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.arena.layout.entries().iter().map(|e| (e.name.as_str(), e.shape.as_slice()))
    }

    /// Sets the input to real values, samples one after the other.
    ///
    /// # Errors
    /// Another number of values, or a layer of tokens.
    pub fn set_input(&mut self, values: &[R]) -> Result<()> {
        match self.program.input {
            Value::Real(act) => {
                let range = self.activations.range(act);
                fill(&mut self.activations.values[range], values, "input")
            }
            Value::Tokens(_) => Err(Error::shape("probe", "tokens", "real values")),
        }
    }

    /// Sets the input to tokens, samples one after the other.
    ///
    /// # Errors
    /// Another number of tokens, or a layer of real values.
    pub fn set_tokens(&mut self, tokens: &[i32]) -> Result<()> {
        match self.program.input {
            Value::Tokens(indices) => {
                let range = self.activations.index_range(indices);
                fill(&mut self.activations.indices[range], tokens, "tokens")
            }
            Value::Real(_) => Err(Error::shape("probe", "real values", "tokens")),
        }
    }

    /// Sets a parameter or a kept tensor.
    ///
    /// # Errors
    /// No tensor of this name, or another number of values.
    pub fn set(&mut self, name: &str, values: &[R]) -> Result<()> {
        if let Some(entry) = self.arena.layout.get(name) {
            return fill(&mut self.arena.parameters[entry.range()], values, name);
        }
        match self.arena.state_layout.get(name) {
            Some(entry) => fill(&mut self.arena.state[entry.range()], values, name),
            None => Err(Error::shape("probe", "a declared parameter", format!("`{name}`"))),
        }
    }

    /// A parameter's or a kept tensor's values.
    pub fn get(&self, name: &str) -> Option<&[R]> {
        match self.arena.layout.get(name) {
            Some(entry) => Some(&self.arena.parameters[entry.range()]),
            None => self.arena.state_layout.get(name).map(|entry| &self.arena.state[entry.range()]),
        }
    }

    /// Runs forward, and backward from `dy` where the probe was made for training.
    ///
    /// # Errors
    /// Another number of values than the output has, or what an operation reports.
    pub fn run(&mut self, dy: &[R]) -> Result<()> {
        let range = self.activations.range(self.dy);
        fill(&mut self.activations.values[range], dy, "gradient")?;
        self.run_ops(self.program.ops.len())
    }

    fn run_ops(&mut self, count: usize) -> Result<()> {
        let mut memory = Memory { arena: &mut self.arena, activations: &mut self.activations };
        Cpu::<R>::new().run(&self.program.ops[..count], &mut memory, &self.step)
    }

    /// The output of the last run.
    pub fn output(&self) -> &[R] {
        &self.activations.values[self.activations.range(self.program.output)]
    }

    /// The gradient of the input after the last run; none for tokens.
    pub fn input_gradient(&self) -> Option<&[R]> {
        self.dx.map(|dx| &self.activations.values[self.activations.range(dx)])
    }

    /// The gradient of a parameter after the last run.
    pub fn gradient(&self, name: &str) -> Option<&[R]> {
        self.arena.layout.get(name).map(|entry| &self.arena.gradients[entry.range()])
    }

    /// Compares every gradient with central differences of `sum of dy * y`, dy drawn from `seed`, at up to `limit`
    /// elements of each tensor.
    ///
    /// # Errors
    /// What an operation reports.
    pub fn check_gradients(&mut self, seed: u64, limit: usize) -> Result<GradientCheck> {
        let stream = Philox::new(seed, Purpose::Sampling, 0);
        let outputs: usize = self.program.output_shape.iter().product();
        let dy: Vec<R> = (0..outputs as u64).map(|i| R::from_f64(stream.normal(i))).collect();
        let state = self.arena.state.clone();
        self.run(&dy)?;
        let mut tensors: Vec<(String, Place, usize, Vec<R>)> = Vec::new();
        if let (Value::Real(x), Some(dx)) = (self.program.input, self.input_gradient()) {
            tensors.push(("input".into(), Place::Input, self.activations.range(x).start, dx.to_vec()));
        }
        for entry in self.arena.layout.entries() {
            let gradient = self.arena.gradients[entry.range()].to_vec();
            tensors.push((entry.name.clone(), Place::Parameter, entry.offset, gradient));
        }
        let mut errors = Vec::new();
        for (tensor, (name, place, offset, gradient)) in tensors.into_iter().enumerate() {
            let mut order: Vec<usize> = (0..gradient.len()).collect();
            Philox::new(seed, Purpose::Shuffle, tensor as u32).shuffle(&mut order);
            let (mut difference, mut size) = (0.0, 0.0);
            let mut size_gradient = 0.0;
            for &element in order.iter().take(limit) {
                let numeric = self.derivative(&dy, place, offset + element, &state)?;
                let exact = gradient[element].f64();
                difference += (numeric - exact).powi(2);
                size += numeric.powi(2);
                size_gradient += exact.powi(2);
            }
            let scale = size.sqrt() + size_gradient.sqrt();
            errors.push((name, if scale == 0.0 { 0.0 } else { difference.sqrt() / scale }));
        }
        Ok(GradientCheck { errors })
    }

    fn derivative(&mut self, dy: &[R], place: Place, at: usize, state: &[R]) -> Result<f64> {
        let center = *self.place(place, at);
        let h = 1e-5 * center.f64().abs().max(1.0);
        let mut loss = |value: f64| -> Result<f64> {
            *self.place(place, at) = R::from_f64(value);
            self.arena.state.copy_from_slice(state);
            self.run_ops(self.program.forward_ops)?;
            Ok(self.output().iter().zip(dy).map(|(y, d)| y.f64() * d.f64()).sum())
        };
        let slope = (loss(center.f64() + h)? - loss(center.f64() - h)?) / (2.0 * h);
        *self.place(place, at) = center;
        Ok(slope)
    }

    fn place(&mut self, place: Place, at: usize) -> &mut R {
        match place {
            Place::Input => &mut self.activations.values[at],
            Place::Parameter => &mut self.arena.parameters[at],
        }
    }
}

#[derive(Clone, Copy)]
enum Place {
    Input,
    Parameter,
}

fn fill<T: Copy>(to: &mut [T], from: &[T], what: &str) -> Result<()> {
    if to.len() != from.len() {
        return Err(Error::shape(what, format!("{} values", to.len()), format!("{}", from.len())));
    }
    to.copy_from_slice(from);
    Ok(())
}
