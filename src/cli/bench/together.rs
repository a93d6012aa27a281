//! `warpstep bench`, started as several processes: their sums by size, and whole steps that they make together.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use super::{Options, Printer, command, place, precisions, set_threads};
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Cuda, Device, DeviceOptions, device_count};
use crate::backend::profile::Kind;
use crate::bench::machine::{Seen, Watch};
use crate::bench::measure::{Here, Settings};
use crate::bench::output::{Output, try_beside};
use crate::bench::place::{Bed, Place, Precision};
use crate::bench::results::{Figure, Results};
use crate::bench::run::{Pattern, SPEED_SECONDS};
use crate::bench::speeds::Speeds;
use crate::bench::works::MODELS;
use crate::bench::{all_reduce, report, step, table, together};
use crate::cli::assemble::Opened;
use crate::cli::team::{Team, Vigil, said_once};
use crate::config::DeviceChoice;
use crate::error::{Error, Result};
use crate::parallel::watch::TIMEOUT;
use crate::parallel::world::World;
use crate::parallel::{Collective, agree};

/// The suites of several processes.
const SUITES: [&str; 2] = [all_reduce::SUITE, step::SUITE];
/// Steps that are taken where nothing is asked for: each as small as tells something.
const TOUR: [&str; 3] = ["mlp", "gpt_cpu", "gpt2"];
/// Seconds of a figure where not given.
const SECONDS: f64 = 1.0;

