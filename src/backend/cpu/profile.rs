//! Times of operations, by the clock.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use rayon::prelude::*;

use super::Cpu;
use super::parallel::vectorize;
use crate::backend::profile::{KernelTime, Kind, Probe, Profiled, Traffic, WRITTEN};
use crate::error::{Error, Result};
use crate::host;
use crate::real::Real;

/// Values of a piece of a copy.
const PIECE: usize = 1 << 16;

/// Bytes of the last cache where the system does not tell.
const DEFAULT_CACHE: usize = 32 << 20;

/// Free bytes where the system does not tell.
const DEFAULT_FREE: usize = 2 << 30;

/// The data caches, the nearest first: name, and the bytes of all its instances.
fn caches() -> Vec<(String, usize)> {
    let Ok(processors) = std::fs::read_dir("/sys/devices/system/cpu") else { return Vec::new() };
    let mut found: Vec<(u32, String, usize)> = Vec::new();
    for processor in processors.flatten() {
        let Ok(indices) = std::fs::read_dir(processor.path().join("cache")) else { continue };
        for index in indices.flatten() {
            let read = |name: &str| std::fs::read_to_string(index.path().join(name)).unwrap_or_default();
            let (level, kind) = (read("level").trim().parse::<u32>(), read("type"));
            // Shared by these processors: the same list is the same cache.
            let (shared, size) = (read("shared_cpu_list").trim().to_owned(), size(read("size").trim()));
            let (Ok(level), Some(size)) = (level, size) else { continue };
            if kind.trim() != "Instruction" && !found.iter().any(|(l, s, _)| *l == level && *s == shared) {
                found.push((level, shared, size));
            }
        }
    }
    let mut levels: Vec<u32> = found.iter().map(|(level, ..)| *level).collect();
    levels.sort_unstable();
    levels.dedup();
    let total = |level: u32| found.iter().filter(|(l, ..)| *l == level).map(|(.., size)| size).sum();
    levels.into_iter().map(|level| (format!("L{level}"), total(level))).collect()
}

/// `32768K` in bytes.
fn size(text: &str) -> Option<usize> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    Some(digits.parse::<usize>().ok()? * factor)
}

/// The sum of some values, in 64 sums side by side.
fn sum(values: &[f32]) -> f32 {
    vectorize(
        #[inline(always)]
        || {
            let mut sums = [0f32; 64];
            let (whole, rest) = values.as_chunks::<64>();
            for chunk in whole {
                sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += value);
            }
            sums.iter().sum::<f32>() + rest.iter().sum::<f32>()
        },
    )
}

/// Adds 1 to every value.
fn add_one(values: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || values.iter_mut().for_each(|value| *value += 1.0),
    );
}

impl<R: Real> Profiled for Cpu<R> {
    fn start_timing(&self) {}

    fn within(&self, _: &'static str, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<f64>> {
        self.milliseconds(work).map(Some)
    }

    fn finish_timing(&self) -> Result<Vec<KernelTime>> {
        Ok(Vec::new())
    }

    fn milliseconds(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let began = Instant::now();
        work()?;
        Ok(began.elapsed().as_secs_f64() * 1e3)
    }

    fn copy(&self, to: &mut Vec<f32>, from: &Vec<f32>) -> Result<()> {
        if to.len() != from.len() {
            return Err(Error::shape("copy", format!("{} elements", to.len()), from.len().to_string()));
        }
        to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    }

    fn kind(&self) -> Kind {
        Kind::Host
    }

    fn wait(&self) -> Result<()> {
        // Whatever was asked for is done when the call returns.
        Ok(())
    }

    fn cache_bytes(&self) -> usize {
        caches().last().map_or(DEFAULT_CACHE, |(_, bytes)| *bytes)
    }

    fn inner_caches(&self) -> Vec<(String, usize)> {
        let mut caches = caches();
        caches.pop();
        caches
    }

    fn free_bytes(&self) -> usize {
        host::free_bytes().unwrap_or(DEFAULT_FREE)
    }

    fn parts(&self) -> usize {
        rayon::current_num_threads()
    }

    /// Each thread goes through one part of the whole in one go: large enough for the C library's copies to pass by the caches.
    fn traffic(&self, traffic: Traffic, to: &mut Vec<f32>, from: &Vec<f32>, len: usize, rounds: usize) -> Result<()> {
        let parts = self.parts();
        if len == 0 || !len.is_multiple_of(4 * parts) || from.len() < len || to.len() < len {
            let found = format!("{len} of {} and {} elements", from.len(), to.len());
            return Err(Error::shape("traffic", format!("a multiple of {} elements of both", 4 * parts), found));
        }
        let part = len / parts;
        let from = &from[..len];
        match traffic {
            Traffic::Copy => to[..len].par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| {
                for _ in 0..rounds {
                    to.copy_from_slice(black_box(from));
                    black_box(&mut *to);
                }
            }),
            Traffic::Write => to[..len].par_chunks_mut(part).for_each(|to| {
                for _ in 0..rounds {
                    bytemuck::cast_slice_mut::<f32, u8>(to).fill(WRITTEN.to_bits() as u8);
                    black_box(&mut *to);
                }
            }),
            Traffic::InPlace => to[..len].par_chunks_mut(part).for_each(|to| {
                for _ in 0..rounds {
                    add_one(to);
                    black_box(&mut *to);
                }
            }),
            Traffic::Read => to[..parts].par_iter_mut().zip(from.par_chunks(part)).for_each(|(to, from)| {
                for _ in 0..rounds {
                    *to = sum(black_box(from));
                    black_box(&mut *to);
                }
            }),
        }
        Ok(())
    }

    fn probes(&self) -> Result<Vec<Probe<'_>>> {
        // Every thread of the pool does one small thing, and all are waited for.
        let done = Arc::new(AtomicU64::new(0));
        let (count, threads) = (Arc::clone(&done), self.parts());
        let work = move || {
            rayon::broadcast(|_| count.fetch_add(1, Ordering::Relaxed));
            Ok(())
        };
        let done = move || Ok(done.load(Ordering::Relaxed) / threads as u64);
        Ok(vec![Probe { name: "fork_join".to_owned(), bytes: None, work: Box::new(work), done: Box::new(done) }])
    }

    fn copy_len(&self) -> usize {
        32 << 20
    }

    fn product_size(&self) -> [usize; 3] {
        [1024; 3]
    }
}
