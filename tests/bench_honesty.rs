//! The benchmark's harness catches work that is skipped, buffers that a cache holds, and times that do not wait for the work.
//!
//! It is tried on a device that is made up, whose clock moves as the work says: memory is slow, its cache fast, and what is queued
//! takes its time. And every real task is asked whether it notices that its work was not done.

use std::sync::{Mutex, MutexGuard};

use warpstep::Result;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::profile::{Kind, Traffic};
use warpstep::bench::device::{ProductTask, TrafficTask};
use warpstep::bench::kernel::{KernelTask, Way};
use warpstep::bench::layers::cases;
use warpstep::bench::measure::{Asked, Ground, Limit, Settings, Task, measure, spans};
use warpstep::bench::place::{Place, Precision};
use warpstep::bench::results::{Figure, Floor};
use warpstep::bench::step::StepTask;
use warpstep::bench::unit::unit;
use warpstep::bench::update::UpdateTask;
use warpstep::bench::works::{Updating, training};

/// Bytes that the cache holds.
const CACHE: usize = 1 << 20;
/// Bytes of each buffer.
const BUFFER: usize = 1 << 18;
/// Bytes a second out of memory, and out of the cache.
const SPEEDS: [f64; 2] = [1e9, 1e10];

/// A device that is made up.
#[derive(Default)]
struct State {
    now: f64,
    /// When what was queued is done, on the stream that waits are for and on another.
    free_at: [f64; 2],
    /// Buffers in the cache, the oldest first.
    cache: Vec<usize>,
    /// When each buffer's outcome will be there: never, where nothing was queued.
    there_at: Vec<f64>,
    runs: u64,
    waits: u64,
    least_span: f64,
}

#[derive(Default)]
struct MadeUp(Mutex<State>);

impl MadeUp {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl Ground for MadeUp {
    fn now(&self) -> f64 {
        let mut state = self.state();
        state.now += 1e-8;
        state.now
    }
    fn wait(&self) -> Result<()> {
        let mut state = self.state();
        state.now = state.now.max(state.free_at[0]);
        state.waits += 1;
        Ok(())
    }
    fn pause(&self, seconds: f64) {
        self.state().now += seconds;
    }
    fn cache_bytes(&self) -> usize {
        CACHE
    }
    fn least_span(&self) -> f64 {
        self.state().least_span
    }
    fn refusal(&self) -> Option<String> {
        None
    }
}

/// What is wrong with a task.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Returns at once, always.
    Skips,
    /// Works while it is warmed up, and then has its result already.
    SkipsLater,
    /// Uses another stream than the one that is waited for. Whoever reads its outcome sees what is there.
    NotWaitedFor,
    /// The same, but whoever reads its outcome waits for it.
    NotWaitedForButRead,
    /// Says that it takes sets in turn, and takes the first.
    OneSet,
    /// Takes twice as long every second time.
    Unsteady,
    /// Takes twenty times as long at first, and every seventh time.
    Cold,
    /// Takes a quarter of a second.
    Long,
    /// Has four of five done before they are asked for.
    ReadAhead,
}

/// Reads a buffer after the other.
struct Reading<'a> {
    device: &'a MadeUp,
    sets: usize,
    next: usize,
    fault: Fault,
}

impl<'a> Reading<'a> {
    fn new(device: &'a MadeUp, sets: usize, fault: Fault) -> Self {
        device.state().there_at = vec![f64::INFINITY; sets];
        Reading { device, sets, next: 0, fault }
    }
}

impl Task for Reading<'_> {
    fn run(&mut self) -> Result<()> {
        let mut state = self.device.state();
        state.runs += 1;
        let set = self.next;
        self.next = (self.next + 1) % self.sets;
        let (skips, runs) = (self.fault, state.runs);
        if skips == Fault::Skips || (skips == Fault::SkipsLater && runs > 100) {
            state.now += 1e-7;
            return Ok(());
        }
        let buffer = if self.fault == Fault::OneSet { 0 } else { set };
        let cached = state.cache.contains(&buffer);
        state.cache.retain(|&other| other != buffer);
        state.cache.push(buffer);
        if state.cache.len() * BUFFER > CACHE {
            state.cache.remove(0);
        }
        let unsteady = match self.fault {
            Fault::Unsteady if runs % 2 == 0 => 2.0,
            Fault::Cold if runs % 7 == 1 => 20.0,
            Fault::Long => 1000.0,
            Fault::ReadAhead if runs % 5 != 0 => 0.9,
            Fault::ReadAhead => 5.0,
            _ => 1.0,
        };
        // A little uneven, as all times are.
        let uneven = 1.0 + 0.02 * (runs % 5) as f64;
        let takes = BUFFER as f64 / SPEEDS[usize::from(cached)] * unsteady * uneven;
        let stream = usize::from(matches!(self.fault, Fault::NotWaitedFor | Fault::NotWaitedForButRead));
        state.now += 1e-7;
        state.free_at[stream] = state.free_at[stream].max(state.now) + takes;
        state.there_at[set] = state.free_at[stream];
        Ok(())
    }

    fn sets(&self) -> usize {
        self.sets
    }

    fn least_runs(&self) -> usize {
        if self.fault == Fault::ReadAhead { 20 } else { 1 }
    }

    fn round_bytes(&self) -> usize {
        self.sets * BUFFER
    }

    fn prepare(&mut self) -> Result<()> {
        self.device.state().there_at[self.next] = f64::INFINITY;
        Ok(())
    }

    fn verify(&mut self) -> Result<Option<String>> {
        let mut state = self.device.state();
        let there_at = state.there_at[(self.next + self.sets - 1) % self.sets];
        if self.fault == Fault::NotWaitedForButRead && there_at.is_finite() {
            state.now = state.now.max(there_at);
        }
        Ok((state.now < there_at).then(|| "the buffer was not read".to_owned()))
    }
}

