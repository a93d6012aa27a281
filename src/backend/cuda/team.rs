//! What processes tell each other of a step within its recording: a flag, samples, and the metrics of each pass.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{Buffer, Device};
use crate::backend::ops::METRICS;
use crate::backend::step::Found;
use crate::backend::{DeviceSlice, Number, PassOfStep, Slice};
use crate::error::Result;

/// What a process tells that does not come from its device.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Told {
    flag: u64,
    samples: u64,
}

impl Told {
    pub fn new(found: &Found) -> Self {
        Told { flag: u64::from(found.flag), samples: found.samples }
    }
}

/// Bytes of a pass's metrics.
const EACH: usize = size_of::<[f32; METRICS]>();

/// Room on the device for what all processes found in a step: one share each, [`Told`] and the metrics of every pass.
#[derive(Debug)]
pub(super) struct Team {
    shares: Buffer<u8>,
    rank: usize,
    world: usize,
    passes: usize,
}

impl Team {
    pub fn new(device: &Arc<Device>, (rank, world): (usize, usize), passes: usize) -> Result<Self> {
        let shares = Buffer::zeros(device, (size_of::<Told>() + passes * EACH) * world)?;
        Ok(Team { shares, rank, world, passes })
    }

    pub fn is_for(&self, place: (usize, usize), passes: usize) -> bool {
        (self.rank, self.world, self.passes) == (place.0, place.1, passes)
    }

    /// Bytes of all shares.
    pub fn bytes(&self) -> usize {
        self.shares.len()
    }

    pub fn address(&self) -> u64 {
        self.shares.address_of(0)
    }

    /// Where this process's share begins.
    fn own(&self) -> u64 {
        self.shares.address_of(self.rank * self.bytes() / self.world)
    }

    /// Queues the copy of a pass's metrics into this process's share.
    pub fn take(&self, device: &Device, metrics: Option<u64>, pass: PassOfStep) -> Result<()> {
        let Some(metrics) = metrics else { return Ok(()) };
        device.copy(self.own() + (size_of::<Told>() + pass.number * EACH) as u64, metrics, EACH)
    }

    /// Queues the rest of this process's share from page-locked memory, and gives all shares, to be gathered.
    pub fn tell(&self, device: &Device, told: &[u8]) -> Result<Slice<'_>> {
        device.write(self.own(), &told[..size_of::<Told>()])?;
        Ok(Slice::Device(DeviceSlice { address: self.address(), len: self.bytes(), number: Number::U8 }))
    }

    /// The shares as they came to the host.
    pub fn read(&self, shares: &[u8]) -> Vec<Found> {
        let of_process = |share: &[u8]| {
            let (told, metrics) = share.split_at(size_of::<Told>());
            let told: Told = bytemuck::pod_read_unaligned(told);
            let metrics = metrics.chunks_exact(EACH).map(|of_pass| {
                let values: [f32; METRICS] = bytemuck::pod_read_unaligned(of_pass);
                values.map(f64::from)
            });
            Found { flag: told.flag != 0, samples: told.samples, metrics: metrics.collect() }
        };
        shares.chunks_exact(self.bytes() / self.world).map(of_process).collect()
    }
}
