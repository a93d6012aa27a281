//! `warpstep bench`.

use std::cell::Cell;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::assemble::{choose_auto, enter_emulated};
use crate::backend::cpu;
use crate::bench::output::{Output, UNFINISHED, try_beside};
use crate::bench::place::{Place, Precision};
use crate::bench::results::{Figure, Machine, Results};
use crate::bench::run::{Observer, Pattern, Request, SUITES, names, run as take};
use crate::bench::speeds::Speeds;
use crate::bench::{interrupt, report, table};
use crate::config::DeviceChoice;
use crate::error::{Error, Result};
use crate::parallel::world::World;

mod compare;
mod peers;
mod together;

use peers::Peers;

#[derive(Debug, Subcommand)]
enum Command {
    /// What got faster or slower between two results
    Compare(compare::Options),
}

/// Options of `bench`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Without a suite, a tour of all of them in under two minutes. Suites:
  device  copies, reads, writes by size; products; latencies; copies to the host
  update  every rule, clip and precision by number of parameters
  kernel  each operation against its floor
  step    whole training steps: mlp, cnn, gpt_cpu, audio_cnn, resnet18, gpt2
  data    decoding files, feeding batches

Started as several processes (launch --gpus 8 -- bench), other suites:
  all_reduce  sums over all processes by size
  step        whole training steps of all of them, and their communication

A pattern is the beginning of figures' names, with * for anything: step/mlp,
update/adamw*124M, kernel/*backward."
)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Option<Command>,
    /// Which figures; the tour where not given
    #[arg(value_name = "SUITE[/PATTERN]")]
    patterns: Vec<String>,
    /// Device: auto, cpu, cuda, cuda:N or emulated
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// Precisions of a GPU: f32, tf32, bf16, f16 (may be given several times; all where not given, tf32 and bf16 for the tour)
    #[arg(long, value_name = "PRECISION")]
    precision: Vec<String>,
    /// Seconds a figure (default 3; for the tour 0.6)
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Threads of the CPU backend
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Write everything that was found to this file, anew after each figure and each work of peers, or, with -, to the standard
    /// output in the place of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with a roofline, bars and tables to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    peers: Peers,
    /// Name the figures, all of them where no suite is given, and take none
    #[arg(long)]
    list: bool,
}

impl Options {
    /// The device.
    pub(super) fn device(&self) -> Result<DeviceChoice> {
        DeviceChoice::parse(&self.device).map_err(|problem| Error::config("--device", problem))
    }
}

/// Prints the table while it grows, and writes the results.
struct Printer {
    suite: String,
    output: Output,
    /// Whether somebody waits for more than the table, who is not gone where its reader is.
    writes: bool,
    /// Whether nobody reads the table any more.
    gone: Cell<bool>,
}

impl Printer {
    fn new(output: Output, html: Option<&Path>) -> Self {
        let writes = html.is_some() || output != Output::None;
        Printer { suite: String::new(), output, writes, gone: Cell::new(false) }
    }

    fn print(&self, text: &str) -> Result<()> {
        if self.output == Output::Stdout || self.gone.get() {
            return Ok(());
        }
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(error) if self.writes && error.kind() == std::io::ErrorKind::BrokenPipe => {
                self.gone.set(true);
                Ok(())
            }
            written => written.map_err(|error| Error::io("write to", "the standard output", error)),
        }
    }
}

impl Observer for Printer {
    fn begins(&mut self, machine: &Machine, speeds: &Speeds) -> Result<()> {
        self.suite.clear();
        self.print(&table::head(machine, speeds))
    }

    fn figure(&mut self, figure: &Figure, so_far: &Results) -> Result<()> {
        if self.suite != figure.suite {
            self.suite.clone_from(&figure.suite);
            self.print(&table::suite(&figure.suite))?;
        }
        self.print(&table::line(figure))?;
        self.output.write_so_far(so_far)
    }
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if let Some(Command::Compare(options)) = &options.command {
        return compare::run(options);
    }
    if let Some(seconds) = options.seconds.filter(|&seconds| !(seconds > 0.0 && seconds.is_finite())) {
        return Err(Error::config("--seconds", format!("found {seconds}, expected a number above 0")).into());
    }
    let world = World::detect()?;
    if world.size > 1 {
        return together::run(options, &world);
    }
    let mut request = request(options)?;
    set_threads(options)?;
    if options.list {
        if request.patterns.is_empty() {
            request.patterns = SUITES.into_iter().map(Pattern::parse).collect::<Result<_>>()?;
        }
        let mut out = std::io::stdout().lock();
        for name in names(&request)? {
            writeln!(out, "{name}")?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    // Before minutes are spent: can all be written?
    let mut printer = Printer::new(Output::open(options.json.as_deref())?, options.html.as_deref());
    options.html.as_deref().map_or(Ok(()), try_beside)?;
    interrupt::listen()?;
    let mut results = take(&request, &mut printer)?;
    with_peers(options, &request, &printer, &mut results)?;
    // First what is to stay, should the table's reader be gone.
    printer.output.write(&results)?;
    printer.print(&table::foot(&results))?;
    if let Some(path) = &options.html {
        report::write(&results, path)?;
    }
    Ok(interrupt::caught().map_or(ExitCode::SUCCESS, |signal| ExitCode::from(128 + signal)))
}

/// Runs the peers that are asked for: what was found beside a work is written before the next one begins.
fn with_peers(options: &Options, request: &Request, printer: &Printer, results: &mut Results) -> Result<()> {
    options.peers.run(request, &mut |text| printer.print(text), &mut |found| {
        results.peers.extend(found);
        printer.output.write_so_far(results)
    })?;
    if interrupt::caught().is_some() {
        results.machine.notes.push(UNFINISHED.to_owned());
    }
    Ok(())
}

/// Makes the pool of threads that was asked for.
fn set_threads(options: &Options) -> Result<()> {
    if let Some(problem) = cpu::wrong_threads(options.threads) {
        return Err(Error::config("--threads", problem));
    }
    cpu::set_threads(options.threads).map_err(|error| match options.threads {
        Some(threads) => Error::config("--threads", format!("found {threads}: {error}")),
        None => Error::Device(format!("no threads on the CPU: {error}")),
    })
}

/// The precisions that are asked for.
fn precisions(options: &Options) -> Result<Vec<Precision>> {
    let known = |name: &String| {
        let known = Precision::ALL.into_iter().find(|precision| precision.name() == name);
        known.ok_or_else(|| Error::config("--precision", format!("found {name:?}, expected f32, tf32, bf16 or f16")))
    };
    options.precision.iter().map(known).collect()
}

fn request(options: &Options) -> Result<Request> {
    let patterns = options.patterns.iter().map(|text| Pattern::parse(text)).collect::<Result<Vec<_>>>()?;
    let precisions = precisions(options)?;
    Ok(Request { patterns, place: place(options.device()?)?, precisions, seconds: options.seconds, command: command() })
}

/// The arguments of this call, as results hold them.
fn command() -> String {
    std::env::args().collect::<Vec<_>>().join(" ")
}

/// The device of this name; an emulated one starts the program again and does not come back.
fn place(device: DeviceChoice) -> Result<Place> {
    Ok(match device {
        DeviceChoice::Auto => choose_auto().map_or(Place::Cpu, Place::Cuda),
        DeviceChoice::Cpu => Place::Cpu,
        DeviceChoice::Cuda(number) => Place::Cuda(number.unwrap_or(0) as usize),
        DeviceChoice::Emulated => {
            enter_emulated()?;
            Place::Cuda(0)
        }
    })
}
