//! Sums of devices by way of the host, where the collective cannot queue them.

use std::ops::Range;
use std::sync::{Arc, Barrier, Mutex, PoisonError};

use half::f16;
use warpstep::backend::cuda::Storage;
use warpstep::backend::{HostSlice, Slice};
use warpstep::parallel::{Collective, Wire, host_slice};
use warpstep::plan::Share;
use warpstep::train::step::StepReport;

use crate::emulator::Emulator;
use crate::steps::{pipelined, trainer};
use crate::{ALONE, each, is_there, together};

/// Threads of one process that meet in the host's memory: what MPI is to processes.
struct Meeting {
    slots: Mutex<Vec<Vec<u8>>>,
    barrier: Barrier,
}

struct OnHost {
    meeting: Arc<Meeting>,
    rank: usize,
    world: usize,
}

impl OnHost {
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

/// What steps find that two processes take, by way of the host.
fn around_the_host<S: Storage>(share: impl Fn(usize) -> Share + Sync, steps: usize) -> Vec<(Vec<StepReport>, f32)> {
    let meeting = Arc::new(Meeting { slots: Mutex::new(vec![Vec::new(); 2]), barrier: Barrier::new(2) });
    each(2, |rank, device| {
        let collective = Arc::new(OnHost { meeting: meeting.clone(), rank, world: 2 });
        let mut trainer = trainer::<S>(&device, collective, share(rank), Wire::F32);
        let reports = pipelined(&mut trainer, share(rank), 0..steps);
        (reports, trainer.loss_scale().unwrap().map_or(1.0, |scale| scale.scale))
    })
}

fn by_nccl<S: Storage>(share: impl Fn(usize) -> Share + Sync, steps: usize) -> Vec<(Vec<StepReport>, f32)> {
    together(2, |nccl, device| {
        let share = share(nccl.rank());
        let mut trainer = trainer::<S>(&device, Arc::new(nccl), share, Wire::F32);
        let reports = pipelined(&mut trainer, share, 0..steps);
        (reports, trainer.loss_scale().unwrap().map_or(1.0, |scale| scale.scale))
    })
}

#[test]
fn sums_by_way_of_the_host_find_what_sums_on_the_device_find() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let apart = |rank| Share::of_rank(rank, 2);
    let parts = |rank| Share::reproducible(rank, 2, 4).unwrap();
    let found = by_nccl::<f32>(apart, 6);
    assert_eq!(found[0].0, found[1].0, "processes disagree");
    assert_eq!(found, around_the_host::<f32>(apart, 6));
    assert_eq!(by_nccl::<f32>(parts, 4), around_the_host::<f32>(parts, 4));
    // In f16 gradients are scaled, and the update divides by the scale.
    let halves = by_nccl::<f16>(apart, 4);
    assert_eq!(halves, around_the_host::<f16>(apart, 4));
    assert_eq!(halves[0].1, 65_536.0);
    let (half, full) = (&halves[0].0[0], &found[0].0[0]);
    let norms = [half, full].map(|report| report.outcome.grad_norm);
    assert!(!half.outcome.skipped && (norms[0] - norms[1]).abs() < 0.05 * norms[1], "{norms:?}");
}

#[test]
fn a_step_around_the_host_is_two_recordings() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(emulator) = Emulator::find() else { return };
    let share = |rank| Share::of_rank(rank, 2);
    let launches = |steps| {
        emulator.reset();
        around_the_host::<f32>(share, steps);
        emulator.host().graph_launches
    };
    // Backward and update of each of two processes, once all are recorded.
    let (few, more) = (launches(6), launches(9));
    assert_eq!(more - few, 2 * 2 * 3);
}
