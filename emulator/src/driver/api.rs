//! The functions. Their names, parameters and numbers are the CUDA driver API's.
#![allow(
    non_snake_case,
    clippy::missing_safety_doc,
    reason = "the driver's own names; its documentation says what each asks"
)]

mod errors;
mod module;

use std::cell::{Cell, RefCell};
use std::ffi::{c_char, c_int, c_uint};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use super::{Before, Call, Capture, Event, Shared, Stream, Work, fail, lock, perform, queue, state, status};
use crate::exec::{SHARED_LIMIT, STATIC_SHARED_LIMIT};
use crate::memory::Memory;

thread_local! {
    static CURRENT: Cell<Option<u32>> = const { Cell::new(None) };
    /// The capture that this thread began and has not ended: calls that wait for the device are illegal meanwhile.
    static CAPTURING: RefCell<Option<Shared<Capture>>> = const { RefCell::new(None) };
}

static INITIALIZED: AtomicBool = AtomicBool::new(false);

/// Contexts are numbered from here on; each device has its primary one.
const CONTEXT: usize = 0x100;

/// The devices that this process sees, by their numbers among all: `WARPSTEP_EMULATOR_DEVICES` there are (1 unless set), of which
/// `CUDA_VISIBLE_DEVICES` may pick some.
fn visible() -> &'static [u32] {
    static VISIBLE: OnceLock<Vec<u32>> = OnceLock::new();
    VISIBLE.get_or_init(|| {
        let set = std::env::var("WARPSTEP_EMULATOR_DEVICES").ok().and_then(|count| count.parse().ok());
        let count: u32 = set.unwrap_or(1);
        match std::env::var("CUDA_VISIBLE_DEVICES") {
            // Up to the first that is none, as the driver has it.
            Ok(picked) => {
                picked.split(',').map_while(|one| one.trim().parse().ok().filter(|&one| one < count)).collect()
            }
            Err(_) => (0..count).collect(),
        }
    })
}

fn devices() -> u32 {
    visible().len() as u32
}

/// A device's number among all of the machine.
pub(crate) fn physical(ordinal: u32) -> u32 {
    visible().get(ordinal as usize).copied().unwrap_or(ordinal)
}

/// Runs a call; a panic within it is an unknown error.
fn call(body: impl FnOnce() -> Call<()>) -> c_int {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
        Ok(Ok(())) => status::SUCCESS,
        Ok(Err(number)) => number,
        Err(_) => status::UNKNOWN,
    }
}

/// Writes a result where the caller wants it.
unsafe fn put<T>(to: *mut T, value: T) -> Call<()> {
    if to.is_null() {
        return Err(status::INVALID_VALUE);
    }
    // SAFETY: the caller of the driver hands in room for a value.
    unsafe { to.write(value) };
    Ok(())
}

fn ready() -> Call<()> {
    if INITIALIZED.load(Ordering::Relaxed) { Ok(()) } else { Err(status::NOT_INITIALIZED) }
}

fn device(ordinal: c_int) -> Call<u32> {
    ready()?;
    u32::try_from(ordinal).ok().filter(|&ordinal| ordinal < devices()).ok_or(status::INVALID_DEVICE)
}

/// The device of this thread's context, which no fault has broken.
fn current() -> Call<u32> {
    ready()?;
    let device = CURRENT.get().ok_or(status::INVALID_CONTEXT)?;
    match state().broken.get(&device) {
        Some(&broken) => Err(broken),
        None => Ok(device),
    }
}

/// The device of this thread's context, as libraries ask for it.
pub(crate) fn current_device() -> Call<u32> {
    current()
}

/// The device of this thread's context, if it has one.
pub(crate) fn context() -> Option<u32> {
    CURRENT.get()
}

/// A stream of the device of this thread's context.
fn own_stream(stream: usize) -> Call<Shared<Stream>> {
    let device = current()?;
    let found = state().streams.get(stream)?;
    let owner = lock(&found).device;
    if owner == device { Ok(found) } else { Err(status::INVALID_HANDLE) }
}

/// Queues a copy or a fill, for which the thread must have a context, whatever the stream.
fn queue_here(stream: usize, work: Work) -> Call<()> {
    current()?;
    queue(stream, work)
}

/// Refuses what is illegal while this thread captures, and spoils the capture, as the driver does.
fn outside_capture() -> Call<()> {
    CAPTURING.with_borrow(|capture| match capture {
        Some(capture) => {
            lock(capture).invalid = true;
            Err(status::STREAM_CAPTURE_UNSUPPORTED)
        }
        None => Ok(()),
    })
}

