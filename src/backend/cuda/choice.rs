//! Which of the library's algorithms a product takes: the fastest on this device, measured once and kept on disk.
//!
//! Algorithms differ in their order of sums, so another algorithm gives other bits. A run gives the same bits as the one before
//! because the choice is made once: what was measured is written to the cache, where the first that writes wins, and read from
//! then on, by every process. Where it cannot be written, where a run asks for the same bits on any machine, and within a
//! recording, the library's own first proposal is taken, which is a function of the shape. Every algorithm that is proposed
//! gives the same bits each time it runs (see `Limits` in blas.rs).

use std::fmt::Write as _;
use std::path::PathBuf;

use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t;
use cudarc::driver::{CudaEvent, sys};

use super::blas::{Blas, Described, fits, multiply};
use super::context::{Device, driver_error};
use super::module::cache_folder;
use super::product::{Product, Shape};
use crate::error::Result;

/// What was chosen.
pub(super) struct Choice {
    /// None where the library has no algorithm.
    pub algorithm: Option<cublasLtMatmulAlgo_t>,
    /// Whether it is to be kept; a choice made within a recording is made again outside.
    pub is_final: bool,
}

/// Chooses among what the library proposes, best first.
///
/// # Safety
/// As [`Device::product`].
pub(super) unsafe fn choose(
    device: &Device,
    blas: &Blas,
    shape: &Shape,
    described: &Described,
    product: &Product,
    found: &[cublasLtMatmulAlgo_t],
) -> Result<Choice> {
    let first = found.first().copied();
    if !device.options().measure || found.len() < 2 {
        return Ok(Choice { algorithm: first, is_final: true });
    }
    if device.is_recording()? {
        return Ok(Choice { algorithm: first, is_final: false });
    }
    let algorithm = match Entry::new(device, blas, shape) {
        // SAFETY: as the caller promises.
        Some(entry) => unsafe { entry.find_or_measure(device, blas, described, product, found)? },
        None => None,
    };
    Ok(Choice { algorithm: algorithm.or(first), is_final: true })
}

/// The place in the cache of one shape's choice.
struct Entry {
    path: PathBuf,
    /// Everything that the choice depends on, hashed.
    key: String,
}

/// First line of an entry.
const HEAD: &str = "warpstep product 1";

impl Entry {
    fn new(device: &Device, blas: &Blas, shape: &Shape) -> Option<Self> {
        let folder = cache_folder()?.join("products");
        let on = (device.name(), device.compute_capability(), device.multiprocessors(), device.driver_version());
        let key = blake3::hash(format!("{on:?} {} {shape:?}", blas.version()).as_bytes()).to_hex().to_string();
        Some(Entry { path: folder.join(&key[..32]), key })
    }

    /// None where nothing can be kept.
    ///
    /// # Safety
    /// As [`Device::product`].
    unsafe fn find_or_measure(
        &self,
        device: &Device,
        blas: &Blas,
        described: &Described,
        product: &Product,
        found: &[cublasLtMatmulAlgo_t],
    ) -> Result<Option<cublasLtMatmulAlgo_t>> {
        let kept = || self.read().filter(|algorithm| fits(blas, described, algorithm));
        if let Some(algorithm) = kept() {
            return Ok(Some(algorithm));
        }
        // Before it is measured for nothing: can it be kept?
        let Some(aside) = self.make_room() else { return Ok(None) };
        // Another process may have kept one meanwhile; what is there and is not that is damaged, or foreign.
        if self.path.exists() && kept().is_none() {
            let _ = std::fs::remove_file(&self.path);
        }
        // What is measured must be what is taken when it is read again.
        let found: Vec<_> = found.iter().filter(|algorithm| fits(blas, described, algorithm)).copied().collect();
        // SAFETY: as the caller promises.
        let measured = unsafe { fastest(device, blas, described, product, &found) };
        let written = match &measured {
            Ok(Some(algorithm)) => std::fs::write(&aside, self.text(algorithm)).is_ok(),
            Ok(None) | Err(_) => false,
        };
        if written {
            // A link is made whole or not at all, and never over one that another process made first.
            let _ = std::fs::hard_link(&aside, &self.path);
        }
        let _ = std::fs::remove_file(&aside);
        measured?;
        Ok(kept())
    }

