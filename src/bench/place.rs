//! Where a benchmark runs: a device, and the number type that it computes in there.

use half::{bf16, f16};

use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Cuda, Device, DeviceOptions};
use crate::backend::ops::Update;
use crate::backend::profile::Profiled;
use crate::error::{Error, Result};

/// What activations are stored in and products computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// `f32`.
    F32,
    /// `tf32`: f32 whose products keep 10 bits of fraction.
    Tf32,
    /// `bf16`, with parameters in f32 besides.
    Bf16,
    /// `f16`, likewise.
    F16,
}

impl Precision {
    /// All of them.
    pub const ALL: [Precision; 4] = [Precision::F32, Precision::Tf32, Precision::Bf16, Precision::F16];

    /// As results name it.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        }
    }
}

/// A device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The processor, with the threads of the present rayon pool.
    Cpu,
    /// A CUDA device by its number; the emulated one in a process that was started with its libraries.
    Cuda(usize),
}

/// A backend that can be timed and trained on.
pub trait Bed: Profiled + Update {}

impl<B: Profiled + Update> Bed for B {}

/// Something to be done on a device, whichever it is.
pub trait OnBed {
    /// What it gives.
    type Given;

    /// Does it.
    ///
    /// # Errors
    /// Its own.
    fn on<B: Bed>(self, backend: &B) -> Result<Self::Given>;
}

impl Place {
    /// The precisions that it computes in.
    pub fn precisions(self) -> &'static [Precision] {
        match self {
            Place::Cpu => &Precision::ALL[..1],
            Place::Cuda(_) => &Precision::ALL,
        }
    }

    /// Opens the device, and does something on it.
    ///
    /// # Errors
    /// No such device, another precision than f32 on the processor, or what the work reports.
    pub fn open<W: OnBed>(self, precision: Precision, work: W) -> Result<W::Given> {
        let ordinal = match self {
            Place::Cpu if precision == Precision::F32 => return work.on(&Cpu::<f32>::new()),
            Place::Cpu => {
                let found = format!("found {}, but the CPU computes in f32", precision.name());
                return Err(Error::config("bench", found));
            }
            Place::Cuda(ordinal) => ordinal,
        };
        let tf32 = precision == Precision::Tf32;
        let device = Device::open(DeviceOptions { ordinal, tf32, ..DeviceOptions::default() })?;
        match precision {
            Precision::F32 | Precision::Tf32 => work.on(&Cuda::<f32>::new(device)),
            Precision::Bf16 => work.on(&Cuda::<bf16>::new(device)),
            Precision::F16 => work.on(&Cuda::<f16>::new(device)),
        }
    }
}
