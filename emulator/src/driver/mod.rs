//! The driver's interface in C, as programs load it from `libcuda.so`: what Warpstep and cudarc call of it, and no more.
//!
//! Work is done when it is queued, on the thread that queues it. That is a legal order: what a stream holds runs in its order,
//! and nothing that an event orders can run too early. Within a capture it is kept as a list and done at each replay.

mod api;
mod handles;
mod inspect;

use std::collections::HashMap;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use crate::counts::Counts;
use crate::exec::{Checks, Launch, launch};
use crate::fault::{Fault, FaultKind};
use crate::memory::Memory;
use crate::ptx::Loaded;
use crate::tell::tell;
use handles::Table;

/// Numbers of the driver's errors.
pub(crate) mod status {
    pub const SUCCESS: i32 = 0;
    pub const INVALID_VALUE: i32 = 1;
    pub const OUT_OF_MEMORY: i32 = 2;
    pub const NOT_INITIALIZED: i32 = 3;
    pub const INVALID_DEVICE: i32 = 101;
    pub const INVALID_IMAGE: i32 = 200;
    pub const INVALID_CONTEXT: i32 = 201;
    pub const NO_BINARY_FOR_GPU: i32 = 209;
    pub const INVALID_PTX: i32 = 218;
    pub const INVALID_HANDLE: i32 = 400;
    pub const PEER_ACCESS_ALREADY_ENABLED: i32 = 704;
    pub const PEER_ACCESS_NOT_ENABLED: i32 = 705;
    pub const NOT_FOUND: i32 = 500;
    pub const ILLEGAL_ADDRESS: i32 = 700;
    pub const MISALIGNED_ADDRESS: i32 = 716;
    pub const LAUNCH_FAILED: i32 = 719;
    pub const COOPERATIVE_LAUNCH_TOO_LARGE: i32 = 720;
    pub const STREAM_CAPTURE_UNSUPPORTED: i32 = 900;
    pub const STREAM_CAPTURE_INVALIDATED: i32 = 901;
    pub const STREAM_CAPTURE_UNMATCHED: i32 = 903;
    pub const STREAM_CAPTURE_UNJOINED: i32 = 904;
    pub const STREAM_CAPTURE_ISOLATION: i32 = 905;
    pub const UNKNOWN: i32 = 999;
}

/// A call of the driver that failed: the number that it returns.
pub(crate) type Call<T> = Result<T, i32>;

/// A kernel as programs hold it.
pub(crate) struct Function {
    pub loaded: Arc<Loaded>,
    pub name: String,
    /// Dynamic shared memory that launches may ask for.
    pub shared_limit: AtomicU32,
}

/// Work of a library, done when its turn comes.
pub(crate) type Task = Arc<dyn Fn() -> Result<(), Fault> + Send + Sync>;

/// One piece of queued work.
#[derive(Clone)]
pub(crate) enum Work {
    Kernel(Arc<KernelLaunch>),
    CopyIn { to: u64, from: usize, bytes: usize },
    CopyOut { to: usize, from: u64, bytes: usize },
    Copy { to: u64, from: u64, bytes: usize },
    Fill { to: u64, pattern: Vec<u8>, count: usize },
    Library(Task),
}

pub(crate) struct KernelLaunch {
    pub function: Arc<Function>,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub dynamic_shared: u32,
    pub params: Vec<u8>,
    pub cooperative: bool,
}

/// A list that streams record into.
#[derive(Default)]
pub(crate) struct Capture {
    pub work: Vec<Work>,
    pub invalid: bool,
}

pub(crate) type Shared<T> = Arc<Mutex<T>>;

/// How much of what each stream has recorded in a capture comes before a point of it.
pub(crate) type Before = HashMap<usize, u64>;

#[derive(Default)]
pub(crate) struct Stream {
    pub device: u32,
    /// What the stream records into, and whether it began the capture.
    pub capture: Option<(Shared<Capture>, bool)>,
    /// What comes before the work that the stream records next, its own counted.
    pub before: Before,
}

#[derive(Default)]
pub(crate) struct Event {
    pub recorded: Option<Instant>,
    pub capture: Option<Shared<Capture>>,
    pub before: Before,
}

