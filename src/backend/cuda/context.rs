//! A device: context, stream, kernels, and what NVIDIA's libraries need.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};

use super::claim::{Claim, Claims};
use super::compiler::Compiled;
use super::libraries::Library;
use super::module::{Image, image};
use super::scratch::{Block, release};
use super::step::Scalars;
use crate::error::{Error, Result};

/// The libraries that are named in errors with what installs them.
const DRIVER_MISSING: &str = "no NVIDIA driver was found (libcuda.so): install NVIDIA's driver for this GPU, or use \
                              device = \"cpu\"; `warpstep doctor` tells what is there";

/// What helps where kernels were made for a newer driver.
const NEWER_DRIVER: &str = "the kernels were compiled by a CUDA that is newer than this driver: install a newer driver, or build \
                            Warpstep with nvcc 13.0";

/// What a run can change that needs more memory than there is.
pub const LESS_MEMORY: &str = "make data.batch_size, data.context or the model smaller, compute blocks again in the backward \
                               (model.recompute = true), store activations in bf16 (run.precision), or accumulate over more \
                               micro-batches (optimizer.accumulate)";

/// How a device is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Number of the device.
    pub ordinal: usize,
    /// Whether products of f32 take their inputs in tf32 (10 bits of fraction).
    pub tf32: bool,
    /// Whether programs are recorded and replayed as CUDA graphs. Where they are not, each kernel and each call of a library is
    /// waited for, so that the one is named that fails.
    pub graphs: bool,
    /// Whether a small arena is updated in one cooperative launch.
    pub persistent_update: bool,
    /// Whether products take functions of single values and sums of gradients along.
    pub fusion: Fusion,
    /// Whether affine maps that are small are done by kernels of our own.
    pub small_products: SmallProducts,
    /// How attention in 16 bits multiplies.
    pub attention: AttentionProducts,
    /// Whether a product's algorithm is chosen by measuring, once a shape, and kept in the cache (`$XDG_CACHE_HOME/warpstep` or
    /// `~/.cache/warpstep`); otherwise it is what the library proposes first, which is the same on every machine of a kind.
    pub measure: bool,
}

impl Default for DeviceOptions {
    /// On the emulated device nothing is measured: its times say nothing about any device.
    fn default() -> Self {
        DeviceOptions {
            ordinal: 0,
            tf32: false,
            graphs: true,
            persistent_update: true,
            fusion: Fusion::ByArchitecture,
            small_products: SmallProducts::Measured,
            attention: AttentionProducts::Warps,
            measure: !super::emulated::is_active(),
        }
    }
}

/// Whether passes of our own over what a product gives are left to the product (cuBLASLt's epilogues).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fusion {
    /// Where that is known to be faster: in 16 bits, or in products that are small, on Hopper's and Blackwell's server chips.
    ByArchitecture,
    /// Wherever the library can.
    Always,
    /// Nowhere.
    Never,
}

/// Whether affine maps of a few million multiply-adds are done by kernels of our own, a launch each way (kernels/linear_small.cu),
/// where cuBLASLt takes several. In f32 they are done by cuBLASLt: those kernels multiply in tf32, or 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SmallProducts {
    /// Where that was measured to be faster, once a shape; kept as algorithms are. Nowhere where nothing is to be measured.
    Measured,
    /// Wherever they can.
    Always,
    /// Nowhere.
    Never,
}

/// How attention in 16 bits multiplies, where its heads are of 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionProducts {
    /// By instructions of a warp, which every device has.
    Warps,
    /// By instructions of four warps together, which compute capability 9.0 has (kernels/flash_attention_hopper.cu); by those of a
    /// warp elsewhere. The kernels pass on the emulated device; no GPU has run them yet.
    Groups,
}

