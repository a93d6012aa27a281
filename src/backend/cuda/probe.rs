//! What a benchmark asks of a device besides its operations: traffic through its memory, latencies, copies to and from the host.

use std::sync::{Arc, Mutex, PoisonError};

use super::Buffer;
use super::context::{Device, driver_error};
use super::launch::{Grid, args};
use super::pinned::Pinned;
use super::recording::record;
use crate::backend::profile::{Probe, Traffic};
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};

const FILE: &str = "bandwidth";
/// Values of an access.
const ACCESS: usize = 4;
/// Launches in a graph, whose replay is timed.
const LAUNCHES: u64 = 64;
/// Bytes of copies between host and device: of a batch of pictures, and of larger ones, whose speed is that of the bus.
const HOST_BYTES: [usize; 3] = [1 << 20, 16 << 20, 256 << 20];
/// The same on the emulated device.
const HOST_BYTES_EMULATED: [usize; 1] = [1 << 12];
/// Bytes of the memory that copies take in turn, on either side: more than a processor's caches hold.
const TURN_BYTES: usize = 512 << 20;
/// Bytes of random values that memory is filled with, over and over.
const TILE_BYTES: usize = 1 << 20;

impl Device {
    /// Blocks that go through memory side by side.
    pub(super) fn traffic_blocks(&self) -> usize {
        if super::emulated::is_active() { 2 } else { self.multiprocessors() * 8 }
    }

    /// [`crate::backend::profile::Profiled::traffic`] on a device.
    pub(super) fn traffic(
        &self,
        traffic: Traffic,
        to: &mut Buffer<f32>,
        from: &Buffer<f32>,
        len: usize,
        rounds: usize,
    ) -> Result<()> {
        let blocks = self.traffic_blocks();
        if len == 0 || !len.is_multiple_of(ACCESS * blocks) || from.len() < len || to.len() < len {
            let found = format!("{len} of {} and {} elements", from.len(), to.len());
            let expected = format!("a multiple of {} elements of both", ACCESS * blocks);
            return Err(Error::shape("traffic", expected, found));
        }
        if traffic == Traffic::Copy && rounds == 1 {
            // The driver's own, which no kernel of ours outruns.
            return self.copy(to.address_of(0), from.address_of(0), len * size_of::<f32>());
        }
        let (part, grid) = (len / ACCESS / blocks, Grid::new(blocks, 256));
        let (kernel, list): (&str, &mut [_]) = match traffic {
            Traffic::Copy => ("traffic_copy", args![to.address_of(0), from.address_of(0), part, rounds]),
            Traffic::Write => ("traffic_write", args![to.address_of(0), part, rounds]),
            Traffic::InPlace => ("traffic_in_place", args![to.address_of(0), part, rounds]),
            Traffic::Read => ("traffic_read", args![to.address_of(0), from.address_of(0), part, rounds]),
        };
        // SAFETY: both buffers hold `len` values, a part for each block, and `to` more values than there are blocks.
        unsafe { self.launch(FILE, kernel, grid, list) }
    }

    /// Queues a kernel that counts.
    fn count_up(&self, count: &Buffer<u64>) -> Result<()> {
        // SAFETY: a count of 64 bits.
        unsafe { self.launch(FILE, "count_up", Grid::new(1, 1), args![count.address_of(0)]) }
    }
}

/// Latencies and copies.
pub(super) fn all(device: &Arc<Device>) -> Result<Vec<Probe<'_>>> {
    let mut probes = vec![launch(device)?, replay(device)?];
    let emulated = super::emulated::is_active();
    let sizes: &[usize] = if emulated { &HOST_BYTES_EMULATED } else { &HOST_BYTES };
    for (name, pinned) in [("pinned", true), ("pageable", false)] {
        for &bytes in sizes {
            let size = if bytes < 1 << 20 { format!("{}KiB", bytes >> 10) } else { format!("{}MiB", bytes >> 20) };
            let sets = if emulated { 2 } else { TURN_BYTES / bytes };
            probes.push(host_copy(device, format!("host_to_device/{name}/{size}"), true, pinned, [bytes, sets]));
            probes.push(host_copy(device, format!("device_to_host/{name}/{size}"), false, pinned, [bytes, sets]));
        }
    }
    Ok(probes)
}

fn counted(device: &Arc<Device>) -> Result<Arc<Buffer<u64>>> {
    let count = Buffer::zeros(device, 1)?;
    device.synchronize()?;
    Ok(Arc::new(count))
}

fn read(count: &Buffer<u64>) -> Result<u64> {
    let mut value = [0];
    count.read(0, &mut value)?;
    Ok(value[0])
}

/// A launch of a kernel that does next to nothing.
fn launch(device: &Arc<Device>) -> Result<Probe<'_>> {
    let count = counted(device)?;
    let seen = Arc::clone(&count);
    Ok(Probe {
        name: "launch".to_owned(),
        bytes: None,
        work: Box::new(move || device.count_up(&count)),
        done: Box::new(move || read(&seen)),
    })
}

