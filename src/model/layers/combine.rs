//! Combinators: one layer after another, and around another.

use crate::backend::Backend;
use crate::backend::ops::{Add, Concatenate};
use crate::error::{Error, Result};
use crate::model::{Layer, Planner, Tensor};

/// Layers one after another, each under a name of its own.
pub struct Sequential<B: Backend> {
    layers: Vec<(String, Box<dyn Layer<B>>)>,
}

impl<B: Backend> Sequential<B> {
    /// No layer yet.
    pub fn new() -> Self {
        Sequential { layers: Vec::new() }
    }

    /// Appends a layer called `name`; its parameters' names start with it.
    #[must_use]
    pub fn then(mut self, name: impl Into<String>, layer: impl Layer<B> + 'static) -> Self {
        self.push(name, Box::new(layer));
        self
    }

    /// Appends a layer called `name`.
    pub fn push(&mut self, name: impl Into<String>, layer: Box<dyn Layer<B>>) {
        self.layers.push((name.into(), layer));
    }
}

impl<B: Backend> Default for Sequential<B> {
    fn default() -> Self {
        Self::new()
    }
}

impl<B: Backend> Layer<B> for Sequential<B> {
    fn kind(&self) -> &'static str {
        "sequential"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, mut x: Tensor) -> Result<Tensor> {
        for (name, layer) in &mut self.layers {
            x = planner.layer(name, layer.kind(), |planner| layer.forward(planner, x))?;
        }
        Ok(x)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, mut dy: Tensor) -> Result<Option<Tensor>> {
        for (_, layer) in self.layers.iter_mut().rev() {
            match layer.backward(planner, dy)? {
                Some(dx) => dy = dx,
                None => return Ok(None),
            }
        }
        Ok(Some(dy))
    }
}

/// `y = inner(x) + shortcut(x)`; without a shortcut, `y = inner(x) + x`.
pub struct Residual<B: Backend> {
    inner: Box<dyn Layer<B>>,
    inner_name: String,
    shortcut: Option<(String, Box<dyn Layer<B>>)>,
}

impl<B: Backend> Residual<B> {
    /// `inner(x) + x`; names within `inner` start with `name` (empty: with nothing).
    pub fn new(name: impl Into<String>, inner: impl Layer<B> + 'static) -> Self {
        Residual { inner: Box::new(inner), inner_name: name.into(), shortcut: None }
    }

    /// Puts a layer on the other path, for an inner layer that changes the shape.
    #[must_use]
    pub fn with_shortcut(mut self, name: impl Into<String>, shortcut: impl Layer<B> + 'static) -> Self {
        self.shortcut = Some((name.into(), Box::new(shortcut)));
        self
    }
}

/// Emits `a + b`.
pub(super) fn add<B: Backend>(planner: &mut Planner<'_, B>, a: Tensor, b: Tensor) -> Result<Tensor> {
    if a.shape != b.shape {
        return Err(Error::shape("residual", format!("two branches of {:?}", a.shape), format!("{:?}", b.shape)));
    }
    // A branch that computes nothing gives what it is given, and an operation takes no operand twice.
    let b = if a.value == b.value { copied(planner, &b)? } else { b };
    let (y, sum) = planner.tensor(&a.shape, a.needs_gradient || b.needs_gradient);
    planner.emit(Add { a: a.real("residual")?, b: b.real("residual")?, y, len: a.len() });
    Ok(sum)
}

/// Emits a copy of `x`.
fn copied<B: Backend>(planner: &mut Planner<'_, B>, x: &Tensor) -> Result<Tensor> {
    let (y, copy) = planner.tensor(&x.shape, x.needs_gradient);
    planner.emit(Concatenate { parts: vec![x.real("residual")?], widths: vec![x.len()], y, rows: 1 });
    Ok(copy)
}

impl<B: Backend> Layer<B> for Residual<B> {
    fn kind(&self) -> &'static str {
        "residual"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let inner = &mut self.inner;
        let branch = planner.scoped(&self.inner_name, |planner| inner.forward(planner, x.clone()))?;
        let other = match &mut self.shortcut {
            Some((name, layer)) => planner.scoped(name, |planner| layer.forward(planner, x))?,
            None => x,
        };
        add(planner, branch, other)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let other = match &mut self.shortcut {
            Some((_, layer)) => layer.backward(planner, dy.clone())?,
            None => Some(dy.clone()),
        };
        match (self.inner.backward(planner, dy)?, other) {
            (Some(a), Some(b)) => add(planner, a, b).map(Some),
            _ => Ok(None),
        }
    }
}
