//! Every byte that emulated devices can address.
//!
//! Device addresses are addresses of this process, within one reserved range. Allocations are handed out from its start to its
//! end, each with an unmapped gap behind it, and never twice: so an access past an end or after a free is found, not lost in
//! another allocation. Two shadows lie beside the range: one byte for each byte says whether anything wrote it, and two entries
//! for each word of 4 bytes say who touched it last ([`crate::exec`] finds races by them).

use std::collections::{BTreeMap, HashSet};
use std::sync::{OnceLock, RwLock};

use crate::fault::{Fault, FaultKind, Range, Space};

/// Device number of pinned host memory.
pub const HOST: u32 = u32::MAX;

/// Bytes of the reserved range.
const RESERVED: usize = 1 << 38;
const PAGE: usize = 4096;
/// Bytes of the shadow that holds accesses, for each byte of memory: two entries of 8 for a word of 4.
const TRACE: usize = 4;

/// One live or freed allocation.
#[derive(Clone, Copy, Debug)]
struct Allocation {
    bytes: usize,
    device: u32,
    live: bool,
}

#[derive(Debug, Default)]
struct Table {
    allocations: BTreeMap<u64, Allocation>,
    used: usize,
    in_use: BTreeMap<u32, usize>,
    /// Who may reach whose memory.
    peers: HashSet<(u32, u32)>,
}

/// The memory of all emulated devices of a process.
#[derive(Debug)]
pub struct Memory {
    base: u64,
    written: u64,
    trace: u64,
    capacity: usize,
    table: RwLock<Table>,
}

fn reserve(bytes: usize) -> u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh anonymous mapping, at an address that the kernel chooses.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
    assert!(start != libc::MAP_FAILED, "the emulated device cannot reserve {bytes} bytes of address space");
    start as u64
}

fn protect(start: u64, bytes: usize, protection: i32) -> bool {
    // SAFETY: the pages lie in a mapping of `reserve`.
    unsafe { libc::mprotect(start as *mut libc::c_void, bytes, protection) == 0 }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for (start, bytes) in [(self.base, RESERVED), (self.written, RESERVED), (self.trace, RESERVED * TRACE)] {
            // SAFETY: `reserve` mapped this range, and nothing refers to it once its owner is gone.
            unsafe { libc::munmap(start as *mut libc::c_void, bytes) };
        }
    }
}

impl Memory {
    /// Memory of devices that hold `capacity` bytes each.
    pub fn new(capacity: usize) -> Memory {
        Memory {
            base: reserve(RESERVED),
            written: reserve(RESERVED),
            trace: reserve(RESERVED * TRACE),
            capacity,
            table: RwLock::default(),
        }
    }

