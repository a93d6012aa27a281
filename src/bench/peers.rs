//! The same work by others, in turn with ours.
//!
//! A peer is a process that declares what it does (see `benches/peers/common.py` for the protocol). What it declares is held
//! against our own work, field by field: a peer that does something else is refused, and so is one that dies, hangs, tells
//! times that cannot be, or ends with numbers that are not finite. Both run in turn, A B A B, and each turn gives one ratio.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::interrupt;
use super::measure::{spread, width};
use super::results::{PeerFigure, Spread, Work};
use super::table;
use super::unit::Unit;
use crate::error::{Error, Result};
use crate::text::grouped;

mod process;
mod scripts;

use process::{Declared, Process};
pub use scripts::Scripts;

/// The names that `--peer` takes.
pub const NAMES: [&str; 7] = ["pytorch-eager", "pytorch-compiled", "pytorch-graphed", "jax", "candle", "burn", "llm.c"];

/// How peers are run.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Turns of each side.
    pub turns: usize,
    /// Seconds of a turn.
    pub seconds: f64,
    /// Distance of the ratio's quartiles, over its median, that is still quoted.
    pub widest: f64,
    /// How long a peer may take to declare its work, and besides for its first turn, in which compilers compile.
    pub start: Duration,
    /// How much longer than asked a later turn may take.
    pub patience: Duration,
}

impl Settings {
    /// Five turns that take `seconds` together for each side.
    pub fn new(seconds: f64) -> Self {
        let turns = 5;
        Settings {
            turns,
            seconds: seconds / turns as f64,
            widest: 0.2,
            start: Duration::from_secs(300),
            patience: Duration::from_secs(120),
        }
    }
}

/// Somebody to compare with.
#[derive(Clone, Debug, PartialEq)]
pub struct Peer {
    /// Its name for people.
    pub label: String,
    /// How it is started, or why it cannot be.
    pub start: Start,
}

/// How a peer is started.
#[derive(Clone, Debug, PartialEq)]
pub enum Start {
    /// A program and its arguments.
    Command(OsString, Vec<OsString>),
    /// Not at all, for this reason.
    Missing(String),
}

/// Where peers are looked for.
#[derive(Clone, Debug)]
pub struct Places {
    /// Python: `$WARPSTEP_PYTHON`, or `python3`.
    pub python: OsString,
    /// The program that `benches/peers/build-rust` builds, where it was built.
    pub rust: Option<PathBuf>,
    /// The binary of llm.c, where one was given.
    pub llm_c: Option<PathBuf>,
}

impl Places {
    /// Looks for them: in the environment, beside this program, and where the scripts build them.
    pub fn find(llm_c: Option<PathBuf>) -> Self {
        let given = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let name = "warpstep-peers";
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(name)));
        let built = PathBuf::from("benches/peers/rust/target/release").join(name);
        let rust = given("WARPSTEP_RUST_PEERS")
            .map(PathBuf::from)
            .or_else(|| beside.into_iter().chain([built]).find(|path| path.is_file()));
        Places {
            python: given("WARPSTEP_PYTHON").unwrap_or_else(|| "python3".into()),
            rust,
            llm_c: llm_c.or_else(|| given("WARPSTEP_LLM_C").map(PathBuf::from)),
        }
    }

    /// The peer called `name`, ready to do `work`; on a GPU where `work` counts no threads.
    ///
    /// # Errors
    /// Another name than [`NAMES`].
    pub fn peer(&self, name: &str, work: &Work, scripts: &Scripts) -> Result<Peer> {
        let cuda = work.threads == 0;
        let python = |script: &str, more: &[&str]| {
            let mut arguments = vec![scripts.path(script).into_os_string()];
            arguments.extend(more.iter().map(OsString::from));
            arguments.extend(arguments_for(work).into_iter().map(OsString::from));
            Start::Command(self.python.clone(), arguments)
        };
        let (label, start) = match name {
            "pytorch-eager" => ("PyTorch eager", python("pytorch.py", &["--form", "eager"])),
            "pytorch-compiled" => ("PyTorch compiled", python("pytorch.py", &["--form", "compiled"])),
            "pytorch-graphed" if !cuda => ("PyTorch graphed", Start::Missing("CUDA graphs need a GPU".to_owned())),
            "pytorch-graphed" => ("PyTorch graphed", python("pytorch.py", &["--form", "graphed"])),
            "jax" => ("JAX", python("jax_optax.py", &[])),
            "candle" | "burn" => (if name == "burn" { "burn" } else { "candle" }, self.rust_peer(name, work)),
            "llm.c" => ("llm.c", self.llm_c_peer(work, python)),
            other => {
                let problem = format!("found {other:?}, expected one of {}", NAMES.join(", "));
                return Err(Error::config("--peer", problem));
            }
        };
        Ok(Peer { label: label.to_owned(), start })
    }

    fn rust_peer(&self, name: &str, work: &Work) -> Start {
        match &self.rust {
            _ if work.threads == 0 => Start::Missing("it is built for CPUs alone".to_owned()),
            Some(path) => {
                let given = ["--framework", name].into_iter().map(OsString::from);
                Start::Command(path.into(), given.chain(arguments_for(work).into_iter().map(OsString::from)).collect())
            }
            None => Start::Missing(
                "not built: run benches/peers/build-rust, or name the program in WARPSTEP_RUST_PEERS".to_owned(),
            ),
        }
    }

    fn llm_c_peer(&self, work: &Work, python: impl Fn(&str, &[&str]) -> Start) -> Start {
        match &self.llm_c {
            _ if work.name != "gpt2" || work.threads > 0 => {
                Start::Missing("it trains GPT-2 on GPUs, and nothing else".to_owned())
            }
            Some(path) => python("llm_c.py", &["--binary", &path.to_string_lossy()]),
            None => Start::Missing("its binary was not given: --llm-c PATH, or WARPSTEP_LLM_C".to_owned()),
        }
    }
}

