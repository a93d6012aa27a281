//! The benchmark: what the device can do, what an update, an operation, a training step and the reading of data get out of it,
//! and what the limits are.
//!
//! [`measure`] is the harness: nothing else takes a time. Each suite has a file of its own; [`unit()`](unit::unit) gives the works
//! that others do too, to be run in turn with theirs.

pub mod all_reduce;
pub mod compare;
pub mod data;
pub mod device;
pub mod interrupt;
pub mod kernel;
pub mod layers;
pub mod machine;
pub mod measure;
pub mod output;
pub mod peers;
pub mod place;
pub mod report;
pub mod results;
pub mod run;
mod samples;
pub mod speeds;
pub mod step;
pub mod table;
pub mod together;
pub mod unit;
pub mod update;
pub mod works;
