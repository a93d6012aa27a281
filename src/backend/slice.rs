//! Parts of buffers as collectives take them: numbers of some type, in the host's memory or in a device's.

use half::{bf16, f16};

/// A type of number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// Bytes that are moved and never added.
    U8,
    /// 16 bits, the exponent of f32.
    Bf16,
    /// 16 bits, half precision of IEEE 754.
    F16,
    /// 32 bits.
    F32,
    /// 64 bits.
    F64,
}

impl Number {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Number::U8 => 1,
            Number::Bf16 | Number::F16 => 2,
            Number::F32 => 4,
            Number::F64 => 8,
        }
    }
}

/// Some elements of a buffer, to be written to or read from by a collective.
#[derive(Debug)]
pub enum Slice<'a> {
    /// In the host's memory.
    Host(HostSlice<'a>),
    /// In a device's memory.
    Device(DeviceSlice),
}

/// Numbers in the host's memory.
#[derive(Debug)]
pub enum HostSlice<'a> {
    /// Bytes.
    U8(&'a mut [u8]),
    /// bf16.
    Bf16(&'a mut [bf16]),
    /// f16.
    F16(&'a mut [f16]),
    /// f32.
    F32(&'a mut [f32]),
    /// f64.
    F64(&'a mut [f64]),
}

/// Numbers in a device's memory. Only the device's backend makes one, of a buffer that it was given.
#[derive(Debug)]
pub struct DeviceSlice {
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) number: Number,
}

impl DeviceSlice {
    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What they are.
    pub fn number(&self) -> Number {
        self.number
    }
}

impl HostSlice<'_> {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            HostSlice::U8(values) => values.len(),
            HostSlice::Bf16(values) => values.len(),
            HostSlice::F16(values) => values.len(),
            HostSlice::F32(values) => values.len(),
            HostSlice::F64(values) => values.len(),
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What they are.
    pub fn number(&self) -> Number {
        match self {
            HostSlice::U8(_) => Number::U8,
            HostSlice::Bf16(_) => Number::Bf16,
            HostSlice::F16(_) => Number::F16,
            HostSlice::F32(_) => Number::F32,
            HostSlice::F64(_) => Number::F64,
        }
    }

    /// The bytes that they are.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            HostSlice::U8(values) => values,
            HostSlice::Bf16(values) => bytemuck::cast_slice_mut(values),
            HostSlice::F16(values) => bytemuck::cast_slice_mut(values),
            HostSlice::F32(values) => bytemuck::cast_slice_mut(values),
            HostSlice::F64(values) => bytemuck::cast_slice_mut(values),
        }
    }
}

impl Slice<'_> {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Slice::Host(values) => values.len(),
            Slice::Device(values) => values.len,
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What they are.
    pub fn number(&self) -> Number {
        match self {
            Slice::Host(values) => values.number(),
            Slice::Device(values) => values.number,
        }
    }
}

macro_rules! host_slices {
    ($($ty:ty => $name:ident),*) => {$(
        impl<'a> From<&'a mut [$ty]> for Slice<'a> {
            fn from(values: &'a mut [$ty]) -> Self {
                Slice::Host(HostSlice::$name(values))
            }
        }
    )*};
}
host_slices!(u8 => U8, bf16 => Bf16, f16 => F16, f32 => F32, f64 => F64);
