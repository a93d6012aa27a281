//! GPUs that speak NCCL, each with slices of its device's memory.
//!
//! Calls go to the library itself (`cudarc::nccl::sys`): cudarc's own wrapper knows neither the abort of a communicator nor the
//! errors that come while nobody calls. Every status is checked. Work is queued on a stream of its own ([`Communication`]), which
//! the recording of a step takes in.

use std::ffi::{CStr, c_int, c_void};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use cudarc::nccl::sys;

use super::collective::{Collective, other_types};
use crate::backend::cuda::libraries::{Library, provide_nccl};
use crate::backend::cuda::{Communication, Device};
use crate::backend::{DeviceSlice, Number, Slice};
use crate::error::{Error, Result};
use crate::tell::tell;

/// Bytes of the id by which processes find each other.
pub const ID_BYTES: usize = 128;

/// How long an abort waits for a call of another thread to return, and for its own: they take no time unless they hang.
const RETURNS: Duration = Duration::from_secs(1);

/// A device among those of all processes.
pub struct Nccl {
    communicator: Arc<Communicator>,
}

/// A device that is ready to join others.
pub struct Prepared {
    communication: Communication,
}

struct Communicator {
    communication: Arc<Communication>,
    rank: usize,
    world: usize,
    /// Held while the library is called.
    calls: Mutex<()>,
    /// Null once it was aborted.
    handle: AtomicPtr<sys::ncclComm>,
    /// Whether something failed, after which the others may never come to a common end.
    failed: AtomicBool,
}

