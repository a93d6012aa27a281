//! Several processes that train one model: what they do together, and how their gradients become those of the whole batch.
//!
//! A [`Collective`] is an engine that exists: MPI between CPUs, NCCL between GPUs. What is done by it is written once
//! ([`Gradients`], and, where each process keeps a part of them alone, [`Windowed`]).

mod buckets;
mod collective;
mod footprint;
mod gradients;
mod kept;
#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
mod options;
mod ranks;
mod reducer;
pub mod rendezvous;
pub mod scaling;
mod sharding;
mod tree;
pub mod watch;
mod watched;
mod windowed;
pub mod world;

pub use buckets::{Bucket, buckets};
pub use collective::{Collective, Single, agree, any, broadcast, gather, host_slice};
pub use footprint::Footprint;
pub use gradients::{Gradients, GradientsOptions, Wire};
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub use nccl::{ID_BYTES, Nccl, Prepared};
pub use options::{ParallelOptions, Shard};
pub use sharding::{Sharding, ShardingOptions};
pub use tree::{room_of_tree, tree_reduce_scatter, tree_sum};
pub use watched::Watched;
pub use windowed::Windowed;