/// A GPU, the stream that work is queued on, and the kernels that were loaded.
///
/// Threads may share it: each operation, each run of a program and each step of a trainer is queued whole, before or after what other
/// threads queue.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    copy_stream: Arc<CudaStream>,
    options: DeviceOptions,
    name: String,
    capability: (i32, i32),
    multiprocessors: usize,
    /// Whether the device reads pageable memory itself, by the host's page tables, so that no copy from it need be staged.
    reads_pageable: bool,
    loaded: Mutex<Loaded>,
    timings: Mutex<Option<Vec<super::profile::Timing>>>,
    /// The operation that kernels belong to, while they are timed.
    pub(super) operation: Mutex<Option<&'static str>>,
    blas: std::sync::OnceLock<super::blas::Blas>,
    dnn: std::sync::OnceLock<super::convolution::Dnn>,
    /// Where the run keeps what was chosen for it.
    choices: Mutex<Option<PathBuf>>,
    /// Whether the second of two ways is taken, by question (ways.rs).
    pub(super) ways: Mutex<HashMap<String, bool>>,
    /// Where the scalars of work stand that is no step of a queue, and of whatever is queued now.
    own_state: u64,
    state: AtomicU64,
    /// Who queues work now.
    claims: Claims,
    pub(super) scratch: Mutex<Option<Arc<Block>>>,
    watch: Mutex<Option<Watch>>,
    around_waits: Mutex<Option<Around>>,
    /// Tables of log-mel pictures: the transform, where its bands are, where the rest is.
    pub(super) mel_tables: Mutex<Vec<super::mel::KeptTables>>,
}

/// Tells why what the device waits for will not come, where it does not.
type Watch = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// Does a wait for the device, and tells whom it concerns.
type Around = Arc<dyn Fn(&mut dyn FnMut() -> Result<()>) -> Result<()> + Send + Sync>;

/// Modules by file, functions by file and name.
#[derive(Default)]
struct Loaded {
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<&'static str, HashMap<String, (sys::CUfunction, u32)>>,
}

// SAFETY: modules and functions are handles of the driver, which may be used from any thread that the context is bound to.
unsafe impl Send for Loaded {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("name", &self.name).field("options", &self.options).finish_non_exhaustive()
    }
}

/// An error of the driver, with what was tried.
pub(super) fn driver_error(what: &str, error: DriverError) -> Error {
    let name = error.error_name().map(|name| name.to_string_lossy().into_owned());
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    let told = match (name, text) {
        (Ok(name), Ok(text)) => format!("CUDA: cannot {what}: {text} ({name})"),
        _ => format!("CUDA: cannot {what}: error {:?}", error.0),
    };
    by_status(error.0, told)
}

/// What was told of a status, with what to do where that is known: what another device, another driver or a smaller run would mend is
/// told apart from a device that failed.
fn by_status(status: sys::CUresult, told: String) -> Error {
    use sys::CUresult as Status;
    match status {
        Status::CUDA_ERROR_OUT_OF_MEMORY => Error::Device(format!("{told}: {LESS_MEMORY}")),
        Status::CUDA_ERROR_UNSUPPORTED_PTX_VERSION | Status::CUDA_ERROR_NO_BINARY_FOR_GPU => {
            Error::Device(format!("{told}: {NEWER_DRIVER}"))
        }
        Status::CUDA_ERROR_NO_DEVICE
        | Status::CUDA_ERROR_INVALID_DEVICE
        | Status::CUDA_ERROR_DEVICE_UNAVAILABLE
        | Status::CUDA_ERROR_STUB_LIBRARY
        | Status::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | Status::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => Error::Device(told),
        _ => Error::DeviceFailed(told),
    }
}

/// Whether the driver's library is there at all.
pub fn is_driver_present() -> bool {
    // SAFETY: asks whether a library of this name loads; nothing of it is called.
    unsafe { sys::is_culib_present() }
}

/// The oldest driver's version: that of the CUDA whose functions are called here, and whose nvcc makes the kernels.
const LEAST_DRIVER: i32 = 13_000;

/// What the driver supports, as 13000 for CUDA 13.0; 0 where it does not tell.
pub(super) fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: the driver is present, as the caller knows, and needs no start for this; there is room for the number.
    let status = unsafe { sys::cuDriverGetVersion(&mut version) };
    if status == sys::CUresult::CUDA_SUCCESS { version } else { 0 }
}

/// Why the driver, which is present, cannot be used, where it is too old.
pub(super) fn old_driver() -> Option<String> {
    let version = driver_version();
    (1..LEAST_DRIVER).contains(&version).then(|| {
        format!(
            "the NVIDIA driver is too old: it supports CUDA {}.{}, and Warpstep needs 13.0: {}",
            version / 1000,
            version % 1000 / 10,
            Library::Driver.install()
        )
    })
}

