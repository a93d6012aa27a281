//! What tests ask of the device that a driver does not tell, in Rust and in C (tests reach the device through its library).

use std::ffi::{CStr, c_char};

use super::{HostCounts, state};
use crate::counts::Counts;

/// What the host did since the last [`reset`].
pub fn host_counts() -> HostCounts {
    state().host
}

/// What a kernel did since the last [`reset`].
pub fn counts_of(kernel: &str) -> Counts {
    state().kernels.get(kernel).copied().unwrap_or_default()
}

/// The last fault, in a sentence.
pub fn last_fault() -> Option<String> {
    state().last_fault.as_ref().map(ToString::to_string)
}

/// Sets all counts to 0.
pub fn reset() {
    let mut state = state();
    state.host = HostCounts::default();
    state.kernels.clear();
}

/// [`host_counts`].
///
/// # Safety
/// `to` holds a [`HostCounts`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn warpstep_emulator_host_counts(to: *mut HostCounts) {
    // SAFETY: as the caller promises.
    unsafe { to.write(host_counts()) };
}

/// [`counts_of`].
///
/// # Safety
/// `kernel` is a C string; `to` holds [`Counts`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn warpstep_emulator_counts_of(kernel: *const c_char, to: *mut Counts) {
    // SAFETY: as the caller promises.
    unsafe { to.write(counts_of(&CStr::from_ptr(kernel).to_string_lossy())) };
}

/// [`reset`].
#[unsafe(no_mangle)]
pub extern "C" fn warpstep_emulator_reset() {
    reset();
}
