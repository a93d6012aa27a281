//! Memory of a device.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::context::Device;
use crate::error::{Error, Result};

/// `len` values of `T` on a device, 256-byte aligned.
#[derive(Debug)]
pub struct Buffer<T> {
    address: u64,
    len: usize,
    identity: u64,
    device: Arc<Device>,
    of: PhantomData<T>,
}

/// Buffers of this process so far.
static MADE: AtomicU64 = AtomicU64::new(0);

impl<T: bytemuck::Pod> Buffer<T> {
    /// A buffer of zeros.
    ///
    /// # Errors
    /// Not enough memory: what was asked, what was free, what to change.
    pub fn zeros(device: &Arc<Device>, len: usize) -> Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| Error::Device("a buffer of 2^64 bytes".into()))?;
        // Nothing has an address too, so that a pointer to it can be handed on.
        let address = device.allocate(bytes.max(1))?;
        let identity = MADE.fetch_add(1, Ordering::Relaxed) + 1;
        let buffer = Buffer { address, len, identity, device: device.clone(), of: PhantomData };
        device.fill_zero(address, bytes)?;
        Ok(buffer)
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A number above 0 that no other buffer has: an address is another's once this one is freed.
    pub(super) fn identity(&self) -> u64 {
        self.identity
    }

    /// Device address of a value.
    pub(super) fn address_of(&self, index: usize) -> u64 {
        debug_assert!(index <= self.len);
        self.address + (index * size_of::<T>()) as u64
    }

    /// Address of some of its values.
    ///
    /// # Errors
    /// Values that it does not have.
    pub(super) fn part(&self, values: &Range<usize>) -> Result<u64> {
        if values.start > values.end || values.end > self.len {
            return Err(Error::shape("slice", format!("a part of {} elements", self.len), format!("{values:?}")));
        }
        Ok(self.address_of(values.start))
    }

    /// Copies host memory into the buffer, from value `offset` on (`=`), in the order of the device's stream.
    ///
    /// # Errors
    /// A copy that does not fit, or a device that failed.
    pub fn write(&mut self, offset: usize, from: &[T]) -> Result<()> {
        self.check(offset, from.len())?;
        self.device.write(self.address_of(offset), bytemuck::cast_slice(from))
    }

    /// Copies the buffer, from value `offset` on, into host memory (`=`), after all work before it is done.
    ///
    /// # Errors
    /// A copy that does not fit, or a device that failed.
    pub fn read(&self, offset: usize, to: &mut [T]) -> Result<()> {
        self.check(offset, to.len())?;
        self.device.read(self.address_of(offset), bytemuck::cast_slice_mut(to))
    }

    fn check(&self, offset: usize, part: usize) -> Result<()> {
        if offset.checked_add(part).is_some_and(|end| end <= self.len) {
            return Ok(());
        }
        let found = format!("{part} elements from {offset} on");
        Err(Error::shape("copy", format!("a part of {} elements", self.len), found))
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        self.device.release(self.address);
    }
}
