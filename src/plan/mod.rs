//! Arithmetic of memory and of work: where each parameter lies in its arena, where each activation lies in its buffer, which part
//! of a batch is whose, and which part of an arena.
//!
//! Nothing here touches memory or knows a backend.

mod layout;
mod memory;
mod shard;
mod share;

pub use layout::{ALIGNMENT, ParamEntry, ParamLayout, ParamSpec};
pub use memory::{Lifetime, MemoryPlan};
pub use shard::{Gather, Hold, Window, overlap, shards};
pub use share::{PassOf, Share};