/// Number of devices; 0 without a driver, or with one that does not start.
pub fn device_count() -> usize {
    if !is_driver_present() || result::init().is_err() {
        return 0;
    }
    result::device::get_count().map_or(0, |count| usize::try_from(count).unwrap_or(0))
}

impl Device {
    /// Opens a device.
    ///
    /// # Errors
    /// No driver, a driver that is too old, or no such device: what was found and what to do.
    pub fn open(options: DeviceOptions) -> Result<Arc<Self>> {
        if !is_driver_present() {
            return Err(Error::Device(DRIVER_MISSING.into()));
        }
        if let Some(old) = old_driver() {
            return Err(Error::Device(old));
        }
        result::init().map_err(|error| driver_error("start the driver", error))?;
        let count = device_count();
        if options.ordinal >= count {
            return Err(Error::Device(format!(
                "there is no device cuda:{}: the driver knows {count} device{}; use device = \"cpu\" or a smaller number",
                options.ordinal,
                if count == 1 { "" } else { "s" }
            )));
        }
        let fail = |error| driver_error(&format!("open device {}", options.ordinal), error);
        let context = CudaContext::new(options.ordinal).map_err(fail)?;
        // SAFETY: every buffer of this backend is used on the one stream below, in its order, so no event need guard it; and
        // events would be illegal within a capture.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(fail)?;
        Self::new(&stream, options)
    }

    /// The device of a stream that somebody else made, in a context of their own: all work is queued on that stream, in its
    /// order. `options.ordinal` is not looked at. On a context's default stream CUDA records nothing, so that steps are launches of
    /// their kernels there, and of two ways to do an operation none is measured: `new_stream` has the faster ones.
    ///
    /// # Errors
    /// A device that is too old, or that failed.
    pub fn on_stream(stream: &Arc<CudaStream>, options: DeviceOptions) -> Result<Arc<Self>> {
        if let Some(old) = old_driver() {
            return Err(Error::Device(old));
        }
        Self::new(stream, DeviceOptions { ordinal: stream.context().ordinal(), ..options })
    }

