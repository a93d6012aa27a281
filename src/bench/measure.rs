//! The harness: how a time is taken, and what it refuses.
//!
//! A [`Task`] only queues its work. It is the harness that takes the clock, that waits for the device within every timed span, and
//! that looks at what the work left. So a time without a wait cannot be taken by accident; and where a task, or a device's wait,
//! does not keep its promise, one of the checks below refuses the figure:
//!
//! - the outcome: before a repetition that is looked at, the task makes what it left earlier wrong, and its twin then tells what
//!   should be there. Work that is skipped is seen, and so is work that is not done when its time is over;
//! - the clock: single times must add up to the time from the first repetition to the moment the last outcome was there;
//! - physics: nothing is faster, by more than noise, than the fastest that the run has seen of the device;
//! - the caches: work that is timed against the memory must go through more of it than the last cache holds;
//! - the spread: quartiles that lie too far apart mean that something else ran.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::interrupt;
use super::machine::Seen;
use super::place::Bed;
use super::results::{Figure, Floor, Spread};
use crate::backend::profile::Kind;
use crate::error::Result;

/// A device as the harness sees it.
pub trait Ground: Sync {
    /// Seconds since some moment.
    fn now(&self) -> f64;
    /// Waits until everything that was queued is done.
    ///
    /// # Errors
    /// A device that failed.
    fn wait(&self) -> Result<()>;
    /// Does nothing for so many seconds.
    fn pause(&self, seconds: f64);
    /// Bytes of its last cache.
    fn cache_bytes(&self) -> usize;
    /// Seconds of a span that is long beside a wait and a look at the clock.
    fn least_span(&self) -> f64;
    /// Why no time taken here is to be quoted.
    fn refusal(&self) -> Option<String>;
    /// Looks at the device's clocks, behind work of it.
    fn look_at_clocks(&self) {}
    /// Whether nothing more is to be timed, since somebody asked for the end.
    fn is_over(&self) -> bool {
        false
    }
}

/// Work that is repeated.
pub trait Task {
    /// Queues a repetition, on the next of its sets of memory.
    ///
    /// # Errors
    /// A device that failed.
    fn run(&mut self) -> Result<()>;

    /// Takes over what the task itself has to wait for, such as the reports of steps in flight.
    ///
    /// # Errors
    /// A device that failed.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }

    /// Sets of memory that repetitions take in turn.
    fn sets(&self) -> usize {
        1
    }

    /// Repetitions of a span, at least: where some lie ready before they are asked for, several times as many.
    fn least_runs(&self) -> usize {
        1
    }

    /// Whether it is the device that works, whose clocks are then worth a look.
    fn is_on_device(&self) -> bool {
        true
    }

    /// Bytes that a round through all sets touches.
    fn round_bytes(&self) -> usize;

    /// Makes the outcome of the next repetition wrong unless that is done, and finds out what it should be.
    ///
    /// # Errors
    /// A device that failed.
    fn prepare(&mut self) -> Result<()>;

    /// What is wrong with the outcome of the repetition that followed [`Task::prepare`]; nothing where it is as it should be.
    ///
    /// # Errors
    /// A device that failed.
    fn verify(&mut self) -> Result<Option<String>>;
}

/// The clock, and the device behind a backend.
pub struct Here<'a, B> {
    backend: &'a B,
    began: Instant,
    seen: Mutex<Seen>,
}

impl<'a, B: Bed> Here<'a, B> {
    /// Starts the clock.
    pub fn new(backend: &'a B) -> Self {
        Self::since(backend, Instant::now())
    }

    /// With a clock that was started before.
    pub fn since(backend: &'a B, began: Instant) -> Self {
        Here { backend, began, seen: Mutex::default() }
    }

    /// What was seen of the clocks behind all that was timed so far.
    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl<B: Bed> Ground for Here<'_, B> {
    fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    fn wait(&self) -> Result<()> {
        self.backend.wait()
    }

    fn pause(&self, seconds: f64) {
        std::thread::sleep(Duration::from_secs_f64(seconds));
    }

    fn cache_bytes(&self) -> usize {
        self.backend.cache_bytes()
    }

