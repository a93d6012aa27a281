//! Kernel launches with named parts.

use std::ffi::c_void;

use cudarc::driver::{CudaStream, result};

use super::context::{Device, driver_error};
use super::{Cuda, Storage};
use crate::error::Result;

/// An argument of a kernel: its bytes, as the kernel's parameter takes them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arg([u64; ARG_WORDS]);

/// Room for the largest struct that is handed to a kernel by value.
const ARG_WORDS: usize = 13;

impl Arg {
    /// A struct that is laid out as the kernel's is.
    pub fn of<T: bytemuck::NoUninit>(value: &T) -> Self {
        const { assert!(size_of::<T>() <= ARG_WORDS * 8, "an argument larger than any expected") };
        let mut words = [0u64; ARG_WORDS];
        bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(value));
        Arg(words)
    }
}

macro_rules! arg {
    ($($ty:ty),*) => {$(
        impl From<$ty> for Arg {
            fn from(value: $ty) -> Self {
                Arg::of(&value)
            }
        }
    )*};
}
arg!(u64, i64, u32, i32, f32, f64);

impl From<usize> for Arg {
    /// Sizes are `i64` in kernels.
    fn from(value: usize) -> Self {
        Arg::from(value as u64)
    }
}

impl From<bool> for Arg {
    /// Flags are `int` in kernels.
    fn from(value: bool) -> Self {
        Arg::from(i32::from(value))
    }
}

/// Where and how wide a kernel runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    pub blocks: [u32; 3],
    pub threads: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

impl Grid {
    /// `blocks` blocks of `threads` threads in a row.
    pub fn new(blocks: usize, threads: u32) -> Self {
        Grid { blocks: [blocks.clamp(1, 0x7fff_ffff) as u32, 1, 1], threads: [threads, 1, 1], shared: 0 }
    }

    /// Enough blocks of 256 threads for `len` values, `per_thread` at a time, at most `most`: kernels loop.
    pub fn elements(device: &Device, len: usize, per_thread: usize) -> Self {
        Grid::new(len.div_ceil(256 * per_thread).min(device.multiprocessors() * 8), 256)
    }

    /// With so many bytes of dynamic shared memory.
    pub fn with_shared(self, shared: usize) -> Self {
        Grid { shared: shared as u32, ..self }
    }
}

/// Builds the list of a kernel's arguments.
macro_rules! args {
    ($($value:expr),* $(,)?) => {
        &mut [$($crate::backend::cuda::launch::Arg::from($value)),*]
    };
}
pub(super) use args;

/// Where each argument lies, as the driver wants to know.
pub(super) fn pointers(args: &mut [Arg]) -> Vec<*mut c_void> {
    args.iter_mut().map(|arg| arg.0.as_mut_ptr().cast()).collect()
}

impl<S: Storage> Cuda<S> {
    /// Queues the form for `S` of a kernel template: `name_f32`, `name_bf16` or `name_f16`.
    ///
    /// # Safety
    /// As [`Device::launch`].
    pub(super) unsafe fn launch(&self, file: &'static str, name: &str, grid: Grid, args: &mut [Arg]) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.device().launch(file, &format!("{name}_{}", S::NAME), grid, args) }
    }
}

impl Device {
    /// Queues a kernel of `kernels/<file>.cu`.
    ///
    /// # Safety
    /// `args` are what the kernel takes, in number, order and type, and its addresses hold what it reads and writes.
    pub(super) unsafe fn launch(&self, file: &'static str, kernel: &str, grid: Grid, args: &mut [Arg]) -> Result<()> {
        // SAFETY: as the caller promises.
        self.timed(kernel, || unsafe { self.launch_on(self.stream(), file, kernel, grid, args) })
    }

    /// Queues a kernel on another stream of the device.
    ///
    /// # Safety
    /// As [`Device::launch`].
    pub(super) unsafe fn launch_on(
        &self,
        stream: &CudaStream,
        file: &'static str,
        kernel: &str,
        grid: Grid,
        args: &mut [Arg],
    ) -> Result<()> {
        let function = self.function(file, kernel, grid.shared)?;
        let mut pointers = pointers(args);
        let [bx, by, bz] = grid.blocks;
        let [tx, ty, tz] = grid.threads;
        let stream = stream.cu_stream();
        let _claim = self.claim();
        // SAFETY: the function belongs to this context, which `function` bound; the arguments are as the caller promises.
        unsafe { result::launch_kernel(function, (bx, by, bz), (tx, ty, tz), grid.shared, stream, &mut pointers) }
            .map_err(|error| driver_error(&format!("launch {kernel}"), error))
    }
}
