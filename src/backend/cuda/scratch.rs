//! Memory for what one operation leaves for its own next kernel.

use std::sync::{Arc, PoisonError};

use cudarc::driver::{CudaContext, result};

use super::claim::Claim;
use super::context::Device;
use crate::error::{Error, Result};

/// What addresses of it are multiples of: NVIDIA's libraries expect what `cudaMalloc` aligns to.
pub(super) const ALIGNMENT: usize = 256;

/// Scratch memory of a device. Recordings name it, so each keeps it from being freed.
#[derive(Debug)]
pub(super) struct Block {
    address: u64,
    bytes: usize,
    context: Arc<CudaContext>,
}

impl Drop for Block {
    fn drop(&mut self) {
        release(&self.context, self.address);
    }
}

/// Frees device memory, after the work that is queued; what fails is told where work is waited for next.
pub(super) fn release(context: &CudaContext, address: u64) {
    let freed = context.bind_to_thread().and_then(|()| {
        // SAFETY: the callers own what the driver allocated there, and nothing names it any more; the driver waits for work in flight.
        unsafe { result::free_sync(address) }
    });
    context.record_err(freed);
}

/// Scratch memory while an operation uses it: meanwhile no other thread queues anything on the device.
pub(super) struct Scratch<'d> {
    address: u64,
    _claim: Claim<'d>,
}

impl Scratch<'_> {
    /// Where it begins; 0 where nothing was asked for yet.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Device {
    /// Scratch memory of so many bytes: its contents mean nothing to anybody else. It is as large as the most that was asked for,
    /// which is known by the end of the first, unrecorded run of a program, if not before ([`Device::reserve`]).
    pub(super) fn scratch(&self, bytes: usize) -> Result<Scratch<'_>> {
        let claim = self.claim();
        let mut kept = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.as_ref().map_or(0, |block| block.bytes) < bytes {
            if self.is_recording()? {
                return Err(Error::DeviceFailed(format!(
                    "{bytes} bytes of scratch memory were asked for within a recording"
                )));
            }
            // Before the larger is there, unless a recording names it.
            *kept = None;
            let bytes = bytes.next_multiple_of(ALIGNMENT);
            *kept = Some(Arc::new(Block { address: self.allocate(bytes)?, bytes, context: self.context().clone() }));
        }
        Ok(Scratch { address: kept.as_ref().map_or(0, |block| block.address), _claim: claim })
    }

    /// The scratch memory that is used at present, for recordings to keep.
    pub(super) fn scratch_block(&self) -> Option<Arc<Block>> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