    fn least_span(&self) -> f64 {
        match self.backend.kind() {
            Kind::Host => 50e-6,
            Kind::Gpu => 2e-3,
            Kind::Emulated => 0.0,
        }
    }

    fn refusal(&self) -> Option<String> {
        (self.backend.kind() == Kind::Emulated)
            .then(|| "emulated device: its times say nothing of any device".to_owned())
    }

    fn look_at_clocks(&self) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).look(self.backend);
    }

    fn is_over(&self) -> bool {
        interrupt::caught().is_some()
    }
}

/// How long, and how strictly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Seconds of a figure.
    pub seconds: f64,
    /// How often a figure is taken at most, where its spread is too wide.
    pub tries: usize,
    /// The widest distance of the quartiles, over the median.
    pub widest: f64,
    /// When the clock shows this, figures are taken once, whatever their spread.
    pub impatient_after: Option<f64>,
}

impl Settings {
    /// The usual strictness.
    pub fn new(seconds: f64) -> Self {
        Settings { seconds, tries: 3, widest: 0.2, impatient_after: None }
    }
}

/// Repetitions that a figure has at least.
const LEAST_COUNT: usize = 5;
/// How much faster than what bounds it a figure may be: that is measured too.
const NOISE: f64 = 0.1;
/// The share of the wall's time that may be missing from the sum of single times.
const MISSING: f64 = 0.2;

/// Seconds of it that may be missing besides: somebody else may have had the processor between two spans.
const MISSING_SECONDS: f64 = 0.02;

/// A limit that a figure is held to.
#[derive(Clone, Debug, PartialEq)]
pub struct Limit {
    /// What is shown. A figure that is faster by more than noise is refused, since then it is no floor.
    pub floor: Floor,
    /// By how much the floor may be passed all the same: 1 but where fewer operations than are counted can do.
    pub passable: f64,
    /// Seconds that nothing can be faster than: by the fastest that this run has seen of the device.
    pub least: f64,
    /// Whether the floor is one of memory, so that caches would falsify the figure.
    pub from_memory: bool,
}

/// Spans of one repetition whose fastest tells how many make a span that is long enough, and seconds after which no other of these
/// is begun: some of the first are slow, for caches, clocks and threads that slept.
const SINGLE_SPANS: usize = 5;
const SINGLE_SECONDS: f64 = 0.1;

/// Spans of a task, each with its wait, for about so many seconds and once at least, after a warm-up of a tenth of that: seconds a
/// repetition. The fastest repetition of the warm-up tells how many make a span, as it does for peers (`benches/peers/common.py`).
///
/// # Errors
/// What the task reports.
pub fn spans(ground: &dyn Ground, task: &mut dyn Task, seconds: f64) -> Result<Vec<f64>> {
    let (mut one, mut done, began) = (f64::INFINITY, 0, ground.now());
    let least = |done| (seconds / 10.0).max(if done < SINGLE_SPANS { SINGLE_SECONDS } else { 0.0 });
    while done == 0 || ground.now() - began < least(done) {
        one = one.min(span(ground, task, 1)?);
        done += 1;
    }
    let (runs, began) = (runs(ground, task, one), ground.now());
    let mut times = vec![span(ground, task, runs)?];
    while ground.now() - began < seconds {
        times.push(span(ground, task, runs)?);
    }
    Ok(times)
}

/// Seconds a repetition over so many, with the wait for their end.
fn span(ground: &dyn Ground, task: &mut dyn Task, runs: usize) -> Result<f64> {
    let began = ground.now();
    for _ in 0..runs {
        task.run()?;
    }
    task.finish()?;
    ground.wait()?;
    Ok((ground.now() - began) / runs as f64)
}

/// Repetitions of a span.
fn runs(ground: &dyn Ground, task: &dyn Task, one: f64) -> usize {
    let most = 10_000.0;
    let enough = if one > 0.0 { (ground.least_span() / one).ceil().clamp(1.0, most) as usize } else { 1 };
    enough.max(task.least_runs())
}

