//! Whole models, each from options that a run file can give.

mod gpt;
mod text_encoder;

pub use gpt::{GptOptions, GptPositions};
pub use text_encoder::TextEncoderOptions;