/// A replay of a graph of such launches: what each node takes.
fn replay(device: &Arc<Device>) -> Result<Probe<'_>> {
    let count = counted(device)?;
    // Loads the kernel, which a recording cannot.
    device.count_up(&count)?;
    device.synchronize()?;
    let graph = record(device, || (0..LAUNCHES).try_for_each(|_| device.count_up(&count)))?;
    let seen = Arc::clone(&count);
    Ok(Probe {
        name: format!("graph_replay/{LAUNCHES}_launches"),
        bytes: None,
        work: Box::new(move || graph.launch(device).map_err(|error| driver_error("replay launches", error))),
        done: Box::new(move || Ok((read(&seen)? - 1) / LAUNCHES)),
    })
}

/// Host memory of either kind.
enum Host {
    Pinned(Pinned),
    Pageable(Vec<u8>),
}

impl Host {
    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Host::Pinned(pinned) => pinned.bytes_mut(),
            Host::Pageable(bytes) => bytes,
        }
    }
}

/// Memory of a copy, on either side. Its first word counts the copies that it has made.
struct Pair {
    host: Host,
    buffer: Buffer<u64>,
    count: u64,
}

/// Copies between host and device, through pairs of memory in turn.
struct HostCopy {
    pairs: Vec<Pair>,
    /// The pair of the next copy.
    next: usize,
}

impl HostCopy {
    /// Memory that is filled on either side: pages that were never written are all the same one.
    fn new(device: &Arc<Device>, pinned: bool, [bytes, sets]: [usize; 2]) -> Result<Self> {
        let stream = Philox::new(1, Purpose::Sampling, 5);
        let mut words = vec![0; TILE_BYTES.min(bytes) / size_of::<u32>()];
        stream.words(0, &mut words);
        let tile: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        let pair = |_| {
            let mut host =
                if pinned { Host::Pinned(Pinned::new(device, bytes)?) } else { Host::Pageable(vec![0; bytes]) };
            for part in host.bytes_mut().chunks_mut(tile.len()) {
                part.copy_from_slice(&tile[..part.len()]);
            }
            // It counts from 0 on.
            host.bytes_mut()[..8].fill(0);
            let buffer = Buffer::zeros(device, bytes / size_of::<u64>())?;
            device.write(buffer.address_of(0), host.bytes_mut())?;
            device.synchronize()?;
            Ok(Pair { host, buffer, count: 0 })
        };
        Ok(HostCopy { pairs: (0..sets.max(1)).map(pair).collect::<Result<_>>()?, next: 0 })
    }

    fn copy(&mut self, device: &Device, to_device: bool) -> Result<()> {
        let number = self.next;
        self.next = (number + 1) % self.pairs.len();
        let pair = &mut self.pairs[number];
        if to_device { pair.send(device) } else { pair.fetch(device) }
    }

    /// How many copies have been made, by what lies where they lead.
    fn done(&self, to_device: bool) -> Result<u64> {
        self.pairs.iter().map(|pair| if to_device { read(&pair.buffer) } else { Ok(pair.count) }).sum()
    }
}

impl Pair {
    fn send(&mut self, device: &Device) -> Result<()> {
        self.count += 1;
        let bytes = self.host.bytes_mut();
        bytes[..8].copy_from_slice(&self.count.to_ne_bytes());
        device.write(self.buffer.address_of(0), bytes)?;
        // Host memory may be written again only when the copy is over.
        device.synchronize()
    }

    fn fetch(&mut self, device: &Device) -> Result<()> {
        device.count_up(&self.buffer)?;
        device.read(self.buffer.address_of(0), self.host.bytes_mut())?;
        let mut word = [0; 8];
        word.copy_from_slice(&self.host.bytes_mut()[..8]);
        self.count = u64::from_ne_bytes(word);
        Ok(())
    }
}

/// The probe of a copy of so many bytes, through so many pairs of memory in turn, which are taken when it first runs: of those that
/// are named, few are asked for.
fn host_copy(
    device: &Arc<Device>,
    name: String,
    to_device: bool,
    pinned: bool,
    [bytes, sets]: [usize; 2],
) -> Probe<'_> {
    let copies: Arc<Mutex<Option<HostCopy>>> = Arc::default();
    let seen = Arc::clone(&copies);
    let work = move || {
        // What a thread left that panicked within a copy is a count that no longer fits, which is seen.
        let mut copies = copies.lock().unwrap_or_else(PoisonError::into_inner);
        let copies = match &mut *copies {
            Some(copies) => copies,
            none => none.insert(HostCopy::new(device, pinned, [bytes, sets])?),
        };
        copies.copy(device, to_device)
    };
    let done = move || match &*seen.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(copies) => copies.done(to_device),
        None => Ok(0),
    };
    Probe { name, bytes: Some(bytes), work: Box::new(work), done: Box::new(done) }
}
