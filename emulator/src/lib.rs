//! An emulated CUDA device: executes PTX, instruction by instruction, where there is no GPU.
//!
//! [`ptx`] reads what nvcc emits, [`exec`] runs it over [`memory`] and finds what hardware does not tell ([`fault`]), and
//! counts what it cost ([`counts`]).

pub mod counts;
pub mod driver;
pub mod exec;
pub mod fatbin;
pub mod fault;
mod libraries;
pub mod memory;
pub mod ptx;