/// The host waits for all work, which is done already.
fn wait() -> Call<()> {
    current()?;
    outside_capture()?;
    let mut state = state();
    state.host.synchronizations += 1;
    state.unwaited = false;
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> c_int {
    call(|| {
        if flags != 0 {
            return Err(status::INVALID_VALUE);
        }
        INITIALIZED.store(true, Ordering::Relaxed);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    let set = std::env::var("WARPSTEP_EMULATOR_DRIVER").ok().and_then(|version| version.parse().ok());
    // SAFETY: as the driver's callers promise.
    call(|| unsafe { put(version, set.unwrap_or(13000)) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    call(|| {
        ready()?;
        // SAFETY: as the driver's callers promise.
        unsafe { put(count, devices() as c_int) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(to: *mut c_int, ordinal: c_int) -> c_int {
    // SAFETY: as the driver's callers promise.
    call(|| unsafe { put(to, device(ordinal)? as c_int) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, ordinal: c_int) -> c_int {
    call(|| {
        device(ordinal)?;
        let text = c"Warpstep emulated device".to_bytes_with_nul();
        if name.is_null() || len <= 0 {
            return Err(status::INVALID_VALUE);
        }
        let bytes = text.len().min(len as usize);
        // SAFETY: the caller hands in room for `len` characters.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, bytes);
            name.add(bytes - 1).write(0);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], ordinal: c_int) -> c_int {
    call(|| {
        let mut bytes = *b"warpstep-emul-00";
        bytes[15] = physical(device(ordinal)?) as u8;
        // SAFETY: as the driver's callers promise.
        unsafe { put(uuid, bytes) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, ordinal: c_int) -> c_int {
    call(|| {
        device(ordinal)?;
        // SAFETY: as the driver's callers promise.
        unsafe { put(bytes, Memory::global().capacity()) }
    })
}

/// The attributes of an A100, as far as programs ask for them.
fn attribute(number: c_int) -> c_int {
    match number {
        1..=3 => 1024,
        4 => 64,
        5 => 0x7fff_ffff,
        6 | 7 => 65535,
        8 => STATIC_SHARED_LIMIT as c_int,
        9 => 65536,
        10 => 32,
        12 | 82 => 65536,
        13 => 1_410_000,
        16 => 108,
        19 | 31 | 41 | 78 | 95 => 1,
        36 => 1_215_000,
        37 => 5120,
        38 => 40 << 20,
        39 => 2048,
        40 => 2,
        75 => 8,
        76 => 0,
        81 => 164 << 10,
        97 => SHARED_LIMIT as c_int,
        106 => 32,
        111 => 1024,
        _ => 0,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, number: c_int, ordinal: c_int) -> c_int {
    call(|| {
        device(ordinal)?;
        // SAFETY: as the driver's callers promise.
        unsafe { put(value, attribute(number)) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, ordinal: c_int) -> c_int {
    // SAFETY: as the driver's callers promise.
    call(|| unsafe { put(context, CONTEXT + device(ordinal)? as usize) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(ordinal: c_int) -> c_int {
    call(|| device(ordinal).map(drop))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut usize) -> c_int {
    call(|| {
        ready()?;
        // SAFETY: as the driver's callers promise.
        unsafe { put(context, CURRENT.get().map_or(0, |ordinal| CONTEXT + ordinal as usize)) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: usize) -> c_int {
    call(|| {
        ready()?;
        let ordinal = context.wrapping_sub(CONTEXT);
        if context != 0 && ordinal >= devices() as usize {
            return Err(status::INVALID_CONTEXT);
        }
        CURRENT.set((context != 0).then_some(ordinal as u32));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevice(to: *mut c_int) -> c_int {
    // SAFETY: as the driver's callers promise.
    call(|| unsafe { put(to, current()? as c_int) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> c_int {
    call(wait)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    call(|| {
        let memory = Memory::global();
        let used = memory.in_use(current()?);
        // SAFETY: as the driver's callers promise.
        unsafe {
            put(free, memory.capacity() - used)?;
            put(total, memory.capacity())
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int {
    call(|| {
        let device = current()?;
        outside_capture()?;
        if bytes == 0 {
            return Err(status::INVALID_VALUE);
        }
        state().host.allocations += 1;
        let found = Memory::global().allocate(device, bytes).map_err(fail)?;
        // SAFETY: as the driver's callers promise.
        unsafe { put(address, found) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    call(|| {
        current()?;
        outside_capture()?;
        if address == 0 {
            return Ok(());
        }
        state().host.frees += 1;
        Memory::global().free(address).map_err(fail)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(address: *mut u64, bytes: usize, _stream: usize) -> c_int {
    // SAFETY: as the driver's callers promise.
    unsafe { cuMemAlloc_v2(address, bytes) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(address: u64, _stream: usize) -> c_int {
    cuMemFree_v2(address)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(to: *mut usize, bytes: usize, _flags: c_uint) -> c_int {
    call(|| {
        current()?;
        outside_capture()?;
        state().host.host_allocations += 1;
        let address = Memory::global().allocate_host(bytes).map_err(fail)?;
        // SAFETY: as the driver's callers promise.
        unsafe { put(to, address as usize) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(address: usize) -> c_int {
    call(|| {
        current()?;
        Memory::global().free(address as u64).map_err(fail)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoD_v2(to: u64, from: usize, bytes: usize) -> c_int {
    call(|| {
        wait()?;
        perform(&Work::CopyIn { to, from, bytes })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: usize, bytes: usize, stream: usize) -> c_int {
    call(|| queue_here(stream, Work::CopyIn { to, from, bytes }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoH_v2(to: usize, from: u64, bytes: usize) -> c_int {
    call(|| {
        wait()?;
        perform(&Work::CopyOut { to, from, bytes })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(to: usize, from: u64, bytes: usize, stream: usize) -> c_int {
    call(|| {
        if Memory::global().range(to as u64).is_none() {
            let mut state = state();
            state.host.waiting_copies += u64::from(state.unwaited);
        }
        queue_here(stream, Work::CopyOut { to, from, bytes })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) -> c_int {
    call(|| {
        current()?;
        outside_capture()?;
        perform(&Work::Copy { to, from, bytes })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) -> c_int {
    call(|| queue_here(stream, Work::Copy { to, from, bytes }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8_v2(to: u64, value: u8, count: usize) -> c_int {
    call(|| {
        current()?;
        outside_capture()?;
        perform(&Work::Fill { to, pattern: vec![value], count })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: usize) -> c_int {
    call(|| queue_here(stream, Work::Fill { to, pattern: vec![value], count }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: usize) -> c_int {
    call(|| queue_here(stream, Work::Fill { to, pattern: value.to_le_bytes().to_vec(), count }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(can: *mut c_int, by: c_int, owner: c_int) -> c_int {
    // SAFETY: as the driver's callers promise.
    call(|| unsafe { put(can, c_int::from(device(by)? != device(owner)?)) })
}

fn set_peer(context: usize, reach: bool) -> Call<()> {
    let by = current()?;
    let owner = context.wrapping_sub(CONTEXT);
    if owner >= devices() as usize || owner == by as usize {
        return Err(status::INVALID_CONTEXT);
    }
    let changed = Memory::global().set_peer(by, owner as u32, reach);
    let same = if reach { status::PEER_ACCESS_ALREADY_ENABLED } else { status::PEER_ACCESS_NOT_ENABLED };
    if changed { Ok(()) } else { Err(same) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxEnablePeerAccess(context: usize, flags: c_uint) -> c_int {
    call(|| if flags == 0 { set_peer(context, true) } else { Err(status::INVALID_VALUE) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxDisablePeerAccess(context: usize) -> c_int {
    call(|| set_peer(context, false))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyPeerAsync(
    to: u64,
    _to_context: usize,
    from: u64,
    _from_context: usize,
    bytes: usize,
    stream: usize,
) -> c_int {
    call(|| queue_here(stream, Work::Copy { to, from, bytes }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(to: *mut usize, _flags: c_uint) -> c_int {
    call(|| {
        let stream = Stream { device: current()?, ..Stream::default() };
        let handle = state().streams.insert(Arc::new(Mutex::new(stream)));
        // SAFETY: as the driver's callers promise.
        unsafe { put(to, handle) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(to: *mut usize, flags: c_uint, _priority: c_int) -> c_int {
    // SAFETY: as the driver's callers promise.
    unsafe { cuStreamCreate(to, flags) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: usize) -> c_int {
    call(|| state().streams.remove(stream).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: usize) -> c_int {
    call(|| {
        if stream != 0 {
            let stream = state().streams.get(stream)?;
            if let Some((capture, _)) = &lock(&stream).capture {
                lock(capture).invalid = true;
                return Err(status::STREAM_CAPTURE_UNSUPPORTED);
            }
        }
        wait()
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: usize) -> c_int {
    call(|| {
        current()?;
        if stream == 0 { Ok(()) } else { state().streams.get(stream).map(drop) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) -> c_int {
    call(|| {
        current()?;
        let event = state().events.get(event)?;
        if stream == 0 {
            return Ok(());
        }
        let stream = state().streams.get(stream)?;
        let event = lock(&event);
        let mut stream: std::sync::MutexGuard<'_, Stream> = lock(&stream);
        let Some(capture) = &event.capture else {
            // A recording cannot wait for what no replay does.
            return match &stream.capture {
                Some((capture, _)) if event.recorded.is_some() => {
                    lock(capture).invalid = true;
                    Err(status::STREAM_CAPTURE_ISOLATION)
                }
                _ => Ok(()),
            };
        };
        // A stream that waits for an event of a capture joins the capture.
        stream.capture.get_or_insert((Arc::clone(capture), false));
        for (&of, &count) in &event.before {
            let known = stream.before.entry(of).or_default();
            *known = count.max(*known);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(stream: usize, to: *mut c_int) -> c_int {
    call(|| {
        let capturing = match stream {
            0 => 0,
            _ => {
                let stream = state().streams.get(stream)?;
                let stream = lock(&stream);
                // 0: none, 1: active, 2: invalidated.
                stream.capture.as_ref().map_or(0, |(capture, _)| if lock(capture).invalid { 2 } else { 1 })
            }
        };
        // SAFETY: as the driver's callers promise.
        unsafe { put(to, capturing) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: usize, _mode: c_uint) -> c_int {
    call(|| {
        current()?;
        // The default stream records nothing.
        if stream == 0 {
            return Err(status::STREAM_CAPTURE_UNSUPPORTED);
        }
        let stream = state().streams.get(stream)?;
        let mut stream = lock(&stream);
        if stream.capture.is_some() {
            return Err(status::STREAM_CAPTURE_UNSUPPORTED);
        }
        let capture: Shared<Capture> = Arc::default();
        CAPTURING.set(Some(Arc::clone(&capture)));
        stream.capture = Some((capture, true));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: usize, to: *mut usize) -> c_int {
    call(|| {
        let stream = state().streams.get(stream)?;
        let mut stream = lock(&stream);
        let Some((capture, true)) = stream.capture.take() else { return Err(status::STREAM_CAPTURE_UNMATCHED) };
        let end = std::mem::take(&mut stream.before);
        drop(stream);
        CAPTURING.set(None);
        let joined = state().release(&capture, &end);
        let capture = std::mem::take(&mut *lock(&capture));
        if capture.invalid || !joined {
            // SAFETY: as the driver's callers promise.
            unsafe { put(to, 0)? };
            return Err(if joined { status::STREAM_CAPTURE_INVALIDATED } else { status::STREAM_CAPTURE_UNJOINED });
        }
        let graph = state().graphs.insert(Arc::new(capture.work));
        // SAFETY: as the driver's callers promise.
        unsafe { put(to, graph) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(to: *mut usize, graph: usize, _flags: u64) -> c_int {
    call(|| {
        let mut state = state();
        let work = state.graphs.get(graph)?;
        let executable = state.graphs.insert(work);
        // SAFETY: as the driver's callers promise.
        unsafe { put(to, executable) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphUpload(graph: usize, _stream: usize) -> c_int {
    call(|| state().graphs.get(graph).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(graph: usize, stream: usize) -> c_int {
    call(|| {
        current()?;
        let work = {
            let mut state = state();
            state.host.graph_launches += 1;
            if stream != 0 {
                let stream = state.streams.get(stream)?;
                if lock(&stream).capture.is_some() {
                    return Err(status::STREAM_CAPTURE_UNSUPPORTED);
                }
            }
            let work = state.graphs.get(graph)?;
            state.host.graph_kernels += work.iter().filter(|work| matches!(work, Work::Kernel(_))).count() as u64;
            work
        };
        work.iter().try_for_each(perform)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(graph: usize) -> c_int {
    call(|| state().graphs.remove(graph).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(graph: usize) -> c_int {
    cuGraphDestroy(graph)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(to: *mut usize, _flags: c_uint) -> c_int {
    call(|| {
        current()?;
        let handle = state().events.insert(Arc::default());
        // SAFETY: as the driver's callers promise.
        unsafe { put(to, handle) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: usize) -> c_int {
    call(|| state().events.remove(event).map(drop))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: usize, stream: usize) -> c_int {
    call(|| {
        current()?;
        let event: Shared<Event> = state().events.get(event)?;
        let (capture, before) = match stream {
            0 => (None, Before::new()),
            _ => {
                let stream = state().streams.get(stream)?;
                let stream = lock(&stream);
                (stream.capture.as_ref().map(|(capture, _)| Arc::clone(capture)), stream.before.clone())
            }
        };
        *lock(&event) = Event { recorded: Some(Instant::now()), capture, before };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: usize) -> c_int {
    call(|| {
        current()?;
        let mut state = state();
        state.events.get(event)?;
        // All of it is done, and now the host knows.
        state.unwaited = false;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: usize) -> c_int {
    call(|| {
        state().events.get(event)?;
        wait()
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: usize, end: usize) -> c_int {
    call(|| {
        let [start, end] = [start, end].map(|event| state().events.get(event));
        let [start, end] = [lock(&*start?).recorded, lock(&*end?).recorded];
        let (Some(start), Some(end)) = (start, end) else { return Err(status::INVALID_HANDLE) };
        // SAFETY: as the driver's callers promise.
        unsafe { put(milliseconds, end.saturating_duration_since(start).as_secs_f32() * 1e3) }
    })
}
