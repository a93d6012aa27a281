//! What was measured once and is kept on disk: the first that writes wins, and everybody reads it from then on, so that a choice that
//! changes bits is the same for every run on a device, for every process of a run, and for a run that is resumed elsewhere.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use cudarc::driver::{CudaEvent, sys};

use super::context::{Device, driver_error, driver_version};
use super::module::cache_folder;
use crate::error::Result;

/// Where one choice is kept: in the run's folder, so that it goes on with the bits that it had wherever it is resumed, and in the cache
/// of this machine.
pub(super) struct Entry {
    run: Option<Place>,
    cache: Option<Place>,
}

/// A file that keeps a choice.
struct Place {
    path: PathBuf,
    /// The first line.
    head: &'static str,
    /// Everything that the choice depends on, hashed.
    key: String,
}

impl Entry {
    /// The entry in `folder` for what `question` says, on this device; `head` names what is kept, and the form in which.
    pub fn new(device: &Device, folder: &str, head: &'static str, question: &str) -> Self {
        let on = (device.name(), device.compute_capability(), device.multiprocessors());
        let place = |base: PathBuf, key: String| {
            let key = blake3::hash(key.as_bytes()).to_hex().to_string();
            Place { path: base.join(folder).join(&key[..32]), head, key }
        };
        Entry {
            // Another driver runs the same kernels; what it measures would be another choice.
            run: device.choices().map(|base| place(base, format!("{on:?} {question}"))),
            cache: cache_folder().map(|base| place(base, format!("{:?} {question}", (on, driver_version())))),
        }
    }

    /// What is kept and fits, or else what `measure` finds, which is kept if it can be; none where it cannot, or nothing was found.
    ///
    /// # Errors
    /// Those of `measure`.
    pub fn find_or_measure<const WORDS: usize>(
        &self,
        fits: impl Fn(&[u64; WORDS]) -> bool,
        measure: impl FnOnce() -> Result<Option<[u64; WORDS]>>,
    ) -> Result<Option<[u64; WORDS]>> {
        let places: Vec<&Place> = [&self.run, &self.cache].into_iter().flatten().collect();
        find_in(&places, false, &fits, &mut Some(measure))
    }

    /// Keeps what was taken without being measured, for this run alone: it may have room to measure when it is resumed.
    pub fn keep_for_run(&self, words: &[u64]) {
        if let Some((place, aside)) = self.run.as_ref().and_then(|place| Some((place, place.make_room()?))) {
            place.keep(&aside, Some(words));
        }
    }
}

/// What the first of the places keeps that keeps anything, or else what `measure` finds; kept in all places before, too. `keeps`: whether
/// a place before these would keep it.
fn find_in<const WORDS: usize>(
    places: &[&Place],
    keeps: bool,
    fits: &dyn Fn(&[u64; WORDS]) -> bool,
    measure: &mut Option<impl FnOnce() -> Result<Option<[u64; WORDS]>>>,
) -> Result<Option<[u64; WORDS]>> {
    let Some((place, rest)) = places.split_first() else {
        // Not for nothing.
        return measure.take().filter(|_| keeps).map_or(Ok(None), |measure| measure());
    };
    let kept = || place.read().filter(fits);
    if let Some(words) = kept() {
        return Ok(Some(words));
    }
    let Some(aside) = place.make_room() else { return find_in(rest, keeps, fits, measure) };
    // Another process may have kept one meanwhile; what is there and is not that is damaged, or foreign.
    if place.path.exists() && kept().is_none() {
        let _ = std::fs::remove_file(&place.path);
    }
    let found = find_in(rest, true, fits, measure);
    place.keep(&aside, found.as_ref().ok().and_then(Option::as_ref).map(<[u64; WORDS]>::as_slice));
    // The first that wrote is right.
    Ok(found?.and_then(|_| kept()))
}

impl Place {
    /// Makes a file beside the entry to write to.
    fn make_room(&self) -> Option<PathBuf> {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let aside = self.path.with_extension(format!("{}-{number}.tmp", std::process::id()));
        std::fs::create_dir_all(self.path.parent()?).and_then(|()| std::fs::write(&aside, "")).ok()?;
        Some(aside)
    }

    /// Keeps the words, where nothing is kept yet, by way of a file that [`Place::make_room`] made.
    fn keep(&self, aside: &Path, words: Option<&[u64]>) {
        if words.is_some_and(|words| std::fs::write(aside, self.text(words)).is_ok()) {
            // A link is made whole or not at all, and never over one that another process made first.
            let _ = std::fs::hard_link(aside, &self.path);
        }
        let _ = std::fs::remove_file(aside);
    }

    fn text(&self, words: &[u64]) -> String {
        let mut text = format!("{}\n{}\n", self.head, self.key);
        for word in words {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{word:016x}");
        }
        let sum = blake3::hash(text.as_bytes()).to_hex();
        text + &sum + "\n"
    }

    fn read<const WORDS: usize>(&self) -> Option<[u64; WORDS]> {
        let text = std::fs::read_to_string(&self.path).ok()?;
        let mut words = [0u64; WORDS];
        for (word, line) in words.iter_mut().zip(text.lines().skip(2)) {
            *word = u64::from_str_radix(line, 16).ok()?;
        }
        // What is not to the letter what would be written is damaged.
        (text == self.text(&words)).then_some(words)
    }
}

/// How often each is timed, in turn with the others.
const ROUNDS: usize = 5;

/// Median milliseconds of each of `count` works; none for one that does not run, which `run(which)` tells.
pub(super) fn times(device: &Device, count: usize, run: impl Fn(usize) -> bool) -> Result<Vec<Option<f32>>> {
    let fail = |error| driver_error("time what is to be chosen", error);
    let event = || device.stream().record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).map_err(fail);
    // The first run of each loads its kernels.
    let works: Vec<bool> = (0..count).map(&run).collect();
    let mut spans: Vec<Vec<[CudaEvent; 2]>> = (0..count).map(|_| Vec::new()).collect();
    for _ in 0..ROUNDS {
        for (which, spans) in spans.iter_mut().enumerate().filter(|(which, _)| works[*which]) {
            let start = event()?;
            run(which);
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

/// By how much another must be faster than the first: less is noise.
const WORTH_IT: f32 = 0.98;

/// The least of the times; the first unless another is worth it, none where nothing ran.
pub(super) fn fastest(times: &[Option<f32>]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (which, time) in times.iter().enumerate().filter_map(|(which, time)| Some((which, (*time)?))) {
        if best.is_none_or(|(of, least)| time < if of == 0 { least * WORTH_IT } else { least }) {
            best = Some((which, time));
        }
    }
    best.map(|(which, _)| which)
}

#[cfg(test)]
mod tests {
    use super::fastest;

    #[test]
    fn another_than_the_first_has_to_be_worth_it() {
        assert_eq!(fastest(&[]), None);
        assert_eq!(fastest(&[None, None]), None);
        assert_eq!(fastest(&[Some(1.0), Some(0.99), Some(0.981)]), Some(0));
        assert_eq!(fastest(&[Some(1.0), Some(0.97), Some(0.96)]), Some(2));
        assert_eq!(fastest(&[None, Some(3.0), Some(2.99)]), Some(2));
    }
}
