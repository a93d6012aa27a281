//! `warpstep doctor`.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::say;
use crate::backend::cuda::auto::{Choice, Machine, choose};
use crate::backend::cuda::doctor::{CudaReport, DeviceReport, LibraryReport, examine};
use crate::backend::cuda::{compile_all, emulated};
use crate::error::Error;

/// Options of `doctor`.
#[derive(Debug, Args)]
#[command(
    after_help = "Ends with 0 where all that is there works, a machine without a GPU included; with 1 where a device is \
                        there that does not work."
)]
pub(crate) struct Options {
    /// What to look at: all devices where not given, cuda:N for one, emulated for the device in software
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
    /// Only compile every kernel with NVRTC for devices of this compute capability, 9.0 for instance, into the cache where a
    /// build without nvcc looks for them: before its first run, or where there is no GPU
    #[arg(long, value_name = "CAPABILITY", conflicts_with_all = ["device", "json"], value_parser = capability)]
    compile: Option<(i32, i32)>,
}

/// The processor.
#[derive(Debug, Serialize)]
struct Processor {
    name: Option<String>,
    threads: usize,
    /// Vector instructions, of those that the CPU backend has code for.
    vectors: Vec<&'static str>,
}

/// All that is printed.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    cpu: Processor,
    cuda: CudaReport,
    /// What `device = "auto"` takes.
    auto: String,
    works: bool,
}

/// `9.0`.
fn capability(text: &str) -> Result<(i32, i32), String> {
    let expected = || format!("found {text:?}, expected a compute capability, as 9.0");
    let (major, minor) = text.split_once('.').ok_or_else(expected)?;
    Ok((major.parse().map_err(|_| expected())?, minor.parse().map_err(|_| expected())?))
}

/// Runs it.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if let Some((major, minor)) = options.compile {
        let files = compile_all((major, minor))?;
        say(&format!("the kernels of {files} files are compiled for compute capability {major}.{minor}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let only = match options.device.as_deref() {
        None | Some("auto" | "cpu") => None,
        Some("emulated") if emulated::is_active() => None,
        Some("emulated") => return Err(emulated::start_again().into()),
        Some("cuda") => Some(0),
        Some(other) => Some(other.strip_prefix("cuda:").and_then(|number| number.parse().ok()).ok_or_else(|| {
            Error::config("--device", format!("found {other:?}, expected auto, cpu, cuda, cuda:N or emulated"))
        })?),
    };
    let cuda = examine(only);
    if let Some(only) = only
        && cuda.devices.is_empty()
    {
        let message =
            format!("there is no device cuda:{only}; `warpstep doctor` without --device lists those that there are");
        return Err(Error::Device(message).into());
    }
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        cpu: processor(),
        works: cuda.devices.iter().all(works),
        auto: match choose(&Machine::look(), true) {
            Choice::Cuda(ordinal) if cuda.devices.iter().any(|device| device.ordinal == ordinal && !works(device)) => {
                format!("cpu (cuda:{ordinal} does not work)")
            }
            Choice::Cuda(ordinal) => format!("cuda:{ordinal}"),
            Choice::Cpu(None) => "cpu".to_owned(),
            Choice::Cpu(Some(reason)) => format!("cpu ({reason})"),
        },
        cuda,
    };
    let text = if options.json { serde_json::to_string(&report)? + "\n" } else { page(&report) };
    say(&text)?;
    Ok(if report.works { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn works(device: &DeviceReport) -> bool {
    device.checks.iter().all(|check| check.works)
}

fn processor() -> Processor {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    Processor {
        name: name.map(str::to_owned),
        threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        vectors: vectors(),
    }
}

#[cfg(target_arch = "x86_64")]
fn vectors() -> Vec<&'static str> {
    let known = [
        ("SSE2", is_x86_feature_detected!("sse2")),
        ("AVX2", is_x86_feature_detected!("avx2")),
        ("FMA", is_x86_feature_detected!("fma")),
        ("AVX-512", is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")),
    ];
    known.into_iter().filter_map(|(name, there)| there.then_some(name)).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn vectors() -> Vec<&'static str> {
    if cfg!(target_arch = "aarch64") { vec!["NEON"] } else { Vec::new() }
}

/// The report for people.
fn page(report: &Report) -> String {
    let Report { version, cpu, cuda, auto, .. } = report;
    let mut text = String::new();
    let mut line = |name: &str, value: String| text += &format!("{name:<10}{value}\n");
    line("Warpstep", format!("{version}, {}", kernels(cuda)));
    let vectors = cpu.vectors.join(", ");
    let name = cpu.name.as_deref().unwrap_or("a processor that does not tell its name");
    line("CPU", format!("{name}, {} thread{}, {vectors}", cpu.threads, if cpu.threads == 1 { "" } else { "s" }));
    for library in &cuda.libraries {
        let release = cuda.driver_release.as_deref().filter(|_| library.name == "driver" && !cuda.emulated);
        line(library.name, describe(library, release));
        if let Some(advice) = library.advice.as_ref().filter(|_| library.found) {
            line("", advice.clone());
        }
    }
    if let Some(error) = &cuda.driver_error {
        line("", error.clone());
    }
    if let Some(advice) = &cuda.kernels.advice {
        line("kernels", advice.clone());
    }
    for device in &cuda.devices {
        let (major, minor) = device.compute_capability;
        line(
            &format!("cuda:{}", device.ordinal),
            format!(
                "{}{}, compute capability {major}.{minor}, {:.1} GiB, {} multiprocessors",
                device.name,
                if cuda.emulated { " (emulated: no GPU is used)" } else { "" },
                device.memory_bytes as f64 / f64::from(1 << 30),
                device.multiprocessors
            ),
        );
        for check in &device.checks {
            let found =
                check.error.as_ref().map_or_else(|| "works".to_owned(), |error| format!("DOES NOT WORK: {error}"));
            line("", format!("{}: {found}", check.name));
        }
    }
    if cuda.devices.is_empty() {
        line("devices", "no CUDA device: runs on the CPU".to_owned());
    }
    line("auto", format!("device = \"auto\" takes {auto}"));
    text
}

fn kernels(cuda: &CudaReport) -> String {
    match (cuda.kernels.embedded, cuda.kernels.nvcc) {
        (true, Some(nvcc)) => format!("kernels embedded (nvcc {nvcc})"),
        (true, None) => "kernels embedded".to_owned(),
        (false, _) => "built without nvcc: kernels are compiled by NVRTC when they are first used".to_owned(),
    }
}

fn describe(library: &LibraryReport, release: Option<&str>) -> String {
    if !library.found {
        let advice = library.advice.as_deref().unwrap_or_default();
        return match advice.strip_prefix("not needed") {
            Some(_) => format!("not found; {advice}"),
            None => format!("not found (for {}): {advice}", library.purpose),
        };
    }
    let mut text = library.version.clone().unwrap_or_else(|| "of unknown version".to_owned());
    if let Some(release) = release {
        text += &format!(", release {release}");
    }
    if let Some(name) = &library.found_as {
        text += &format!(", as {name}");
    }
    if let Some(path) = &library.path {
        text += &format!(", {}", path.display());
    }
    text
}