/// Sets that together are far more than the cache holds.
const MANY: usize = 16;

fn figure(sets: usize, fault: Fault) -> Figure {
    against(sets, fault, 1.0, 1.0)
}

/// Beside a floor of so many times the seconds that its bytes take, which may be passed by so much.
fn against(sets: usize, fault: Fault, times: f64, passable: f64) -> Figure {
    let device = MadeUp::default();
    let mut task = Reading::new(&device, sets, fault);
    let seconds = BUFFER as f64 / SPEEDS[0];
    let limit = |_: Option<&_>| {
        let what = "its bytes at the speed of the memory".into();
        let floor = Floor { seconds: times * seconds, what, doubt: None };
        Some(Limit { floor, passable, least: seconds, from_memory: true })
    };
    let figure = Figure { suite: "kernel".into(), name: format!("{fault:?}"), ..Figure::default() };
    measure(&device, &Settings::new(0.1), &mut task, None, Asked { figure, limit: &limit }).unwrap()
}

/// Why it was refused.
fn refusal(sets: usize, fault: Fault) -> String {
    figure(sets, fault).refused.unwrap_or_else(|| panic!("{fault:?} was not noticed"))
}

#[test]
fn honest_work_gives_a_figure() {
    let figure = figure(MANY, Fault::None);
    assert_eq!(figure.refused, None);
    let expected = BUFFER as f64 / SPEEDS[0];
    assert!((figure.seconds.median / expected - 1.04).abs() < 0.01, "{:?}", figure.seconds);
    assert!(figure.seconds.count > 100);
}

#[test]
fn work_that_is_skipped_is_refused() {
    for fault in [Fault::Skips, Fault::SkipsLater] {
        let why = refusal(MANY, fault);
        assert!(why.starts_with("wrong outcome, as if work were skipped"), "{fault:?}: {why}");
    }
}

#[test]
fn a_buffer_that_the_cache_holds_is_refused() {
    let why = refusal(1, Fault::None);
    assert!(why.starts_with("cached: its buffers hold 0.2 MiB together, the caches 1.0 MiB"), "{why}");
}

#[test]
fn a_task_that_only_says_that_it_rotates_its_buffers_is_refused() {
    let why = refusal(MANY, Fault::OneSet);
    assert!(why.starts_with("faster than physics") && why.contains("cache"), "{why}");
}

#[test]
fn a_figure_that_is_faster_than_the_floor_that_is_shown_is_refused() {
    let why = against(MANY, Fault::None, 1.3, 1.0).refused.unwrap();
    assert!(why.starts_with("125 % of its floor: "), "{why}");
    assert_eq!(against(MANY, Fault::None, 1.1, 1.0).refused, None, "within the noise");
    assert_eq!(against(MANY, Fault::None, 2.0, 2.25).refused, None, "fewer operations than are counted");
}

#[test]
fn a_time_that_does_not_wait_for_the_work_is_refused() {
    let why = refusal(MANY, Fault::NotWaitedFor);
    assert_eq!(why, "time without synchronization: the work was not done when its time was over");
    let why = refusal(MANY, Fault::NotWaitedForButRead);
    assert!(why.starts_with("time without synchronization: the single times add up to"), "{why}");
}

#[test]
fn times_that_are_too_far_apart_are_refused() {
    let why = refusal(MANY, Fault::Unsteady);
    assert!(why.starts_with("spread too wide"), "{why}");
}

