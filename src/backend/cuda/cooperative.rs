//! Cooperative launches: all blocks of a kernel are resident at once, so that they may wait for each other.

use cudarc::driver::{result, sys};

use super::context::{Device, driver_error};
use super::launch::{Arg, Grid, pointers};
use crate::error::Result;

impl Device {
    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<usize> {
        let value = self.stream().context().attribute(attribute);
        let value = value.map_err(|error| driver_error("ask for an attribute of the device", error))?;
        Ok(usize::try_from(value).unwrap_or(0))
    }

    /// Bytes of the second-level cache.
    pub(super) fn cache_bytes(&self) -> Result<usize> {
        self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)
    }

    /// How many blocks of `threads` threads of a kernel are resident at once; 0 where the device launches nothing cooperatively.
    pub(super) fn resident_blocks(&self, file: &'static str, kernel: &str, threads: u32) -> Result<usize> {
        if self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)? == 0 {
            return Ok(0);
        }
        let function = self.function(file, kernel, 0)?;
        // SAFETY: the function is valid; the call only asks.
        let blocks = unsafe { result::occupancy::max_active_block_per_multiprocessor(function, threads as i32, 0) };
        let blocks = blocks.map_err(|error| driver_error(&format!("ask how many blocks of {kernel} fit"), error))?;
        Ok(usize::try_from(blocks).unwrap_or(0) * self.multiprocessors())
    }

    /// Queues a kernel of `kernels/<file>.cu` whose blocks wait for each other. A graph records it as it does any launch.
    ///
    /// # Safety
    /// As [`Device::launch`]; the grid has at most [`Device::resident_blocks`].
    pub(super) unsafe fn launch_cooperative(
        &self,
        file: &'static str,
        kernel: &str,
        grid: Grid,
        args: &mut [Arg],
    ) -> Result<()> {
        let function = self.function(file, kernel, grid.shared)?;
        self.timed(kernel, || {
            let mut pointers = pointers(args);
            let stream = self.stream().cu_stream();
            // SAFETY: the function belongs to this context, which `function` bound; the rest is as the caller promises.
            unsafe {
                result::launch_cooperative_kernel(
                    function,
                    grid.blocks.into(),
                    grid.threads.into(),
                    grid.shared,
                    stream,
                    &mut pointers,
                )
            }
            .map_err(|error| driver_error(&format!("launch {kernel}"), error))
        })
    }
}