/// What the library says of a status.
fn check(action: &str, status: sys::ncclResult_t) -> Result<()> {
    if matches!(status, sys::ncclResult_t::ncclSuccess | sys::ncclResult_t::ncclInProgress) {
        return Ok(());
    }
    let text = |text: *const std::ffi::c_char| {
        // SAFETY: the library's own text, or nothing, which lives until this thread's next call.
        (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    // SAFETY: any status may be asked about; the last error may be asked for without a communicator.
    let (name, last) =
        unsafe { (text(sys::ncclGetErrorString(status)), text(sys::ncclGetLastError(std::ptr::null_mut()))) };
    let name = name.unwrap_or_else(|| format!("status {}", status as u32));
    let last =
        last.filter(|last| !last.trim().is_empty()).map_or_else(String::new, |last| format!(" ({})", last.trim()));
    Err(Error::Collective(format!("NCCL cannot {action}: {name}{last}")))
}

/// The library's name for a type.
fn type_of(number: Number) -> sys::ncclDataType_t {
    match number {
        Number::U8 => sys::ncclDataType_t::ncclUint8,
        Number::Bf16 => sys::ncclDataType_t::ncclBfloat16,
        Number::F16 => sys::ncclDataType_t::ncclFloat16,
        Number::F32 => sys::ncclDataType_t::ncclFloat32,
        Number::F64 => sys::ncclDataType_t::ncclFloat64,
    }
}

fn aborted() -> Error {
    Error::Collective("NCCL: the exchange with other processes was given up".into())
}

/// Makes the library loadable.
fn load() -> Result<()> {
    provide_nccl()?;
    if Library::Nccl.is_present() {
        return Ok(());
    }
    let install = Library::Nccl.install();
    Err(Error::Device(format!(
        "several GPUs need NCCL, which was not found (libnccl.so.2): install it ({install}) where the loader looks for it; \
         `warpstep doctor` tells what is there"
    )))
}

impl Nccl {
    /// An id for a new group of processes: one asks for it, and hands it to all.
    ///
    /// # Errors
    /// No NCCL, or one that cannot open a port.
    pub fn unique_id() -> Result<[u8; ID_BYTES]> {
        load()?;
        let mut id = sys::ncclUniqueId { internal: [0; ID_BYTES] };
        // SAFETY: room for an id.
        check("make an id for its processes", unsafe { sys::ncclGetUniqueId(&mut id) })?;
        Ok(bytemuck::cast(id.internal))
    }

    /// Does all of [`Nccl::join`] that this process can do, and fail at, by itself.
    ///
    /// # Errors
    /// No NCCL, or a device that failed.
    pub fn prepare(device: &Arc<Device>) -> Result<Prepared> {
        load()?;
        Ok(Prepared { communication: Communication::new(device)? })
    }

    /// Joins the processes of an id with a device ([`Prepared::join`]).
    ///
    /// # Errors
    /// No NCCL, a process that does not come, or a device that failed.
    pub fn join(device: &Arc<Device>, id: &[u8; ID_BYTES], rank: usize, world: usize) -> Result<Self> {
        Nccl::prepare(device)?.join(id, rank, world)
    }
}

impl Prepared {
    /// Joins the processes of an id. Comes back when all have. The device is watched from then on: the host does not wait for a
    /// process that is gone ([`Device::watch`]).
    ///
    /// # Errors
    /// A process that does not come, or a device that failed.
    pub fn join(self, id: &[u8; ID_BYTES], rank: usize, world: usize) -> Result<Nccl> {
        if rank >= world {
            return Err(Error::shape("NCCL", format!("a rank below {world}"), rank.to_string()));
        }
        let Prepared { communication } = self;
        let device = Arc::clone(communication.device());
        communication.bind()?;
        let id = sys::ncclUniqueId { internal: bytemuck::cast(*id) };
        let mut handle = std::ptr::null_mut();
        // SAFETY: room for a handle; the device's context is that of this thread.
        let status = unsafe { sys::ncclCommInitRank(&mut handle, world as c_int, id, rank as c_int) };
        check(&format!("join {world} processes as number {rank}"), status)?;
        let communicator = Arc::new(Communicator {
            communication: Arc::new(communication),
            rank,
            world,
            calls: Mutex::new(()),
            handle: AtomicPtr::new(handle),
            failed: AtomicBool::new(false),
        });
        let watched = Arc::downgrade(&communicator);
        device.watch(move || watched.upgrade().map_or(Ok(()), |communicator| communicator.check()));
        Ok(Nccl { communicator })
    }
}

impl Communicator {
    fn lock(&self) -> MutexGuard<'_, ()> {
        // A thread that panicked left no call half done.
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the library.
    fn call(&self, action: &str, call: impl FnOnce(sys::ncclComm_t) -> sys::ncclResult_t) -> Result<()> {
        self.communication.bind()?;
        let _calls = self.lock();
        let handle = self.handle.load(Ordering::Acquire);
        if handle.is_null() {
            return Err(aborted());
        }
        let called = check(action, call(handle));
        if called.is_err() {
            self.failed.store(true, Ordering::Release);
        }
        called
    }

    /// Several calls that are one to the library.
    fn group(
        &self,
        action: &str,
        mut calls: impl FnMut(sys::ncclComm_t) -> std::result::Result<(), sys::ncclResult_t>,
    ) -> Result<()> {
        self.call(action, |comm| {
            // SAFETY: every group that is begun is ended.
            let begun = unsafe { sys::ncclGroupStart() };
            if begun != sys::ncclResult_t::ncclSuccess {
                return begun;
            }
            let called = calls(comm);
            // SAFETY: as above.
            let ended = unsafe { sys::ncclGroupEnd() };
            called.err().unwrap_or(ended)
        })
    }

    /// What failed since nobody called; then everything that waits is given up.
    fn check(&self) -> Result<()> {
        let mut found = sys::ncclResult_t::ncclSuccess;
        // SAFETY: room for a status.
        let asked = self.call("tell of errors", |comm| unsafe { sys::ncclCommGetAsyncError(comm, &mut found) });
        let checked = asked.and_then(|()| check("exchange values with the other processes", found));
        if checked.is_err() {
            self.abort();
        }
        checked
    }

    /// Takes the communicator from whoever uses it, and ends what it does.
    fn abort(&self) {
        self.failed.store(true, Ordering::Release);
        let begun = Instant::now();
        let _calls = loop {
            match self.calls.try_lock() {
                Ok(calls) => break Some(calls),
                Err(TryLockError::Poisoned(calls)) => break Some(calls.into_inner()),
                Err(TryLockError::WouldBlock) if begun.elapsed() > RETURNS => break None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let handle = self.handle.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if handle.is_null() {
            return;
        }
        // Kernels that wait are ended at once; but the call comes back only when no recording names the communicator any more, and
        // this thread may hold one. The thread keeps what the library uses until then.
        let (handle, communication) = (AtomicPtr::new(handle), Arc::clone(&self.communication));
        let (done, wait) = std::sync::mpsc::channel();
        let end = move || {
            // SAFETY: it was taken out, so that nobody aborts it twice or calls it from now on; a call that hangs in it is what the
            // library has aborts for, from another thread.
            let status = unsafe { sys::ncclCommAbort(handle.into_inner()) };
            if let Err(error) = check("give up", status) {
                tell(error);
            }
            drop(communication);
            // Nobody waits any more where it took longer.
            let _ = done.send(());
        };
        match std::thread::Builder::new().name("warpstep-abort".into()).spawn(end) {
            Ok(_) => drop(wait.recv_timeout(RETURNS)),
            Err(error) => tell(Error::io("start", "a thread that gives NCCL's exchange up", error)),
        }
    }

    /// Where the library queues.
    fn stream(&self) -> sys::cudaStream_t {
        self.communication.stream().cu_stream().cast()
    }

    fn sum(&self, values: &DeviceSlice) -> Result<()> {
        if values.number() == Number::U8 {
            return Err(Error::shape("NCCL", "a sum of numbers", "bytes"));
        }
        let (at, len, ty, stream) = (pointer(values, 0), values.len(), type_of(values.number()), self.stream());
        // SAFETY: the slice is `len` numbers of its type in the device's memory, which what is queued may use until it has passed.
        self.call("sum values over processes", |comm| unsafe {
            sys::ncclAllReduce(at, at, len, ty, sys::ncclRedOp_t::ncclSum, comm, stream)
        })
    }

    fn reduce_scatter(&self, values: &DeviceSlice, shards: &[Range<usize>]) -> Result<()> {
        check_shards(shards, self.world, values.len())?;
        if values.number() == Number::U8 {
            return Err(Error::shape("NCCL", "a sum of numbers", "bytes"));
        }
        let (ty, stream, sum) = (type_of(values.number()), self.stream(), sys::ncclRedOp_t::ncclSum);
        let action = "sum shards over processes";
        if let Some(each) = even(shards) {
            let (from, to) = (pointer(values, shards[0].start), pointer(values, shards[self.rank].start));
            // SAFETY: as in `sum`; the shards lie within the slice, and a process's result in its own of what is sent.
            return self.call(action, |comm| unsafe { sys::ncclReduceScatter(from, to, each, ty, sum, comm, stream) });
        }
        self.group(action, |comm| {
            each_shard(shards, |root, shard| {
                let at = pointer(values, shard.start);
                // SAFETY: as above.
                unsafe { sys::ncclReduce(at, at, shard.len(), ty, sum, root, comm, stream) }
            })
        })
    }

    fn gather(&self, values: &DeviceSlice, shards: &[Range<usize>]) -> Result<()> {
        check_shards(shards, self.world, values.len())?;
        let (ty, stream) = (type_of(values.number()), self.stream());
        let action = "gather values of all processes";
        if let Some(each) = even(shards) {
            let (from, to) = (pointer(values, shards[self.rank].start), pointer(values, shards[0].start));
            // SAFETY: as in `reduce_scatter`.
            return self.call(action, |comm| unsafe { sys::ncclAllGather(from, to, each, ty, comm, stream) });
        }
        self.group(action, |comm| {
            each_shard(shards, |root, shard| {
                let at = pointer(values, shard.start);
                // SAFETY: as above.
                unsafe { sys::ncclBroadcast(at, at, shard.len(), ty, root, comm, stream) }
            })
        })
    }

    fn broadcast(&self, values: &DeviceSlice, root: usize) -> Result<()> {
        let root = self.process(root)?;
        let (at, len, ty, stream) = (pointer(values, 0), values.len(), type_of(values.number()), self.stream());
        // SAFETY: as in `sum`.
        self.call("copy values to all processes", |comm| unsafe {
            sys::ncclBroadcast(at, at, len, ty, root, comm, stream)
        })
    }

    fn swap(&self, partner: usize, send: &DeviceSlice, receive: &DeviceSlice) -> Result<()> {
        let (partner, stream) = (self.process(partner)?, self.stream());
        let (from, to) = (pointer(send, 0), pointer(receive, 0));
        self.group("swap values with a process", |comm| {
            let done = |status| if status == sys::ncclResult_t::ncclSuccess { Ok(()) } else { Err(status) };
            // SAFETY: as in `sum`, for both; they share no memory, or nothing would be borrowed twice.
            unsafe {
                if !send.is_empty() {
                    done(sys::ncclSend(from, send.len(), type_of(send.number()), partner, comm, stream))?;
                }
                if !receive.is_empty() {
                    done(sys::ncclRecv(to, receive.len(), type_of(receive.number()), partner, comm, stream))?;
                }
            }
            Ok(())
        })
    }

    fn process(&self, number: usize) -> Result<c_int> {
        if number < self.world {
            return Ok(number as c_int);
        }
        Err(Error::shape("NCCL", format!("a rank below {}", self.world), number.to_string()))
    }

    /// Queues work with slices of the device; with slices of the host does it, by way of the device.
    fn with<const N: usize>(
        &self,
        slices: [Slice<'_>; N],
        work: impl FnOnce(&[DeviceSlice; N]) -> Result<()>,
    ) -> Result<()> {
        let (mut device, mut host) = (Vec::with_capacity(N), Vec::with_capacity(N));
        for slice in slices {
            match slice {
                Slice::Device(slice) => device.push(slice),
                Slice::Host(slice) => host.push(slice),
            }
        }
        match (<[DeviceSlice; N]>::try_from(device), host.try_into()) {
            (Ok(device), _) => work(&device),
            (_, Ok(host)) => self.communication.staged(host, work),
            _ => Err(Error::shape("NCCL", "slices of the device, or of the host", "of both")),
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if *self.failed.get_mut() {
            return self.abort();
        }
        let handle = *self.handle.get_mut();
        // SAFETY: nobody else has the handle any more; what it was asked for has passed, or is waited for by the library.
        if let Err(error) = check("leave the other processes", unsafe { sys::ncclCommDestroy(handle) }) {
            tell(error);
        }
    }
}

/// Address of an element.
fn pointer(values: &DeviceSlice, element: usize) -> *mut c_void {
    (values.address() as usize + element * values.number().bytes()) as *mut c_void
}

/// The length of shards that are all as long.
fn even(shards: &[Range<usize>]) -> Option<usize> {
    let each = shards.first()?.len();
    shards.iter().all(|shard| shard.len() == each).then_some(each)
}

fn check_shards(shards: &[Range<usize>], world: usize, len: usize) -> Result<()> {
    let joined = shards.windows(2).all(|pair| pair[0].end == pair[1].start);
    let within = shards.iter().all(|shard| shard.start <= shard.end && shard.end <= len);
    if shards.len() == world && joined && within {
        return Ok(());
    }
    Err(Error::shape("NCCL", format!("{world} shards in a row of {len} elements"), format!("{shards:?}")))
}

/// A call for each shard that is not empty, until one fails.
fn each_shard(
    shards: &[Range<usize>],
    mut call: impl FnMut(c_int, &Range<usize>) -> sys::ncclResult_t,
) -> std::result::Result<(), sys::ncclResult_t> {
    for (root, shard) in shards.iter().enumerate().filter(|(_, shard)| !shard.is_empty()) {
        let status = call(root as c_int, shard);
        if status != sys::ncclResult_t::ncclSuccess {
            return Err(status);
        }
    }
    Ok(())
}

impl Collective for Nccl {
    fn name(&self) -> &'static str {
        "NCCL"
    }

    fn rank(&self) -> usize {
        self.communicator.rank
    }

    fn world(&self) -> usize {
        self.communicator.world
    }

    fn is_queued(&self) -> bool {
        true
    }

    fn all_reduce_sum(&self, values: Slice<'_>) -> Result<()> {
        self.communicator.with([values], |[values]| self.communicator.sum(values))
    }

    fn reduce_scatter_sum(&self, values: Slice<'_>, shards: &[Range<usize>]) -> Result<()> {
        self.communicator.with([values], |[values]| self.communicator.reduce_scatter(values, shards))
    }

    fn all_gather(&self, values: Slice<'_>, shards: &[Range<usize>]) -> Result<()> {
        self.communicator.with([values], |[values]| self.communicator.gather(values, shards))
    }

    fn broadcast(&self, values: Slice<'_>, root: usize) -> Result<()> {
        self.communicator.with([values], |[values]| self.communicator.broadcast(values, root))
    }

    fn swap(&self, partner: usize, send: Slice<'_>, receive: Slice<'_>) -> Result<()> {
        self.communicator.with([send, receive], |[send, receive]| self.communicator.swap(partner, send, receive))
    }

    fn barrier(&self) -> Result<()> {
        let mut one = [1f32];
        self.all_reduce_sum(one.as_mut_slice().into())
    }

    fn add(&self, to: Slice<'_>, from: Slice<'_>) -> Result<()> {
        match (&to, &from) {
            (Slice::Device(to), Slice::Device(from)) => self.communicator.communication.add(to, from),
            _ => Err(other_types("add on a device", to.number(), to.len(), from.number(), from.len())),
        }
    }

    fn convert(&self, to: Slice<'_>, from: Slice<'_>) -> Result<()> {
        match (&to, &from) {
            (Slice::Device(to), Slice::Device(from)) => self.communicator.communication.convert(to, from),
            _ => Err(other_types("convert on a device", to.number(), to.len(), from.number(), from.len())),
        }
    }

    fn copy(&self, to: Slice<'_>, from: Slice<'_>) -> Result<()> {
        match (&to, &from) {
            (Slice::Device(to), Slice::Device(from)) => self.communicator.communication.copy(to, from),
            _ => Err(other_types("copy on a device", to.number(), to.len(), from.number(), from.len())),
        }
    }

    fn abort(&self) {
        self.communicator.abort();
    }

    fn fork(&self) -> Result<()> {
        self.communicator.communication.fork()
    }

    fn join(&self) -> Result<()> {
        self.communicator.communication.join()
    }

    fn mark(&self, number: usize) -> Result<()> {
        self.communicator.communication.mark(number)
    }

    fn join_mark(&self, number: usize) -> Result<()> {
        self.communicator.communication.join_mark(number)
    }
}
