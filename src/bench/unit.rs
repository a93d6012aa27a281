//! Works that others do too, ready to be run in turn with theirs.

use super::measure::{Ground, Here, Task, spans};
use super::place::{Bed, OnBed, Place, Precision};
use super::results::Work;
use super::step::StepTask;
use super::update::{self, UpdateTask};
use super::works::{self, Updating};
use crate::backend::profile::Kind;
use crate::error::{Error, Result};

/// The training steps that [`unit()`] knows by name, besides updates.
pub const STEPS: [&str; 6] = ["mlp", "cnn", "audio_cnn", "resnet18", "gpt_cpu", "gpt2"];

/// A work that can be run for a while at a time.
pub trait Unit: Send {
    /// What exactly it does.
    fn work(&self) -> Work;

    /// The number of the CUDA device that it runs on; none on the CPU.
    fn ordinal(&self) -> Option<usize> {
        None
    }

    /// Seconds of each repetition, for about so long and once at least, after a warm-up of a tenth of it; all of it is done when
    /// this returns. Repetitions that are shorter than a wait for the device is long are queued several together, and count by
    /// their mean.
    ///
    /// # Errors
    /// A device that failed.
    fn run_for(&mut self, seconds: f64) -> Result<Vec<f64>>;

    /// What is wrong with what the last repetition left, looked at by its twin in f64; nothing where it is as it should be.
    ///
    /// # Errors
    /// A device that failed.
    fn verify(&mut self) -> Result<Option<String>>;
}

/// A work by its name, with all its memory taken and its first repetitions done: one of [`STEPS`], or `update/` and what
/// [`update::of_peers`] names.
///
/// # Errors
/// Another name, no such device, or not enough memory.
pub fn unit(name: &str, place: Place, precision: Precision) -> Result<Box<dyn Unit>> {
    let updating = name.strip_prefix("update/").and_then(update::by_name);
    if !STEPS.contains(&name) && updating.is_none() {
        let known = STEPS.join(", ");
        return Err(Error::config("bench", format!("found {name:?}, expected one of {known}, update/RULE+CLIP/SIZE")));
    }
    let ordinal = match place {
        Place::Cpu => None,
        Place::Cuda(ordinal) => Some(ordinal),
    };
    place.open(precision, Opening { name, updating, precision, ordinal })
}

struct Opening<'a> {
    name: &'a str,
    updating: Option<Updating>,
    precision: Precision,
    ordinal: Option<usize>,
}

impl OnBed for Opening<'_> {
    type Given = Box<dyn Unit>;

    fn on<B: Bed>(self, backend: &B) -> Result<Box<dyn Unit>> {
        let (precision, ordinal, device) = (self.precision.name(), self.ordinal, backend.clone());
        let mut unit: Box<dyn Unit> = if let Some(mut work) = self.updating {
            if backend.kind() == Kind::Emulated {
                work.parameters = works::update(backend).parameters;
            }
            let task = UpdateTask::new(backend, &work)?;
            let work = work.work(precision, works::threads(backend));
            Box::new(Alone { backend: device, ordinal, work, task })
        } else {
            let work = works::training(backend, self.name)?;
            let task = StepTask::new(backend, &work)?;
            let work = work.work(task.parameters(), precision, works::threads(backend));
            Box::new(Alone { backend: device, ordinal, work, task })
        };
        for _ in 0..2 {
            unit.run_for(0.0)?;
        }
        Ok(unit)
    }
}

/// A task on its device.
struct Alone<B, T> {
    backend: B,
    ordinal: Option<usize>,
    work: Work,
    task: T,
}

impl<B: Bed, T: Task + Send> Unit for Alone<B, T> {
    fn work(&self) -> Work {
        self.work.clone()
    }

    fn ordinal(&self) -> Option<usize> {
        self.ordinal
    }

    fn run_for(&mut self, seconds: f64) -> Result<Vec<f64>> {
        let ground = Here::new(&self.backend);
        let (ground, task) = (&ground, &mut self.task);
        // Within the pool, as the trainer runs its steps: no thread has to be woken to begin.
        rayon::scope(|_| spans(ground, task, seconds))
    }

    fn verify(&mut self) -> Result<Option<String>> {
        let ground = Here::new(&self.backend);
        self.task.prepare()?;
        self.task.run()?;
        self.task.finish()?;
        ground.wait()?;
        self.task.verify()
    }
}
