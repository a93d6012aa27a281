//! The stream of a device that its collective's work is queued on, beside the one of everything else.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaEvent, CudaStream, result};

use super::Buffer;
use super::context::{Device, driver_error};
use super::launch::{Grid, args};
use crate::backend::{DeviceSlice, HostSlice, IN_FLIGHT, Number};
use crate::error::{Error, Result};

/// Bytes that staged slices begin at multiples of.
const STAGED: usize = 256;

/// A stream for exchanges with other devices. What is queued on it and on the device's own stream runs side by side, but for what
/// [`Communication::fork`] and [`Communication::join`] put in order; both also hold within a recording, which they draw the stream
/// into.
#[derive(Debug)]
pub struct Communication {
    device: Arc<Device>,
    stream: Arc<CudaStream>,
    forked: CudaEvent,
    joined: CudaEvent,
    /// Pass when what was remembered by their number is done.
    marks: Vec<CudaEvent>,
    /// Passes when what was staged is exchanged.
    exchanged: CudaEvent,
    /// Device memory for slices of the host.
    staging: Mutex<Option<Buffer<u8>>>,
}

impl Communication {
    /// A stream on this device.
    ///
    /// # Errors
    /// A device that failed.
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        let fail = |error| driver_error("make a stream for exchanges", error);
        let event = || device.context().new_event(None).map_err(fail);
        Ok(Communication {
            stream: device.context().new_stream().map_err(fail)?,
            forked: event()?,
            joined: event()?,
            marks: (0..2 * IN_FLIGHT).map(|_| event()).collect::<Result<_>>()?,
            exchanged: event()?,
            staging: Mutex::default(),
            device: device.clone(),
        })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The stream, as the driver names it.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Makes the device's context that of this thread, as calls of libraries need it.
    ///
    /// # Errors
    /// A device that failed.
    pub fn bind(&self) -> Result<()> {
        self.device.bind()
    }

    /// What is queued here from now on begins after what the device has queued.
    ///
    /// # Errors
    /// A device that failed.
    pub fn fork(&self) -> Result<()> {
        let _claim = self.device.claim();
        let forked = self.forked.record(self.device.stream()).and_then(|()| self.stream.wait(&self.forked));
        forked.map_err(|error| driver_error("put an exchange behind the step", error))
    }

    /// What the device queues from now on begins after what is queued here.
    ///
    /// # Errors
    /// A device that failed.
    pub fn join(&self) -> Result<()> {
        let _claim = self.device.claim();
        let joined = self.joined.record(&self.stream).and_then(|()| self.device.stream().wait(&self.joined));
        joined.map_err(|error| driver_error("put the step behind an exchange", error))
    }

    /// Remembers what is queued here so far, by number.
    ///
    /// # Errors
    /// A number that there is not, or a device that failed.
    pub fn mark(&self, number: usize) -> Result<()> {
        let marked = self.numbered(number)?.record(&self.stream);
        marked.map_err(|error| driver_error("remember an exchange", error))
    }

    /// What the device queues from now on begins after what was remembered last by this number.
    ///
    /// # Errors
    /// As [`Communication::mark`].
    pub fn join_mark(&self, number: usize) -> Result<()> {
        let _claim = self.device.claim();
        let joined = self.device.stream().wait(self.numbered(number)?);
        joined.map_err(|error| driver_error("put the step behind an exchange", error))
    }

    fn numbered(&self, number: usize) -> Result<&CudaEvent> {
        let unknown = || Error::shape("exchange", format!("a mark below {}", self.marks.len()), number.to_string());
        self.marks.get(number).ok_or_else(unknown)
    }

    /// Queues `to = from`, of one type.
    ///
    /// # Errors
    /// Other types or lengths, or a device that failed.
    pub fn copy(&self, to: &DeviceSlice, from: &DeviceSlice) -> Result<()> {
        if (to.number(), to.len()) != (from.number(), from.len()) {
            return Err(differ("copy", to, from));
        }
        if to.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let bytes = to.len() * to.number().bytes();
        // SAFETY: both hold as many bytes.
        unsafe { result::memcpy_dtod_async(to.address(), from.address(), bytes, self.stream.cu_stream()) }
            .map_err(|error| driver_error("copy on the device", error))
    }

