//! Multi-head attention.

use super::dropout::check_probability;
use super::{Linear, planned};
use crate::backend::ops::{AttentionBackward, AttentionDropout, AttentionForward, AttentionGeometry, Padding, Rotary};
use crate::backend::{Act, Backend};
use crate::error::{Error, Result};
use crate::model::{Init, Layer, Planner, Tensor};

/// Rotary positions (Su et al. 2021).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RotaryOptions {
    /// 10,000 in the paper.
    pub base: f64,
    /// Pairs are neighbours, as in the paper, rather than halves of a head apart, as in Llama.
    pub interleaved: bool,
}

impl Default for RotaryOptions {
    fn default() -> Self {
        RotaryOptions { base: 10_000.0, interleaved: false }
    }
}

/// Attention over packed queries, keys and values: `[batch, time, (heads + 2 kv_heads) head_size] -> [batch, time, heads
/// head_size]`. It has no parameter. With rotary positions it turns its input in place: nothing else may read that.
#[derive(Debug)]
pub struct Attention {
    heads: usize,
    kv_heads: usize,
    causal: bool,
    dropout: f64,
    rotary: Option<RotaryOptions>,
    saved: Option<Saved>,
}

#[derive(Clone, Copy, Debug)]
struct Saved {
    qkv: Act,
    y: Act,
    log_sum_exp: Act,
    geometry: AttentionGeometry,
    dropout: Option<AttentionDropout>,
    padding: Option<Padding>,
}

impl Attention {
    /// `heads` query heads, as many key heads; each position sees all, or, `causal`, itself and those before.
    pub fn new(heads: usize, causal: bool) -> Self {
        Attention { heads, kv_heads: heads, causal, dropout: 0.0, rotary: None, saved: None }
    }

    /// With fewer key and value heads, each shared by a group of queries (Ainslie et al. 2023).
    #[must_use]
    pub fn with_kv_heads(mut self, kv_heads: usize) -> Self {
        self.kv_heads = kv_heads;
        self
    }

    /// With dropout of probabilities.
    #[must_use]
    pub fn with_dropout(mut self, probability: f64) -> Self {
        self.dropout = probability;
        self
    }

    /// With rotary positions on queries and keys.
    #[must_use]
    pub fn with_rotary(mut self, rotary: Option<RotaryOptions>) -> Self {
        self.rotary = rotary;
        self
    }

    fn turn<B: Backend>(&self, planner: &mut Planner<'_, B>, x: Act, g: &AttentionGeometry, inverse: bool) {
        if let Some(RotaryOptions { base, interleaved }) = self.rotary {
            planner.emit(Rotary {
                x,
                batch: g.batch,
                time: g.time,
                row_width: g.packed_width(),
                heads: g.heads + g.kv_heads,
                head_size: g.head_size,
                base,
                interleaved,
                inverse,
            });
        }
    }
}

impl<B: Backend> Layer<B> for Attention {
    fn kind(&self) -> &'static str {
        "attention"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let [batch, time, packed] = x.dimensions("attention", "[batch, time, packed queries, keys, values]")?;
        let Attention { heads, kv_heads, causal, .. } = *self;
        check_probability(self.dropout)?;
        if heads == 0 || kv_heads == 0 || heads % kv_heads != 0 || packed % (heads + 2 * kv_heads) != 0 {
            return Err(Error::shape(
                "attention",
                "heads that are a multiple of kv_heads, and a width that is a multiple of the heads",
                format!("{heads} heads, {kv_heads} kv_heads, packed width {packed}"),
            ));
        }
        let head_size = packed / (heads + 2 * kv_heads);
        if self.rotary.is_some() && head_size % 2 != 0 {
            return Err(Error::shape("rotary positions", "an even head size", head_size.to_string()));
        }
        let geometry = AttentionGeometry { batch, time, heads, kv_heads, head_size, causal };
        let qkv = x.real("attention")?;
        self.turn(planner, qkv, &geometry, false);
        let (y, output) = planner.tensor(&[batch, time, geometry.width()], x.needs_gradient);
        let log_sum_exp = planner.statistic(batch * heads * time);
        let dropout = (planner.training() && self.dropout > 0.0)
            .then(|| AttentionDropout { probability: self.dropout, stream: planner.stream() });
        let padding = planner.padding();
        planner.emit(AttentionForward { qkv, y, log_sum_exp, geometry, dropout, padding });
        self.saved = Some(Saved { qkv, y, log_sum_exp, geometry, dropout, padding });
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let Saved { qkv, y, log_sum_exp, geometry, dropout, padding } = planned(self.saved.take(), "attention")?;
        let shape = [geometry.batch, geometry.time, geometry.packed_width()];
        let (dqkv, tensor) = planner.tensor(&shape, true);
        let dy = dy.real("attention")?;
        planner.emit(AttentionBackward { qkv, y, dy, log_sum_exp, dqkv, geometry, dropout, padding });
        self.turn(planner, dqkv, &geometry, true);
        Ok(Some(tensor))
    }
}

/// Options of [`SelfAttention`].
#[derive(Clone, Debug)]
pub struct SelfAttentionOptions {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Whether a position sees itself and earlier ones only.
    pub causal: bool,
    /// Biases in both linear layers.
    pub bias: bool,
    /// Dropout of probabilities.
    pub dropout: f64,
    /// Rotary positions.
    pub rotary: Option<RotaryOptions>,
    /// Initial weights of the packed and of the output projection, where not PyTorch's.
    pub init: Option<[Init; 2]>,
}

/// Packed projection (`c_attn`), [`Attention`], output projection (`c_proj`): `[batch, time, width]` to the same.
#[derive(Debug)]
pub struct SelfAttention {
    options: SelfAttentionOptions,
    parts: Option<(Linear, Attention, Linear)>,
}

impl SelfAttention {
    /// The layer of these options.
    pub fn new(options: SelfAttentionOptions) -> Self {
        SelfAttention { options, parts: None }
    }
}

impl<B: Backend> Layer<B> for SelfAttention {
    fn kind(&self) -> &'static str {
        "self_attention"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        let SelfAttentionOptions { heads, kv_heads, causal, bias, dropout, rotary, init } = self.options.clone();
        let width = x.width();
        if heads == 0 || !width.is_multiple_of(heads) {
            let found = format!("width {width}, {heads} heads");
            return Err(Error::shape("self_attention", "a width that is a multiple of the heads", found));
        }
        let linear = |outputs: usize, which: usize| {
            let layer = Linear::new(outputs);
            let layer = if bias { layer } else { layer.without_bias() };
            match init {
                Some(init) => layer.with_init(init[which], Init::Constant(0.0)),
                None => layer,
            }
        };
        let mut packed = linear((heads + 2 * kv_heads) * (width / heads), 0);
        let mut attention =
            Attention::new(heads, causal).with_kv_heads(kv_heads).with_dropout(dropout).with_rotary(rotary);
        let mut projection = linear(width, 1);
        let qkv = planner.scoped("c_attn", |planner| packed.forward(planner, x))?;
        let y = attention.forward(planner, qkv)?;
        let y = planner.scoped("c_proj", |planner| projection.forward(planner, y))?;
        self.parts = Some((packed, attention, projection));
        Ok(y)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let (mut packed, mut attention, mut projection) = planned(self.parts.take(), "self_attention")?;
        let through = |dx: Option<Tensor>| planned(dx, "self_attention");
        let dy = through(projection.backward(planner, dy)?)?;
        let dy = through(attention.backward(planner, dy)?)?;
        packed.backward(planner, dy)
    }
}
