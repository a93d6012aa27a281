//! The kernels: embedded fatbins, or CUDA source that NVRTC compiles on this machine (compiler.rs).

use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::compiler::{Compiled, Source, release};
use crate::error::{Error, Result};
use crate::tell::tell;

/// Bytes where a fatbin lies in a program that nvcc makes: on a multiple of 8, and of a line of the cache.
#[repr(C, align(64))]
struct Aligned<B: ?Sized>(B);

/// The bytes of a file, in an image that is aligned.
macro_rules! aligned {
    ($path:literal) => {{
        const BYTES: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
        &BYTES.0
    }};
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Set to 1: kernels that were embedded are passed over, as if Warpstep had been built without nvcc.
const NVRTC: &str = "WARPSTEP_NVRTC";

/// The compute capability that files are for whose names end with `HOPPER_ENDING`.
pub(super) const HOPPER: (i32, i32) = (9, 0);

/// Whether devices of this compute capability have the instructions of a file of kernels.
pub(super) fn is_for(file: &str, capability: (i32, i32)) -> bool {
    capability == HOPPER || !file.ends_with(HOPPER_ENDING)
}

/// What a module is loaded from.
pub(super) enum Image {
    /// A fatbin that was compiled when Warpstep was built.
    Fatbin(&'static [u8]),
    /// What NVRTC made of the source.
    Compiled(Compiled),
}

/// Whether Warpstep was built with nvcc at hand.
pub fn is_embedded() -> bool {
    !FATBINS.is_empty()
}

/// The image of `kernels/<file>.cu` for a device of this compute capability.
///
/// # Errors
/// No kernel embedded and NVRTC missing, or refusing the source.
pub(super) fn image(file: &str, capability: (i32, i32)) -> Result<Image> {
    let passed_over = std::env::var(NVRTC).is_ok_and(|value| value == "1");
    if let Some((_, fatbin)) = FATBINS.iter().find(|(name, _)| *name == file && !passed_over) {
        return Ok(Image::Fatbin(fatbin));
    }
    let Some((file, source)) = SOURCES.iter().find(|(name, _)| *name == file) else {
        return Err(Error::Device(format!("there is no kernels/{file}.cu in this build")));
    };
    let source = Source::new(file, with_headers(source), capability);
    if let Some(compiled) = source.kept() {
        return Ok(Image::Compiled(compiled));
    }
    static AHEAD: Once = Once::new();
    if let Some(folder) = cache_folder().filter(|_| release().is_some()) {
        // All of them, side by side: a run needs most, and would wait for each as it comes to it. What fails is told by the one that
        // is asked for.
        AHEAD.call_once(|| {
            tell(format_args!(
                "NVRTC compiles the kernels, once, into {}: this may take a minute or two",
                folder.display()
            ));
            let _ = compile_all(capability);
        });
    }
    source.compiled().map(Image::Compiled)
}

/// Compiles every kernel with NVRTC for devices of this compute capability, into the cache where a run looks for what was not
/// embedded: ahead of the first run, or on a machine that has no GPU. Gives the number of files.
///
/// # Errors
/// NVRTC missing, or refusing a source.
pub fn compile_all(capability: (i32, i32)) -> Result<usize> {
    let sources: Vec<_> = SOURCES.iter().filter(|(file, _)| is_for(file, capability)).collect();
    let next = AtomicUsize::new(0);
    let some = || -> Result<()> {
        while let Some((file, source)) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
            Source::new(file, with_headers(source), capability).compiled()?;
        }
        Ok(())
    };
    // No pool's threads: one of these may wait for this.
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(sources.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(some)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })?;
    Ok(sources.len())
}

/// The source with its `#include "x.cuh"` lines replaced by what they name, each once.
fn with_headers(source: &str) -> String {
    fn expand(source: &str, seen: &mut Vec<String>, out: &mut String) {
        for line in source.lines() {
            let name = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix(".cuh\""));
            match name.and_then(|name| HEADERS.iter().find(|(header, _)| *header == name)) {
                Some((name, text)) => {
                    if !seen.iter().any(|s| s == name) {
                        seen.push((*name).to_owned());
                        expand(text, seen, out);
                    }
                }
                None if line.trim() == "#pragma once" => {}
                None => {
                    out.push_str(line);
                    out.push('\n');
                }
            }
        }
    }
    let mut out = String::new();
    expand(source, &mut Vec::new(), &mut out);
    out
}

/// Where what is made on this machine is kept, to be found by the next run.
pub(super) fn cache_folder() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    base.filter(|path| path.is_absolute()).or_else(home).map(|folder| folder.join("warpstep"))
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn headers_are_put_in_once_and_no_include_is_left() {
        for (name, source) in SOURCES {
            let whole = with_headers(source);
            assert!(!whole.contains("#include"), "{name}");
            assert_eq!(whole.matches("struct StepState {").count(), 1, "{name}");
        }
    }

    /// The kernels of a text in PTX.
    fn kernels(ptx: &str) -> Vec<String> {
        let entries = ptx.lines().filter_map(|line| line.split_once(".entry "));
        let mut names: Vec<String> = entries.map(|(_, rest)| rest.trim_end_matches('(').to_owned()).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn nvrtc_compiles_every_source_to_the_kernels_that_nvcc_embedded() {
        // A process's library path is that of its start: scripts/test names NVRTC's folder, and this program starts again with it.
        if let Some(folder) = std::env::var_os("WARPSTEP_TEST_NVRTC") {
            let test = "backend::cuda::module::tests::nvrtc_compiles_every_source_to_the_kernels_that_nvcc_embedded";
            let mut again = std::process::Command::new(std::env::current_exe().unwrap());
            again.args([test, "--exact", "--nocapture"]).env("LD_LIBRARY_PATH", folder);
            let output = again.env_remove("WARPSTEP_TEST_NVRTC").output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            let told = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && !text.contains("skipped: no NVRTC"), "{text}\n{told}");
            return;
        }
        if !is_embedded() || release().is_none() {
            println!("skipped: no NVRTC here, or no embedded kernels to compare with");
            return;
        }
        SOURCES.par_iter().for_each(|(name, source)| {
            let (_, fatbin) = FATBINS.iter().find(|(file, _)| file == name).unwrap();
            let embedded = kernels(&warpstep_emulator::fatbin::ptx(fatbin).unwrap());
            assert!(!embedded.is_empty(), "{name}");
            let (ptx, machine) = Source::new(name, with_headers(source), (9, 0)).compile().unwrap();
            assert_eq!(kernels(&String::from_utf8(ptx).unwrap()), embedded, "{name}");
            let machine = machine.unwrap();
            assert!(machine.starts_with(b"\x7fELF"), "{name}");
            let names = String::from_utf8_lossy(&machine);
            embedded
                .iter()
                .for_each(|kernel| assert!(names.contains(&format!(".text.{kernel}\0")), "{name}: {kernel}"));
        });
        // A device that this NVRTC does not know yet gets PTX for an older one.
        let (name, source) = SOURCES.iter().find(|(name, _)| *name == "report").unwrap();
        let (ptx, machine) = Source::new(name, with_headers(source), (99, 0)).compile().unwrap();
        assert!(machine.is_none() && !kernels(&String::from_utf8(ptx).unwrap()).is_empty());
    }
}
