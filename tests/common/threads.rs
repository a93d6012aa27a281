//! A collective of threads.

#![allow(dead_code)] // each test file uses a part of it

use std::ops::Range;
use std::sync::{Arc, Barrier, Mutex};

use warpstep::backend::{HostSlice, Slice};
use warpstep::parallel::{Collective, host_slice};

/// Where they meet.
struct Meeting {
    slots: Mutex<Vec<Vec<u8>>>,
    barrier: Barrier,
}

/// One of some threads of one process that meet in the host's memory: what MPI is to processes.
#[derive(Clone)]
pub struct OnHost {
    meeting: Arc<Meeting>,
    rank: usize,
    world: usize,
    /// Whether sums are taken.
    sums: bool,
}

impl OnHost {
    /// So many.
    pub fn all(world: usize) -> Vec<Self> {
        let meeting = Arc::new(Meeting { slots: Mutex::new(vec![Vec::new(); world]), barrier: Barrier::new(world) });
        (0..world).map(|rank| OnHost { meeting: Arc::clone(&meeting), rank, world, sums: true }).collect()
    }

    /// As if sums were forgotten.
    pub fn that_forgets(self) -> Self {
        OnHost { sums: false, ..self }
    }

    /// The bytes of all.
    fn exchange(&self, own: &[u8]) -> Vec<Vec<u8>> {
        self.meeting.slots.lock().unwrap()[self.rank] = own.to_vec();
        self.meeting.barrier.wait();
        let all = self.meeting.slots.lock().unwrap().clone();
        self.meeting.barrier.wait();
        all
    }
}

impl Collective for OnHost {
    fn name(&self) -> &'static str {
        "threads"
    }
    fn rank(&self) -> usize {
        self.rank
    }
    fn world(&self) -> usize {
        self.world
    }
    fn all_reduce_sum(&self, values: Slice<'_>) -> warpstep::Result<()> {
        let HostSlice::F32(values) = host_slice("threads", values)? else { panic!("f32 alone is summed here") };
        let all = self.exchange(bytemuck::cast_slice(values));
        if !self.sums {
            return Ok(());
        }
        values.fill(0.0);
        for (rank, bytes) in all.iter().enumerate() {
            let terms: Vec<f32> = bytemuck::pod_collect_to_vec(bytes);
            values.iter_mut().zip(terms).for_each(|(sum, term)| *sum = if rank == 0 { term } else { *sum + term });
        }
        Ok(())
    }
    fn reduce_scatter_sum(&self, values: Slice<'_>, _: &[Range<usize>]) -> warpstep::Result<()> {
        self.all_reduce_sum(values)
    }
    fn all_gather(&self, values: Slice<'_>, shards: &[Range<usize>]) -> warpstep::Result<()> {
        let mut values = host_slice("threads", values)?;
        let each = values.number().bytes();
        let bytes = values.bytes_mut();
        for (shard, all) in shards.iter().zip(self.exchange(bytes)) {
            let shard = shard.start * each..shard.end * each;
            bytes[shard.clone()].copy_from_slice(&all[shard]);
        }
        Ok(())
    }
    fn broadcast(&self, values: Slice<'_>, root: usize) -> warpstep::Result<()> {
        let mut values = host_slice("threads", values)?;
        let all = self.exchange(values.bytes_mut());
        values.bytes_mut().copy_from_slice(&all[root]);
        Ok(())
    }
    fn swap(&self, partner: usize, send: Slice<'_>, receive: Slice<'_>) -> warpstep::Result<()> {
        let (mut send, mut receive) = (host_slice("threads", send)?, host_slice("threads", receive)?);
        receive.bytes_mut().copy_from_slice(&self.exchange(send.bytes_mut())[partner]);
        Ok(())
    }
    fn barrier(&self) -> warpstep::Result<()> {
        self.exchange(&[]);
        Ok(())
    }
}
