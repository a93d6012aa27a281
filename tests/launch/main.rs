//! Who a process is, as any launcher says it, and the launcher of this house.

#[path = "../common/mod.rs"]
mod common;
mod processes;
mod training;
mod world;
