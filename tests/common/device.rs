//! The device that CUDA tests run on: the emulated one, or a real one where `WARPSTEP_TEST_DEVICE=cuda` asks for it.

use std::sync::Arc;

use warpstep::backend::cuda::{Device, DeviceOptions, emulated};

/// Before any test runs, this program starts itself again with the emulated device's libraries on the library path.
#[ctor::ctor]
fn run_on_the_emulated_device() {
    if std::env::var_os("WARPSTEP_TEST_DEVICE").is_none()
        && !emulated::is_active()
        && emulated::find_library().is_some()
    {
        panic!("{}", emulated::start_again());
    }
}

/// A device with these options; none, and a line that says so, where there is none to test on.
#[allow(dead_code, reason = "each test program uses its part")]
pub fn device_with(options: DeviceOptions) -> Option<Arc<Device>> {
    let real = std::env::var("WARPSTEP_TEST_DEVICE").is_ok_and(|device| device == "cuda");
    if !real && !emulated::is_active() {
        println!("skipped: no CUDA device: the emulator was not built, and WARPSTEP_TEST_DEVICE=cuda is not set");
        return None;
    }
    if !real && !warpstep::backend::cuda::is_embedded() {
        println!("skipped: Warpstep was built without nvcc, so there are no kernels to run on the emulated device");
        return None;
    }
    Some(Device::open(options).expect("a device to test on"))
}

/// The first device.
#[allow(dead_code, reason = "each test program uses its part")]
pub fn device() -> Option<Arc<Device>> {
    device_with(DeviceOptions::default())
}