    /// Queues `to += from`, in f32.
    ///
    /// # Errors
    /// Other types or lengths, or a device that failed.
    pub fn add(&self, to: &DeviceSlice, from: &DeviceSlice) -> Result<()> {
        if (to.number(), from.number()) != (Number::F32, Number::F32) || to.len() != from.len() {
            return Err(differ("add", to, from));
        }
        if to.is_empty() {
            return Ok(());
        }
        let list = args![to.address(), from.address(), to.address(), to.len()];
        let grid = Grid::elements(&self.device, to.len(), 4);
        // SAFETY: both hold as many values; each thread reads its values before it writes them, in the place of the first.
        unsafe { self.device.launch_on(&self.stream, "elementwise", "add_f32", grid, list) }
    }

    /// Queues `to = from`, from f32 to bf16 or back.
    ///
    /// # Errors
    /// As [`Communication::add`].
    pub fn convert(&self, to: &DeviceSlice, from: &DeviceSlice) -> Result<()> {
        let kernel = match (from.number(), to.number()) {
            (Number::F32, Number::Bf16) => "convert_bf16",
            (Number::Bf16, Number::F32) => "widen_bf16",
            _ => return Err(differ("convert", to, from)),
        };
        if to.len() != from.len() {
            return Err(differ("convert", to, from));
        }
        let list = args![from.address(), to.address(), to.len()];
        let grid = Grid::elements(&self.device, to.len(), 4);
        // SAFETY: both hold as many values, of the types that the kernel's name says.
        unsafe { self.device.launch_on(&self.stream, "elementwise", kernel, grid, list) }
    }

    /// Does `work` with slices of the host, which are copied to the device for it and back when it is done: behind what the device
    /// has queued, and waited for.
    ///
    /// # Errors
    /// What `work` reports, too little memory, or a device that failed, or what watches it ([`Device::watch`]).
    pub fn staged<const N: usize>(
        &self,
        mut slices: [HostSlice<'_>; N],
        work: impl FnOnce(&[DeviceSlice; N]) -> Result<()>,
    ) -> Result<()> {
        self.bind()?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: [usize; N] = std::array::from_fn(|at| slices[at].len() * slices[at].number().bytes());
        let all: usize = bytes.iter().map(|bytes| bytes.next_multiple_of(STAGED)).sum();
        if staging.as_ref().is_none_or(|buffer| buffer.len() < all) {
            *staging = None;
            *staging = Some(Buffer::zeros(&self.device, all.next_power_of_two())?);
        }
        let mut address = staging.as_ref().map_or(0, |buffer| buffer.address_of(0));
        let staged: [DeviceSlice; N] = std::array::from_fn(|at| {
            let slice = DeviceSlice { address, len: slices[at].len(), number: slices[at].number() };
            address += bytes[at].next_multiple_of(STAGED) as u64;
            slice
        });
        self.fork()?;
        for (slice, staged) in slices.iter_mut().zip(&staged) {
            if !slice.is_empty() {
                // SAFETY: the staging buffer has as many bytes there; from pageable memory, the driver returns once it has read it.
                unsafe { result::memcpy_htod_async(staged.address, slice.bytes_mut(), self.stream.cu_stream()) }
                    .map_err(|error| driver_error("copy to the device", error))?;
            }
        }
        work(&staged)?;
        self.exchanged.record(&self.stream).map_err(|error| driver_error("queue an exchange", error))?;
        self.device.wait_for(&self.exchanged, "finish an exchange")?;
        for (slice, staged) in slices.iter_mut().zip(&staged) {
            if !slice.is_empty() {
                // SAFETY: as above; to pageable memory, the driver returns once the copy is done.
                unsafe { result::memcpy_dtoh_async(slice.bytes_mut(), staged.address, self.stream.cu_stream()) }
                    .map_err(|error| driver_error("copy from the device", error))?;
            }
        }
        self.stream.synchronize().map_err(|error| driver_error("finish an exchange", error))
    }
}

fn differ(operation: &str, to: &DeviceSlice, from: &DeviceSlice) -> Error {
    let found = format!("{} of {:?} and {} of {:?}", from.len(), from.number(), to.len(), to.number());
    Error::shape(operation, "two slices of one length, of types that it knows", found)
}
