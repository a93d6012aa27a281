//! NCCL: communicators over threads of a process and over processes of a machine, as far as training asks for them.
//!
//! What is emulated: unique ids, ranks, groups, collectives, sends and receives, operations that multiply first, aborts; on
//! streams, and captured in graphs. The ranks meet at a hub ([`hub`]) on the loopback interface. Sums go in the order of ranks,
//! where the real library's depends on its rings and trees. A call returns when its work is done, so several ranks of one
//! thread need a group, as for the real library, and can not replay graphs that wait for each other, which there they can.
//! Where calls do not agree, the real library hangs or writes past ends; this one fails on every rank and names both calls.
#![allow(
    non_snake_case,
    clippy::missing_safety_doc,
    reason = "the library's own names; its documentation says what each asks"
)]

mod calls;
mod hub;
mod rank;
mod reduce;
mod wire;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::driver::{current_device, is_capturing, physical, queue_task};
use crate::fault::{Fault, FaultKind};
use crate::memory::Memory;
use crate::tell::tell;
use calls::{check_buffer, type_of};
use rank::{Ask, Comm};
use wire::{Failure, failure, status};

/// 2.27.7.
const VERSION: c_int = 22707;

/// `ncclUniqueId`: a mark, the hub's port, a secret.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId {
    bytes: [u8; 128],
}

const MARK: &[u8; 8] = b"WARPSTEP";

type Call<T> = Result<T, Failure>;

fn communicators() -> MutexGuard<'static, HashMap<usize, Arc<Comm>>> {
    static COMMUNICATORS: OnceLock<Mutex<HashMap<usize, Arc<Comm>>>> = OnceLock::new();
    COMMUNICATORS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

fn keep(comm: Arc<Comm>) -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0x1000);
    let handle = NEXT.fetch_add(0x10, Ordering::Relaxed);
    communicators().insert(handle, comm);
    handle
}

fn find(handle: usize) -> Call<Arc<Comm>> {
    let found = communicators().get(&handle).cloned();
    found.ok_or_else(|| failure(status::INVALID_ARGUMENT, "this is no communicator, or one that was destroyed"))
}

/// A rank that joins when its group ends: where its handle goes, and how it joins.
struct Joining {
    to: usize,
    id: UniqueId,
    rank: c_int,
    ranks: c_int,
    device: u32,
}

#[derive(Default)]
struct Group {
    depth: u32,
    joining: Vec<Joining>,
    calls: Vec<(usize, Arc<Comm>, Ask)>,
}

thread_local! {
    static GROUP: RefCell<Group> = RefCell::default();
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs a call; tells what is wrong on stderr, and keeps it.
fn call(body: impl FnOnce() -> Call<()>) -> c_int {
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body))
        .unwrap_or_else(|_| Err(failure(status::INTERNAL_ERROR, "a panic within the emulated NCCL")));
    match found {
        Ok(()) => status::SUCCESS,
        Err(Failure { status, text }) => {
            tell(format_args!("emulated NCCL: {text}"));
            LAST.set(CString::new(text).unwrap_or_default());
            status
        }
    }
}

unsafe fn put<T>(to: *mut T, value: T) -> Call<()> {
    if to.is_null() {
        return Err(failure(status::INVALID_ARGUMENT, "a result has no place"));
    }
    // SAFETY: room for a value, as the library's callers promise.
    unsafe { to.write(value) };
    Ok(())
}