    /// Makes a file beside the entry to write to.
    fn make_room(&self) -> Option<PathBuf> {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let aside = self.path.with_extension(format!("{}-{number}.tmp", std::process::id()));
        std::fs::create_dir_all(self.path.parent()?).and_then(|()| std::fs::write(&aside, "")).ok()?;
        Some(aside)
    }

    fn text(&self, algorithm: &cublasLtMatmulAlgo_t) -> String {
        let mut text = format!("{HEAD}\n{}\n", self.key);
        for word in algorithm.data {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{word:016x}");
        }
        let sum = blake3::hash(text.as_bytes()).to_hex();
        text + &sum + "\n"
    }

    fn read(&self) -> Option<cublasLtMatmulAlgo_t> {
        let text = std::fs::read_to_string(&self.path).ok()?;
        let mut data = [0u64; 8];
        for (word, line) in data.iter_mut().zip(text.lines().skip(2)) {
            *word = u64::from_str_radix(line, 16).ok()?;
        }
        let algorithm = cublasLtMatmulAlgo_t { data };
        // What is not to the letter what would be written is damaged.
        (text == self.text(&algorithm)).then_some(algorithm)
    }
}

/// How often each algorithm is timed, in turn with the others.
const ROUNDS: usize = 5;
/// By how much another must be faster than the library's first proposal: less is noise.
const WORTH_IT: f32 = 0.98;

/// The fastest by the median of its times; none where there is no room to measure.
///
/// # Safety
/// As [`Device::product`].
unsafe fn fastest(
    device: &Device,
    blas: &Blas,
    described: &Described,
    product: &Product,
    found: &[cublasLtMatmulAlgo_t],
) -> Result<Option<cublasLtMatmulAlgo_t>> {
    // What is written `=` is written again by the product itself. What is added to is read where it is and written elsewhere.
    let room = if product.add { Some(device.allocate(bytes_of_out(product))) } else { None };
    let to = match room {
        None => product.out.address,
        Some(Ok(address)) => address,
        Some(Err(_)) => return Ok(None),
    };
    // SAFETY: as the caller promises; `to` has the room of `out`.
    let times = unsafe { times(device, blas, described, product, to, found) };
    if product.add {
        // After the work that uses it, whatever came of it.
        let finished = device.synchronize();
        device.release(to);
        finished?;
    }
    let mut best: Option<(usize, f32)> = None;
    for (number, time) in times?.into_iter().enumerate().filter_map(|(number, time)| Some((number, time?))) {
        if best.is_none_or(|(of, least)| time < if of == 0 { least * WORTH_IT } else { least }) {
            best = Some((number, time));
        }
    }
    Ok(best.map(|(number, _)| found[number]))
}

/// Bytes from the first value of `out` to its last.
fn bytes_of_out(product: &Product) -> usize {
    let [m, _, n] = product.size;
    let width = if product.types[1] == "f32" { 4 } else { 2 };
    (m.saturating_sub(1) * product.out.stride + n).max(1) * width
}

/// Median milliseconds of each algorithm; none for one that does not run.
///
/// # Safety
/// As [`multiply`].
unsafe fn times(
    device: &Device,
    blas: &Blas,
    described: &Described,
    product: &Product,
    to: u64,
    found: &[cublasLtMatmulAlgo_t],
) -> Result<Vec<Option<f32>>> {
    let fail = |error| driver_error("time a product", error);
    let event = || device.stream().record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).map_err(fail);
    // SAFETY: as the caller promises.
    let run = |algorithm| unsafe { multiply(device, blas, described, product, to, algorithm) }.is_ok();
    // The first run of each loads its kernel.
    let works: Vec<bool> = found.iter().map(run).collect();
    let mut spans: Vec<Vec<[CudaEvent; 2]>> = found.iter().map(|_| Vec::new()).collect();
    for _ in 0..ROUNDS {
        for (algorithm, spans) in
            found.iter().zip(&mut spans).zip(&works).filter(|(_, works)| **works).map(|(pair, _)| pair)
        {
            let start = event()?;
            run(algorithm);
            spans.push([start, event()?]);
        }
    }
    device.synchronize()?;
    let median = |spans: &Vec<[CudaEvent; 2]>| -> Result<Option<f32>> {
        let mut times = Vec::with_capacity(spans.len());
        for [start, end] in spans {
            times.push(start.elapsed_ms(end).map_err(fail)?);
        }
        times.sort_by(f32::total_cmp);
        Ok(times.get(times.len() / 2).copied())
    };
    spans.iter().map(median).collect()
}
