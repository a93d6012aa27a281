//! Functions of single values, and SwiGLU.

use super::planned;
use crate::backend::ops::{ActivationBackward, ActivationForward, ActivationKind, SwigluBackward, SwigluForward};
use crate::backend::{Act, Backend};
use crate::error::{Error, Result};
use crate::model::{Layer, Planner, Tensor};

/// `y = f(x)`, value by value.
#[derive(Debug)]
pub struct Activation {
    kind: ActivationKind,
    x: Option<Act>,
}

impl Activation {
    /// The layer of this function.
    pub fn new(kind: ActivationKind) -> Self {
        Activation { kind, x: None }
    }
}

impl<B: Backend> Layer<B> for Activation {
    fn kind(&self) -> &'static str {
        self.kind.name()
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let act = x.real("activation")?;
        let (y, output) = planner.tensor(&x.shape, x.needs_gradient);
        planner.emit(ActivationForward { x: act, y, kind: self.kind, len: x.len() });
        self.x = Some(act);
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let x = planned(self.x.take(), "activation")?;
        let (dx, tensor) = planner.tensor(&dy.shape, true);
        planner.emit(ActivationBackward { x, dy: dy.real("activation")?, dx, kind: self.kind, len: dy.len() });
        Ok(Some(tensor))
    }
}

/// `silu(first half) * second half` over the last dimension (Shazeer 2020): `[.., 2 width] -> [.., width]`.
#[derive(Debug, Default)]
pub struct Swiglu {
    x: Option<Act>,
}

impl Swiglu {
    /// The layer; it has no parameter.
    pub fn new() -> Self {
        Self::default()
    }
}

impl<B: Backend> Layer<B> for Swiglu {
    fn kind(&self) -> &'static str {
        "swiglu"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let act = x.real("swiglu")?;
        if !x.width().is_multiple_of(2) {
            return Err(Error::shape("swiglu", "an even width", format!("{:?}", x.shape)));
        }
        let width = x.width() / 2;
        let mut shape = x.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = width;
        }
        let (y, output) = planner.tensor(&shape, x.needs_gradient);
        planner.emit(SwigluForward { x: act, y, rows: x.rows(), width });
        self.x = Some(act);
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let x = planned(self.x.take(), "swiglu")?;
        let width = dy.width();
        let mut shape = dy.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = 2 * width;
        }
        let (dx, tensor) = planner.tensor(&shape, true);
        planner.emit(SwigluBackward { x, dy: dy.real("swiglu")?, dx, rows: dy.rows(), width });
        Ok(Some(tensor))
    }
}
