//! Memory of the host in sizes that a user's model or data decide: where it is not there, an error says so, and nothing is aborted.

use std::fs::read_to_string;

use bytemuck::Pod;

use crate::error::{Error, Result};

/// What a run can change that needs more memory of the host than there is.
const LESS_MEMORY: &str = "make data.batch_size, data.context or the model smaller, compute blocks again in the backward \
                           (model.recompute = true), or accumulate over more micro-batches (optimizer.accumulate)";

/// So many zeros.
///
/// # Errors
/// Not enough memory: what was asked, what is free, what to change.
pub(crate) fn zeros<T: Pod>(len: usize) -> Result<Vec<T>> {
    let mut values = Vec::new();
    resize(&mut values, len)?;
    Ok(values)
}

/// Makes it this long, with zeros at its end where it was shorter.
///
/// # Errors
/// As [`zeros`].
pub(crate) fn resize<T: Pod>(values: &mut Vec<T>, len: usize) -> Result<()> {
    if values.try_reserve_exact(len.saturating_sub(values.len())).is_err() {
        let free = free_bytes().map_or_else(String::new, |bytes| format!(", {} MiB are free", bytes >> 20));
        let asked = len.saturating_mul(size_of::<T>()) >> 20;
        return Err(Error::Device(format!("CPU: not enough memory: {asked} MiB were asked for{free}: {LESS_MEMORY}")));
    }
    values.resize(len, T::zeroed());
    Ok(())
}

/// Bytes that this process may still take, by what the system tells: of the machine, of its group of processes, of its own address
/// space. None where it does not tell.
pub(crate) fn free_bytes() -> Option<usize> {
    let value = |file: &str, key: &str| -> Option<usize> {
        let text = read_to_string(file).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let of_system = value("/proc/meminfo", "MemAvailable:").map(|kib| kib << 10);
    let of_group = || {
        let number = |name: &str| value(&format!("/sys/fs/cgroup/{name}"), "");
        Some(number("memory.max")?.saturating_sub(number("memory.current").unwrap_or(0)))
    };
    let of_process = || {
        let most = value("/proc/self/limits", "Max address space")?;
        Some(most.saturating_sub(value("/proc/self/status", "VmSize:")? << 10))
    };
    [of_system, of_group(), of_process()].into_iter().flatten().min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_more_than_there_is_is_an_error_that_tells_what_to_change() {
        assert_eq!(zeros::<f32>(3).unwrap(), [0.0; 3]);
        let mut values = vec![1i32, 2];
        resize(&mut values, 3).unwrap();
        assert_eq!(values, [1, 2, 0]);
        resize(&mut values, 1).unwrap();
        assert_eq!(values, [1]);
        let error = zeros::<f64>(usize::MAX / 16).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        for part in ["MiB were asked for", "data.batch_size", "model.recompute", "optimizer.accumulate"] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_free_is_some_of_what_the_machine_has() {
        let total = read_to_string("/proc/meminfo").unwrap();
        let total = total.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
        let total: usize = total.split_whitespace().next().unwrap().parse().unwrap();
        let free = free_bytes().unwrap();
        assert!(free > 0 && free <= total << 10, "{free} of {total} KiB");
    }
}