/// What is asked of all processes alike.
struct Asked {
    device: DeviceChoice,
    place: Place,
    precision: Precision,
    /// Names of figures by their suites.
    names: Vec<(&'static str, String)>,
}

/// Runs it in one of the processes. The first prints.
pub(super) fn run(options: &Options, world: &World) -> anyhow::Result<ExitCode> {
    let asked = asked(options, world.size).map_err(|error| said_once(world, error))?;
    if options.list {
        let mut out = std::io::stdout().lock();
        for (suite, name) in asked.names.iter().filter(|_| world.rank == 0) {
            writeln!(out, "{suite}/{name}")?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    set_threads(options)?;
    let device = match asked.place {
        Place::Cpu => Opened::Cpu(Cpu::new()),
        Place::Cuda(ordinal) => {
            // Each its own, but where each sees no other, and where the device bears a number.
            let own = !matches!(asked.device, DeviceChoice::Cuda(Some(_))) && device_count() > 1;
            let ordinal = if own { world.local_rank } else { ordinal };
            let tf32 = asked.precision == Precision::Tf32;
            let device = Device::open(DeviceOptions { ordinal, tf32, ..DeviceOptions::default() })?;
            match asked.precision {
                Precision::F32 | Precision::Tf32 => Opened::Cuda(Cuda::new(device)),
                Precision::Bf16 => Opened::CudaBf16(Cuda::new(device)),
                Precision::F16 => Opened::CudaF16(Cuda::new(device)),
            }
        }
    };
    let log = std::env::temp_dir().join(format!("warpstep-bench-rank-{}.log", world.rank));
    let team = Team::join(world, &device, Vigil { timeout: TIMEOUT, log })?;
    let collective = &team.collective;
    // Before minutes are spent: can all be written?
    let html = options.html.as_deref();
    let output = if world.rank == 0 {
        Output::open(options.json.as_deref()).and_then(|output| html.map_or(Ok(()), try_beside).map(|()| output))
    } else {
        Ok(Output::None)
    };
    let output = match agree(&**collective, output) {
        Ok(output) => output,
        Err(error) => {
            team.goodbye();
            return Err(error.into());
        }
    };
    // Where the table's reader is gone, the others are in the midst of their sums all the same.
    let printer = (world.rank == 0).then(|| Printer { writes: true, ..Printer::new(output, html) });
    let taking = Taking { collective, seconds: options.seconds.unwrap_or(SECONDS), asked, printer: printer.as_ref() };
    let found = match &device {
        Opened::Cpu(backend) => taking.figures(backend),
        Opened::Cuda(backend) => taking.figures(backend),
        Opened::CudaBf16(backend) => taking.figures(backend),
        Opened::CudaF16(backend) => taking.figures(backend),
    };
    let results = agree(&**collective, found);
    team.goodbye();
    let results = results?;
    if let Some(printer) = printer {
        printer.output.write(&results)?;
        printer.print(&table::foot(&results))?;
        html.map_or(Ok(()), |path: &Path| report::write(&results, path))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is asked for, where several processes can do all of it.
fn asked(options: &Options, processes: usize) -> Result<Asked> {
    if options.peers.are_asked_for() {
        let problem = format!("found it in {processes} processes, expected one: no peer is run in several");
        return Err(Error::config("--peers", problem));
    }
    let precisions = precisions(options)?;
    let device = options.device()?;
    let place = place(device)?;
    let (kind, precision) = match (place, precisions.as_slice()) {
        (Place::Cpu, [] | [Precision::F32]) => (Kind::Host, Precision::F32),
        (Place::Cpu, [other, ..]) => {
            let problem = format!("found {}, but the CPU computes in f32", other.name());
            return Err(Error::config("--precision", problem));
        }
        (Place::Cuda(_), []) => (Kind::Gpu, Precision::Bf16),
        (Place::Cuda(_), &[one]) => (Kind::Gpu, one),
        (Place::Cuda(_), several) => {
            let problem = format!("found {} of them, expected one where several processes train", several.len());
            return Err(Error::config("--precision", problem));
        }
    };
    let steps = MODELS.map(|model| (step::SUITE, together::name(model, kind, precision, processes)));
    let sums = all_reduce::sizes().map(|bytes| (all_reduce::SUITE, all_reduce::name(bytes, processes)));
    let mut names: Vec<(&'static str, String)> = sums.chain(steps).collect();
    let patterns = options.patterns.iter().map(|text| Pattern::among(&SUITES, text)).collect::<Result<Vec<_>>>()?;
    if let Some(pattern) = patterns.iter().find(|pattern| !names.iter().any(|(suite, name)| pattern.means(suite, name)))
    {
        return Err(pattern.means_none(processes));
    }
    if !patterns.is_empty() {
        names.retain(|(suite, name)| patterns.iter().any(|pattern| pattern.means(suite, name)));
    } else if !options.list {
        // Of the steps, those of a tour: a large model is no measure of processors.
        let tour = TOUR.into_iter().filter(|&model| kind != Kind::Host || model != "gpt2");
        let tour: Vec<String> = tour.map(|model| together::name(model, kind, precision, processes)).collect();
        names.retain(|(suite, name)| *suite != step::SUITE || tour.contains(name));
    }
    Ok(Asked { device, place, precision, names })
}

/// What one of the processes needs to take its figures.
struct Taking<'a> {
    collective: &'a Arc<dyn Collective>,
    seconds: f64,
    asked: Asked,
    /// Of the first process.
    printer: Option<&'a Printer>,
}

impl Taking<'_> {
    fn print(&self, text: &str) -> Result<()> {
        self.printer.map_or(Ok(()), |printer| printer.print(text))
    }

    fn is_asked(&self, suite: &str, name: &str) -> bool {
        self.asked.names.iter().any(|asked| asked.0 == suite && asked.1 == name)
    }

    fn figures<B: Bed + Backend<Real = f32>>(&self, backend: &B) -> Result<Results> {
        let Taking { collective, asked, .. } = self;
        let watch = Watch::begin(backend);
        let mut results = Results { machine: watch.so_far().clone(), ..Results::begin(command()) };
        self.print(&format!(
            "{} processes over {}, each on {}\n",
            collective.world(),
            collective.name(),
            Backend::description(backend),
        ))?;
        let asks_for = |suite: &str| asked.names.iter().any(|name| name.0 == suite);
        let mut unwritten = Ok(());
        let mut told = |figure: Figure| {
            let is_first = results.figures.last().is_none_or(|last: &Figure| last.suite != figure.suite);
            let heading = if is_first { table::suite(&figure.suite) } else { String::new() };
            let line = table::line(&figure);
            results.figures.push(figure);
            let written = self.print(&(heading + &line));
            let so_far = || self.printer.map_or(Ok(()), |printer| printer.output.write_so_far(&results));
            // The others go on to the next figure, and wait there for this process.
            if unwritten.is_ok() {
                unwritten = written.and_then(|()| so_far());
            }
            Ok(())
        };
        if asks_for(all_reduce::SUITE) {
            let wanted = |name: &str| self.is_asked(all_reduce::SUITE, name);
            all_reduce::all_reduce(backend, &***collective, self.seconds, &wanted, &mut told)?;
        }
        let (mut limits, mut heads) = (Vec::new(), Ok(()));
        if asks_for(step::SUITE) {
            let wanted = |name: &str| self.is_asked(step::SUITE, name);
            let settings = Settings::new(self.seconds);
            let brief = Settings { seconds: self.seconds.min(SPEED_SECONDS), ..settings };
            // What each can do while the others do the same.
            collective.barrier()?;
            let ground = Here::new(backend);
            let speeds = rayon::scope(|_| Speeds::measure(backend, &ground, &brief, asked.precision));
            let speeds = agree(&***collective, speeds)?;
            limits.push(speeds.limits());
            heads = self.print(&format!("\n{}", table::head(watch.so_far(), &speeds)));
            together::steps(backend, collective, &settings, &speeds, &wanted, &mut told)?;
        }
        heads.and(unwritten)?;
        results.machine = watch.end(backend, &Seen::default());
        results.machine.limits = limits;
        Ok(results)
    }
}
