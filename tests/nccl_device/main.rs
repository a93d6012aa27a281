//! What devices do together by NCCL, as a program that uses the library sees it: each collective against its definition, whole
//! steps as one graph launch with sums beside the backward, memory that is shared out, sums by way of the host, and a wait that
//! another thread ends.
//!
//! A thread stands for a process, with an emulated device of its own.

mod around_the_host;
mod collectives;
#[path = "../common/emulator.rs"]
mod emulator;
mod sharded;
mod steps;
#[path = "../common/threads.rs"]
mod threads;

use std::sync::{Arc, Mutex};

use warpstep::backend::cuda::{Device, DeviceOptions, emulated, is_embedded};
use warpstep::parallel::Nccl;

const DEVICES: usize = 4;

/// Before any test runs, this program starts itself again on so many emulated devices.
#[ctor::ctor]
fn run_on_the_emulated_devices() {
    if !emulated::is_active() && emulated::find_library().is_some() {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("WARPSTEP_EMULATOR_DEVICES", DEVICES.to_string()) };
        panic!("{}", emulated::start_again());
    }
}

/// A device belongs to one test at a time, and counts are the process's.
pub static ALONE: Mutex<()> = Mutex::new(());

pub fn is_there() -> bool {
    let found = emulated::is_active() && is_embedded();
    if !found {
        println!("skipped: the emulator was not built, or Warpstep was built without nvcc");
    }
    found
}

pub fn device(ordinal: usize) -> Arc<Device> {
    Device::open(DeviceOptions { ordinal, ..DeviceOptions::default() }).unwrap()
}

/// Does the same with every device, and gives what each found.
pub fn each<T: Send>(world: usize, work: impl Fn(usize, Arc<Device>) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..world).map(|rank| scope.spawn(move || work(rank, device(rank)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// As `each`, joined.
pub fn together<T: Send>(world: usize, work: impl Fn(Nccl, Arc<Device>) -> T + Sync) -> Vec<T> {
    let id = Nccl::unique_id().unwrap();
    each(world, |rank, device| work(Nccl::join(&device, &id, rank, world).unwrap(), device))
}
