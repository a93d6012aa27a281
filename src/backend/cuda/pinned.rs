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
        // A copy may be in flight, on either stream. What fails here was or will be reported where work is waited for.
        let _ = self.device.synchronize();
        let _ = self.device.copy_stream().synchronize();
        // SAFETY: allocated by `new`, freed once, and no work of the device names it any more.
        self.device.record(unsafe { result::free_host(self.at.cast()) });
    }
}

/// `struct Report` of kernels/report.cu.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct Pieces {
    from: [u64; MOST_PIECES],
    to: [u64; MOST_PIECES],
    words: [u32; MOST_PIECES],
    pieces: u64,
}

const MOST_PIECES: usize = 4;
const _: () = assert!(size_of::<Pieces>() == 88 && std::mem::offset_of!(Pieces, pieces) == 80);

/// A part of what a step found: where it stands, where it goes, and how many bytes, whole words of 4.
pub(super) struct Piece<'p> {
    pub from: u64,
    pub to: &'p Pinned,
    pub offset: usize,
    pub bytes: usize,
}

/// Queues one kernel that writes up to four pieces to page-locked memory, which nobody reads before `done` has passed; that memory
/// has the address for the device that it has for the host.
pub(super) fn report(device: &Device, pieces: &[Piece<'_>]) -> Result<()> {
    if pieces.is_empty() {
        return Ok(());
    }
    let mut of = Pieces { pieces: pieces.len() as u64, ..Pieces::default() };
    for (i, &Piece { from, to, offset, bytes }) in pieces.iter().enumerate() {
        if offset + bytes > to.bytes {
            let (expected, found) = (format!("{} bytes of a report", to.bytes), format!("{bytes} from {offset} on"));
            return Err(Error::shape("copy", expected, found));
        }
        (of.from[i], of.to[i], of.words[i]) = (from, to.at as u64 + offset as u64, (bytes / 4) as u32);
    }
    // SAFETY: the callers hand on where as many bytes stand; there is room for them, which the device alone writes until `done` has
    // passed.
    unsafe { device.launch("report", "report", Grid::new(1, 256), &mut [Arg::of(&of)]) }
}
