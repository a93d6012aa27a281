//! `warpstep bench`, started as several processes: their sums by size.

use std::process::ExitCode;

use super::{Options, place, set_threads, write_json};
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Cuda, Device, DeviceOptions};
use crate::bench::all_reduce::{SUITE, all_reduce};
use crate::bench::machine::{Watch, date};
use crate::bench::place::{Bed, Place};
use crate::bench::results::{FORMAT, Figure, Results};
use crate::bench::run::Pattern;
use crate::bench::table;
use crate::cli::assemble::Opened;
use crate::cli::team::{Team, Vigil};
use crate::error::Result;
use crate::parallel::watch::TIMEOUT;
use crate::parallel::world::World;
use crate::parallel::{Collective, agree};

/// Seconds of a figure where not given.
const SECONDS: f64 = 1.0;

/// Runs it in one of the processes. The first prints.
pub(super) fn run(options: &Options, world: &World) -> anyhow::Result<ExitCode> {
    set_threads(options)?;
    let device = match place(&options.device)? {
        Place::Cpu => Opened::Cpu(Cpu::new()),
        Place::Cuda(ordinal) => {
            let ordinal = if options.device == "cuda" || options.device == "auto" { world.local_rank } else { ordinal };
            Opened::Cuda(Cuda::new(Device::open(DeviceOptions { ordinal, ..DeviceOptions::default() })?))
        }
    };
    let log = std::env::temp_dir().join(format!("warpstep-bench-rank-{}.log", world.rank));
    let team = Team::join(world, &device, Vigil { timeout: TIMEOUT, log })?;
    let collective = &*team.collective;
    let found = match &device {
        Opened::Cpu(backend) => figures(backend, collective, options),
        Opened::Cuda(backend) => figures(backend, collective, options),
        Opened::CudaBf16(backend) => figures(backend, collective, options),
        Opened::CudaF16(backend) => figures(backend, collective, options),
    };
    let results = agree(collective, found);
    team.goodbye();
    let results = results?;
    if world.rank == 0 {
        if !options.to_stdout() {
            print!("{}", table::foot(&results));
        }
        write_json(&results, options)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn figures<B: Bed>(backend: &B, collective: &dyn Collective, options: &Options) -> Result<Results> {
    let silent = collective.rank() > 0 || options.to_stdout();
    let patterns = options.patterns.iter().map(|text| Pattern::among(&[SUITE], text)).collect::<Result<Vec<_>>>()?;
    let watch = Watch::begin(backend);
    if !silent {
        println!(
            "{} processes over {}, each on {}\n{}",
            collective.world(),
            collective.name(),
            Backend::description(backend),
            table::suite(SUITE)
        );
    }
    let mut taken = Vec::new();
    let wanted = |name: &str| patterns.is_empty() || patterns.iter().any(|pattern| pattern.means(SUITE, name));
    all_reduce(backend, collective, options.seconds.unwrap_or(SECONDS), &wanted, &mut |figure: Figure| {
        if !silent {
            print!("{}", table::line(&figure));
        }
        taken.push(figure);
        Ok(())
    })?;
    Ok(Results {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        date: date(),
        machine: watch.end(backend),
        figures: taken,
        peers: Vec::new(),
    })
}
