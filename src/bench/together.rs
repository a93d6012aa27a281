//! Whole training steps that several processes make together, and what of their time goes to communication.
//!
//! Each process takes a batch of its own, as large as a single process's: what is told is how throughput grows with processes (weak
//! scaling). The share of communication is what such a step takes longer than the same step that every process makes by itself, all at
//! the same time: so what lies hidden behind the backward does not count, and neither does what processes that share a memory, or a
//! power supply, take from each other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::measure::{Asked, Ground, Here, Settings, measure, spans, spread};
use super::place::{Bed, Precision};
use super::results::Figure;
use super::speeds::Speeds;
use super::step::{SUITE, StepTask, limit, memory, shares};
use super::works::{MODELS, training};
use crate::backend::Backend;
use crate::backend::profile::Kind;
use crate::error::{Error, Result};
use crate::parallel::{Collective, agree};

/// The part of a step that only several processes have.
pub const COMMUNICATION: &str = "communication";
/// Seconds of a span, at least: long beside the meeting of all processes at both of its ends.
const LEAST_SPAN: f64 = 10e-3;

/// `mlp/2_processes`, on a GPU `mlp/bf16/2_processes`.
pub fn name(model: &str, kind: Kind, precision: Precision, world: usize) -> String {
    match kind {
        Kind::Host => format!("{model}/{world}_processes"),
        Kind::Gpu | Kind::Emulated => format!("{model}/{}/{world}_processes", precision.name()),
    }
}

/// A clock that all processes share: a moment is when the last of them came to it. So whatever is decided by it is decided alike in all.
struct Joint<'a, B> {
    here: Here<'a, B>,
    team: &'a dyn Collective,
    lost: Mutex<Lost>,
}

/// The first thing that went wrong between processes, which [`Ground::wait`] tells.
#[derive(Default)]
enum Lost {
    #[default]
    Nothing,
    Untold(Error),
    Told,
}

impl<'a, B: Bed> Joint<'a, B> {
    /// Starts the clock, in all processes at once.
    fn new(backend: &'a B, team: &'a dyn Collective) -> Result<Self> {
        team.barrier()?;
        Ok(Joint { here: Here::new(backend), team, lost: Mutex::default() })
    }

    fn lost(&self) -> MutexGuard<'_, Lost> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn latest(&self) -> Result<f64> {
        let mut times = vec![0u8; self.team.world() * size_of::<f64>()];
        let each: Vec<_> = (0..times.len()).step_by(size_of::<f64>()).map(|at| at..at + size_of::<f64>()).collect();
        times[each[self.team.rank()].clone()].copy_from_slice(&self.here.now().to_le_bytes());
        self.team.all_gather(times.as_mut_slice().into(), &each)?;
        Ok(times.as_chunks().0.iter().map(|time| f64::from_le_bytes(*time)).fold(0.0, f64::max))
    }
}

impl<B: Bed> Ground for Joint<'_, B> {
    fn now(&self) -> f64 {
        let mut lost = self.lost();
        if matches!(*lost, Lost::Nothing) {
            match self.latest() {
                Ok(time) => return time,
                Err(error) => *lost = Lost::Untold(error),
            }
        }
        self.here.now()
    }

    fn wait(&self) -> Result<()> {
        let mut lost = self.lost();
        let before = std::mem::take(&mut *lost);
        if !matches!(before, Lost::Nothing) {
            *lost = Lost::Told;
        }
        drop(lost);
        match before {
            Lost::Untold(error) => Err(error),
            Lost::Nothing | Lost::Told => self.here.wait(),
        }
    }

    fn pause(&self, seconds: f64) {
        self.here.pause(seconds);
    }

    fn cache_bytes(&self) -> usize {
        self.here.cache_bytes()
    }

    fn least_span(&self) -> f64 {
        if self.here.least_span() == 0.0 { 0.0 } else { LEAST_SPAN }
    }

    fn refusal(&self) -> Option<String> {
        self.here.refusal()
    }

    fn look_at_clocks(&self) {
        self.here.look_at_clocks();
    }
}

/// Steps by all processes, each figure about `settings.seconds` long. `told` hears of each, in every process.
///
/// # Errors
/// A device, a process or a network that failed; not enough memory in any of them.
pub fn steps<B: Bed + Backend<Real = f32>>(
    backend: &B,
    team: &Arc<dyn Collective>,
    settings: &Settings,
    speeds: &Speeds,
    wanted: &dyn Fn(&str) -> bool,
    told: &mut dyn FnMut(Figure) -> Result<()>,
) -> Result<()> {
    for model in MODELS {
        if wanted(&name(model, backend.kind(), speeds.precision, team.world())) {
            // Within the pool, as the trainer runs its steps.
            told(rayon::scope(|_| step(backend, team, settings, speeds, model))?)?;
        }
    }
    Ok(())
}

fn step<B: Bed + Backend<Real = f32>>(
    backend: &B,
    team: &Arc<dyn Collective>,
    settings: &Settings,
    speeds: &Speeds,
    model: &str,
) -> Result<Figure> {
    let world = team.world();
    let work = training(backend, model)?;
    // No process waits for one that has no room.
    let mut task = agree(&**team, StepTask::together(backend, &work, team))?;
    let batch = task.batch().clone();
    let ground = Joint::new(backend, &**team)?;
    let (amount, of) = work.amount();
    let flops = task.model_flops();
    let asked = Asked {
        figure: Figure {
            suite: SUITE.to_owned(),
            name: name(model, backend.kind(), speeds.precision, world),
            amount: (world as f64 * amount, of),
            flops: Some(world as f64 * flops),
            memory_bytes: Some(memory(backend, &work, batch.table(), [team.rank(), world])? as u64),
            ..Figure::default()
        },
        limit: &|_| Some(limit(model, flops, speeds)),
    };
    let mut figure = measure(&ground, settings, &mut task, None, asked)?;
    drop(task);
    let mut alone = agree(&**team, StepTask::new(backend, &work))?;
    let by_itself = spread(&spans(&ground, &mut alone, settings.seconds / 2.0)?).median;
    drop(alone);
    let own = (by_itself / figure.seconds.median).min(1.0);
    let parts = shares(backend, &work, batch, &ground, settings.seconds / 4.0)?;
    figure.parts = parts.into_iter().map(|(part, share)| (part, own * share)).collect();
    figure.parts.insert(COMMUNICATION.to_owned(), 1.0 - own);
    Ok(figure)
}
