//! Stand-ins for NVIDIA's libraries: the calls that Warpstep makes of them.

mod cublaslt;
mod nccl;
mod values;
