//! Times of kernels, taken by events on the stream; ranges that NVIDIA's profilers show.

use std::sync::PoisonError;

use cudarc::driver::{CudaEvent, sys};

use super::context::{Device, driver_error};
use super::{Buffer, Cuda, Storage, emulated, probe};
use crate::backend::profile::{KernelTime, Kind, Probe, Profiled, Told, Traffic};
use crate::error::{Error, Result};

/// A kernel or a library's call that was queued between two events.
pub(super) struct Timing {
    operation: Option<&'static str>,
    name: String,
    events: [CudaEvent; 2],
}

impl Device {
    /// Starts to time every kernel that is queued, with none timed yet. Programs are not replayed meanwhile, since a graph hides
    /// its kernels.
    pub fn start_timing(&self) {
        *self.timings() = Some(Vec::new());
    }

    /// Whether kernels are timed.
    pub fn is_timing(&self) -> bool {
        self.timings().is_some()
    }

    /// Ends the timing, and tells what took how long, in the order in which the kernels first ran.
    ///
    /// # Errors
    /// A device that failed.
    pub fn finish_timing(&self) -> Result<Vec<KernelTime>> {
        let timings = self.timings().take().unwrap_or_default();
        self.synchronize()?;
        let mut times: Vec<KernelTime> = Vec::new();
        for Timing { operation, name, events } in timings {
            let milliseconds = between(&events)?;
            match times.iter_mut().find(|time| time.name == name && time.operation == operation) {
                Some(time) => (time.count, time.milliseconds) = (time.count + 1, time.milliseconds + milliseconds),
                None => times.push(KernelTime { operation, name, count: 1, milliseconds }),
            }
        }
        Ok(times)
    }

    /// Does `work`, which queues one kernel, between two events where kernels are timed; where they are to be launched one by
    /// one, waits for it.
    pub(super) fn timed(&self, name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let _claim = self.claim();
        if !self.is_timing() {
            work()?;
            let waits = !self.options().graphs && !self.is_recording()?;
            return if waits { self.finish(&format!("run {name}")) } else { Ok(()) };
        }
        let start = self.event()?;
        work()?;
        let events = [start, self.event()?];
        let operation = *self.operation.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(timings) = self.timings().as_mut() {
            timings.push(Timing { operation, name: name.to_owned(), events });
        }
        Ok(())
    }

    /// Does `work`, of whose kernels none is timed.
    pub(super) fn untimed<T>(&self, work: impl FnOnce() -> T) -> T {
        let timings = self.timings().take();
        let done = work();
        *self.timings() = timings;
        done
    }

    fn event(&self) -> Result<CudaEvent> {
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        self.stream().record_event(Some(flags)).map_err(|error| driver_error("time a kernel", error))
    }
}

/// Milliseconds from the first event to the second, both of which are past.
fn between([start, end]: &[CudaEvent; 2]) -> Result<f64> {
    start.elapsed_ms(end).map(f64::from).map_err(|error| driver_error("time a kernel", error))
}

/// Runs an operation within a range of its name, where Warpstep was built with the feature `nvtx` and NVIDIA's library for it is there
/// (`libnvtx3interop.so.1`, or `libnvToolsExt.so` of older toolkits).
#[cfg(feature = "nvtx")]
pub(super) fn ranged(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    static PRESENT: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        super::libraries::provide_nvtx().unwrap_or_else(|error| {
            crate::tell::tell(error);
            false
        })
    });
    let _range = PRESENT.then(|| cudarc::nvtx::scoped_range(name));
    work()
}

/// Runs an operation: its name is for builds with the feature `nvtx`.
#[cfg(not(feature = "nvtx"))]
#[inline]
pub(super) fn ranged(_: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    work()
}

impl<S: Storage> Profiled for Cuda<S> {
    fn start_timing(&self) {
        self.device().start_timing();
    }

    fn within(&self, operation: &'static str, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<f64>> {
        let set = |operation| *self.device().operation.lock().unwrap_or_else(PoisonError::into_inner) = operation;
        set(Some(operation));
        let worked = work();
        set(None);
        worked.map(|()| None)
    }

    fn finish_timing(&self) -> Result<Vec<KernelTime>> {
        self.device().finish_timing()
    }

    fn milliseconds(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let device = self.device();
        let start = device.event()?;
        work()?;
        let events = [start, device.event()?];
        device.synchronize()?;
        between(&events)
    }

    fn copy(&self, to: &mut Buffer<f32>, from: &Buffer<f32>) -> Result<()> {
        if to.len() != from.len() {
            return Err(Error::shape("copy", format!("{} elements", to.len()), from.len().to_string()));
        }
        self.device().copy(to.address_of(0), from.address_of(0), to.len() * size_of::<f32>())
    }

    fn kind(&self) -> Kind {
        if emulated::is_active() { Kind::Emulated } else { Kind::Gpu }
    }

    fn wait(&self) -> Result<()> {
        self.device().synchronize()
    }

    fn cache_bytes(&self) -> usize {
        // The emulated device has no caches, and no time for work that passes by them.
        if emulated::is_active() { 1 << 12 } else { self.device().cache_bytes().unwrap_or(0) }
    }

    fn inner_caches(&self) -> Vec<(String, usize)> {
        // What is near to a multiprocessor is not coherent, and its size is not told.
        Vec::new()
    }

    fn free_bytes(&self) -> usize {
        self.device().memory().map_or(0, |(free, _)| free)
    }

    fn told(&self) -> Told {
        let facts = self.device().facts();
        let Some(clocks) = self.device().clocks() else {
            let why =
                if emulated::is_active() { "an emulated device has no clocks" } else { "NVML does not tell clocks" };
            return Told { facts, now: why.to_owned(), ..Told::default() };
        };
        let number = |value: Option<u32>, unit: &str| value.map_or("?".to_owned(), |value| format!("{value} {unit}"));
        let now = format!(
            "multiprocessors {}, memory {}, {}, {}",
            number(clocks.multiprocessor_mhz, "MHz"),
            number(clocks.memory_mhz, "MHz"),
            number(clocks.temperature, "C"),
            number(clocks.power_mw.map(|power| power / 1000), "W")
        );
        Told { facts, clock_mhz: clocks.multiprocessor_mhz, now, held_back: clocks.held_back }
    }

    fn parts(&self) -> usize {
        self.device().traffic_blocks()
    }

    fn traffic(
        &self,
        traffic: Traffic,
        to: &mut Buffer<f32>,
        from: &Buffer<f32>,
        len: usize,
        rounds: usize,
    ) -> Result<()> {
        self.device().traffic(traffic, to, from, len, rounds)
    }

    fn probes(&self) -> Result<Vec<Probe<'_>>> {
        probe::all(self.device())
    }

    /// Two buffers of 1 GiB, or a quarter of what is free.
    fn copy_len(&self) -> usize {
        let most = if emulated::is_active() { 1 << 16 } else { 1 << 28 };
        self.device().memory().map_or(1 << 22, |(free, _)| (free / 16).min(most))
    }

    fn product_size(&self) -> [usize; 3] {
        if emulated::is_active() { [256; 3] } else { [8192, 4096, 4096] }
    }
}
