//! A batch on its way into a slot, on the copies' own stream.

use std::sync::Arc;

use cudarc::driver::result;

use super::super::buffer::Buffer;
use super::super::context::{Device, driver_error};
use super::super::gather::Sides;
use super::super::pinned::Pinned;
use super::super::{Cuda, Storage};
use super::{Scalars, Slot};
use crate::backend::Activations;
use crate::backend::step::{Feed, Fill, Gather, Pass, check_len};
use crate::error::Result;

impl Slot {
    /// Brings the batch into the inputs that are selected. No work is left that reads them.
    pub fn copy<S: Storage>(&mut self, device: &Arc<Device>, pass: &Pass<'_, Cuda<S>>) -> Result<()> {
        match &pass.feed {
            Feed::Values(fills) => self.copy_values(device, pass.activations, fills),
            Feed::Rows(gather) => self.gather(device, pass.activations, gather),
        }
    }

    /// Brings the scalars to their place, and has the work that is queued next wait for them and for the batch. No work is left that
    /// reads them.
    pub fn copy_scalars(&mut self, device: &Device, scalars: &Scalars) -> Result<()> {
        let bytes = bytemuck::bytes_of(scalars);
        self.scalars.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        let (from, stream) = (&self.scalars.bytes()[..bytes.len()], device.copy_stream().cu_stream());
        // SAFETY: the state has their size; the page-locked memory stays as it is until `done` has passed.
        unsafe { result::memcpy_htod_async(self.state.address_of(0), from, stream) }
            .map_err(|error| driver_error("copy a step's scalars to the device", error))?;
        self.copied.record(device.copy_stream()).map_err(|error| driver_error("copy a batch to the device", error))?;
        device.stream().wait(&self.copied).map_err(|error| driver_error("wait for a batch", error))
    }

    fn copy_values<S: Storage>(
        &mut self,
        device: &Arc<Device>,
        activations: &Activations<Cuda<S>>,
        fills: &[Fill<'_>],
    ) -> Result<()> {
        let mut places = Vec::with_capacity(fills.len());
        let mut bytes = 0;
        for fill in fills {
            let (address, expected, len, each) = match fill {
                Fill::Real(act, values) => {
                    let range = activations.range(*act);
                    (activations.values.address_of(range.start), range.len(), values.len(), size_of::<S>())
                }
                Fill::Indices(indices, values) => {
                    let range = activations.index_range(*indices);
                    (activations.indices.address_of(range.start), range.len(), values.len(), size_of::<i32>())
                }
            };
            check_len("batch", expected, len)?;
            let start = bytes;
            bytes = (start + len * each).next_multiple_of(16);
            places.push((address, start..start + len * each));
        }
        if self.batch.len() < bytes {
            self.batch = Pinned::new(device, bytes)?;
        }
        for (fill, (_, range)) in fills.iter().zip(&places) {
            let to = &mut self.batch.bytes_mut()[range.clone()];
            match fill {
                Fill::Real(_, values) => {
                    let to: &mut [S] = bytemuck::cast_slice_mut(to);
                    to.iter_mut().zip(values.iter()).for_each(|(to, &value)| *to = S::from_f32(value));
                }
                Fill::Indices(_, values) => to.copy_from_slice(bytemuck::cast_slice(values)),
            }
        }
        let stream = device.copy_stream();
        for (address, range) in places {
            if !range.is_empty() {
                // SAFETY: the activation holds as many bytes; the page-locked memory stays as it is until `done` has passed.
                unsafe { result::memcpy_htod_async(address, &self.batch.bytes()[range], stream.cu_stream()) }
                    .map_err(|error| driver_error("copy a batch to the device", error))?;
            }
        }
        Ok(())
    }

    /// Copies the samples' numbers alone; the device has the values.
    fn gather<S: Storage>(
        &mut self,
        device: &Arc<Device>,
        activations: &Activations<Cuda<S>>,
        gather: &Gather<'_>,
    ) -> Result<()> {
        let sides = Sides::new(device, activations, gather)?;
        let rows = gather.picked.rows();
        let numbers: &[u8] = bytemuck::cast_slice(rows);
        if self.batch.len() < numbers.len() {
            self.batch = Pinned::new(device, numbers.len())?;
        }
        let room = match &mut self.rows {
            Some(room) if room.len() >= rows.len() => room,
            room => {
                let made = room.insert(Buffer::zeros(device, rows.len())?);
                // It is set to 0 on another stream than it is written on.
                device.synchronize()?;
                made
            }
        };
        let stream = device.copy_stream();
        self.batch.bytes_mut()[..numbers.len()].copy_from_slice(numbers);
        if !rows.is_empty() {
            let from = &self.batch.bytes()[..numbers.len()];
            // SAFETY: there is room for as many numbers; the page-locked memory stays as it is until `done` has passed.
            unsafe { result::memcpy_htod_async(room.address_of(0), from, stream.cu_stream()) }
                .map_err(|error| driver_error("copy the numbers of a batch's samples", error))?;
        }
        // SAFETY: the numbers were copied before, on the same stream; no work is left that uses the room for the batch.
        unsafe { sides.queue(device, stream, room.address_of(0)) }
    }
}
