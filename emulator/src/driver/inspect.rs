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

/// The kernels that ran since the last [`reset`], in the order of their names.
pub fn kernels() -> Vec<(String, Counts)> {
    let mut all: Vec<_> = state().kernels.iter().map(|(name, counts)| (name.clone(), *counts)).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
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

/// One of [`kernels`] by number: its counts, and its name cut to `bytes` with the 0 at its end. False past the last.
///
/// # Safety
/// `name` has room for `bytes` characters, at least 1; `to` holds [`Counts`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn warpstep_emulator_kernel(
    number: usize,
    name: *mut c_char,
    bytes: usize,
    to: *mut Counts,
) -> bool {
    let all = kernels();
    let Some((found, counts)) = all.get(number) else { return false };
    let len = found.len().min(bytes.saturating_sub(1));
    // SAFETY: as the caller promises.
    unsafe {
        std::ptr::copy_nonoverlapping(found.as_ptr().cast(), name, len);
        name.add(len).write(0);
        to.write(*counts);
    }
    true
}

/// [`last_fault`], cut to `bytes` with the 0 at its end; false where there was none.
///
/// # Safety
/// `to` has room for `bytes` characters, at least 1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn warpstep_emulator_last_fault(to: *mut c_char, bytes: usize) -> bool {
    let Some(fault) = last_fault() else { return false };
    let len = fault.len().min(bytes.saturating_sub(1));
    // SAFETY: as the caller promises.
    unsafe {
        std::ptr::copy_nonoverlapping(fault.as_ptr().cast(), to, len);
        to.add(len).write(0);
    }
    true
}
