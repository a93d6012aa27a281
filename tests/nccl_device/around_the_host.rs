//! Sums of devices by way of the host, where the collective cannot queue them.

use std::sync::{Arc, PoisonError};

use half::f16;
use warpstep::backend::cuda::Storage;
use warpstep::parallel::{Collective, Wire};
use warpstep::plan::Share;
use warpstep::train::step::StepReport;

use crate::emulator::Emulator;
use crate::steps::{pipelined, trainer};
use crate::threads::OnHost;
use crate::{ALONE, each, is_there, together};

/// What steps find that two processes take, by way of the host.
fn around_the_host<S: Storage>(share: impl Fn(usize) -> Share + Sync, steps: usize) -> Vec<(Vec<StepReport>, f32)> {
    let meeting = OnHost::all(2);
    each(2, |rank, device| {
        let collective = Arc::new(meeting[rank].clone());
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
