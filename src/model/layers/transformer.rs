//! The transformer block: attention and a feed-forward layer, each normalized first and added to what came in.

use super::combine::add;
use super::{Activation, Dropout, LayerNorm, Linear, RmsNorm, SelfAttention, SelfAttentionOptions, Swiglu, planned};
use crate::backend::Backend;
use crate::backend::ops::ActivationKind;
use crate::error::Result;
use crate::model::{Init, Layer, Planner, Tensor};

/// Which normalization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// [`LayerNorm`].
    LayerNorm,
    /// [`RmsNorm`].
    RmsNorm,
}

impl NormKind {
    /// The layer; `bias` is for [`LayerNorm`].
    pub fn layer<B: Backend>(self, epsilon: f64, bias: bool) -> Box<dyn Layer<B>> {
        match (self, bias) {
            (NormKind::LayerNorm, true) => Box::new(LayerNorm::new(epsilon)),
            (NormKind::LayerNorm, false) => Box::new(LayerNorm::new(epsilon).without_bias()),
            (NormKind::RmsNorm, _) => Box::new(RmsNorm::new(epsilon)),
        }
    }
}

/// What stands between the two linear layers of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HiddenActivation {
    /// A function of single values.
    Pointwise(ActivationKind),
    /// [`Swiglu`]: the first linear layer is twice as wide.
    Swiglu,
}

/// Linear (`c_fc`), activation, linear (`c_proj`): `[.., width]` to the same.
#[derive(Debug)]
pub struct FeedForward {
    hidden: usize,
    activation: HiddenActivation,
    bias: bool,
    init: Option<[Init; 2]>,
    parts: Option<(Linear, Middle, Linear)>,
}

#[derive(Debug)]
enum Middle {
    Pointwise(Activation),
    Swiglu(Swiglu),
}

impl Middle {
    fn layer<B: Backend>(&mut self) -> &mut dyn Layer<B> {
        match self {
            Middle::Pointwise(layer) => layer,
            Middle::Swiglu(layer) => layer,
        }
    }
}

impl FeedForward {
    /// With `hidden` values in between; `init` gives the first weights of the two linear layers (biases then start at 0)
    /// where they are not to be PyTorch's.
    pub fn new(hidden: usize, activation: HiddenActivation, bias: bool, init: Option<[Init; 2]>) -> Self {
        FeedForward { hidden, activation, bias, init, parts: None }
    }

    fn linear(&self, outputs: usize, which: usize) -> Linear {
        let layer = Linear::new(outputs);
        let layer = if self.bias { layer } else { layer.without_bias() };
        match self.init {
            Some(init) => layer.with_init(init[which], Init::Constant(0.0)),
            None => layer,
        }
    }
}

impl<B: Backend> Layer<B> for FeedForward {
    fn kind(&self) -> &'static str {
        "feed_forward"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let width = x.width();
        let (outputs, mut middle) = match self.activation {
            HiddenActivation::Pointwise(kind) => (self.hidden, Middle::Pointwise(Activation::new(kind))),
            HiddenActivation::Swiglu => (2 * self.hidden, Middle::Swiglu(Swiglu::new())),
        };
        let (mut first, mut second) = (self.linear(outputs, 0), self.linear(width, 1));
        let y = planner.scoped("c_fc", |planner| first.forward(planner, x))?;
        let y = middle.layer().forward(planner, y)?;
        let y = planner.scoped("c_proj", |planner| second.forward(planner, y))?;
        self.parts = Some((first, middle, second));
        Ok(y)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let (mut first, mut middle, mut second) = planned(self.parts.take(), "feed_forward")?;
        let dy = planned(second.backward(planner, dy)?, "feed_forward")?;
        let dy = planned(middle.layer().backward(planner, dy)?, "feed_forward")?;
        first.backward(planner, dy)
    }
}

/// Options of a [`TransformerBlock`].
#[derive(Clone, Debug)]
pub struct BlockOptions {
    /// Which normalization.
    pub norm: NormKind,
    /// Added to the variance, or to the mean of squares.
    pub epsilon: f64,
    /// Attention.
    pub attention: SelfAttentionOptions,
    /// Values between the linear layers of the feed-forward layer.
    pub hidden: usize,
    /// What stands there.
    pub activation: HiddenActivation,
    /// Biases, of the feed-forward layer and of layer norms.
    pub bias: bool,
    /// Dropout of what each branch adds.
    pub dropout: f64,
    /// Initial weights of the feed-forward layer's two linear layers, where not PyTorch's.
    pub init: Option<[Init; 2]>,
}

/// `x + attn(ln_1(x))`, then `x + mlp(ln_2(x))`: GPT-2's block, normalized first. `[batch, time, width]` to the same.
///
/// Parameters, in nanoGPT's names: `ln_1.weight`, `ln_1.bias`, `attn.c_attn.*`, `attn.c_proj.*`, `ln_2.*`, `mlp.c_fc.*`,
/// `mlp.c_proj.*`.
pub struct TransformerBlock<B: Backend> {
    branches: [Branch<B>; 2],
}

struct Branch<B: Backend> {
    names: [&'static str; 2],
    norm: Box<dyn Layer<B>>,
    inner: Box<dyn Layer<B>>,
    dropout: Dropout,
}

impl<B: Backend> TransformerBlock<B> {
    /// The block of these options.
    pub fn new(options: BlockOptions) -> Self {
        let BlockOptions { norm, epsilon, attention, hidden, activation, bias, dropout, init } = options;
        let branch =
            |names, inner| Branch { names, norm: norm.layer(epsilon, bias), inner, dropout: Dropout::new(dropout) };
        TransformerBlock {
            branches: [
                branch(["ln_1", "attn"], Box::new(SelfAttention::new(attention)) as Box<dyn Layer<B>>),
                branch(["ln_2", "mlp"], Box::new(FeedForward::new(hidden, activation, bias, init))),
            ],
        }
    }
}

impl<B: Backend> Layer<B> for TransformerBlock<B> {
    fn kind(&self) -> &'static str {
        "transformer_block"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, mut x: Tensor) -> Result<Tensor> {
        for Branch { names, norm, inner, dropout } in &mut self.branches {
            let y = planner.scoped(names[0], |planner| norm.forward(planner, x.clone()))?;
            let y = planner.scoped(names[1], |planner| inner.forward(planner, y))?;
            let y = dropout.forward(planner, y)?;
            x = add(planner, y, x)?;
        }
        Ok(x)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, mut dy: Tensor) -> Result<Option<Tensor>> {
        for Branch { norm, inner, dropout, .. } in self.branches.iter_mut().rev() {
            let d = planned(dropout.backward(planner, dy.clone())?, "transformer_block")?;
            let d = planned(inner.backward(planner, d)?, "transformer_block")?;
            match norm.backward(planner, d)? {
                Some(d) => dy = add(planner, d, dy)?,
                None => return Ok(None),
            }
        }
        Ok(Some(dy))
    }
}
