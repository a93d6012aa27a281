//! A run of the benchmark: which figures, in which order, for how long.

use std::cell::Cell;
use std::time::Instant;

use super::machine::Watch;
use super::measure::{Ground, Here, Settings};
use super::place::{Bed, OnBed, Place, Precision};
use super::results::{Figure, Machine, Results};
use super::speeds::Speeds;
use super::{data, device, interrupt, kernel, step, unit, update};
use crate::backend::profile::Kind;
use crate::error::{Error, Result};

/// The suites, in the order in which they run.
pub const SUITES: [&str; 5] = ["device", "update", "kernel", "step", "data"];

/// The tour on a CPU: what a newcomer wants to see, in under two minutes. On a GPU the same names stand behind its precisions.
const TOUR: [&str; 31] = [
    "device/copy/*memory",
    "device/read/*memory",
    "device/write/memory",
    "device/copy/*L2",
    "device/product/128x784x256",
    "device/product/1024x1024x1024",
    "device/product/4096x4096x4096",
    "device/fork_join",
    "device/launch",
    "device/graph_replay",
    "device/host_to_device/pinned/256MiB",
    "update/sgd/",
    "update/momentum+global_norm/50M",
    "update/adamw+global_norm/50M",
    "update/momentum+global_norm/124M",
    "update/adamw+global_norm/124M",
    "kernel/linear_gelu",
    "kernel/conv",
    "kernel/layer_norm",
    "kernel/attention/12x64",
    "kernel/cross_entropy",
    "kernel/dropout",
    "kernel/gelu_tanh",
    "step/mlp",
    "step/cnn",
    "step/gpt_cpu",
    "step/audio_cnn",
    "step/gpt2/bf16",
    "data/feed/idx/1_thread",
    "data/feed/images/1_thread",
    "data/feed/tokens/1_thread",
];
/// Seconds of a figure of the tour.
const TOUR_SECONDS: f64 = 0.6;
/// Seconds of a figure that was asked for.
const USUAL_SECONDS: f64 = 3.0;
/// Seconds after which figures of the tour are taken once, whatever their spread.
const TOUR_IMPATIENT: f64 = 60.0;
/// Seconds after which nothing more of the tour is begun.
const TOUR_END: f64 = 105.0;
/// Seconds of a figure that tells the device's speed.
pub const SPEED_SECONDS: f64 = 0.5;

/// Which figures: a suite, and the beginning of names within it, where `*` stands for anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    suite: String,
    name: String,
}

impl Pattern {
    /// `update`, `update/adamw`, `kernel/*backward`.
    ///
    /// # Errors
    /// No such suite.
    pub fn parse(text: &str) -> Result<Self> {
        Self::among(&SUITES, text)
    }

    /// As [`Pattern::parse`], of figures of these suites.
    ///
    /// # Errors
    /// Another suite.
    pub fn among(suites: &[&str], text: &str) -> Result<Self> {
        let (suite, name) = text.split_once('/').unwrap_or((text, ""));
        if !suites.contains(&suite) {
            let known = suites.join(", ");
            let found = format!("found the suite {suite:?}, expected {known}, each alone or as SUITE/PATTERN");
            return Err(Error::config("bench", found));
        }
        Ok(Pattern { suite: suite.to_owned(), name: name.to_owned() })
    }

    /// Whether it means a figure.
    pub fn means(&self, suite: &str, name: &str) -> bool {
        let mut parts = self.name.split('*');
        let first = parts.next().unwrap_or("");
        let Some(mut rest) = name.strip_prefix(first) else { return false };
        for part in parts {
            let Some(at) = rest.find(part) else { return false };
            rest = &rest[at + part.len()..];
        }
        self.suite == suite
    }

    /// That it means none of so many processes.
    pub(crate) fn means_none(&self, processes: usize) -> Error {
        let Pattern { suite, name } = self;
        let lister = match processes {
            1 => format!("`warpstep bench --list {suite}`"),
            _ => format!("`bench --list {suite}`, started as {processes} processes,"),
        };
        let found = format!("found {suite}/{name}, which means no figure; {lister} names those of {suite}");
        Error::config("bench", found)
    }

