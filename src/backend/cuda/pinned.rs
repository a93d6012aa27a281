//! Page-locked host memory.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::result;

use super::context::{Device, driver_error};
use super::launch::{Arg, Grid};
use crate::error::{Error, Result};

/// Page-locked host memory, which the device copies from and to without the host's help.
#[derive(Debug)]
pub(super) struct Pinned {
    at: *mut u8,
    bytes: usize,
    device: Arc<Device>,
}

// SAFETY: the memory is reached through `&mut Pinned`, or by the device while its owner knows not to.
unsafe impl Send for Pinned {}

impl Pinned {
    /// So many zero bytes, 256-byte aligned.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        device.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: the context is bound; the address is freed once, by `drop`.
        let at = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|error| driver_error(&format!("lock {bytes} bytes of host memory"), error))?
            .cast::<u8>();
        // SAFETY: `bytes` bytes were allocated there.
        unsafe { at.write_bytes(0, bytes) };
        Ok(Pinned { at, bytes, device: device.clone() })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// The bytes. The caller knows that the device does not write them now.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated, and set, by `new`.
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }
    }

    /// The bytes. The caller knows that the device does not read or write them now.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated, and set, by `new`.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A copy may be in flight. What fails here was or will be reported where work is waited for.
        let _ = self.device.synchronize();
        // SAFETY: allocated by `new`, freed once, and no work of the device names it any more.
        self.device.record(unsafe { result::free_host(self.at.cast()) });
    }
}

/// Whether so many bytes from `offset` on are some of `to`.
fn fits(to: &Pinned, offset: usize, bytes: usize) -> Result<()> {
    if offset + bytes > to.bytes {
        return Err(Error::shape(
            "copy",
            format!("{} bytes of a report", to.bytes),
            format!("{bytes} from {offset} on"),
        ));
    }
    Ok(())
}

/// Queues a copy of what the device found to page-locked memory, which nobody reads before `done` has passed.
pub(super) fn copy_out(device: &Device, to: &Pinned, offset: usize, from: u64, bytes: usize) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    fits(to, offset, bytes)?;
    // SAFETY: the page-locked memory holds as many bytes there, which the device alone writes until `done` has passed.
    unsafe {
        let to = std::slice::from_raw_parts_mut(to.at.add(offset), bytes);
        result::memcpy_dtoh_async(to, from, device.stream().cu_stream())
    }
    .map_err(|error| driver_error("copy what a step found", error))
}

/// `struct Report` of kernels/report.cu.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct Pieces {
    from: [u64; MOST_PIECES],
    to: [u64; MOST_PIECES],
    words: [u32; MOST_PIECES],
    pieces: u32,
}

const MOST_PIECES: usize = 3;
const _: () = assert!(size_of::<Pieces>() == 64 && std::mem::offset_of!(Pieces, words) == 48);

/// As [`copy_out`] for up to three pieces (from where, to which offset, how many bytes), by one kernel: page-locked memory has the
/// address for the device that it has for the host. Pieces are whole words of 4 bytes.
pub(super) fn report(device: &Device, to: &Pinned, pieces: &[(u64, usize, usize)]) -> Result<()> {
    let mut of = Pieces::default();
    for (i, &(from, offset, bytes)) in pieces.iter().enumerate() {
        fits(to, offset, bytes)?;
        (of.from[i], of.to[i], of.words[i]) = (from, to.at as u64 + offset as u64, (bytes / 4) as u32);
        of.pieces = i as u32 + 1;
    }
    if pieces.is_empty() {
        return Ok(());
    }
    // SAFETY: the callers hand on where as many bytes stand; there is room for them, which the device alone writes until `done` has
    // passed.
    unsafe { device.launch("report", "report", Grid::new(1, 256), &mut [Arg::of(&of)]) }
}
