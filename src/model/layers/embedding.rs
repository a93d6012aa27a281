//! Tables of vectors for tokens and positions.

use super::planned;
use crate::backend::ops::{EmbeddingBackward, EmbeddingForward, Padding, PositionBackward, PositionForward};
use crate::backend::{Backend, Indices, Param};
use crate::error::{Error, Result};
use crate::model::{Init, Layer, Planner, Tensor};

/// `torch.nn.Embedding`: tokens `[batch, time] -> [batch, time, width]`. Parameter `weight` `[vocabulary, width]`, standard
/// normal at first, as PyTorch's, unless told otherwise.
#[derive(Debug)]
pub struct Embedding {
    vocabulary: usize,
    width: usize,
    init: Init,
    pad: Option<i32>,
    saved: Option<(Indices, Param, [usize; 2])>,
}

impl Embedding {
    /// A table of `vocabulary` vectors of `width`.
    pub fn new(vocabulary: usize, width: usize) -> Self {
        Embedding { vocabulary, width, init: Init::Normal { std: 1.0 }, pad: None, saved: None }
    }

    /// With other initial values.
    #[must_use]
    pub fn with_init(mut self, init: Init) -> Self {
        self.init = init;
        self
    }

    /// Says that token `pad` stands for nothing: attention does not see it, a mean over time does not count it.
    #[must_use]
    pub fn with_padding(mut self, pad: i32) -> Self {
        self.pad = Some(pad);
        self
    }
}

impl<B: Backend> Layer<B> for Embedding {
    fn kind(&self) -> &'static str {
        "embedding"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let tokens = x.tokens("embedding")?;
        let [batch, time] = x.dimensions("embedding", "[batch, time]")?;
        let (vocabulary, width) = (self.vocabulary, self.width);
        let weight = planner.parameter("weight", &[vocabulary, width], self.init)?;
        if let Some(pad) = self.pad {
            planner.set_padding(Padding { tokens, pad });
        }
        let (y, output) = planner.tensor(&[batch, time, width], true);
        planner.emit(EmbeddingForward { tokens, weight, positions: None, y, batch, time, width, vocabulary });
        self.saved = Some((tokens, weight, [batch, time]));
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let (tokens, weight, [batch, time]) = planned(self.saved.take(), "embedding")?;
        let dweight = planner.gradient(weight);
        planner.emit(EmbeddingBackward {
            tokens,
            dy: dy.real("embedding")?,
            dweight,
            dpositions: None,
            batch,
            time,
            width: self.width,
            vocabulary: self.vocabulary,
        });
        Ok(None)
    }
}

/// Adds a learned vector for each position: `[batch, time, width]`, time at most `positions`. Parameter `weight`
/// `[positions, width]`.
#[derive(Debug)]
pub struct Positions {
    positions: usize,
    init: Init,
    saved: Option<(Param, bool)>,
}

impl Positions {
    /// A table for `positions` positions, normal with deviation 0.02 at first (GPT-2's).
    pub fn new(positions: usize) -> Self {
        Positions { positions, init: Init::Normal { std: 0.02 }, saved: None }
    }

    /// With other initial values.
    #[must_use]
    pub fn with_init(mut self, init: Init) -> Self {
        self.init = init;
        self
    }
}

impl<B: Backend> Layer<B> for Positions {
    fn kind(&self) -> &'static str {
        "positions"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let [batch, time, width] = x.dimensions("positions", "[batch, time, width]")?;
        if time > self.positions {
            return Err(Error::shape("positions", format!("at most {} positions", self.positions), time.to_string()));
        }
        let weight = planner.parameter("weight", &[self.positions, width], self.init)?;
        let (y, output) = planner.tensor(&x.shape, true);
        planner.emit(PositionForward { x: x.real("positions")?, weight, y, batch, time, width });
        self.saved = Some((weight, x.needs_gradient));
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let (weight, needs_gradient) = planned(self.saved.take(), "positions")?;
        let [batch, time, width] = dy.dimensions("positions", "[batch, time, width]")?;
        let dweight = planner.gradient(weight);
        planner.emit(PositionBackward { dy: dy.real("positions")?, dweight, batch, time, width });
        Ok(needs_gradient.then_some(dy))
    }
}

/// Token vectors plus learned position vectors, as at the foot of GPT-2: `[batch, time] -> [batch, time, width]`. Parameters
/// `wte.weight` `[vocabulary, width]` and `wpe.weight` `[positions, width]`.
#[derive(Debug)]
pub struct TokenAndPosition {
    vocabulary: usize,
    positions: usize,
    width: usize,
    init: Init,
    saved: Option<(Indices, [Param; 2], [usize; 2])>,
}

impl TokenAndPosition {
    /// Tables of `vocabulary` tokens and `positions` positions, normal with deviation 0.02 at first (GPT-2's).
    pub fn new(vocabulary: usize, positions: usize, width: usize) -> Self {
        TokenAndPosition { vocabulary, positions, width, init: Init::Normal { std: 0.02 }, saved: None }
    }
}

impl<B: Backend> Layer<B> for TokenAndPosition {
    fn kind(&self) -> &'static str {
        "embedding"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let tokens = x.tokens("embedding")?;
        let [batch, time] = x.dimensions("embedding", "[batch, time]")?;
        let TokenAndPosition { vocabulary, width, init, .. } = *self;
        if time > self.positions {
            return Err(Error::shape("positions", format!("at most {} positions", self.positions), time.to_string()));
        }
        let weight = planner.scoped("wte", |planner| planner.parameter("weight", &[vocabulary, width], init))?;
        let table = planner.scoped("wpe", |planner| planner.parameter("weight", &[self.positions, width], init))?;
        let (y, output) = planner.tensor(&[batch, time, width], true);
        planner.emit(EmbeddingForward { tokens, weight, positions: Some(table), y, batch, time, width, vocabulary });
        self.saved = Some((tokens, [weight, table], [batch, time]));
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let (tokens, [weight, table], [batch, time]) = planned(self.saved.take(), "embedding")?;
        let dweight = planner.gradient(weight);
        let dpositions = Some(planner.gradient(table));
        planner.emit(EmbeddingBackward {
            tokens,
            dy: dy.real("embedding")?,
            dweight,
            dpositions,
            batch,
            time,
            width: self.width,
            vocabulary: self.vocabulary,
        });
        Ok(None)
    }
}