    /// Whether it means a figure whose name begins so, or goes on behind it: `step/mlp/bf16` behind `mlp`.
    fn has_begun(&self, suite: &str, name: &str) -> bool {
        let goes_on = |rest: &str| rest.starts_with('/');
        self.means(suite, name) || (self.suite == suite && self.name.strip_prefix(name).is_some_and(goes_on))
    }
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which figures; the tour where there are none.
    pub patterns: Vec<Pattern>,
    /// The device.
    pub place: Place,
    /// The precisions; those that suit the request where there are none.
    pub precisions: Vec<Precision>,
    /// Seconds of a figure.
    pub seconds: Option<f64>,
    /// The arguments, for the results.
    pub command: String,
}

/// Somebody who is told what is found while it is.
pub trait Observer {
    /// The machine, and the precision of what follows.
    ///
    /// # Errors
    /// What the observer cannot write.
    fn begins(&mut self, machine: &Machine, speeds: &Speeds) -> Result<()>;

    /// A figure, and everything that was found so far, the figure included.
    ///
    /// # Errors
    /// What the observer cannot write.
    fn figure(&mut self, figure: &Figure, so_far: &Results) -> Result<()>;
}

impl Request {
    fn is_tour(&self) -> bool {
        self.patterns.is_empty()
    }

    fn patterns(&self) -> Vec<Pattern> {
        if !self.is_tour() {
            return self.patterns.clone();
        }
        let parts = TOUR.iter().filter_map(|text| text.split_once('/'));
        parts.map(|(suite, name)| Pattern { suite: suite.to_owned(), name: name.to_owned() }).collect()
    }

    /// The works that peers do too, of those that are asked for, as [`unit()`](unit::unit) takes them. Of updates, each pattern means
    /// one: the first of [`update::of_peers`] that it names.
    pub fn works(&self) -> Vec<String> {
        let patterns = self.patterns();
        let is_asked = |name: &str| match name {
            // Minutes on a CPU, and nobody's measure there.
            "gpt2" if self.place == Place::Cpu && self.is_tour() => false,
            _ => patterns.iter().any(|pattern| pattern.has_begun("step", name)),
        };
        let mut works: Vec<String> = unit::STEPS.into_iter().filter(|name| is_asked(name)).map(str::to_owned).collect();
        let updates = update::of_peers(self.place);
        for pattern in &patterns {
            // Of the tour, one.
            let few = if self.is_tour() { 1 } else { updates.len() };
            let update = updates[..few].iter().find(|update| pattern.has_begun("update", update));
            works.extend(update.map(|update| format!("update/{update}")).filter(|update| !works.contains(update)));
        }
        works
    }

    /// The patterns that mean no work that peers do.
    pub fn without_peers(&self) -> Vec<String> {
        let updates = update::of_peers(self.place);
        let has_work = |pattern: &&Pattern| {
            unit::STEPS.into_iter().any(|name| pattern.has_begun("step", name))
                || updates.iter().any(|update| pattern.has_begun("update", update))
        };
        let without = self.patterns.iter().filter(|pattern| !has_work(pattern));
        without.map(|Pattern { suite, name }| format!("{suite}/{name}").trim_end_matches('/').to_owned()).collect()
    }

    /// The precisions that figures are taken in.
    pub fn precisions(&self) -> Vec<Precision> {
        match self.place {
            _ if !self.precisions.is_empty() => self.precisions.clone(),
            Place::Cuda(_) if self.is_tour() => vec![Precision::Tf32, Precision::Bf16],
            place => place.precisions().to_vec(),
        }
    }

    fn settings(&self) -> Settings {
        let usual = if self.is_tour() { TOUR_SECONDS } else { USUAL_SECONDS };
        Settings::new(self.seconds.unwrap_or(usual))
    }
}

/// The names of the figures that are asked for, as `suite/name`.
///
/// # Errors
/// No such device, or patterns that mean nothing.
pub fn names(request: &Request) -> Result<Vec<String>> {
    Ok(named(request)?.into_iter().flat_map(|(_, names)| names).collect())
}

