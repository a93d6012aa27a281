//! The operation families: a small trait each, and an argument struct for each operation.
//!
//! Shapes stand in brackets, outermost dimension first; every tensor is contiguous in that order. Each field that an
//! operation writes says `=` (overwrites) or `+=` (adds); gradients of parameters follow [`super::Grad`].

mod activation;
mod attention;
mod conv;
mod elementwise;
mod embedding;
mod linear;
mod loss;
mod mel;
mod norm;
mod pool;
mod update;

pub use activation::*;
pub use attention::*;
pub use conv::*;
pub use elementwise::*;
pub use embedding::*;
pub use linear::*;
pub use loss::*;
pub use mel::*;
pub use norm::*;
pub use pool::*;
pub use update::*;
