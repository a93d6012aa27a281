//! `warpstep bench`, started as several processes: their sums by size.

use std::process::ExitCode;

use super::{Options, Printer, place, set_threads};
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Cuda, Device, DeviceOptions, device_count};
use crate::bench::all_reduce::{SUITE, all_reduce, name, sizes};
use crate::bench::machine::{Seen, Watch, date};
use crate::bench::output::Output;
use crate::bench::place::{Bed, Place};
use crate::bench::results::{FORMAT, Figure, Results};
use crate::bench::run::Pattern;
use crate::bench::table;
use crate::cli::assemble::Opened;
use crate::cli::team::{Team, Vigil, said_once};
use crate::error::{Error, Result};
use crate::parallel::watch::TIMEOUT;
use crate::parallel::world::World;
use crate::parallel::{Collective, agree};

/// Seconds of a figure where not given.
const SECONDS: f64 = 1.0;

/// Runs it in one of the processes. The first prints.
pub(super) fn run(options: &Options, world: &World) -> anyhow::Result<ExitCode> {
    let patterns = asked(options, world.size).map_err(|error| said_once(world, error))?;
    set_threads(options)?;
    let device = match place(&options.device)? {
        Place::Cpu => Opened::Cpu(Cpu::new()),
        Place::Cuda(ordinal) => {
            // Each its own, but where each sees no other, and where the device bears a number.
            let own = !options.device.starts_with("cuda:") && device_count() > 1;
            let ordinal = if own { world.local_rank } else { ordinal };
            Opened::Cuda(Cuda::new(Device::open(DeviceOptions { ordinal, ..DeviceOptions::default() })?))
        }
    };
    let log = std::env::temp_dir().join(format!("warpstep-bench-rank-{}.log", world.rank));
    let team = Team::join(world, &device, Vigil { timeout: TIMEOUT, log })?;
    let collective = &*team.collective;
    // Before minutes are spent: can it be written?
    let output = if world.rank == 0 { Output::open(options.json.as_deref()) } else { Ok(Output::None) };
    let output = match agree(collective, output) {
        Ok(output) => output,
        Err(error) => {
            team.goodbye();
            return Err(error.into());
        }
    };
    // Where the table's reader is gone, the others are in the midst of their sums all the same.
    let printer = (world.rank == 0).then(|| Printer { writes: true, ..Printer::new(output, None) });
    let taking = Taking { collective, options, patterns, printer: printer.as_ref() };
    let found = match &device {
        Opened::Cpu(backend) => taking.figures(backend),
        Opened::Cuda(backend) => taking.figures(backend),
        Opened::CudaBf16(backend) => taking.figures(backend),
        Opened::CudaF16(backend) => taking.figures(backend),
    };
    let results = agree(collective, found);
    team.goodbye();
    let results = results?;
    if let Some(printer) = printer {
        printer.output.write(&results)?;
        printer.print(&table::foot(&results))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The patterns, where all that was asked for can be done by several processes.
fn asked(options: &Options, processes: usize) -> Result<Vec<Pattern>> {
    let Options { precision, html, list, peers, .. } = options;
    let given = [
        ("--list", *list),
        ("--html", html.is_some()),
        ("--precision", !precision.is_empty()),
        ("--peers", peers.are_asked_for()),
    ];
    if let Some((name, _)) = given.into_iter().find(|(_, is_given)| *is_given) {
        let problem = format!(
            "found it in {processes} processes, which take their sums in f32 and nothing else; expected one process, or no {name}"
        );
        return Err(Error::config(name, problem));
    }
    let patterns = options.patterns.iter().map(|text| Pattern::among(&[SUITE], text)).collect::<Result<Vec<_>>>()?;
    let means_none = |text: &&String| {
        let pattern = Pattern::among(&[SUITE], text);
        pattern.is_ok_and(|pattern| !sizes().any(|bytes| pattern.means(SUITE, &name(bytes, processes))))
    };
    if let Some(text) = options.patterns.iter().find(means_none) {
        let known: Vec<String> = sizes().map(|bytes| name(bytes, processes)).collect();
        let problem =
            format!("found {text}, which means no figure, expected the beginning of one of {}", known.join(", "));
        return Err(Error::config("bench", problem));
    }
    Ok(patterns)
}

/// What one of the processes needs to take its figures.
struct Taking<'a> {
    collective: &'a dyn Collective,
    options: &'a Options,
    patterns: Vec<Pattern>,
    /// Of the first process.
    printer: Option<&'a Printer>,
}

impl Taking<'_> {
    fn print(&self, text: &str) -> Result<()> {
        self.printer.map_or(Ok(()), |printer| printer.print(text))
    }

    fn figures<B: Bed>(&self, backend: &B) -> Result<Results> {
        let Taking { collective, options, patterns, .. } = self;
        let watch = Watch::begin(backend);
        self.print(&format!(
            "{} processes over {}, each on {}\n{}",
            collective.world(),
            collective.name(),
            Backend::description(backend),
            table::suite(SUITE)
        ))?;
        let mut taken = Vec::new();
        let wanted = |name: &str| patterns.is_empty() || patterns.iter().any(|pattern| pattern.means(SUITE, name));
        all_reduce(backend, *collective, options.seconds.unwrap_or(SECONDS), &wanted, &mut |figure: Figure| {
            self.print(&table::line(&figure))?;
            taken.push(figure);
            Ok(())
        })?;
        Ok(Results {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            command: std::env::args().collect::<Vec<_>>().join(" "),
            date: date(),
            machine: watch.end(backend, &Seen::default()),
            figures: taken,
            peers: Vec::new(),
        })
    }
}
