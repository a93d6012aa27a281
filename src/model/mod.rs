//! Models: layers with explicit forward and backward, written once over [`Backend`].
//!
//! A [`Layer`] does not compute. When a program is planned it emits operations, those of its forward and, later, those of
//! its backward, into a [`Planner`]. The result is a [`Program`]: a flat list of operations with a static memory plan,
//! which a backend runs (or records once and replays).

mod asked;
mod fuse;
pub mod interop;
mod layer;
pub mod layers;
mod parameters;
mod planner;
pub mod presets;
mod probe;
mod program;

pub use layer::{Layer, Tensor, Value};
pub use parameters::{Init, ParamTable};
pub use planner::{Planner, Row};
pub use probe::{Alone, GradientCheck, Probe};
pub use program::{ActivationBytes, OpCost, Program};

use asked::Asked;

use crate::backend::ops::{BinaryCrossEntropy, CrossEntropy, METRICS, MeanSquaredError};
use crate::backend::{Arena, Backend};
use crate::error::{Error, Result};

/// What a batch's inputs are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// Real values of this shape a sample.
    Real(Vec<usize>),
    /// This many tokens a sample.
    Tokens(usize),
}

/// What a model is trained to make small.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Loss {
    /// Softmax and cross-entropy over the last dimension, one target a row.
    CrossEntropy {
        /// In `[0, 1)`.
        label_smoothing: f64,
        /// The target that does not count.
        ignore_index: i32,
    },
    /// Mean of squared differences.
    MeanSquaredError,
    /// Binary cross-entropy of logits.
    BinaryCrossEntropy,
}

impl Loss {
    /// Checks every option.
    fn check(&self) -> Result<()> {
        match self {
            Loss::CrossEntropy { label_smoothing, .. } if !(0.0..1.0).contains(label_smoothing) => {
                let found = label_smoothing.to_string();
                Err(Error::shape("cross_entropy", "label smoothing from 0 to below 1", found))
            }
            _ => Ok(()),
        }
    }
}

/// What a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Forward, loss and backward; dropout on; batch norm by the batch.
    Training,
    /// Forward and loss; dropout off; batch norm by running statistics.
    Evaluation,
    /// Forward alone.
    Inference,
}

/// A network, its loss, and the parameters that it declared.
pub struct Model<B: Backend> {
    front: Option<(&'static str, Box<dyn Layer<B>>)>,
    root: Box<dyn Layer<B>>,
    /// What it is trained to make small.
    pub loss: Loss,
    parameters: ParamTable,
    after_planning: Option<AfterPlanning<B>>,
    asked: Option<Asked>,
}

/// What is done to every program of a model once it is planned.
type AfterPlanning<B> = Box<dyn Fn(&mut Program<B>, Mode, &ParamTable) -> Result<()> + Send + Sync>;

impl<B: Backend> Model<B> {
    /// A model of one layer, most often a [`layers::Sequential`]. Its parameters are declared by the first [`Model::plan`].
    pub fn new(root: Box<dyn Layer<B>>, loss: Loss) -> Self {
        Model { front: None, root, loss, parameters: ParamTable::default(), after_planning: None, asked: None }
    }

    /// Puts a layer that is not trained before the others, which keep their names.
    #[must_use]
    pub fn preceded_by(self, name: &'static str, layer: impl Layer<B> + 'static) -> Self {
        Model { front: Some((name, Box::new(layer))), ..self }
    }

    /// Has shapes that do not fit told in the words of the run file that asked for the model.
    #[must_use]
    fn asked_by(self, asked: Asked) -> Self {
        Model { asked: Some(asked), ..self }
    }

    /// Has every program that is planned from now on handed to `change`, such as to put a clock around each operation.
    pub fn after_planning(
        &mut self,
        change: impl Fn(&mut Program<B>, Mode, &ParamTable) -> Result<()> + Send + Sync + 'static,
    ) {
        self.after_planning = Some(Box::new(change));
    }

    /// The parameters declared so far.
    pub fn parameters(&self) -> &ParamTable {
        &self.parameters
    }

