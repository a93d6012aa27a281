//! The fused update on the CUDA device against the CPU's: the same bits in f32, for every rule, clip, form and order of skipped
//! steps.

mod bed;
#[path = "../common/device.rs"]
mod device;
mod early;
mod forms;
mod rules;
mod types;

use std::sync::Arc;

use warpstep::backend::cuda::{Device, DeviceOptions};

/// The device twice: with the update in several launches, and in one where that is possible.
fn devices() -> Vec<Arc<Device>> {
    let device =
        |persistent_update| device::device_with(DeviceOptions { persistent_update, ..DeviceOptions::default() });
    [false, true].into_iter().filter_map(device).collect()
}