/// The arguments that ask a peer for this work.
fn arguments_for(work: &Work) -> Vec<String> {
    let device = if work.threads == 0 { "cuda" } else { "cpu" };
    let mut arguments = vec![
        ("--work", work.name.clone()),
        ("--device", device.to_owned()),
        ("--threads", work.threads.to_string()),
        ("--precision", work.precision.clone()),
        ("--update", work.update.clone()),
    ];
    match work.inputs.as_slice() {
        [parameters] => arguments.push(("--parameters", parameters.to_string())),
        [batch, rest @ ..] => {
            arguments.push(("--batch", batch.to_string()));
            if let (true, [context]) = (work.name.starts_with("gpt"), rest) {
                arguments.push(("--context", context.to_string()));
            }
        }
        [] => {}
    }
    if work.samples > 0 {
        arguments.push(("--samples", work.samples.to_string()));
    }
    arguments.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect()
}

/// Which field of two works differs, in words; nothing where both are the same. `sides` says whose the two are.
pub fn difference(one: &Work, other: &Work, sides: [&str; 2]) -> Option<String> {
    let Work { name, parameters, inputs, samples, precision, update, threads } = other;
    let fields = [
        ("work", one.name.clone(), name.clone()),
        ("number of parameters", grouped(one.parameters), grouped(parameters)),
        ("shape of the inputs", format!("{:?}", one.inputs), format!("{inputs:?}")),
        ("number of samples to take batches from", grouped(one.samples), grouped(samples)),
        ("precision", one.precision.clone(), precision.clone()),
        ("update", one.update.clone(), update.clone()),
        ("number of threads", one.threads.to_string(), threads.to_string()),
    ];
    let (field, one, other) = fields.into_iter().find(|(_, one, other)| one != other)?;
    Some(format!("another {field}: {one} {}, {other} {}", sides[0], sides[1]))
}

/// Runs a peer in turn with our own work. A peer that is missing, fails or does other work gives a figure that says so.
///
/// # Errors
/// What our own work reports.
pub fn run(peer: &Peer, unit: &mut dyn Unit, settings: &Settings) -> Result<PeerFigure> {
    let ours = unit.work();
    let nothing = PeerFigure {
        peer: peer.label.clone(),
        // What was asked for: of who is not there, nothing else is known.
        work: Work {
            name: ours.name.clone(),
            precision: ours.precision.clone(),
            update: ours.update.clone(),
            parameters: if ours.name == "update" { ours.parameters } else { 0 },
            ..Work::default()
        },
        ..PeerFigure::default()
    };
    if interrupt::caught().is_some() {
        return Ok(PeerFigure { refused: Some("the benchmark was interrupted before".to_owned()), ..nothing });
    }
    let (mut process, declared) = match open(peer, &ours, unit.ordinal(), settings) {
        Ok(found) => found,
        Err(refused) => return Ok(PeerFigure { refused: Some(refused), ..nothing }),
    };
    let Declared { version, work, .. } = declared;
    let known = PeerFigure { version, work, ..nothing };
    if let Some(refused) = difference(&ours, &known.work, ["here", "there"]) {
        let refused = format!("{refused}; times of different work tell nothing");
        return Ok(PeerFigure { refused: Some(refused), ..known });
    }
    turns(&mut process, unit, settings, known)
}

