//! A layer whose forward is run again in the backward (Chen et al., "Training deep nets with sublinear memory cost", 2016).

use super::planned;
use crate::backend::Backend;
use crate::error::Result;
use crate::model::planner::Place;
use crate::model::{Layer, Planner, Tensor};

/// `y = inner(x)`, of which x alone is kept for the backward: there the forward is emitted again, then the backward.
///
/// What `inner` computes in between dies within its forward, so a deep stack of such layers needs the memory of one layer and of
/// all inputs, for one more forward of arithmetic. Gradients have the same bits: dropout draws the same masks, and what is kept
/// from step to step moves once. `inner` must leave x as it is: [`super::Attention`] with rotary positions, which turns its
/// input in place, has to stand behind a layer that makes that input, as in [`super::SelfAttention`].
pub struct Recompute<L> {
    inner: L,
    saved: Option<(Tensor, Place)>,
}

impl<L> Recompute<L> {
    /// Around this layer.
    pub fn new(inner: L) -> Self {
        Recompute { inner, saved: None }
    }
}

impl<B: Backend, L: Layer<B>> Layer<B> for Recompute<L> {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        self.saved = planner.training().then(|| (x.clone(), planner.place()));
        self.inner.forward(planner, x)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let (x, place) = planned(self.saved.take(), "recompute")?;
        let inner = &mut self.inner;
        let again = planner.again(&place, |planner| inner.forward(planner, x))?;
        let dx = inner.backward(planner, dy)?;
        planner.drop_unread(again);
        Ok(dx)
    }
}