#[test]
fn the_length_of_a_span_is_not_told_by_a_repetition_that_was_slow() {
    let device = MadeUp::default();
    let seconds = BUFFER as f64 / SPEEDS[0];
    device.state().least_span = 10.0 * seconds;
    // Too short for a warm-up by time, then long enough for one.
    for warmed_up in [0.0, 1.0] {
        let mut task = Reading::new(&device, MANY, Fault::Cold);
        {
            let mut state = device.state();
            (state.runs, state.waits) = (0, 0);
        }
        let times = spans(&device, &mut task, warmed_up).unwrap();
        let state = device.state();
        let single = state.waits - times.len() as u64;
        assert!(single >= 5, "{single} spans of one repetition");
        // Ten of the fastest.
        assert_eq!(state.runs - single, 10 * times.len() as u64, "{times:?}");
        // A repetition takes a millisecond in the mean.
        assert!(warmed_up == 0.0 || (single > 50 && times.len() > 50), "{single}, {times:?}");
    }
}

#[test]
fn a_span_is_longer_than_what_lies_ready_before_it_begins() {
    assert_eq!(figure(MANY, Fault::ReadAhead).refused, None);
    let device = MadeUp::default();
    let mut task = Reading::new(&device, MANY, Fault::ReadAhead);
    let times = spans(&device, &mut task, 0.1).unwrap();
    let [fastest, slowest] = [f64::min, f64::max].map(|of| times.iter().copied().reduce(of).unwrap());
    assert!(slowest < 1.1 * fastest, "{fastest} to {slowest}");
}

#[test]
fn a_repetition_that_is_long_is_not_taken_several_times_to_warm_up() {
    let device = MadeUp::default();
    let mut task = Reading::new(&device, MANY, Fault::Long);
    assert_eq!(spans(&device, &mut task, 0.0).unwrap().len(), 1);
    let state = device.state();
    assert_eq!((state.runs, state.waits), (2, 2));
}

/// A task whose work is not done must say so, and one whose work is done must not.
fn notices(name: &str, task: &mut dyn Task) {
    for _ in 0..2 {
        task.prepare().unwrap();
        let found = task.verify().unwrap();
        assert!(found.is_some(), "{name} does not notice that nothing was done");
        task.prepare().unwrap();
        task.run().unwrap();
        task.finish().unwrap();
        assert_eq!(task.verify().unwrap(), None, "{name}");
    }
}

#[test]
fn traffic_and_products_notice_that_nothing_was_done() {
    let cpu = Cpu::<f32>::new();
    for traffic in [Traffic::Copy, Traffic::Read, Traffic::Write] {
        notices(&format!("{traffic:?}"), &mut TrafficTask::within(&cpu, traffic, 1 << 16).unwrap());
    }
    notices("product", &mut ProductTask::new(&cpu, [33, 65, 17]).unwrap());
}

#[test]
fn updates_notice_that_nothing_was_done() {
    let cpu = Cpu::<f32>::new();
    for (rule, clip) in [
        ("momentum", "global_norm"),
        ("adamw", "tensor_norm"),
        ("lamb", "global_norm"),
        ("lion", "adaptive"),
        ("muon", "none"),
    ] {
        let work = Updating::new(rule, clip, 90_000, false).unwrap();
        notices(&format!("{rule}+{clip}"), &mut UpdateTask::new(&cpu, &work).unwrap());
    }
}

#[test]
fn operations_notice_that_nothing_was_done() {
    let cpu = Cpu::<f32>::new();
    // The small shapes.
    for case in cases(Kind::Emulated) {
        let mut task = KernelTask::new(&cpu, &case).unwrap();
        for way in [Way::Forward, Way::Backward] {
            let goes = task.go(way).unwrap();
            assert_eq!(
                goes,
                way == Way::Forward || case.has_backward(),
                "{}, {way:?}: what is listed is what runs",
                case.name
            );
            if goes {
                notices(&format!("{}, {way:?}", case.name), &mut task);
                // As the harness leaves it: what was looked at is wrong, and the other way must not suffer.
                task.prepare().unwrap();
            }
        }
    }
}

#[test]
fn steps_notice_that_nothing_was_done() {
    let cpu = Cpu::<f32>::new();
    let work = training(&cpu, "mlp").unwrap();
    notices("mlp", &mut StepTask::new(&cpu, &work).unwrap());
}

#[test]
fn a_unit_is_the_work_that_its_name_says_and_its_outcome_is_right() {
    let mut unit = unit("mlp", Place::Cpu, Precision::F32).unwrap();
    let work = unit.work();
    assert_eq!((work.name.as_str(), work.inputs.as_slice(), work.parameters), ("mlp", &[128, 784][..], 235_146));
    assert_eq!((work.update.as_str(), work.precision.as_str()), ("momentum+global_norm", "f32"));
    let times = unit.run_for(0.0).unwrap();
    assert!(!times.is_empty() && times.iter().all(|&seconds| seconds > 0.0));
    assert_eq!(unit.verify().unwrap(), None);
}