/// The value of `CUDA_VISIBLE_DEVICES` by which a peer sees our device alone: the entry of this number in our own list, where there
/// is one. That entry may be a number of the driver's, or a name.
pub fn visible_device(ours: Option<&str>, ordinal: usize) -> String {
    match ours {
        None => ordinal.to_string(),
        // An entry that is not there shows none: the device that we run on was one.
        Some(list) => list.split(',').nth(ordinal).unwrap_or("").trim().to_owned(),
    }
}

fn open(peer: &Peer, ours: &Work, ordinal: Option<usize>, settings: &Settings) -> Result<(Process, Declared), String> {
    let (program, arguments) = match &peer.start {
        Start::Missing(reason) => return Err(reason.clone()),
        Start::Command(program, arguments) => (program, arguments),
    };
    let mut command = Command::new(program);
    // A library that is imported is not to leave files beside the scripts.
    command.args(arguments).env("PYTHONDONTWRITEBYTECODE", "1");
    if ours.threads > 0 {
        for pool in ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"] {
            command.env(pool, ours.threads.to_string());
        }
    }
    if let Some(ordinal) = ordinal {
        let given = |name| std::env::var(name).ok();
        command.env("CUDA_VISIBLE_DEVICES", visible_device(given("CUDA_VISIBLE_DEVICES").as_deref(), ordinal));
        // The order in which our driver counted them.
        command.env("CUDA_DEVICE_ORDER", given("CUDA_DEVICE_ORDER").unwrap_or_else(|| "FASTEST_FIRST".to_owned()));
    }
    let mut process = Process::start(&mut command)?;
    let declared = process.declaration(settings.start)?;
    Ok((process, declared))
}

/// How long threads that still spin after one side's turn get to fall asleep before the other's.
const SETTLE: Duration = Duration::from_millis(250);

/// A B A B: ours, theirs, ours, theirs.
fn turns(process: &mut Process, unit: &mut dyn Unit, settings: &Settings, known: PeerFigure) -> Result<PeerFigure> {
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    // Compilation and first allocations are over before the first turn that counts.
    if let Err(refused) = process.run(0.0, settings.start) {
        return Ok(PeerFigure { refused: Some(refused), ..known });
    }
    for _ in 0..settings.turns.max(1) {
        std::thread::sleep(SETTLE);
        let one = unit.run_for(settings.seconds)?;
        std::thread::sleep(SETTLE);
        let other = match process.run(settings.seconds, settings.patience) {
            Ok(times) => times,
            Err(refused) => return Ok(PeerFigure { refused: Some(refused), ..known }),
        };
        ratios.push(spread(&other).median / spread(&one).median);
        ours.extend(one);
        theirs.extend(other);
    }
    // What was timed has to have been the work, on either side.
    let wrong = match process.check(settings.patience) {
        Ok(()) => unit.verify()?.map(|wrong| format!("our own outcome is wrong: {wrong}")),
        Err(refused) => Some(refused),
    };
    if wrong.is_some() {
        return Ok(PeerFigure { refused: wrong, ..known });
    }
    let ratio = spread(&ratios);
    let width = width(&ratio);
    // Written so that a width which is no number is refused.
    let refused = (width.is_nan() || width > settings.widest).then(|| {
        format!(
            "spread too wide: quartiles of the ratio {:.0} % of its median apart, more than {:.0} %; close other programs, or \
             give more --seconds",
            100.0 * width,
            100.0 * settings.widest
        )
    });
    Ok(PeerFigure { theirs: spread(&theirs), ours: spread(&ours), ratio, refused, ..known })
}

/// The heading over [`line()`].
pub fn heading() -> String {
    let told = "peers: the same work by others, in turn with ours; times as fast, with its quartiles";
    format!("\n{told}\n{:<12} {:<17} {:>9} {:>9}  times as fast\n", "work", "peer", "theirs", "ours")
}

/// A figure as a line of a table.
pub fn line(figure: &PeerFigure) -> String {
    let PeerFigure { peer, work, theirs, ours, ratio, refused, .. } = figure;
    let head = format!("{:<12} {peer:<17}", work.title());
    if ratio.count == 0 {
        return format!("{head} not compared: {}\n", refused.as_deref().unwrap_or("no turn was taken"));
    }
    let (theirs, ours) = (table::seconds(theirs.median), table::seconds(ours.median));
    let Spread { lower_quartile, median, upper_quartile, .. } = ratio;
    let doubt = refused.as_ref().map_or_else(String::new, |why| format!("    not to be quoted: {why}\n"));
    format!("{head} {theirs:>9} {ours:>9}  {median:.2} ({lower_quartile:.2} to {upper_quartile:.2})\n{doubt}")
}
