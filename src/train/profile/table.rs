//! The table of a profile.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{EVALUATION, Speed};
use crate::backend::profile::KernelTime;
use crate::model::OpCost;

/// What the update, and what else is queued between operations, is called.
const UPDATE: &str = "update";

/// All runs of one operation, or, below it, of one of its kernels.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// The operation's or the kernel's name.
    pub name: String,
    /// How often it ran.
    pub count: u64,
    /// Milliseconds in all.
    pub milliseconds: f64,
    /// Bytes that it must move; none for a kernel.
    pub bytes: Option<u64>,
    /// Its floating-point operations; none for a kernel.
    pub flops: Option<u64>,
    /// Milliseconds that it takes at least; none for a kernel.
    pub floor_ms: Option<f64>,
    /// An operation's kernels, where the device tells them.
    pub kernels: Vec<Entry>,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Table {
    /// What it ran on.
    pub device: String,
    /// Micro-batches that were counted.
    pub micro_batches: u64,
    /// Bytes a second of a copy, measured in the same run.
    pub copy_bytes_per_s: f64,
    /// Floating-point operations a second of a large product, measured in the same run.
    pub product_flops_per_s: f64,
    /// Milliseconds by the clock for all of it.
    pub wall_ms: f64,
    /// The operations, the longest first.
    pub entries: Vec<Entry>,
}

impl Table {
    pub(super) fn new(device: String, speed: Speed, micro_batches: u64, wall_ms: f64) -> Self {
        let Speed { copy: copy_bytes_per_s, product: product_flops_per_s } = speed;
        Table { device, micro_batches, copy_bytes_per_s, product_flops_per_s, wall_ms, entries: Vec::new() }
    }

    fn speed(&self) -> Speed {
        Speed { copy: self.copy_bytes_per_s, product: self.product_flops_per_s }
    }

    pub(super) fn add_operations(
        &mut self,
        costs: &[OpCost],
        times: &BTreeMap<&'static str, f64>,
        kernels: &[KernelTime],
    ) {
        let speed = self.speed();
        for cost in costs {
            let at = self.entries.iter().position(|entry| entry.name == cost.name).unwrap_or_else(|| {
                let kernels = of(kernels, Some(cost.name));
                let of_kernels: f64 = kernels.iter().map(|kernel| kernel.milliseconds).sum();
                self.entries.push(Entry {
                    name: cost.name.to_owned(),
                    count: 0,
                    milliseconds: of_kernels + times.get(cost.name).copied().unwrap_or(0.0),
                    bytes: Some(0),
                    flops: Some(0),
                    floor_ms: Some(0.0),
                    kernels,
                });
                self.entries.len() - 1
            });
            let (entry, runs) = (&mut self.entries[at], self.micro_batches);
            entry.count += runs;
            let add = |to: &mut Option<u64>, value: u64| *to = to.map(|sum| sum + value * runs);
            add(&mut entry.bytes, cost.bytes);
            add(&mut entry.flops, cost.flops);
            let floor = speed.floor_ms(cost.bytes, cost.flops) * runs as f64;
            entry.floor_ms = entry.floor_ms.map(|sum| sum + floor);
        }
    }

    /// What ran between operations, on a device that tells its kernels.
    pub(super) fn add_update(&mut self, bytes: u64, updates: u64, kernels: &[KernelTime]) {
        let kernels = of(kernels, None);
        if kernels.is_empty() || updates == 0 {
            return;
        }
        self.entries.push(Entry {
            name: UPDATE.to_owned(),
            count: updates,
            milliseconds: kernels.iter().map(|kernel| kernel.milliseconds).sum(),
            bytes: Some(bytes * updates),
            flops: Some(0),
            floor_ms: Some(self.speed().floor_ms(bytes, 0) * updates as f64),
            kernels,
        });
    }

    pub(super) fn sort(&mut self) {
        self.entries.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
    }

    /// Milliseconds of all entries.
    pub fn milliseconds(&self) -> f64 {
        self.entries.iter().map(|entry| entry.milliseconds).sum()
    }

    /// Milliseconds that all entries take at least.
    pub fn floor_ms(&self) -> f64 {
        self.entries.iter().filter_map(|entry| entry.floor_ms).sum()
    }

    /// The table for people.
    pub fn text(&self) -> String {
        let all = self.milliseconds();
        let mut text = format!(
            "{}; {} micro-batch{}; a copy {:.1} GB/s, a product {:.3} TFLOP/s\n",
            self.device,
            self.micro_batches,
            if self.micro_batches == 1 { "" } else { "es" },
            self.copy_bytes_per_s / 1e9,
            self.product_flops_per_s / 1e12
        );
        let names = self.entries.iter().flat_map(|entry| {
            std::iter::once(entry.name.len()).chain(entry.kernels.iter().map(|kernel| kernel.name.len() + 2))
        });
        let width = names.max().unwrap_or(0).max("operation".len());
        text += &format!(
            "{:<width$} {:>7} {:>10} {:>6} {:>10} {:>8} {:>9} {:>10} {:>8}\n",
            "operation", "count", "ms", "share", "MB", "GB/s", "GFLOP/s", "floor ms", "of floor"
        );
        for entry in &self.entries {
            line(&mut text, width, entry, &entry.name, all);
            if entry.kernels.len() > 1 {
                for kernel in &entry.kernels {
                    line(&mut text, width, kernel, &format!("  {}", kernel.name), all);
                }
            }
        }
        let floor = self.floor_ms();
        text += &format!(
            "all of it: {all:.3} ms where {floor:.3} ms is the floor ({:.0} % of its speed); {:.3} ms by the clock\n",
            percent(floor, all),
            self.wall_ms
        );
        text
    }
}

fn of(kernels: &[KernelTime], operation: Option<&str>) -> Vec<Entry> {
    let mine = kernels.iter().filter(|kernel| kernel.operation == operation && kernel.operation != Some(EVALUATION));
    mine.map(|kernel| Entry {
        name: kernel.name.clone(),
        count: kernel.count as u64,
        milliseconds: kernel.milliseconds,
        bytes: None,
        flops: None,
        floor_ms: None,
        kernels: Vec::new(),
    })
    .collect()
}

fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { 100.0 * part / whole } else { 0.0 }
}

fn line(text: &mut String, width: usize, entry: &Entry, name: &str, all: f64) {
    let number =
        |value: Option<f64>, digits: usize| value.map_or_else(String::new, |value| format!("{value:.digits$}"));
    let rate = |amount: Option<u64>| {
        amount
            .filter(|&amount| amount > 0 && entry.milliseconds > 0.0)
            .map(|amount| amount as f64 / entry.milliseconds / 1e6)
    };
    let line = format!(
        "{name:<width$} {:>7} {:>10.3} {:>5.1}% {:>10} {:>8} {:>9} {:>10} {:>8}",
        entry.count,
        entry.milliseconds,
        percent(entry.milliseconds, all),
        number(entry.bytes.map(|bytes| bytes as f64 / 1e6), 2),
        number(rate(entry.bytes), 1),
        number(rate(entry.flops), 1),
        number(entry.floor_ms, 3),
        entry.floor_ms.map_or_else(String::new, |floor| format!("{:.0}%", percent(floor, entry.milliseconds))),
    );
    *text += line.trim_end();
    *text += "\n";
}
