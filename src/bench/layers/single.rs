//! Operations that no layer emits alone: losses, sums, joined rows, turned heads; and those that take a neighbour along, or see
//! padding.

use crate::backend::ops::{
    Add, BinaryCrossEntropy, Concatenate, CrossEntropy, METRICS, MeanSquaredError, Padding, Rotary, Split,
};
use crate::backend::{Act, Backend};
use crate::error::{Error, Result};
use crate::model::layers::RotaryOptions;
use crate::model::{Layer, Planner, Tensor};

/// What is given to a layer besides its input and its output's gradient, and what it leaves besides its output and gradients.
#[derive(Clone, Debug, Default)]
pub struct More {
    /// Given: each, and the least of its values; they reach up to 1.
    pub given: Vec<(Act, f32)>,
    /// Left on the way forward, and on the way back.
    pub left: [Vec<Act>; 2],
    /// A loss's metrics, left on the way forward.
    pub metrics: Option<Act>,
    /// Terms of the mean whose gradient a loss leaves as its output.
    pub terms: Option<usize>,
}

/// Which operation, or which operations around a layer.
pub(super) enum Form<B: Backend> {
    /// A layer, and no more.
    Layer(Box<dyn Layer<B>>),
    /// The loss, whose output is the gradient of what it is given.
    CrossEntropy,
    /// Likewise.
    MeanSquaredError,
    /// Likewise.
    BinaryCrossEntropy,
    /// The input and another value.
    Add,
    /// The input and others, so many in all; on the way back, the gradient taken apart.
    Concatenate(usize),
    /// Of rows of so many heads, the first ones turned, in place.
    Rotary { heads: usize, turned: usize },
    /// The normalization of the input's sum with another value; on the way back, another gradient is added.
    Added(Box<dyn Layer<B>>),
    /// A batch normalization, its sum with another value, and a function of that, as a residual block ends.
    Residual(Box<dyn Layer<B>>, Box<dyn Layer<B>>),
    /// A layer that sees tokens of which some are padding.
    Padded(Box<dyn Layer<B>>),
}

/// A form as a layer, which tells what else it is given and leaves.
pub(super) struct Single<B: Backend> {
    form: Form<B>,
    pub more: More,
}

impl<B: Backend> Form<B> {
    pub fn layer(layer: impl Layer<B> + 'static) -> Self {
        Form::Layer(Box::new(layer))
    }
}

impl<B: Backend> Single<B> {
    pub fn new(form: Form<B>) -> Self {
        Single { form, more: More::default() }
    }
}

impl More {
    fn give<B: Backend>(&mut self, planner: &mut Planner<'_, B>, len: usize, least: f32) -> Act {
        let act = planner.activation(len);
        planner.keep(act);
        self.given.push((act, least));
        act
    }

    /// Emits the sum of `x` and what is given for it.
    fn add<B: Backend>(&mut self, planner: &mut Planner<'_, B>, x: &Tensor) -> Result<Tensor> {
        let b = self.give(planner, x.len(), -1.0);
        let (y, sum) = planner.tensor(&x.shape, true);
        planner.emit(Add { a: x.real("add")?, b, y, len: x.len() });
        Ok(sum)
    }

    /// A loss's metrics, and the gradient of the mean of so many terms.
    fn loss<B: Backend>(&mut self, planner: &mut Planner<'_, B>, x: &Tensor, terms: usize) -> (Act, Act, Tensor) {
        let metrics = planner.statistic(METRICS);
        planner.keep(metrics);
        (self.metrics, self.terms) = (Some(metrics), Some(terms));
        let (gradient, output) = planner.tensor(&x.shape, true);
        (metrics, gradient, output)
    }
}

/// Turns the heads, or turns them back.
fn turn<B: Backend>(
    planner: &mut Planner<'_, B>,
    x: &Tensor,
    [heads, turned]: [usize; 2],
    inverse: bool,
) -> Result<()> {
    let [batch, time, row_width] = x.dimensions("rotary", "[batch, time, heads head_size]")?;
    let RotaryOptions { base, interleaved } = RotaryOptions::default();
    let head_size = row_width / heads;
    let x = x.real("rotary")?;
    planner.emit(Rotary { x, batch, time, row_width, heads: turned, head_size, base, interleaved, inverse });
    Ok(())
}

fn gradient(dx: Option<Tensor>) -> Result<Tensor> {
    dx.ok_or_else(|| Error::shape("bench", "a layer with a gradient of its input", "none"))
}

