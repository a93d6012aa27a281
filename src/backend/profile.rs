//! What a backend must be able to do for its operations to be timed.

use super::Backend;
use crate::error::Result;

/// What a device is, as far as its times go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The processor that this program runs on.
    Host,
    /// A GPU.
    Gpu,
    /// A device in software, whose times say nothing.
    Emulated,
}

/// What [`Traffic::Write`] leaves: four equal bytes, since the C library fills memory fastest with bytes.
pub const WRITTEN: f32 = f32::from_bits(0x3F3F_3F3F);

/// How memory is gone through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// `to = from`.
    Copy,
    /// All of `from` is read: the sum of each of [`Profiled::parts`] equal parts of it is left in `to`, from the first value on.
    Read,
    /// `to = ` [`WRITTEN`].
    Write,
    /// `to = to + 1`: read and written where it is, as an update does.
    InPlace,
}

/// What a device tells of itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// Facts by name, which do not change.
    pub facts: Vec<(&'static str, String)>,
    /// MHz now; none where it does not tell.
    pub clock_mhz: Option<u32>,
    /// More of the moment, in words.
    pub now: String,
    /// What holds the clocks back now.
    pub held_back: Vec<&'static str>,
}

/// A small thing that a device does all the time, ready to be timed.
pub struct Probe<'a> {
    /// What: `launch`, `fork_join`, `host_to_device/pinned`.
    pub name: String,
    /// Bytes that it moves; none for a latency.
    pub bytes: Option<usize>,
    /// Queues one.
    pub work: Box<dyn FnMut() -> Result<()> + Send + 'a>,
    /// How many have been done; waits for the device.
    pub done: Box<dyn FnMut() -> Result<u64> + Send + 'a>,
}

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

    /// What it is.
    fn kind(&self) -> Kind;

    /// Waits until everything that was queued is done.
    ///
    /// # Errors
    /// A device that failed.
    fn wait(&self) -> Result<()>;

    /// Bytes of the last cache, all its instances together.
    fn cache_bytes(&self) -> usize;

    /// Bytes of a cache nearer to where arithmetic is done, from the nearest on, all their instances together, by name.
    fn inner_caches(&self) -> Vec<(String, usize)>;

    /// Bytes of its memory that are free.
    fn free_bytes(&self) -> usize;

    /// Facts about it, by name, and what its clocks are now, in words, where it tells: `1980 MHz`, and what holds them back.
    fn told(&self) -> Told {
        Told::default()
    }

    /// Parts that are gone through side by side, each by one thread or one block.
    fn parts(&self) -> usize;

    /// Goes through memory `rounds` times, as one piece of work.
    ///
    /// # Errors
    /// Buffers of other lengths, lengths that are no multiple of 4 times [`Profiled::parts`], or a device that failed.
    fn traffic(
        &self,
        traffic: Traffic,
        to: &mut Self::Buffer<f32>,
        from: &Self::Buffer<f32>,
        len: usize,
        rounds: usize,
    ) -> Result<()>;

    /// Latencies, and copies between host and device where these are two.
    ///
    /// # Errors
    /// A device that failed.
    fn probes(&self) -> Result<Vec<Probe<'_>>>;

    /// Values of the copy that tells the bandwidth: far more than any cache holds.
    fn copy_len(&self) -> usize;

    /// Rows, inputs and outputs of the product that tells the arithmetic peak.
    fn product_size(&self) -> [usize; 3];
}