/// What the host did, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct HostCounts {
    /// Kernels launched by themselves, outside graphs.
    pub launches: u64,
    /// Graphs launched.
    pub graph_launches: u64,
    /// Times that the host waited for the device.
    pub synchronizations: u64,
    /// Allocations of device memory.
    pub allocations: u64,
    /// Times that device memory was freed.
    pub frees: u64,
    /// Allocations of pinned host memory.
    pub host_allocations: u64,
    /// Copies from the host, in graphs too.
    pub copies_in: u64,
    /// Bytes copied from the host.
    pub bytes_in: u64,
    /// Copies to the host, in graphs too.
    pub copies_out: u64,
    /// Bytes copied to the host.
    pub bytes_out: u64,
    /// Copies between device memory, in graphs too.
    pub copies: u64,
    /// Bytes of those.
    pub bytes_copied: u64,
    /// Fills of device memory, in graphs too.
    pub fills: u64,
    /// Bytes of those.
    pub bytes_filled: u64,
    /// Kernels that graphs launched.
    pub graph_kernels: u64,
    /// Calls of libraries.
    pub library_calls: u64,
    /// Times that cuDNN was asked which algorithms there are for a convolution.
    pub heuristics: u64,
    /// Copies to memory that is not page-locked while there was work that nobody had waited for: a driver's call waits for it.
    pub waiting_copies: u64,
}

#[derive(Default)]
pub(crate) struct State {
    pub streams: Table<Shared<Stream>>,
    pub events: Table<Shared<Event>>,
    pub modules: Table<Arc<Loaded>>,
    pub functions: Table<Arc<Function>>,
    pub graphs: Table<Arc<Vec<Work>>>,
    pub host: HostCounts,
    pub kernels: HashMap<String, Counts>,
    pub last_fault: Option<Fault>,
    /// By device, the error that every call returns after a fault, as a broken context does.
    pub broken: HashMap<u32, i32>,
    /// Whether there is work that nobody has waited for.
    pub unwaited: bool,
}