    /// The memory of this process; each device holds `WARPSTEP_EMULATOR_MEMORY` bytes, 16 GiB unless set.
    pub fn global() -> &'static Memory {
        static MEMORY: OnceLock<Memory> = OnceLock::new();
        MEMORY.get_or_init(|| {
            let set = std::env::var("WARPSTEP_EMULATOR_MEMORY").ok().and_then(|bytes| bytes.parse().ok());
            Memory::new(set.unwrap_or(16 << 30))
        })
    }

    /// Bytes that each device holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Allocates memory of a device, on a multiple of 256 bytes; nothing has written it yet.
    ///
    /// # Errors
    /// [`FaultKind::OutOfMemory`].
    pub fn allocate(&self, device: u32, bytes: usize) -> Result<u64, Fault> {
        self.reserve_for(device, bytes)
    }

    /// Allocates pinned host memory, which kernels may address; it counts as written.
    ///
    /// # Errors
    /// [`FaultKind::OutOfMemory`].
    pub fn allocate_host(&self, bytes: usize) -> Result<u64, Fault> {
        let address = self.reserve_for(HOST, bytes)?;
        self.mark_written(address, bytes);
        Ok(address)
    }

    fn reserve_for(&self, device: u32, bytes: usize) -> Result<u64, Fault> {
        let mut table = self.write();
        let used = table.in_use.get(&device).copied().unwrap_or(0);
        let pages = bytes.max(1).div_ceil(PAGE) * PAGE;
        let free = if device == HOST { usize::MAX } else { self.capacity.saturating_sub(used) };
        let refused = || Fault::from(FaultKind::OutOfMemory { asked: bytes as u64, free: free as u64, device });
        if bytes > free || table.used + pages + PAGE > RESERVED {
            return Err(refused());
        }
        let offset = table.used;
        let address = self.base + offset as u64;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let opened = protect(address, pages, access)
            && protect(self.written + offset as u64, pages, access)
            && protect(self.trace + (offset * TRACE) as u64, pages * TRACE, access);
        if !opened {
            return Err(refused());
        }
        table.used += pages + PAGE;
        *table.in_use.entry(device).or_default() += bytes;
        table.allocations.insert(address, Allocation { bytes, device, live: true });
        Ok(address)
    }

    /// Frees an allocation; its addresses are never handed out again.
    ///
    /// # Errors
    /// [`FaultKind::NotAllocated`].
    pub fn free(&self, address: u64) -> Result<(), Fault> {
        let mut table = self.write();
        let Some(allocation) = table.allocations.get_mut(&address).filter(|allocation| allocation.live) else {
            return Err(FaultKind::NotAllocated { address }.into());
        };
        allocation.live = false;
        let (bytes, device) = (allocation.bytes, allocation.device);
        if let Some(used) = table.in_use.get_mut(&device) {
            *used -= bytes;
        }
        let (offset, pages) = (address - self.base, bytes.max(1).div_ceil(PAGE) * PAGE);
        let parts =
            [(address, pages), (self.written + offset, pages), (self.trace + offset * TRACE as u64, pages * TRACE)];
        for (start, bytes) in parts {
            // SAFETY: the pages belong to this allocation alone, which nothing uses any more.
            unsafe { libc::madvise(start as *mut libc::c_void, bytes, libc::MADV_DONTNEED) };
            protect(start, bytes, libc::PROT_NONE);
        }
        Ok(())
    }

    /// The live allocation that holds `address`: its start, length and device.
    pub fn range(&self, address: u64) -> Option<(u64, usize, u32)> {
        let table = self.read();
        let (&start, allocation) = table.allocations.range(..=address).next_back()?;
        let inside = allocation.live && address < start + allocation.bytes as u64;
        inside.then_some((start, allocation.bytes, allocation.device))
    }

    /// Start and end of the live allocation that holds an access whole.
    ///
    /// # Errors
    /// [`FaultKind::OutOfBounds`] or [`FaultKind::UseAfterFree`].
    ///
    /// `by` is the device that accesses; none for the host, which reaches all.
    pub(crate) fn locate(
        &self,
        by: Option<u32>,
        address: u64,
        bytes: u64,
        write: bool,
    ) -> Result<(u64, u64), FaultKind> {
        let table = self.read();
        let near = table.allocations.range(..=address).next_back();
        let range = near.map(|(&start, allocation)| Range { start, bytes: allocation.bytes as u64 });
        match (near, range) {
            (Some((_, allocation)), Some(range)) if address.saturating_add(bytes) <= range.start + range.bytes => {
                let owner = allocation.device;
                if let Some(by) = by.filter(|&by| by != owner && owner != HOST && !table.peers.contains(&(by, owner))) {
                    return Err(FaultKind::OtherDevice { write, address, owner, by });
                }
                if allocation.live {
                    return Ok((range.start, range.start + range.bytes));
                }
                Err(FaultKind::UseAfterFree { write, address, bytes, range })
            }
            _ => Err(FaultKind::OutOfBounds { space: Space::Global, write, address, bytes, near: range }),
        }
    }

    /// Checks an access of the host or of a library: in bounds, and written before it is read. A write marks what it writes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, address: u64, bytes: usize, write: bool) -> Result<*mut u8, Fault> {
        if bytes == 0 {
            return Ok(address as *mut u8);
        }
        let (start, end) = self.locate(None, address, bytes as u64, write)?;
        if write {
            self.mark_written(address, bytes);
        } else if let Some(at) = self.first_unwritten(address, bytes) {
            let range = Some(Range { start, bytes: end - start });
            return Err(FaultKind::Unwritten { space: Space::Global, address: at, bytes: 1, range }.into());
        }
        Ok(address as *mut u8)
    }

    /// Copies host memory to an allocation.
    ///
    /// # Errors
    /// A copy that does not fit.
    pub fn copy_in(&self, to: u64, from: &[u8]) -> Result<(), Fault> {
        let to = self.check(to, from.len(), true)?;
        // SAFETY: `check` found room for as many bytes; host memory outside the reserved range does not overlap it.
        unsafe { std::ptr::copy(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    /// Copies from an allocation to host memory; what nothing wrote is zero.
    ///
    /// # Errors
    /// A copy that does not fit.
    pub fn copy_out(&self, from: u64, to: &mut [u8]) -> Result<(), Fault> {
        if !to.is_empty() {
            self.locate(None, from, to.len() as u64, false)?;
            // SAFETY: `locate` found as many bytes.
            unsafe { std::ptr::copy(from as *const u8, to.as_mut_ptr(), to.len()) };
        }
        Ok(())
    }

    /// Copies between allocations; what was not written stays so.
    ///
    /// # Errors
    /// A copy that does not fit.
    pub fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Fault> {
        if bytes > 0 {
            self.locate(None, from, bytes as u64, false)?;
            self.locate(None, to, bytes as u64, true)?;
            // SAFETY: both ranges and their shadows lie in live allocations; `copy` allows overlap.
            unsafe {
                std::ptr::copy(from as *const u8, to as *mut u8, bytes);
                std::ptr::copy(self.shadow(from), self.shadow(to), bytes);
            }
        }
        Ok(())
    }

    /// Repeats a pattern `count` times from `to` on.
    ///
    /// # Errors
    /// What does not fit.
    pub fn fill(&self, to: u64, pattern: &[u8], count: usize) -> Result<(), Fault> {
        let bytes = pattern.len() * count;
        let start = self.check(to, bytes, true)?;
        if bytes > 0 {
            // SAFETY: `check` found room for as many bytes.
            let slice = unsafe { std::slice::from_raw_parts_mut(start, bytes) };
            slice.chunks_exact_mut(pattern.len()).for_each(|chunk| chunk.copy_from_slice(pattern));
        }
        Ok(())
    }

    /// Lets kernels of device `by` reach memory of device `owner`, or no longer; false where that is so already.
    pub fn set_peer(&self, by: u32, owner: u32, reach: bool) -> bool {
        let mut table = self.write();
        if reach { table.peers.insert((by, owner)) } else { table.peers.remove(&(by, owner)) }
    }

    /// Forgets who accessed what, on every page.
    pub(crate) fn forget_traces(&self) {
        let used = self.read().used;
        // SAFETY: the pages belong to the traces, which no launch uses meanwhile; they read as 0 afterwards.
        unsafe { libc::madvise(self.trace as *mut libc::c_void, used * TRACE, libc::MADV_DONTNEED) };
    }

    /// Bytes that a device has handed out.
    pub fn in_use(&self, device: u32) -> usize {
        self.read().in_use.get(&device).copied().unwrap_or(0)
    }

    /// The shadow byte of an address within an allocation: 1 where something wrote it.
    pub(crate) fn shadow(&self, address: u64) -> *mut u8 {
        (self.written + (address - self.base)) as *mut u8
    }

    /// The two entries of the word that holds an address within an allocation: last store, last load.
    pub(crate) fn trace(&self, address: u64) -> *mut [u64; 2] {
        (self.trace + ((address - self.base) & !3) * TRACE as u64) as *mut [u64; 2]
    }

    fn mark_written(&self, address: u64, bytes: usize) {
        // SAFETY: the shadow of a live allocation is mapped.
        unsafe { std::ptr::write_bytes(self.shadow(address), 1, bytes) };
    }

    fn first_unwritten(&self, address: u64, bytes: usize) -> Option<u64> {
        // SAFETY: the shadow of a live allocation is mapped.
        let shadow = unsafe { std::slice::from_raw_parts(self.shadow(address), bytes) };
        shadow.iter().position(|&byte| byte == 0).map(|at| address + at as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_outside_freed_or_unwritten() {
        let memory = Memory::new(1 << 20);
        let a = memory.allocate(0, 100).unwrap();
        assert_eq!(a % 256, 0);
        assert!(matches!(memory.check(a + 96, 8, true).unwrap_err().kind, FaultKind::OutOfBounds { .. }));
        assert!(matches!(memory.check(a, 4, false).unwrap_err().kind, FaultKind::Unwritten { .. }));
        memory.fill(a, &[1, 2], 50).unwrap();
        let mut back = [0; 3];
        memory.copy_out(a + 97, &mut back).unwrap();
        assert_eq!(back, [2, 1, 2]);
        let b = memory.allocate(0, 100).unwrap();
        memory.copy(b + 4, a, 8).unwrap();
        assert!(memory.check(b + 4, 8, false).is_ok() && memory.check(b, 8, false).is_err());
        memory.free(a).unwrap();
        assert!(matches!(memory.check(a, 4, false).unwrap_err().kind, FaultKind::UseAfterFree { .. }));
        assert!(memory.free(a).is_err() && memory.range(a).is_none());
        assert_eq!(memory.in_use(0), 100);
        assert!(matches!(memory.allocate(0, 1 << 20).unwrap_err().kind, FaultKind::OutOfMemory { .. }));
    }
}
