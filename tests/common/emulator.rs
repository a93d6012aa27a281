//! What the emulated device counted, asked of the library that stands in for the driver.

use std::ffi::{CStr, c_char};

use libloading::{Library, Symbol};
use warpstep::backend::cuda::emulated;
use warpstep_emulator::counts::Counts;
use warpstep_emulator::driver::HostCounts;

/// The emulated device's counts. They are the process's: tests that read them do not run side by side.
pub struct Emulator {
    library: Library,
}

impl Emulator {
    /// None, and a line that says so, on a real device.
    pub fn find() -> Option<Self> {
        if !emulated::is_active() {
            println!("skipped: only the emulated device counts what kernels do");
            return None;
        }
        // SAFETY: the library is loaded already, as the driver, and its start runs nothing of its own.
        let library = unsafe { Library::new("libcuda.so") }.expect("the emulated device's library");
        Some(Emulator { library })
    }

    fn function<T>(&self, name: &str) -> Symbol<'_, T> {
        // SAFETY: the callers below name the types that `emulator/src/driver/inspect.rs` has.
        unsafe { self.library.get(name) }.expect(name)
    }

    /// Sets all counts to 0.
    pub fn reset(&self) {
        let reset = self.function::<extern "C" fn()>("warpstep_emulator_reset");
        reset();
    }

    /// What the host did since the last reset.
    pub fn host(&self) -> HostCounts {
        let mut counts = HostCounts::default();
        let read = self.function::<unsafe extern "C" fn(*mut HostCounts)>("warpstep_emulator_host_counts");
        // SAFETY: room for the counts.
        unsafe { read(&mut counts) };
        counts
    }

    /// What each kernel did since the last reset, by name.
    #[allow(dead_code, reason = "each test program uses its part")]
    pub fn kernels(&self) -> Vec<(String, Counts)> {
        type Read = unsafe extern "C" fn(usize, *mut c_char, usize, *mut Counts) -> bool;
        let read = self.function::<Read>("warpstep_emulator_kernel");
        let mut found = Vec::new();
        loop {
            let (mut name, mut counts) = ([0 as c_char; 256], Counts::default());
            // SAFETY: room for a name of as many characters, and for the counts.
            if !unsafe { read(found.len(), name.as_mut_ptr(), name.len(), &mut counts) } {
                return found;
            }
            // SAFETY: the name ends with a 0.
            let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
            found.push((name, counts));
        }
    }
}
