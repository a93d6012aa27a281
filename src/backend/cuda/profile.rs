//! Times of kernels, taken by events on the stream.

use cudarc::driver::{CudaEvent, sys};

use super::context::{Device, driver_error};
use crate::error::Result;

/// A kernel or a library's call that was queued between two events.
pub(super) struct Timing {
    name: String,
    events: [CudaEvent; 2],
}

/// What all runs of one kernel took.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// The kernel, or the library's call.
    pub name: String,
    /// How often it ran.
    pub count: usize,
    /// Milliseconds in all.
    pub milliseconds: f64,
}

impl Device {
    /// Starts to time every kernel that is queued. Programs are not replayed meanwhile, since a graph hides its kernels.
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
        for Timing { name, events: [start, end] } in timings {
            let milliseconds = f64::from(start.elapsed_ms(&end).map_err(|error| driver_error("time a kernel", error))?);
            match times.iter_mut().find(|time| time.name == name) {
                Some(time) => (time.count, time.milliseconds) = (time.count + 1, time.milliseconds + milliseconds),
                None => times.push(KernelTime { name, count: 1, milliseconds }),
            }
        }
        Ok(times)
    }

    /// Does `work`, which queues one kernel, between two events where kernels are timed.
    pub(super) fn timed(&self, name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        if !self.is_timing() {
            return work();
        }
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let event = || self.stream().record_event(Some(flags)).map_err(|error| driver_error("time a kernel", error));
        let start = event()?;
        work()?;
        let end = event()?;
        if let Some(timings) = self.timings().as_mut() {
            timings.push(Timing { name: name.to_owned(), events: [start, end] });
        }
        Ok(())
    }
}
