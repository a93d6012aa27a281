//! Arithmetic of memory: where each parameter lies in its arena, where each activation lies in its buffer.
//!
//! Nothing here touches memory or knows a backend.

mod layout;
mod memory;

pub use layout::{ALIGNMENT, ParamEntry, ParamLayout, ParamSpec};
pub use memory::{Lifetime, MemoryPlan};