/// Median, quartiles, fastest.
pub fn spread(times: &[f64]) -> Spread {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let place = share * sorted.len().saturating_sub(1) as f64;
        let (low, part) = (place.floor() as usize, place.fract());
        match (sorted.get(low), sorted.get(low + 1)) {
            (Some(&low), Some(&high)) => low + part * (high - low),
            (Some(&low), None) => low,
            (None, _) => f64::NAN,
        }
    };
    Spread { count: times.len(), min: at(0.0), lower_quartile: at(0.25), median: at(0.5), upper_quartile: at(0.75) }
}

/// The distance of the quartiles over the median.
pub fn width(spread: &Spread) -> f64 {
    (spread.upper_quartile - spread.lower_quartile) / spread.median
}

/// What a figure is about, before it is taken: its suite and name, its amount, bytes, operations.
pub struct Asked<'a> {
    /// The figure with all but its times.
    pub figure: Figure,
    /// The limit, from the spread of what was timed beside it.
    pub limit: &'a dyn Fn(Option<&Spread>) -> Option<Limit>,
}

/// One try.
struct Taken {
    times: Spread,
    beside: Option<Spread>,
    refused: Option<String>,
}

/// Times a task, in turn with another that gives it a measure (a pass through memory) where there is one. Where the ground says
/// meanwhile that it is over, what was timed until then is given, which nobody is to quote.
///
/// # Errors
/// What the tasks report.
pub fn measure(
    ground: &dyn Ground,
    settings: &Settings,
    task: &mut dyn Task,
    mut beside: Option<&mut (dyn Task + '_)>,
    asked: Asked<'_>,
) -> Result<Figure> {
    // A first look, while nothing else is queued, so that no time is spent on what is wrong.
    let began = ground.now();
    task.prepare()?;
    let first = span(ground, task, 1)?;
    if let Some(refused) = outcome(ground, task, began)? {
        return Ok(Figure { seconds: spread(&[first]), refused: Some(refused), ..asked.figure });
    }
    warm_up(ground, settings, task)?;
    if let Some(beside) = beside.as_deref_mut() {
        beside.prepare()?;
        span(ground, beside, 1)?;
        if let Some(wrong) = beside.verify()? {
            let refused = Some(format!("what it is measured against is wrong: {wrong}"));
            return Ok(Figure { seconds: spread(&[first]), refused, ..asked.figure });
        }
        warm_up(ground, settings, beside)?;
    }
    let mut best: Option<Taken> = None;
    for _ in 0..settings.tries.max(1) {
        let taken = take(ground, settings, task, beside.as_deref_mut())?;
        let narrow = width(&taken.times) <= settings.widest;
        let over = taken.refused.is_some() || narrow;
        if over || best.as_ref().is_none_or(|best| width(&taken.times) < width(&best.times)) {
            best = Some(taken);
        }
        if over || ground.is_over() || settings.impatient_after.is_some_and(|after| ground.now() > after) {
            break;
        }
    }
    let Some(Taken { times, beside, refused }) = best else { return Ok(asked.figure) };
    let limit = (asked.limit)(beside.as_ref());
    let disturbed = beside.filter(|beside| width(beside) > settings.widest);
    let refused = refused
        .or_else(|| ground.refusal())
        .or_else(|| {
            let width = width(&disturbed?);
            Some(format!(
                "spread too wide: that of the pass through memory beside it, {:.0} % of its median",
                100.0 * width
            ))
        })
        .or_else(|| limit.as_ref().and_then(|limit| impossible(ground, task, &times, limit)))
        .or_else(|| too_wide(&times, settings));
    Ok(Figure { seconds: times, floor: limit.map(|limit| limit.floor), refused, ..asked.figure })
}

/// Runs the task until its time no longer changes, or half of a figure's time is over.
fn warm_up(ground: &dyn Ground, settings: &Settings, task: &mut dyn Task) -> Result<()> {
    let began = ground.now();
    // The first run of a set loads kernels, the second is recorded.
    for _ in 0..2 * task.sets() {
        span(ground, task, 1)?;
    }
    let mut last = span(ground, task, 1)?;
    while ground.now() - began < settings.seconds / 2.0 && !ground.is_over() {
        let runs = runs(ground, task, last);
        let some = [span(ground, task, runs)?, span(ground, task, runs)?, span(ground, task, runs)?];
        let now = spread(&some).median;
        if (now / last - 1.0).abs() < 0.05 {
            break;
        }
        last = now;
    }
    Ok(())
}

fn take(
    ground: &dyn Ground,
    settings: &Settings,
    task: &mut dyn Task,
    mut beside: Option<&mut (dyn Task + '_)>,
) -> Result<Taken> {
    let first = span(ground, task, 1)?;
    let runs = runs(ground, task, first);
    let (mut times, mut others) = (Vec::new(), Vec::new());
    let began = ground.now();
    let mut told = 0.0;
    while (ground.now() - began < settings.seconds || times.len() < LEAST_COUNT)
        && (times.is_empty() || !ground.is_over())
    {
        if let Some(beside) = beside.as_deref_mut() {
            let other = span(ground, beside, 1)?;
            told += other;
            others.push(other);
        }
        let time = span(ground, task, runs)?;
        told += time * runs as f64;
        times.push(time);
    }
    if task.is_on_device() {
        ground.look_at_clocks();
    }
    let refused = if ground.is_over() { None } else { look(ground, task, began, told)? };
    Ok(Taken { times: spread(&times), beside: beside.map(|_| spread(&others)), refused })
}

/// Why the outcome of the repetition that was prepared is not what it should be.
fn outcome(ground: &dyn Ground, task: &mut dyn Task, began: f64) -> Result<Option<String>> {
    let Some(wrong) = task.verify()? else { return Ok(None) };
    // Work that is only late is there after as long again.
    ground.pause((ground.now() - began).clamp(0.01, 1.0));
    Ok(Some(match task.verify()? {
        None => "time without synchronization: the work was not done when its time was over".to_owned(),
        Some(_) => format!("wrong outcome, as if work were skipped: {wrong}"),
    }))
}

/// Looks at the outcome of one more repetition, and whether all work was done when its time was told to be over: why the
/// figure is refused, if it is.
fn look(ground: &dyn Ground, task: &mut dyn Task, began: f64, told: f64) -> Result<Option<String>> {
    task.prepare()?;
    let told = told + span(ground, task, 1)?;
    if let Some(refused) = outcome(ground, task, began)? {
        return Ok(Some(refused));
    }
    let seen = ground.now();
    // What looking takes where nothing has to be waited for.
    task.verify()?;
    task.prepare()?;
    let idle = ground.now() - seen;
    let wall = seen - began;
    let missing = wall - told - idle;
    if missing > MISSING * (told + idle) + idle + MISSING_SECONDS {
        return Ok(Some(format!(
            "time without synchronization: the single times add up to {told:.3} s, but their outcome took {:.3} s",
            wall - idle
        )));
    }
    Ok(None)
}

/// Why a time cannot be, by physics.
fn impossible(ground: &dyn Ground, task: &dyn Task, times: &Spread, limit: &Limit) -> Option<String> {
    let Limit { least, from_memory, .. } = *limit;
    let (bytes, cache) = (task.round_bytes(), ground.cache_bytes());
    if from_memory && bytes < 2 * cache {
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        return Some(format!(
            "cached: its buffers hold {:.1} MiB together, the caches {:.1} MiB; it was timed against the memory",
            mib(bytes),
            mib(cache)
        ));
    }
    if times.median < least * (1.0 - NOISE) {
        return Some(format!(
            "faster than physics: {:.3} us where {:.3} us is the least; work was skipped, or came out of a cache",
            times.median * 1e6,
            least * 1e6
        ));
    }
    let share = limit.floor.seconds / times.median;
    (share > (1.0 + NOISE) * limit.passable).then(|| {
        format!(
            "{:.0} % of its floor: what that is computed from was slower when it was measured, so it is no floor; take it again",
            100.0 * share
        )
    })
}

fn too_wide(times: &Spread, settings: &Settings) -> Option<String> {
    let width = width(times);
    // Written so that a width which is no number is refused.
    (width.is_nan() || width > settings.widest).then(|| {
        format!(
            "spread too wide: quartiles {:.0} % of the median apart, more than {:.0} %; close other programs, or give more --seconds",
            100.0 * width,
            100.0 * settings.widest
        )
    })
}
