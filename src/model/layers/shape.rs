//! Layers that compute nothing, or next to nothing: other shapes, joined branches, means over time.

use super::planned;
use crate::backend::Backend;
use crate::backend::ops::{Add, Concatenate, MeanTimeBackward, MeanTimeForward, Padding, Split};
use crate::error::{Error, Result};
use crate::model::{Layer, Planner, Tensor};

/// `[batch, ..] -> [batch, product of the rest]`, without an operation.
#[derive(Debug, Default)]
pub struct Flatten {
    shape: Vec<usize>,
}

impl Flatten {
    /// The layer; it has no parameter.
    pub fn new() -> Self {
        Self::default()
    }
}

impl<B: Backend> Layer<B> for Flatten {
    fn kind(&self) -> &'static str {
        "flatten"
    }

    fn forward(&mut self, _: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        x.real("flatten")?;
        self.shape.clone_from(&x.shape);
        let batch = x.shape.first().copied().unwrap_or(1);
        let width = x.shape.iter().skip(1).product();
        Ok(x.reshaped(&[batch, width]))
    }

    fn backward(&mut self, _: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        Ok(Some(dy.reshaped(&self.shape)))
    }
}

/// Puts dimensions of size 1 in: `[batch, time, width] -> [batch, 1, time, width]`, a picture of one channel.
#[derive(Debug, Default)]
pub struct AsPicture {
    shape: Vec<usize>,
}

impl AsPicture {
    /// The layer; it has no parameter.
    pub fn new() -> Self {
        Self::default()
    }
}

impl<B: Backend> Layer<B> for AsPicture {
    fn kind(&self) -> &'static str {
        "as_picture"
    }

    fn forward(&mut self, _: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let [batch, time, width] = x.dimensions("as_picture", "[batch, time, width]")?;
        self.shape.clone_from(&x.shape);
        Ok(x.reshaped(&[batch, 1, time, width]))
    }

    fn backward(&mut self, _: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        Ok(Some(dy.reshaped(&self.shape)))
    }
}

/// Branches that see the same input, their outputs `[.., width]` put side by side: `[.., sum of the widths]`.
pub struct Parallel<B: Backend> {
    branches: Vec<(String, Box<dyn Layer<B>>)>,
    shapes: Vec<Vec<usize>>,
}

impl<B: Backend> Parallel<B> {
    /// Named branches; their parameters' names start with the name.
    pub fn new(branches: Vec<(String, Box<dyn Layer<B>>)>) -> Self {
        Parallel { branches, shapes: Vec::new() }
    }
}

impl<B: Backend> Layer<B> for Parallel<B> {
    fn kind(&self) -> &'static str {
        "parallel"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let mut outputs = Vec::new();
        for (name, layer) in &mut self.branches {
            outputs.push(planner.scoped(name, |planner| layer.forward(planner, x.clone()))?);
        }
        let before_width = |y: &Tensor| y.shape[..y.shape.len().saturating_sub(1)].to_vec();
        let Some(mut shape) = outputs.first().map(before_width).filter(|shape| !shape.is_empty()) else {
            return Err(Error::shape("parallel", "branches, of [.., width]", "none"));
        };
        if outputs.iter().any(|y| before_width(y) != shape) {
            let found: Vec<_> = outputs.iter().map(|y| &y.shape).collect();
            return Err(Error::shape(
                "parallel",
                "branches that differ in their last dimension alone",
                format!("{found:?}"),
            ));
        }
        let (rows, widths) = (shape.iter().product(), outputs.iter().map(Tensor::width).collect::<Vec<_>>());
        let needs_gradient = outputs.iter().any(|y| y.needs_gradient);
        shape.push(widths.iter().sum());
        let (y, output) = planner.tensor(&shape, needs_gradient);
        let parts = outputs.iter().map(|y| y.real("parallel")).collect::<Result<_>>()?;
        self.shapes = outputs.into_iter().map(|y| y.shape).collect();
        planner.emit(Concatenate { parts, widths, y, rows });
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let gradients: Vec<_> = self.shapes.iter().map(|shape| planner.tensor(shape, true)).collect();
        planner.emit(Split {
            x: dy.real("parallel")?,
            parts: gradients.iter().map(|(act, _)| *act).collect(),
            widths: gradients.iter().map(|(_, tensor)| tensor.width()).collect(),
            rows: dy.rows(),
        });
        let mut total: Option<Tensor> = None;
        for ((_, layer), (_, gradient)) in self.branches.iter_mut().zip(gradients).rev() {
            let Some(dx) = layer.backward(planner, gradient)? else { continue };
            total = Some(match total {
                None => dx,
                Some(sum) => {
                    let (y, tensor) = planner.tensor(&dx.shape, true);
                    let len = dx.len();
                    planner.emit(Add { a: sum.real("parallel")?, b: dx.real("parallel")?, y, len });
                    tensor
                }
            });
        }
        Ok(total)
    }
}

/// The mean over time of positions that are not padding: `[batch, time, width] -> [batch, width]`.
#[derive(Debug, Default)]
pub struct MeanOverTime {
    saved: Option<([usize; 3], Option<Padding>)>,
}

impl MeanOverTime {
    /// The layer; it has no parameter.
    pub fn new() -> Self {
        Self::default()
    }
}

impl<B: Backend> Layer<B> for MeanOverTime {
    fn kind(&self) -> &'static str {
        "mean_over_time"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let [batch, time, width] = x.dimensions("mean_over_time", "[batch, time, width]")?;
        let padding = planner.padding();
        let (y, output) = planner.tensor(&[batch, width], x.needs_gradient);
        planner.emit(MeanTimeForward { x: x.real("mean_over_time")?, y, batch, time, width, padding });
        self.saved = Some(([batch, time, width], padding));
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let (shape, padding) = planned(self.saved.take(), "mean_over_time")?;
        let [batch, time, width] = shape;
        let (dx, tensor) = planner.tensor(&shape, true);
        planner.emit(MeanTimeBackward { dy: dy.real("mean_over_time")?, dx, batch, time, width, padding });
        Ok(Some(tensor))
    }
}
