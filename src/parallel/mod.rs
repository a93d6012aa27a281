//! Several processes that train one model: what they do together, and how their gradients become those of the whole batch.
//!
//! A [`Collective`] is an engine that exists: MPI between CPUs, NCCL between GPUs. What is done by it is written once
//! ([`Gradients`]).

mod buckets;
mod collective;
mod gradients;
#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
mod options;
pub mod rendezvous;
pub mod scaling;
mod tree;
pub mod watch;
pub mod world;

pub use buckets::{Bucket, buckets};
pub use collective::{Collective, Single, agree, broadcast, gather, host_slice};
pub use gradients::{Gradients, GradientsOptions, Wire};
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub use nccl::{ID_BYTES, Nccl};
pub use options::ParallelOptions;
pub use tree::{room_of_tree, tree_sum};
