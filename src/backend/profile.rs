//! What a backend must be able to do for its operations to be timed.

use super::Backend;
use crate::error::Result;

/// What all runs of one kernel took.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// The operation that it belongs to; none for the update and what else is queued between operations.
    pub operation: Option<&'static str>,
    /// The kernel, or the library's call.
    pub name: String,
    /// How often it ran.
    pub count: usize,
    /// Milliseconds in all.
    pub milliseconds: f64,
}

/// A backend whose operations can be timed.
pub trait Profiled: Backend + Clone {
    /// Starts to time, with nothing timed yet. A device that replays recordings runs operations one by one meanwhile.
    fn start_timing(&self);

    /// Runs one operation. A host's backend tells the milliseconds; a device's tells them later, by kernel.
    ///
    /// # Errors
    /// What the work reports.
    fn within(&self, operation: &'static str, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<f64>>;

    /// Ends the timing: what each kernel took, in the order in which they first ran; nothing on a host.
    ///
    /// # Errors
    /// A device that failed.
    fn finish_timing(&self) -> Result<Vec<KernelTime>>;

    /// Milliseconds that the device takes over some work, its end waited for.
    ///
    /// # Errors
    /// What the work reports.
    fn milliseconds(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64>;

    /// `to = from`, on the device.
    ///
    /// # Errors
    /// Buffers of other lengths, or a device that failed.
    fn copy(&self, to: &mut Self::Buffer<f32>, from: &Self::Buffer<f32>) -> Result<()>;

    /// Values of the copy that tells the bandwidth: far more than any cache holds.
    fn copy_len(&self) -> usize;

    /// Rows, inputs and outputs of the product that tells the arithmetic peak.
    fn product_size(&self) -> [usize; 3];
}