    /// The device of a stream, whose driver is new enough.
    fn new(stream: &Arc<CudaStream>, options: DeviceOptions) -> Result<Arc<Self>> {
        let context = stream.context().clone();
        let fail = |error| driver_error(&format!("open device {}", options.ordinal), error);
        context.bind_to_thread().map_err(fail)?;
        let capability = context.compute_capability().map_err(fail)?;
        if capability.0 < 8 {
            return Err(Error::Device(format!(
                "{} has compute capability {}.{}; Warpstep needs 8.0 (Ampere, 2020) or newer",
                context.name().map_err(fail)?,
                capability.0,
                capability.1
            )));
        }
        let attribute = |attribute| context.attribute(attribute).map_err(fail);
        let multiprocessors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let host_page_tables =
            attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES)?;
        let mut device = Device {
            stream: stream.clone(),
            copy_stream: context.new_stream().map_err(fail)?,
            name: context.name().map_err(fail)?,
            multiprocessors: usize::try_from(multiprocessors).unwrap_or(1),
            reads_pageable: host_page_tables != 0,
            capability,
            context,
            options,
            loaded: Mutex::default(),
            timings: Mutex::default(),
            operation: Mutex::default(),
            blas: std::sync::OnceLock::new(),
            dnn: std::sync::OnceLock::new(),
            choices: Mutex::default(),
            ways: Mutex::default(),
            own_state: 0,
            state: AtomicU64::new(0),
            claims: Claims::default(),
            scratch: Mutex::default(),
            watch: Mutex::default(),
            around_waits: Mutex::default(),
            mel_tables: Mutex::default(),
        };
        device.own_state = device.allocate(size_of::<Scalars>())?;
        device.state = AtomicU64::new(device.own_state);
        device.write(device.own_state, bytemuck::bytes_of(&Scalars::default()))?;
        Ok(Arc::new(device))
    }

    /// What the driver calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Major and minor number.
    pub fn compute_capability(&self) -> (i32, i32) {
        self.capability
    }

    /// How it is used.
    pub fn options(&self) -> DeviceOptions {
        self.options
    }

    /// Number of multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Bytes free and in all.
    ///
    /// # Errors
    /// A device that failed.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        result::mem_get_info().map_err(|error| driver_error("ask for the memory", error))
    }

    pub(super) fn precision_name(&self, storage: &str) -> String {
        if storage == "f32" && self.options.tf32 { "tf32".into() } else { storage.into() }
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Whether what is queued can be recorded.
    pub(super) fn can_record(&self) -> bool {
        !self.stream.cu_stream().is_null()
    }

    /// Whether what is run again is recorded and replayed.
    pub(super) fn replays(&self) -> bool {
        self.options.graphs && self.can_record() && !self.is_timing()
    }

    /// The stream that batches are copied on.
    pub(super) fn copy_stream(&self) -> &Arc<CudaStream> {
        &self.copy_stream
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Keeps an error of something that cannot return one, for the next [`Device::synchronize`].
    pub(super) fn record<T>(&self, result: std::result::Result<T, DriverError>) {
        self.context.record_err(result);
    }

    /// Keeps what is chosen by measuring, from now on, in this folder too, and takes what is kept there before anything else: a run
    /// that is resumed has its bits wherever it is, and processes that see the folder choose alike.
    pub fn keep_choices_in(&self, folder: PathBuf) {
        // A thread that panicked changed nothing of it.
        *self.choices.lock().unwrap_or_else(PoisonError::into_inner) = Some(folder);
    }

    pub(super) fn choices(&self) -> Option<PathBuf> {
        self.choices.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The products' library, opened on first use.
    pub(super) fn blas(&self) -> Result<&super::blas::Blas> {
        // One thread opens it.
        let _claim = self.claim();
        if let Some(blas) = self.blas.get() {
            return Ok(blas);
        }
        let blas = super::blas::Blas::open(self)?;
        Ok(self.blas.get_or_init(|| blas))
    }

    /// The convolutions' library, opened on first use.
    pub(super) fn dnn(&self) -> Result<&super::convolution::Dnn> {
        // As above.
        let _claim = self.claim();
        if let Some(dnn) = self.dnn.get() {
            return Ok(dnn);
        }
        let dnn = super::convolution::Dnn::open(self)?;
        Ok(self.dnn.get_or_init(|| dnn))
    }

    /// Lets this thread alone queue work until what it gets is dropped.
    pub(super) fn claim(&self) -> Claim<'_> {
        self.claims.claim()
    }

    /// Address of the `StepState` of what this thread queues now.
    pub(super) fn step_state(&self) -> u64 {
        if self.claims.are_own() { self.state.load(Ordering::Relaxed) } else { self.own_state }
    }

    /// Queues work whose scalars stand elsewhere than those of all other work: steps have theirs on the way while another is
    /// computed. Its thread has claimed the device.
    pub(super) fn with_state<T>(&self, address: u64, work: impl FnOnce() -> T) -> T {
        /// Names the device's own again, also where `work` panics.
        struct Back<'d>(&'d Device);
        impl Drop for Back<'_> {
            fn drop(&mut self) {
                self.0.state.store(self.0.own_state, Ordering::Relaxed);
            }
        }
        self.state.store(address, Ordering::Relaxed);
        let _back = Back(self);
        work()
    }

    /// Whether what is queued is recorded, not run.
    pub(super) fn is_recording(&self) -> Result<bool> {
        let status = self.stream.capture_status().map_err(|error| driver_error("ask for the recording", error))?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Makes the context that of this thread.
    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| driver_error("use the device from this thread", error))
    }

    fn loaded(&self) -> MutexGuard<'_, Loaded> {
        // A thread that panicked left a table of handles behind, which is whole after every insertion.
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn timings(&self) -> MutexGuard<'_, Option<Vec<super::profile::Timing>>> {
        self.timings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A kernel of `kernels/<file>.cu`, allowed `shared` bytes of dynamic shared memory; loaded on first use.
    pub(super) fn function(&self, file: &'static str, kernel: &str, shared: u32) -> Result<sys::CUfunction> {
        self.bind()?;
        let mut loaded = self.loaded();
        if let Some(&(function, allowed)) = loaded.functions.get(file).and_then(|functions| functions.get(kernel))
            && shared <= allowed
        {
            return Ok(function);
        }
        let module = match loaded.modules.get(file) {
            Some(&module) => module,
            None => {
                let module = self.load(file)?;
                loaded.modules.insert(file, module);
                module
            }
        };
        let name = CString::new(kernel).map_err(|_| Error::Device(format!("{kernel:?} is no name of a kernel")))?;
        // SAFETY: the module was loaded in this context and is unloaded only when the device is dropped.
        let function = unsafe { result::module::get_function(module, name) }
            .map_err(|error| driver_error(&format!("find the kernel {kernel}"), error))?;
        if shared > STATIC_SHARED {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is valid; the value is checked by the driver.
            unsafe { result::function::set_function_attribute(function, attribute, shared as i32) }
                .map_err(|error| driver_error(&format!("give {kernel} {shared} bytes of shared memory"), error))?;
        }
        loaded.functions.entry(file).or_default().insert(kernel.to_owned(), (function, shared.max(STATIC_SHARED)));
        Ok(function)
    }

    fn load(&self, file: &'static str) -> Result<sys::CUmodule> {
        let image = image(file, self.capability)?;
        let bytes: &[u8] = match &image {
            Image::Fatbin(bytes) => bytes,
            Image::Compiled(Compiled::Machine(bytes) | Compiled::Ptx(bytes)) => bytes,
        };
        // SAFETY: a fatbin and machine code say their own length, PTX ends with a 0; the driver copies what it loads.
        unsafe { result::module::load_data(bytes.as_ptr().cast()) }
            .map_err(|error| driver_error(&format!("load the kernels of {file}"), error))
    }

    /// Device memory of `bytes` bytes, with nothing in it.
    ///
    /// # Errors
    /// Not enough: what was asked, what is free, what to change.
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        // SAFETY: the context is bound; the address is freed once, by `release`.
        unsafe { result::malloc_sync(bytes) }.map_err(|error| {
            if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return driver_error(&format!("allocate {bytes} bytes"), error);
            }
            let (free, total) = result::mem_get_info().unwrap_or_default();
            Error::Device(format!(
                "{}: not enough memory: {} MiB were asked for, {} of {} MiB are free: {LESS_MEMORY}",
                self.name,
                bytes.div_ceil(1 << 20),
                free >> 20,
                total >> 20
            ))
        })
    }

    /// Frees what [`Device::allocate`] gave, after the work that is queued.
    pub(super) fn release(&self, address: u64) {
        release(&self.context, address);
    }

    /// Sets bytes to 0, in the order of the stream.
    pub(super) fn fill_zero(&self, address: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        let _claim = self.claim();
        // SAFETY: the caller owns `bytes` bytes at the address.
        unsafe { result::memset_d8_async(address, 0, bytes, self.stream.cu_stream()) }
            .map_err(|error| driver_error("set memory to 0", error))
    }

    /// Copies host memory to the device, in the order of the stream; the host memory may change afterwards.
    pub(super) fn write(&self, address: u64, from: &[u8]) -> Result<()> {
        const ACTION: &str = "copy to the device";
        if from.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let _claim = self.claim();
        // SAFETY: the caller owns as many bytes at the address; from pageable memory, the driver returns once it has read it, or
        // the copy is waited for below.
        unsafe { result::memcpy_htod_async(address, from, self.stream.cu_stream()) }
            .map_err(|error| driver_error(ACTION, error))?;
        if self.reads_pageable && !self.is_recording()? { self.finish(ACTION) } else { Ok(()) }
    }

    /// Copies device memory to the host, after all queued work is done.
    pub(super) fn read(&self, address: u64, to: &mut [u8]) -> Result<()> {
        const ACTION: &str = "copy from the device";
        if to.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // Into pageable memory the driver's call comes back with the copy: it would wait for other processes with nobody to ask
        // after them.
        self.watch_queued(ACTION)?;
        let _claim = self.claim();
        // SAFETY: the caller owns as many bytes at the address; the host memory outlives the synchronization below.
        unsafe { result::memcpy_dtoh_async(to, address, self.stream.cu_stream()) }
            .map_err(|error| driver_error(ACTION, error))?;
        self.drain(FINISH)
    }

    /// Copies within the device, in the order of the stream.
    pub(super) fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        let _claim = self.claim();
        // SAFETY: the caller owns as many bytes at both addresses.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }
            .map_err(|error| driver_error("copy on the device", error))
    }

    /// Asks `watch` while the host waits for the device, and when the device reports a failure: what is queued may wait for other
    /// processes, and a device cannot tell that one of them is gone.
    pub fn watch(&self, watch: impl Fn() -> Result<()> + Send + Sync + 'static) {
        // A thread that panicked changed nothing of it.
        *self.watch.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(watch));
    }

    /// Lets `around` do the host's waits for the device from now on: what it is given is the wait.
    pub fn around_waits(&self, around: impl Fn(&mut dyn FnMut() -> Result<()>) -> Result<()> + Send + Sync + 'static) {
        // As above.
        *self.around_waits.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(around));
    }

    fn watched(&self) -> Option<Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the watch knows of a failure, or else what the driver said of it.
    pub(super) fn failure(&self, what: &str, error: DriverError) -> Error {
        let told = self.watched().and_then(|watch| watch().err());
        told.unwrap_or_else(|| driver_error(what, error))
    }

    /// Waits until an event has passed.
    ///
    /// # Errors
    /// A device that failed, or what watches it.
    pub(super) fn wait_for(&self, event: &CudaEvent, what: &str) -> Result<()> {
        self.bind()?;
        let around = self.around_waits.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match around {
            Some(around) => around(&mut || self.wait_watched(event, what)),
            None => self.wait_watched(event, what),
        }
    }

    fn wait_watched(&self, event: &CudaEvent, what: &str) -> Result<()> {
        let Some(watch) = self.watched() else {
            return event.synchronize().map_err(|error| driver_error(what, error));
        };
        let mut asked = 0;
        while !event.try_is_complete().map_err(|error| driver_error(what, error))? {
            asked += 1;
            if asked < TURNS {
                std::thread::yield_now();
                continue;
            }
            watch()?;
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Waits for all queued work where something watches the device, so that nothing that comes next does unwatched.
    fn watch_queued(&self, what: &str) -> Result<()> {
        if self.watched().is_none() {
            return Ok(());
        }
        let event = {
            let _claim = self.claim();
            self.stream.record_event(None).map_err(|error| driver_error(what, error))?
        };
        self.wait_for(&event, what)
    }

    /// Waits for all queued work.
    ///
    /// # Errors
    /// What failed since the last time.
    pub fn synchronize(&self) -> Result<()> {
        self.finish(FINISH)
    }

    /// The same, where `what` is what the queued work does.
    pub(super) fn finish(&self, what: &str) -> Result<()> {
        self.bind()?;
        self.watch_queued(what)?;
        self.drain(what)
    }

    /// The same, where nothing that is queued waits for other processes any more.
    fn drain(&self, what: &str) -> Result<()> {
        // No stream is waited for while another thread records.
        let _claim = self.claim();
        self.stream.synchronize().map_err(|error| driver_error(what, error))?;
        self.context.check_err().map_err(|error| driver_error("free memory", error))
    }
}

/// What waiting does, where nothing tells what the queued work does.
const FINISH: &str = "finish the work queued";
/// How often an event is asked for before the host sleeps in between.
const TURNS: u32 = 1000;
/// How long it sleeps.
const PAUSE: Duration = Duration::from_micros(50);

/// Bytes of shared memory that need no permission.
const STATIC_SHARED: u32 = 48 << 10;

impl Drop for Device {
    fn drop(&mut self) {
        self.release(self.own_state);
        if let Some(blas) = self.blas.take() {
            blas.close(self);
        }
        drop(self.dnn.take());
        *self.scratch.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        let kept = std::mem::take(self.mel_tables.get_mut().unwrap_or_else(PoisonError::into_inner));
        for super::mel::KeptTables { address, .. } in kept {
            self.release(address);
        }
        for &module in self.loaded().modules.values() {
            // SAFETY: no function of the module is used after the device, which owns them all.
            self.context.record_err(unsafe { result::module::unload(module) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_failed_is_no_wrong_input_and_too_little_memory_is() {
        use sys::CUresult as Status;
        let told = |status| {
            let error = by_status(status, "told".to_owned());
            (error.exit_code(), error.to_string())
        };
        for failed in
            [Status::CUDA_ERROR_ILLEGAL_ADDRESS, Status::CUDA_ERROR_ECC_UNCORRECTABLE, Status::CUDA_ERROR_UNKNOWN]
        {
            assert_eq!(told(failed), (1, "told".to_owned()));
        }
        for (wrong, advice) in [
            (Status::CUDA_ERROR_OUT_OF_MEMORY, "data.batch_size"),
            (Status::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "newer driver"),
            (Status::CUDA_ERROR_NO_DEVICE, "told"),
        ] {
            let (code, text) = told(wrong);
            assert!(code == 2 && text.contains(advice), "{text}");
        }
    }
}
