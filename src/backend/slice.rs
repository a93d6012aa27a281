//! Parts of buffers as collectives take them: numbers of some type, in the host's memory or in a device's.

use std::ops::Range;

use half::{bf16, f16};

use crate::error::{Error, Result};

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

/// A type of number as buffers hold it.
pub trait Numeric: bytemuck::Pod + Send + Sync {
    /// Which it is.
    const NUMBER: Number;

    /// These in the host's memory.
    fn host(values: &mut [Self]) -> HostSlice<'_>;
}

macro_rules! host_slices {
    ($($ty:ty => $name:ident),*) => {$(
        impl Numeric for $ty {
            const NUMBER: Number = Number::$name;

            fn host(values: &mut [Self]) -> HostSlice<'_> {
                HostSlice::$name(values)
            }
        }

        impl<'a> From<&'a mut [$ty]> for Slice<'a> {
            fn from(values: &'a mut [$ty]) -> Self {
                Slice::Host(HostSlice::$name(values))
            }
        }
    )*};
}
host_slices!(u8 => U8, bf16 => Bf16, f16 => F16, f32 => F32, f64 => F64);

/// Two parts of some values that share none.
fn apart<T: Numeric>(values: &mut [T], parts: [Range<usize>; 2]) -> Option<[HostSlice<'_>; 2]> {
    values.get_disjoint_mut(parts).ok().map(|parts| parts.map(T::host))
}

impl Slice<'_> {
    /// Some of its elements.
    ///
    /// # Errors
    /// Elements that it does not have.
    pub fn part(&mut self, elements: Range<usize>) -> Result<Slice<'_>> {
        let [part, _] = self.parts([elements.clone(), elements.end..elements.end])?;
        Ok(part)
    }

    /// Two parts of it that share no element.
    ///
    /// # Errors
    /// Elements that it does not have, or that are in both.
    pub fn parts(&mut self, parts: [Range<usize>; 2]) -> Result<[Slice<'_>; 2]> {
        let (len, found) = (self.len(), format!("{parts:?}"));
        let [a, b] = &parts;
        let within = parts.iter().all(|part| part.start <= part.end && part.end <= len);
        let apart_from = a.end <= b.start || b.end <= a.start;
        let parts = match self {
            _ if !within || !apart_from => None,
            Slice::Device(DeviceSlice { address, number, .. }) => Some(parts.map(|part| {
                let start = (part.start * number.bytes()) as u64;
                Slice::Device(DeviceSlice { address: *address + start, len: part.len(), number: *number })
            })),
            Slice::Host(values) => match values {
                HostSlice::U8(values) => apart(values, parts),
                HostSlice::Bf16(values) => apart(values, parts),
                HostSlice::F16(values) => apart(values, parts),
                HostSlice::F32(values) => apart(values, parts),
                HostSlice::F64(values) => apart(values, parts),
            }
            .map(|parts| parts.map(Slice::Host)),
        };
        parts.ok_or_else(|| Error::shape("slice", format!("parts of {len} elements, apart from each other"), found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_of_the_same_memory_and_apart() {
        let mut values = [0.0f32, 1.0, 2.0, 3.0];
        let mut slice = Slice::from(values.as_mut_slice());
        let [a, b] = slice.parts([2..4, 0..1]).unwrap();
        let (Slice::Host(HostSlice::F32(a)), Slice::Host(HostSlice::F32(b))) = (a, b) else { panic!("other types") };
        assert_eq!((&*a, &*b), (&[2.0, 3.0][..], &[0.0][..]));
        for wrong in [[0..2, 1..3], [0..5, 5..5], [3..4, 2..5]] {
            assert!(slice.parts(wrong.clone()).is_err(), "{wrong:?}");
        }
        let mut device = Slice::Device(DeviceSlice { address: 256, len: 10, number: Number::Bf16 });
        let Slice::Device(part) = device.part(3..7).unwrap() else { panic!("not on the device") };
        assert_eq!((part.address(), part.len(), part.number()), (262, 4, Number::Bf16));
    }
}