/// The names of the figures that are asked for, by the precision that they are taken in.
fn named(request: &Request) -> Result<Vec<(Precision, Vec<String>)>> {
    let mut all = Vec::new();
    for (number, precision) in request.precisions().into_iter().enumerate() {
        all.push((precision, request.place.open(precision, Listing { request, precision, first: number == 0 })?));
    }
    let patterns = request.patterns();
    let unmet = |pattern: &&Pattern| {
        let mut names = all.iter().flat_map(|(_, names): &(Precision, Vec<String>)| names);
        !names.any(|name| name.split_once('/').is_some_and(|(suite, name)| pattern.means(suite, name)))
    };
    // The tour names what devices of either kind have.
    if let Some(pattern) = patterns.iter().find(unmet).filter(|_| !request.is_tour()) {
        return Err(pattern.means_none(1));
    }
    let meant = |name: &String| {
        let (suite, name) = name.split_once('/').unwrap_or((name, ""));
        patterns.iter().any(|pattern| pattern.means(suite, name))
    };
    Ok(all.into_iter().map(|(precision, names)| (precision, names.into_iter().filter(meant).collect())).collect())
}

struct Listing<'a> {
    request: &'a Request,
    precision: Precision,
    first: bool,
}

impl OnBed for Listing<'_> {
    type Given = Vec<String>;

    fn on<B: Bed>(self, backend: &B) -> Result<Vec<String>> {
        let found = std::cell::RefCell::new(Vec::new());
        for suite in SUITES {
            let note = |name: &str| {
                if self.first || is_of(name, self.precision) {
                    found.borrow_mut().push(format!("{suite}/{name}"));
                }
                false
            };
            // Nothing is timed, so no speed is looked at.
            let speeds = Speeds::unknown(self.precision);
            let ground = Here::new(backend);
            figures(suite, backend, &ground, &self.request.settings(), &speeds, &note, &mut |_| Ok(()))?;
        }
        Ok(found.into_inner())
    }
}

/// Whether a figure is one of this precision, rather than of the device whichever it is.
fn is_of(name: &str, precision: Precision) -> bool {
    name.split('/')
        .any(|part| part.strip_prefix(precision.name()).is_some_and(|rest| rest.is_empty() || rest == "_alone"))
}

/// The figures of a suite that are wanted.
fn figures<B: Bed>(
    suite: &str,
    backend: &B,
    ground: &dyn Ground,
    settings: &Settings,
    speeds: &Speeds,
    wanted: &dyn Fn(&str) -> bool,
    told: &mut dyn FnMut(Figure) -> Result<()>,
) -> Result<()> {
    let share = if backend.kind() == Kind::Emulated { 0.0 } else { 1.0 };
    match suite {
        "device" => device::figures(backend, ground, settings, speeds, wanted, told),
        "update" => update::figures(backend, ground, settings, speeds, wanted, told),
        "kernel" => kernel::figures(backend, ground, settings, speeds, wanted, told),
        "step" => step::figures(backend, ground, settings, speeds, wanted, told),
        _ => data::figures(ground, settings, share, wanted, told),
    }
}

/// Takes the figures that are asked for. Behind a signal ([`interrupt`]) none is begun any more, and what was found is given.
///
/// # Errors
/// No such device, or one that failed; patterns that mean nothing; what the observer reports.
pub fn run(request: &Request, observer: &mut (dyn Observer + Send)) -> Result<Results> {
    let mut precisions: Vec<(usize, Precision)> = request.precisions().into_iter().enumerate().collect();
    if !request.is_tour() {
        // Patterns that mean nothing are refused before minutes are spent, and no precision is opened for nothing.
        let named = named(request)?;
        precisions.retain(|(number, _)| !named[*number].1.is_empty());
    }
    let mut results = Results::begin(request.command.clone());
    let began = Instant::now();
    for (place, (number, precision)) in precisions.into_iter().enumerate() {
        if interrupt::caught().is_some() {
            break;
        }
        let first = number == 0;
        let part = Running { request, precision, first, began, results: &mut results, observer: &mut *observer };
        let machine = request.place.open(precision, part)?;
        if place == 0 {
            let limits = std::mem::take(&mut results.machine.limits);
            results.machine = Machine { limits, ..machine };
            continue;
        }
        for note in machine.notes {
            if !results.machine.notes.contains(&note) {
                results.machine.notes.push(note);
            }
        }
    }
    Ok(results)
}

/// The figures of one precision. It gives what the machine was meanwhile.
struct Running<'a> {
    request: &'a Request,
    precision: Precision,
    first: bool,
    began: Instant,
    /// What was found so far, to which its figures are added.
    results: &'a mut Results,
    observer: &'a mut (dyn Observer + Send),
}

