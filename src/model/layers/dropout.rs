//! Dropout.

use crate::backend::Backend;
use crate::backend::ops::DropoutApply;
use crate::error::{Error, Result};
use crate::model::{Layer, Planner, Tensor};

/// Dropout with probability p: in training a value becomes 0 or `x / (1 - p)`; otherwise nothing happens.
#[derive(Debug)]
pub struct Dropout {
    probability: f64,
    stream: Option<u32>,
}

impl Dropout {
    /// Dropout of `probability`, in `[0, 1)`.
    pub fn new(probability: f64) -> Self {
        Dropout { probability, stream: None }
    }

    fn apply<B: Backend>(&self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let Some(stream) = self.stream else { return Ok(x) };
        let (y, output) = planner.tensor(&x.shape, x.needs_gradient);
        let len = x.len();
        planner.emit(DropoutApply { x: x.real("dropout")?, y, probability: self.probability, stream, len });
        Ok(output)
    }
}

/// Checks a probability of dropout.
pub(super) fn check_probability(probability: f64) -> Result<()> {
    if (0.0..1.0).contains(&probability) {
        return Ok(());
    }
    Err(Error::shape("dropout", "a probability from 0 to below 1", probability.to_string()))
}

impl<B: Backend> Layer<B> for Dropout {
    fn kind(&self) -> &'static str {
        "dropout"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        check_probability(self.probability)?;
        self.stream = (planner.training() && self.probability > 0.0).then(|| planner.stream());
        self.apply(planner, x)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        self.apply(planner, dy).map(Some)
    }
}
