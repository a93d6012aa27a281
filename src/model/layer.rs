//! What a layer is, and the tensors that layers hand on.

use super::Planner;
use crate::backend::step::Room;
use crate::backend::{Act, Backend, Indices};
use crate::error::{Error, Result};

/// A layer: a forward and a backward written next to each other.
///
/// Both emit operations into a [`Planner`]. A layer keeps, between the two, the handles that its backward needs. It is
/// planned anew for each batch shape: `forward` must not rely on what an earlier plan left. Within [`super::layers::Recompute`] a
/// forward is planned twice before its backward, the second time with [`Planner::recomputing`].
pub trait Layer<B: Backend>: Send {
    /// What it is, for tables and errors: `linear`.
    fn kind(&self) -> &'static str;

    /// Emits the forward of `x` and returns the output.
    ///
    /// # Errors
    /// A shape that does not fit.
    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor>;

    /// Emits the backward: from the gradient of the last forward's output to gradients of parameters and of its input.
    /// Returns none when the input needs no gradient.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>>;
}

impl<B: Backend, L: Layer<B> + ?Sized> Layer<B> for Box<L> {
    fn kind(&self) -> &'static str {
        (**self).kind()
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        (**self).forward(planner, x)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        (**self).backward(planner, dy)
    }
}

/// Which memory holds a tensor's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Real values.
    Real(Act),
    /// Whole numbers.
    Tokens(Indices),
}

impl From<Value> for Room {
    fn from(value: Value) -> Self {
        match value {
            Value::Real(act) => Room::Real(act),
            Value::Tokens(indices) => Room::Whole(indices),
        }
    }
}

/// A tensor while a program is planned: where its values will be, and its shape, samples first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Where.
    pub value: Value,
    /// Shape, outermost first; the first dimension counts samples.
    pub shape: Vec<usize>,
    /// Whether anything before it is trained.
    pub needs_gradient: bool,
}

impl Tensor {
    /// The handle of real values.
    ///
    /// # Errors
    /// The tensor holds tokens: `layer` needs an embedding before it.
    pub fn real(&self, layer: &str) -> Result<Act> {
        match self.value {
            Value::Real(act) => Ok(act),
            Value::Tokens(_) => Err(Error::shape(layer, "real values", "tokens (put an embedding layer before it)")),
        }
    }

    /// The handle of tokens.
    ///
    /// # Errors
    /// The tensor holds real values.
    pub fn tokens(&self, layer: &str) -> Result<Indices> {
        match self.value {
            Value::Tokens(indices) => Ok(indices),
            Value::Real(_) => Err(Error::shape(layer, "tokens (whole numbers)", "real values")),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Width of the last dimension.
    pub fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, rest)| rest.iter().product())
    }

    /// The same values under another shape.
    pub fn reshaped(mut self, shape: &[usize]) -> Self {
        debug_assert_eq!(self.len(), shape.iter().product::<usize>());
        self.shape = shape.to_vec();
        self
    }

    /// The dimensions, where there are `N` of them.
    ///
    /// # Errors
    /// Another number of dimensions; `expected` says what they mean, as `[batch, channels, height, width]`.
    pub fn dimensions<const N: usize>(&self, layer: &str, expected: &str) -> Result<[usize; N]> {
        <[usize; N]>::try_from(self.shape.as_slice())
            .map_err(|_| Error::shape(layer, expected, format!("{:?}", self.shape)))
    }
}
