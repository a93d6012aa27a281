//! An emulated CUDA device: executes PTX, instruction by instruction, where there is no GPU.
//!
//! [`ptx`] reads what nvcc emits, [`exec`] runs it over [`memory`] and finds what hardware does not tell ([`fault`]), and
//! counts what it cost ([`counts`]). [`driver`] is the interface that programs load as `libcuda.so`; beside it stand NVIDIA's
//! libraries as far as Warpstep calls them. [`fatbin`] takes the PTX out of what nvcc packs.
//!
//! # What is emulated
//!
//! - PTX of `compute_80` as nvcc 13 writes it: arithmetic with its roundings, packed halves, predicates and divergence, jumps by
//!   tables, functions that are called, vectors, atomics, asynchronous copies, `ldmatrix` and `mma`, shuffles, votes, named
//!   barriers, fences, and cooperative launches with barriers of the whole grid. Of what compute capability 9.0 has besides,
//!   `wgmma` with 16-bit factors, the left one in registers, the right one swizzled over 128 bytes. An instruction that is not
//!   known is an error with its line when the module is loaded, never passed over.
//! - Every access of a kernel is checked: bounds, freed memory, alignment, memory of other devices, reads of what nothing wrote,
//!   and data races between lanes, warps and blocks, by the memory model's release and acquire. So is what `wgmma` asks of a
//!   program that it runs beside: fences of registers and of shared memory, and nothing touched until it is waited for. (Who wrote
//!   to shared memory is to publish it: a fence of the reader's alone counts for nothing here.)
//! - Streams, events, graphs, several devices with memory of their own.
//!
//! # What is not
//!
//! - Time. Work is done when it is queued, in order; nothing overlaps, and clocks say nothing of a GPU's speed.
//! - Machine code: what ptxas makes of the PTX (registers, spills, contraction) is not seen.
//! - Caches and their hints, textures, clusters, `mbarrier`, the tensor memory accelerator, recursion, calls by address, `printf`.
//! - Approximate instructions give the nearest value, `mma` sums in f64 and rounds once: within what the ISA allows, but not the
//!   bits of any one GPU.
//! - Locks that lanes of one warp take from each other: they can turn for ever here.
//!
//! # Variables of the environment
//!
//! `WARPSTEP_EMULATOR_DEVICES` (1), `WARPSTEP_EMULATOR_MEMORY` (bytes of each, 16 GiB), `WARPSTEP_EMULATOR_DRIVER` (the version that
//! the driver tells, 13000), `WARPSTEP_EMULATOR_CHECKS=off` (neither races nor unwritten reads are looked for),
//! `CUDA_VISIBLE_DEVICES` as the driver has it.

pub mod counts;
pub mod driver;
pub mod exec;
pub mod fatbin;
pub mod fault;
mod libraries;
pub mod memory;
pub mod ptx;
mod tell;