fn device() -> Call<u32> {
    current_device().map_err(|number| failure(status::UNHANDLED_CUDA_ERROR, format!("CUDA error {number}")))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { put(version, VERSION) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(to: *mut UniqueId) -> c_int {
    call(|| {
        let broken = |error: std::io::Error| failure(status::SYSTEM_ERROR, format!("no unique id: {error}"));
        let mut token = [0; 16];
        std::fs::File::open("/dev/urandom")
            .and_then(|mut source| std::io::Read::read_exact(&mut source, &mut token))
            .map_err(broken)?;
        let port = hub::open(token).map_err(broken)?;
        let mut id = UniqueId { bytes: [0; 128] };
        id.bytes[..8].copy_from_slice(MARK);
        id.bytes[8..10].copy_from_slice(&port.to_le_bytes());
        id.bytes[10..26].copy_from_slice(&token);
        // SAFETY: as the library's callers promise.
        unsafe { put(to, id) }
    })
}

impl Joining {
    fn join(&self) -> Call<usize> {
        let wrong = |text: String| Err(failure(status::INVALID_ARGUMENT, text));
        if self.ranks < 1 || self.rank < 0 || self.rank >= self.ranks {
            return wrong(format!("rank {} of {} ranks", self.rank, self.ranks));
        }
        let bytes = &self.id.bytes;
        if &bytes[..8] != MARK {
            return wrong("this is no unique id of the emulated NCCL".to_owned());
        }
        let port = u16::from_le_bytes([bytes[8], bytes[9]]);
        let mut token = [0; 16];
        token.copy_from_slice(&bytes[10..26]);
        let unique = physical(self.device);
        Ok(keep(Comm::join(port, token, self.rank as u32, self.ranks as u32, self.device, unique)?))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRank(to: *mut usize, ranks: c_int, id: UniqueId, rank: c_int) -> c_int {
    call(|| {
        let joining = Joining { to: to as usize, id, rank, ranks, device: device()? };
        if to.is_null() {
            return Err(failure(status::INVALID_ARGUMENT, "a communicator has no place"));
        }
        let grouped = GROUP.with_borrow(|group| group.depth > 0);
        if grouped {
            GROUP.with_borrow_mut(|group| group.joining.push(joining));
            return Ok(());
        }
        // SAFETY: as the library's callers promise.
        unsafe { put(to, joining.join()?) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    to: *mut usize,
    ranks: c_int,
    id: UniqueId,
    rank: c_int,
    _config: *mut c_void,
) -> c_int {
    // SAFETY: as the library's callers promise.
    unsafe { ncclCommInitRank(to, ranks, id, rank) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitAll(to: *mut usize, ranks: c_int, devices: *const c_int) -> c_int {
    let mut id = UniqueId { bytes: [0; 128] };
    // SAFETY: room for an id.
    let found = unsafe { ncclGetUniqueId(&mut id) };
    if found != status::SUCCESS {
        return found;
    }
    call(|| {
        if to.is_null() || ranks < 1 {
            return Err(failure(status::INVALID_ARGUMENT, format!("communicators of {ranks} ranks")));
        }
        let joining: Vec<Joining> = (0..ranks)
            .map(|rank| {
                // SAFETY: a device for each rank, or none at all, as the library's callers promise.
                let device = if devices.is_null() { rank } else { unsafe { devices.add(rank as usize).read() } };
                Joining { to: to as usize + rank as usize * size_of::<usize>(), id, rank, ranks, device: device as u32 }
            })
            .collect();
        join_all(&joining)
    })
}

/// Ranks of one thread join side by side.
fn join_all(joining: &[Joining]) -> Call<()> {
    let found: Vec<Call<usize>> = std::thread::scope(|scope| {
        let threads: Vec<_> = joining.iter().map(|joining| scope.spawn(|| joining.join())).collect();
        let panicked = || failure(status::INTERNAL_ERROR, "a rank panicked while it joined");
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(panicked()))).collect()
    });
    for (joining, found) in joining.iter().zip(found) {
        // SAFETY: the place that the caller named for this rank's communicator.
        unsafe { put(joining.to as *mut usize, found?)? };
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommFinalize(comm: usize) -> c_int {
    call(|| find(comm).map(drop))
}

fn leave(handle: usize, abort: bool) -> Call<()> {
    let comm = find(handle)?;
    communicators().remove(&handle);
    comm.leave(abort);
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommDestroy(comm: usize) -> c_int {
    call(|| leave(comm, false))
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommAbort(comm: usize) -> c_int {
    call(|| leave(comm, true))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(comm: usize, to: *mut c_int) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { put(to, find(comm)?.failed().map_or(status::SUCCESS, |failed| failed.status)) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommCount(comm: usize, to: *mut c_int) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { put(to, find(comm)?.ranks as c_int) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommUserRank(comm: usize, to: *mut c_int) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { put(to, find(comm)?.rank as c_int) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommCuDevice(comm: usize, to: *mut c_int) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { put(to, find(comm)?.device as c_int) })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(number: c_int) -> *const c_char {
    let text: &CStr = match number {
        status::SUCCESS => c"no error",
        status::UNHANDLED_CUDA_ERROR => c"unhandled cuda error",
        status::SYSTEM_ERROR => c"unhandled system error",
        status::INTERNAL_ERROR => c"internal error",
        status::INVALID_ARGUMENT => c"invalid argument",
        status::INVALID_USAGE => c"invalid usage",
        status::REMOTE_ERROR => c"remote process exited or there was a network error",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

/// The last error of this thread; the text stays until its next.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(_comm: usize) -> *const c_char {
    LAST.with_borrow(|text| text.as_ptr())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclRedOpCreatePreMulSum(
    to: *mut c_int,
    scalar: *const u8,
    ty: c_int,
    residence: c_int,
    comm: usize,
) -> c_int {
    static NEXT: AtomicI32 = AtomicI32::new(reduce::OPERATIONS as i32);
    call(|| {
        let comm = find(comm)?;
        let (ty, bytes) = type_of(ty)?;
        if scalar.is_null() || !matches!(residence, 0 | 1) {
            return Err(failure(status::INVALID_ARGUMENT, "an operation's factor lies nowhere"));
        }
        let mut factor = vec![0; bytes];
        if residence == 0 {
            let read = Memory::global().copy_out(scalar as u64, &mut factor);
            read.map_err(|fault| failure(status::INVALID_ARGUMENT, fault.to_string()))?;
        } else {
            // SAFETY: a value of the type in host memory, as the library's callers promise.
            unsafe { std::ptr::copy_nonoverlapping(scalar, factor.as_mut_ptr(), bytes) };
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        comm.factors.lock().unwrap_or_else(PoisonError::into_inner).insert(number, (ty, factor));
        // SAFETY: as the library's callers promise.
        unsafe { put(to, number) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclRedOpDestroy(op: c_int, comm: usize) -> c_int {
    call(|| {
        let comm = find(comm)?;
        let removed = comm.factors.lock().unwrap_or_else(PoisonError::into_inner).remove(&op);
        removed
            .map(drop)
            .ok_or_else(|| failure(status::INVALID_ARGUMENT, format!("{op} is no operation of this communicator")))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclMemAlloc(to: *mut u64, bytes: usize) -> c_int {
    call(|| {
        let found = Memory::global().allocate(device()?, bytes);
        let address = found.map_err(|fault| failure(status::UNHANDLED_CUDA_ERROR, fault.to_string()))?;
        // SAFETY: as the library's callers promise.
        unsafe { put(to, address) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclMemFree(address: u64) -> c_int {
    call(|| Memory::global().free(address).map_err(|fault| failure(status::UNHANDLED_CUDA_ERROR, fault.to_string())))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommRegister(comm: usize, address: u64, bytes: usize, to: *mut u64) -> c_int {
    call(|| {
        let comm = find(comm)?;
        check_buffer(&comm, "a buffer to register", address, bytes)?;
        // SAFETY: as the library's callers promise.
        unsafe { put(to, address) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommDeregister(comm: usize, _handle: u64) -> c_int {
    call(|| find(comm).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> c_int {
    GROUP.with_borrow_mut(|group| group.depth += 1);
    status::SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupEnd() -> c_int {
    call(|| {
        let ended = GROUP.with_borrow_mut(|group| {
            match group.depth {
                0 => return Err(failure(status::INVALID_USAGE, "a group ends that was not started")),
                1 => {}
                _ => {
                    group.depth -= 1;
                    return Ok(None);
                }
            }
            Ok(Some(std::mem::take(group)))
        })?;
        let Some(group) = ended else { return Ok(()) };
        join_all(&group.joining)?;
        queue(group.calls)
    })
}

/// Calls that are done together, each with its communicator.
type Part = Vec<(Arc<Comm>, Ask)>;

/// Queues calls on their streams: all together, so that none waits for one behind it.
fn queue(calls: Vec<(usize, Arc<Comm>, Ask)>) -> Call<()> {
    let mut streams: Vec<usize> = calls.iter().map(|call| call.0).collect();
    streams.dedup();
    let captured = streams.iter().any(|&stream| is_capturing(stream));
    let mut parts: Vec<(usize, Part)> = Vec::new();
    for (stream, comm, ask) in calls {
        // Each stream records its own; else the first stream stands for all.
        match parts.iter_mut().find(|part| part.0 == stream || !captured) {
            Some(part) => part.1.push((comm, ask)),
            None => parts.push((stream, vec![(comm, ask)])),
        }
    }
    for (stream, part) in parts {
        let comms: Vec<Arc<Comm>> = part.iter().map(|(comm, _)| Arc::clone(comm)).collect();
        queue_task(stream, move || perform(&part)).map_err(|number| {
            let failed = comms.iter().find_map(|comm| comm.failed());
            failed.unwrap_or_else(|| failure(status::UNHANDLED_CUDA_ERROR, format!("CUDA error {number}")))
        })?;
    }
    Ok(())
}

fn perform(calls: &[(Arc<Comm>, Ask)]) -> Result<(), Fault> {
    let fault = |failed: Failure| Fault::from(FaultKind::Collective(failed.text));
    let asked: Result<Vec<u64>, Failure> = calls.iter().map(|(comm, ask)| comm.ask(ask)).collect();
    for ((comm, ask), id) in calls.iter().zip(asked.map_err(fault)?) {
        comm.finish(ask, id).map_err(fault)?;
    }
    Ok(())
}
