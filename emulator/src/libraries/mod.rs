//! Stand-ins for NVIDIA's libraries: the calls that Warpstep makes of them.

mod convolution;
mod cublaslt;
mod cudnn;
mod nccl;
mod values;
