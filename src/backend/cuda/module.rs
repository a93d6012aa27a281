//! The kernels: embedded fatbins, or CUDA source that NVRTC compiles on this machine, once, into a cache on disk.

use std::path::PathBuf;

use cudarc::nvrtc;
use rayon::prelude::*;

use crate::error::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Set to 1: kernels that were embedded are passed over, as if Warpstep had been built without nvcc.
const NVRTC: &str = "WARPSTEP_NVRTC";

/// What a module is loaded from.
pub(super) enum Image {
    /// A fatbin that was compiled when Warpstep was built.
    Fatbin(&'static [u8]),
    /// PTX with a 0 at its end.
    Ptx(Vec<u8>),
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
    let Some((_, source)) = SOURCES.iter().find(|(name, _)| *name == file) else {
        return Err(Error::Device(format!("there is no kernels/{file}.cu in this build")));
    };
    compiled(file, source, capability).map(Image::Ptx)
}

/// Compiles every kernel with NVRTC for devices of this compute capability, into the cache where a run looks for what was not
/// embedded: ahead of the first run, or on a machine that has no GPU. Gives the number of files.
///
/// # Errors
/// NVRTC missing, or refusing a source.
pub fn compile_all(capability: (i32, i32)) -> Result<usize> {
    SOURCES.par_iter().try_for_each(|(file, source)| compiled(file, source, capability).map(drop))?;
    Ok(SOURCES.len())
}

/// PTX with a 0 at its end, from the cache or from NVRTC.
fn compiled(file: &str, source: &str, capability: (i32, i32)) -> Result<Vec<u8>> {
    let source = with_headers(source);
    let options = options(capability);
    let key = blake3::hash(format!("{options}\n{source}").as_bytes()).to_hex();
    let cached = cache_folder().map(|folder| folder.join(format!("{file}-{}.ptx", &key[..16])));
    if let Some(ptx) = cached.as_ref().and_then(|path| std::fs::read(path).ok()).filter(|ptx| ptx.ends_with(&[0])) {
        return Ok(ptx);
    }
    let ptx = compile(file, &source, &options)?;
    if let Some(path) = cached {
        keep(&path, &ptx);
    }
    Ok(ptx)
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

/// What NVRTC is told. Functions without a space, lambdas among them, are the device's: there is no other here.
fn options(capability: (i32, i32)) -> String {
    format!("--gpu-architecture=compute_{}{} -std=c++17 -fmad=false -default-device", capability.0, capability.1)
}

fn compile(file: &str, source: &str, options: &str) -> Result<Vec<u8>> {
    // SAFETY: asks whether a library of this name loads; nothing of it is called.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err(Error::Device(
            "this Warpstep was built without nvcc, and NVRTC is not installed either: install it \
             (`pip install nvidia-cuda-nvrtc` and name its folder in LD_LIBRARY_PATH, or NVIDIA's CUDA toolkit), or build \
             Warpstep where nvcc is on the path"
                .into(),
        ));
    }
    let options = nvrtc::CompileOptions {
        options: options.split(' ').map(str::to_owned).collect(),
        name: Some(format!("{file}.cu")),
        ..Default::default()
    };
    let ptx = nvrtc::compile_ptx_with_opts(source, options)
        .map_err(|error| Error::Device(format!("NVRTC does not compile kernels/{file}.cu: {error:?}")))?;
    let mut bytes = ptx.to_src().into_bytes();
    bytes.push(0);
    Ok(bytes)
}

/// Where what is made on this machine is kept, to be found by the next run.
pub(super) fn cache_folder() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    base.filter(|path| path.is_absolute()).or_else(home).map(|folder| folder.join("warpstep"))
}

/// Writes the cache aside and renames it; a cache that cannot be written is only slower.
fn keep(path: &std::path::Path, ptx: &[u8]) {
    let aside = path.with_extension(format!("{}.tmp", std::process::id()));
    let kept = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&aside, ptx))
        .and_then(|()| std::fs::rename(&aside, path));
    if kept.is_err() {
        let _ = std::fs::remove_file(&aside);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_put_in_once_and_no_include_is_left() {
        for (name, source) in SOURCES {
            let whole = with_headers(source);
            assert!(!whole.contains("#include"), "{name}");
            assert_eq!(whole.matches("struct StepState {").count(), 1, "{name}");
        }
    }

    /// The kernels of the first PTX that these bytes hold.
    fn kernels(bytes: &[u8]) -> Vec<String> {
        let text = String::from_utf8_lossy(bytes);
        let first = text[text.find(".version").unwrap()..].split('\0').next().unwrap();
        let entries = first.lines().filter_map(|line| line.split_once(".entry "));
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
        // SAFETY: as in `compile`.
        if !is_embedded() || !unsafe { nvrtc::sys::is_culib_present() } {
            println!("skipped: no NVRTC here, or no embedded kernels to compare with");
            return;
        }
        SOURCES.par_iter().for_each(|(name, source)| {
            let (_, fatbin) = FATBINS.iter().find(|(file, _)| file == name).unwrap();
            let embedded = kernels(fatbin);
            assert!(!embedded.is_empty(), "{name}");
            assert_eq!(kernels(&compile(name, &with_headers(source), &options((9, 0))).unwrap()), embedded, "{name}");
        });
    }
}