impl OnBed for Running<'_> {
    type Given = Machine;

    fn on<B: Bed>(self, backend: &B) -> Result<Self::Given> {
        // Within the pool, as the trainer runs its steps: no thread has to be woken to begin.
        rayon::scope(|_| self.take(backend))
    }
}

impl Running<'_> {
    fn take<B: Bed>(self, backend: &B) -> Result<Machine> {
        let Running { request, precision, first, began, results, observer } = self;
        let watch = Watch::begin(backend);
        let ground = Here::since(backend, began);
        let mut settings = request.settings();
        if request.is_tour() {
            settings.impatient_after = Some(TOUR_IMPATIENT);
        }
        let seconds = settings.seconds.min(SPEED_SECONDS);
        let brief = Settings { seconds, ..settings };
        let speeds = Speeds::measure(backend, &ground, &brief, precision)?;
        if interrupt::caught().is_some() {
            return Ok(watch.end(backend, &ground.seen()));
        }
        observer.begins(watch.so_far(), &speeds)?;
        if results.figures.is_empty() {
            results.machine = watch.so_far().clone();
        }
        results.machine.limits.push(speeds.limits());
        let before = results.figures.len();
        let patterns = request.patterns();
        let left_out = Cell::new(0);
        for suite in SUITES {
            let wanted = |name: &str| {
                let meant =
                    (first || is_of(name, precision)) && patterns.iter().any(|pattern| pattern.means(suite, name));
                let late = request.is_tour() && ground.now() > TOUR_END;
                left_out.set(left_out.get() + u32::from(meant && late));
                meant && !late && interrupt::caught().is_none()
            };
            let mut told = |figure: Figure| {
                // What a signal cut short is no figure.
                if interrupt::caught().is_some() {
                    return Ok(());
                }
                results.figures.push(figure.clone());
                observer.figure(&figure, results)
            };
            figures(suite, backend, &ground, &settings, &speeds, &wanted, &mut told)?;
        }
        let with_floors = results.figures[before..].iter().any(|figure| figure.floor.is_some());
        let is_worth_it = with_floors && ground.refusal().is_none() && interrupt::caught().is_none();
        let drift =
            if is_worth_it { speeds.drift(backend, &ground, &Settings { tries: 1, ..brief })? } else { Vec::new() };
        let mut machine = watch.end(backend, &ground.seen());
        machine.notes.extend(drift);
        if left_out.get() > 0 {
            machine.notes.push(format!(
                "{TOUR_END} s were over before the tour was: figures were left out; `warpstep bench SUITE` takes all of a suite"
            ));
        }
        Ok(machine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_the_beginning_of_a_name_and_a_star_is_anything() {
        let means = |pattern: &str, suite: &str, name: &str| Pattern::parse(pattern).unwrap().means(suite, name);
        assert!(means("step", "step", "audio_cnn"));
        assert!(means("step/cnn", "step", "cnn/bf16") && !means("step/cnn", "step", "audio_cnn"));
        assert!(means("kernel/*backward", "kernel", "linear/128x784x256/backward/f32"));
        assert!(means("update/adamw*124M", "update", "adamw+global_norm/124M/f32"));
        assert!(!means("update/adamw*124M", "update", "adamw+global_norm/50M/f32"));
        assert!(!means("update/adamw", "kernel", "adamw"));
        assert!(Pattern::parse("stop/mlp").is_err());
    }

    #[test]
    fn the_works_of_a_request_are_those_that_its_patterns_mean() {
        for (patterns, place, expected) in [
            (vec![], Place::Cpu, 5),
            (vec!["step", "update"], Place::Cuda(1), 7),
            (vec!["step/mlp/bf16", "update"], Place::Cuda(0), 2),
            (vec!["data"], Place::Cpu, 0),
        ] {
            let patterns = patterns.into_iter().map(|text| Pattern::parse(text).unwrap()).collect();
            let request = Request { patterns, place, precisions: Vec::new(), seconds: None, command: String::new() };
            assert_eq!(request.works().len(), expected, "{request:?}");
        }
    }

    #[test]
    fn the_tour_names_figures_of_every_suite() {
        for suite in SUITES {
            assert!(TOUR.iter().any(|name| name.starts_with(suite)), "{suite}");
        }
        assert!(TOUR.iter().all(|name| Pattern::parse(name).is_ok()));
    }
}
