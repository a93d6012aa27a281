//! The device that CUDA tests run on: the emulated one, or a real one where `WARPSTEP_TEST_DEVICE=cuda` asks for it.

use std::ffi::{CString, c_char};
use std::sync::Arc;

use warpstep::backend::cuda::{Device, DeviceOptions, emulated};
use warpstep_emulator::counts::Counts;

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

/// What a kernel did on the emulated device so far, in all tests of this program; none on a real device.
#[allow(dead_code, reason = "each test program uses its part")]
pub fn counts_of(kernel: &str) -> Option<Counts> {
    if !emulated::is_active() {
        return None;
    }
    let name = CString::new(kernel).expect("a kernel's name");
    let mut counts = Counts::default();
    // SAFETY: the library is the emulator that this process has loaded as its driver; the function has this signature there.
    unsafe {
        let driver = libloading::Library::new("libcuda.so.1").expect("the emulated driver");
        let count: libloading::Symbol<'_, unsafe extern "C" fn(*const c_char, *mut Counts)> =
            driver.get(b"warpstep_emulator_counts_of").expect("the emulator's count");
        count(name.as_ptr(), &mut counts);
    }
    Some(counts)
}