    /// Plans a program for batches of `batch` samples.
    ///
    /// # Errors
    /// A batch of no sample, samples of no value, a loss of options that it does not take; shapes that do not fit, each other or the
    /// targets, with the layer's name or the key of the run file; a batch that is too large to count.
    pub fn plan(&mut self, input: &Input, batch: usize, mode: Mode) -> Result<Program<B>> {
        if batch == 0 {
            return Err(Error::shape("model", "a batch of 1 sample or more", "0"));
        }
        self.loss.check()?;
        let mut planner = Planner::new(&mut self.parameters, mode);
        let mut x = planner.input(input, batch)?;
        if x.is_empty() {
            return Err(Error::shape("model", "inputs of 1 value or more a sample", format!("{:?}", &x.shape[1..])));
        }
        let input_value = x.value;
        if let Some((name, front)) = &mut self.front {
            x = planner.layer(name, front.kind(), |planner| front.forward(planner, x))?;
        }
        let given = x.shape.clone();
        if let Some(asked) = &self.asked {
            asked.check_input(&given)?;
        }
        let y = self.root.forward(&mut planner, x).map_err(|error| match &self.asked {
            Some(asked) => asked.told(planner.failed(), error),
            None => error,
        })?;
        if let Some(asked) = &self.asked {
            asked.check_output(&given, &y.shape)?;
        }
        let logits = y.real("model output")?;
        planner.keep(logits);
        let output_shape = y.shape.clone();
        let len: usize = output_shape.iter().product();
        let classes = output_shape.last().copied().unwrap_or(1);
        let mut target = None;
        let mut metrics = None;
        if mode != Mode::Inference {
            let values = planner.statistic(METRICS);
            planner.keep(values);
            metrics = Some(values);
            let gradient = (mode == Mode::Training).then(|| planner.activation(len));
            target = Some(match self.loss {
                Loss::CrossEntropy { label_smoothing, ignore_index } => {
                    let rows = len / classes.max(1);
                    let targets = planner.indices(rows);
                    planner.keep_indices(targets);
                    planner.emit(CrossEntropy {
                        logits,
                        targets,
                        metrics: values,
                        dlogits: gradient,
                        rows,
                        classes,
                        label_smoothing,
                        ignore_index,
                    });
                    Value::Tokens(targets)
                }
                Loss::MeanSquaredError => {
                    let target = planner.activation(len);
                    planner.keep(target);
                    planner.emit(MeanSquaredError {
                        prediction: logits,
                        target,
                        metrics: values,
                        dprediction: gradient,
                        len,
                    });
                    Value::Real(target)
                }
                Loss::BinaryCrossEntropy => {
                    let target = planner.activation(len);
                    planner.keep(target);
                    planner.emit(BinaryCrossEntropy { logits, target, metrics: values, dlogits: gradient, len });
                    Value::Real(target)
                }
            });
            if let Some(gradient) = gradient {
                planner.start_backward();
                let dy = Tensor { value: Value::Real(gradient), shape: output_shape.clone(), needs_gradient: true };
                self.root.backward(&mut planner, dy)?;
            }
        }
        let mut program = planner.finish(input_value, target, metrics, logits, output_shape)?;
        if let Some(change) = &self.after_planning {
            change(&mut program, mode, &self.parameters)?;
        }
        Ok(program)
    }

    /// The arena of this model's parameters with their initial values, laid out in the order that backward finishes them,
    /// and `slots` optimizer slots of zeros.
    ///
    /// # Errors
    /// No program was planned yet, or not enough memory.
    pub fn arena(&self, backend: &B, seed: u64, slots: usize) -> Result<Arena<B>> {
        self.arena_with(backend, seed, slots, true)
    }

    /// As [`Model::arena`]; without `master` as [`ParamTable::arena_with`] has it.
    ///
    /// # Errors
    /// As [`Model::arena`], or a backend that stores what it computes in.
    pub fn arena_with(&self, backend: &B, seed: u64, slots: usize, master: bool) -> Result<Arena<B>> {
        if self.parameters.is_empty() {
            return Err(Error::shape("model", "at least one parameter", "none: every layer is without parameters"));
        }
        self.parameters.arena_with(backend, seed, slots, master)
    }
}
