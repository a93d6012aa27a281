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

/// What is taken at once from this size on is held against what is free before: systems promise more than they have, and end whoever
/// touches what is not there.
const LARGE: usize = 256 << 20;

/// Makes it this long, with zeros at its end where it was shorter.
///
/// # Errors
/// As [`zeros`].
pub(crate) fn resize<T: Pod>(values: &mut Vec<T>, len: usize) -> Result<()> {
    let more = len.saturating_sub(values.capacity()).saturating_mul(size_of::<T>());
    let is_there = more < LARGE || free_bytes().is_none_or(|free| more <= free.saturating_add(swap_bytes()));
    if !is_there || values.try_reserve_exact(len.saturating_sub(values.len())).is_err() {
        let free = free_bytes().map_or_else(String::new, |bytes| format!(", {} MiB are free", bytes >> 20));
        let asked = len.saturating_mul(size_of::<T>()) >> 20;
        return Err(Error::Device(format!("CPU: not enough memory: {asked} MiB were asked for{free}: {LESS_MEMORY}")));
    }
    values.resize(len, T::zeroed());
    Ok(())
}

/// Bytes that this process may still take without the system swapping, by what that tells: of the machine, of its group of processes, of
/// its own address space. None where it does not tell.
pub(crate) fn free_bytes() -> Option<usize> {
    let of_group = || {
        let read = |name: &str| read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
        left_of_group(&read("memory.max")?, &read("memory.current")?, &read("memory.stat").unwrap_or_default())
    };
    let of_process = || {
        let most = number_in(&read_to_string("/proc/self/limits").ok()?, "Max address space")?;
        let taken = number_in(&read_to_string("/proc/self/status").ok()?, "VmSize:")? << 10;
        Some(most.saturating_sub(taken))
    };
    [of_system("MemAvailable:"), of_group(), of_process()].into_iter().flatten().min()
}

/// Bytes that can be swapped out still.
fn swap_bytes() -> usize {
    of_system("SwapFree:").unwrap_or_default()
}

/// Bytes of a line of what the system tells of memory.
fn of_system(key: &str) -> Option<usize> {
    number_in(&read_to_string("/proc/meminfo").ok()?, key).map(|kib| kib << 10)
}

/// The number behind `key`, where a line begins with it.
fn number_in(text: &str, key: &str) -> Option<usize> {
    text.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}

/// What a group may still take of its most, by memory.max, memory.current and memory.stat: pages of files are given up for it. None
/// where there is no most.
fn left_of_group(most: &str, taken: &str, stat: &str) -> Option<usize> {
    let files = ["inactive_file ", "active_file "].into_iter().filter_map(|key| number_in(stat, key)).sum();
    let taken = number_in(taken, "")?.saturating_sub(files);
    Some(number_in(most, "")?.saturating_sub(taken))
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
    fn what_is_left_of_a_group_counts_pages_of_files_as_free() {
        let stat = "anon 100\nfile 750\nshmem 50\ninactive_anon 90\nactive_file 300\ninactive_file 400\n";
        assert_eq!(left_of_group("1000\n", "900\n", stat), Some(800));
        assert_eq!(left_of_group("1000\n", "1200\n", ""), Some(0));
        assert_eq!(left_of_group("max\n", "900\n", stat), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_the_system_would_only_promise_is_refused_before_it_is_touched() {
        // Of address space there is far more than of memory.
        let total = of_system("MemTotal:").unwrap() + of_system("SwapTotal:").unwrap();
        assert!(zeros::<u8>(total).is_err());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_free_is_some_of_what_the_machine_has() {
        let total = of_system("MemTotal:").unwrap();
        let free = free_bytes().unwrap();
        assert!(free > 0 && free <= total, "{free} of {total}");
    }
}