impl<B: Backend> Layer<B> for Single<B> {
    fn kind(&self) -> &'static str {
        "single"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let Single { form, more } = self;
        let (len, rows, width) = (x.len(), x.rows(), x.width());
        match form {
            Form::Layer(layer) => layer.forward(planner, x),
            Form::CrossEntropy => {
                let targets = planner.indices(rows);
                planner.keep_indices(targets);
                let (metrics, dlogits, output) = more.loss(planner, &x, rows);
                planner.emit(CrossEntropy {
                    logits: x.real("cross_entropy")?,
                    targets,
                    metrics,
                    dlogits: Some(dlogits),
                    rows,
                    classes: width,
                    label_smoothing: 0.0,
                    ignore_index: -100,
                });
                Ok(output)
            }
            Form::MeanSquaredError => {
                let target = more.give(planner, len, -1.0);
                let (metrics, gradient, output) = more.loss(planner, &x, len);
                let (prediction, dprediction) = (x.real("mean_squared_error")?, Some(gradient));
                planner.emit(MeanSquaredError { prediction, target, metrics, dprediction, len });
                Ok(output)
            }
            Form::BinaryCrossEntropy => {
                // Shares.
                let target = more.give(planner, len, 0.0);
                let (metrics, gradient, output) = more.loss(planner, &x, len);
                let (logits, dlogits) = (x.real("binary_cross_entropy")?, Some(gradient));
                planner.emit(BinaryCrossEntropy { logits, target, metrics, dlogits, len });
                Ok(output)
            }
            Form::Add => more.add(planner, &x),
            &mut Form::Concatenate(parts) => {
                let mut acts = vec![x.real("concatenate")?];
                acts.extend((1..parts).map(|_| more.give(planner, len, -1.0)));
                let mut shape = x.shape.clone();
                if let Some(last) = shape.last_mut() {
                    *last = parts * width;
                }
                let (y, output) = planner.tensor(&shape, true);
                planner.emit(Concatenate { parts: acts, widths: vec![width; parts], y, rows });
                Ok(output)
            }
            &mut Form::Rotary { heads, turned } => {
                turn(planner, &x, [heads, turned], false)?;
                Ok(x)
            }
            Form::Added(norm) => {
                let sum = more.add(planner, &x)?;
                let act = sum.real("add")?;
                planner.keep(act);
                more.left[0].push(act);
                norm.forward(planner, sum)
            }
            Form::Residual(norm, function) => {
                let normalized = norm.forward(planner, x)?;
                let sum = more.add(planner, &normalized)?;
                function.forward(planner, sum)
            }
            Form::Padded(layer) => {
                let [batch, time, _] = x.dimensions("padded", "[batch, time, width]")?;
                let tokens = planner.indices(batch * time);
                planner.keep_indices(tokens);
                planner.set_padding(Padding { tokens, pad: 0 });
                layer.forward(planner, x)
            }
        }
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let Single { form, more } = self;
        match form {
            Form::CrossEntropy | Form::MeanSquaredError | Form::BinaryCrossEntropy | Form::Add => Ok(None),
            &mut Form::Concatenate(parts) => {
                let (rows, width) = (dy.rows(), dy.width() / parts);
                let mut shape = dy.shape.clone();
                if let Some(last) = shape.last_mut() {
                    *last = width;
                }
                let (dx, tensor) = planner.tensor(&shape, true);
                let others: Vec<Act> = (1..parts).map(|_| planner.activation(rows * width)).collect();
                others.iter().for_each(|&other| planner.keep(other));
                let acts = [&[dx][..], &others].concat();
                planner.emit(Split { x: dy.real("split")?, parts: acts, widths: vec![width; parts], rows });
                more.left[1] = others;
                Ok(Some(tensor))
            }
            &mut Form::Rotary { heads, turned } => {
                turn(planner, &dy, [heads, turned], true)?;
                Ok(Some(dy))
            }
            Form::Added(norm) => {
                let past = gradient(norm.backward(planner, dy)?)?;
                more.add(planner, &past).map(Some)
            }
            Form::Residual(norm, function) => {
                // The other branch needs it too.
                let d = gradient(function.backward(planner, dy)?)?;
                let act = d.real("residual")?;
                planner.keep(act);
                more.left[1].push(act);
                norm.backward(planner, d)
            }
            Form::Layer(layer) | Form::Padded(layer) => layer.backward(planner, dy),
        }
    }
}