impl State {
    /// Streams and events that a capture drew in leave it, as it has ended. Returns whether all that they recorded comes before its
    /// end.
    fn release(&self, capture: &Shared<Capture>, end: &Before) -> bool {
        let mut joined = true;
        for (handle, stream) in self.streams.iter() {
            let mut stream = lock(stream);
            if stream.capture.as_ref().is_some_and(|(drawn_into, _)| Arc::ptr_eq(drawn_into, capture)) {
                stream.capture = None;
                let before = std::mem::take(&mut stream.before);
                joined &= before.get(&handle) <= end.get(&handle);
            }
        }
        for (_, event) in self.events.iter() {
            let mut event = lock(event);
            if event.capture.as_ref().is_some_and(|drawn_into| Arc::ptr_eq(drawn_into, capture)) {
                event.capture = None;
            }
        }
        joined
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The driver of this process.
pub(crate) fn state() -> MutexGuard<'static, State> {
    static STATE: OnceLock<Mutex<State>> = OnceLock::new();
    lock(STATE.get_or_init(Mutex::default))
}

/// What is checked in launches: all, unless `WARPSTEP_EMULATOR_CHECKS=off` asks for speed.
pub(crate) fn checks() -> Checks {
    static CHECKS: OnceLock<Checks> = OnceLock::new();
    *CHECKS.get_or_init(|| {
        let off = std::env::var("WARPSTEP_EMULATOR_CHECKS").is_ok_and(|checks| checks == "off");
        Checks { unwritten: !off, races: !off, ..Checks::default() }
    })
}

/// The driver's number for a fault, and whether the context is broken by it.
fn number(kind: &FaultKind) -> (i32, bool) {
    match kind {
        FaultKind::OutOfMemory { .. } => (status::OUT_OF_MEMORY, false),
        FaultKind::Launch(_) | FaultKind::SharedMemory { .. } | FaultKind::NotAllocated { .. } => {
            (status::INVALID_VALUE, false)
        }
        FaultKind::Collective(_) => (status::LAUNCH_FAILED, false),
        FaultKind::Misaligned { .. } => (status::MISALIGNED_ADDRESS, true),
        FaultKind::Trap
        | FaultKind::Endless { .. }
        | FaultKind::BranchTable { .. }
        | FaultKind::DivergentBarrier { .. }
        | FaultKind::AbsentLane { .. } => (status::LAUNCH_FAILED, true),
        _ => (status::ILLEGAL_ADDRESS, true),
    }
}

/// Tells a fault on stderr, keeps it, and gives its number.
pub(crate) fn fail(fault: Fault) -> i32 {
    let (number, breaks) = number(&fault.kind);
    if !matches!(fault.kind, FaultKind::OutOfMemory { .. }) {
        tell(format_args!("emulated device: {fault}"));
    }
    let mut state = state();
    if let (true, Some(device)) = (breaks, api::context()) {
        state.broken.entry(device).or_insert(number);
    }
    state.last_fault = Some(fault);
    number
}

pub(crate) fn count(what: impl FnOnce(&mut HostCounts)) {
    what(&mut state().host);
}

/// Does work now.
pub(crate) fn perform(work: &Work) -> Call<()> {
    let memory = Memory::global();
    state().unwaited = true;
    let done = match work {
        Work::Kernel(kernel) => run_kernel(kernel),
        Work::CopyIn { to, from, bytes } => {
            count(|host| {
                host.copies_in += 1;
                host.bytes_in += *bytes as u64;
            });
            // SAFETY: the caller of the driver owns as many bytes of host memory, until the stream is done with them.
            memory.copy_in(*to, unsafe { std::slice::from_raw_parts(*from as *const u8, *bytes) })
        }
        Work::CopyOut { to, from, bytes } => {
            count(|host| {
                host.copies_out += 1;
                host.bytes_out += *bytes as u64;
            });
            // SAFETY: as above.
            memory.copy_out(*from, unsafe { std::slice::from_raw_parts_mut(*to as *mut u8, *bytes) })
        }
        Work::Copy { to, from, bytes } => {
            count(|host| {
                host.copies += 1;
                host.bytes_copied += *bytes as u64;
            });
            memory.copy(*to, *from, *bytes)
        }
        Work::Fill { to, pattern, count: times } => {
            count(|host| {
                host.fills += 1;
                host.bytes_filled += (pattern.len() * times) as u64;
            });
            memory.fill(*to, pattern, *times)
        }
        Work::Library(task) => {
            count(|host| host.library_calls += 1);
            task()
        }
    };
    done.map_err(fail)
}

fn run_kernel(kernel: &KernelLaunch) -> Result<(), Fault> {
    let mut counts = Counts::default();
    let launched = Launch {
        grid: kernel.grid,
        block: kernel.block,
        dynamic_shared: kernel.dynamic_shared,
        params: &kernel.params,
        cooperative: kernel.cooperative,
        checks: checks(),
    };
    let name = &kernel.function.name;
    let result = launch(&kernel.function.loaded, name, &launched, Memory::global(), &mut counts);
    let mut state = state();
    match state.kernels.get_mut(name) {
        Some(sum) => *sum += counts,
        None => {
            state.kernels.insert(name.clone(), counts);
        }
    }
    result
}

/// Queues work on a stream: done now, or kept where the stream records.
pub(crate) fn queue(stream: usize, work: Work) -> Call<()> {
    if let Some(broken) = api::context().and_then(|device| state().broken.get(&device).copied()) {
        return Err(broken);
    }
    if stream != 0 {
        let recording = state().streams.get(stream)?;
        let mut recording = lock(&recording);
        if let Some((capture, _)) = &recording.capture {
            let mut into = lock(capture);
            if into.invalid {
                return Err(status::STREAM_CAPTURE_INVALIDATED);
            }
            into.work.push(work);
            drop(into);
            *recording.before.entry(stream).or_default() += 1;
            return Ok(());
        }
    }
    if matches!(work, Work::Kernel(_)) {
        state().host.launches += 1;
    }
    perform(&work)
}

/// Queues work of a library.
pub(crate) fn queue_task(stream: usize, task: impl Fn() -> Result<(), Fault> + Send + Sync + 'static) -> Call<()> {
    queue(stream, Work::Library(Arc::new(task)))
}

/// Whether a stream records what is queued on it.
pub(crate) fn is_capturing(stream: usize) -> bool {
    stream != 0 && state().streams.get(stream).is_ok_and(|stream| lock(&stream).capture.is_some())
}

pub(crate) use api::{current_device, physical};
pub use inspect::{counts_of, host_counts, kernels, last_fault, reset};
