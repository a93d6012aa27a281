//! NVRTC: CUDA source that is compiled on the machine where it runs, once, into a cache on disk.
//!
//! It is compiled to machine code, which every driver of the same CUDA loads, as old as it may be: PTX is refused by a driver that is
//! older than its compiler. PTX alone is left for a device that this NVRTC does not know yet, and beside the machine code for the
//! emulated device, which executes it.

use std::ffi::{CString, c_char, c_int};
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result, sys};

use super::module::{HOPPER, cache_folder, is_embedded, is_for};
use super::{emulated, libraries::Library};
use crate::error::{Error, Result};

/// What a module is loaded from that was compiled here.
pub(super) enum Compiled {
    /// Machine code, an ELF file.
    Machine(Vec<u8>),
    /// PTX with a 0 at its end.
    Ptx(Vec<u8>),
}

/// The numbers of NVRTC's release.
type Release = (c_int, c_int);

/// A source with its headers, for devices of one compute capability.
pub(super) struct Source {
    file: &'static str,
    text: String,
    capability: (i32, i32),
}

/// Machine code is for this ending, PTX for the other.
const MACHINE: &str = "cubin";
const PTX: &str = "ptx";

/// Functions without a space, lambdas among them, are the device's: there is no other here.
const FLAGS: [&str; 3] = ["-std=c++17", "-fmad=false", "-default-device"];

impl Source {
    /// `text` is a source with its headers; what is Hopper's alone is compiled for it, whatever the device.
    pub fn new(file: &'static str, text: String, capability: (i32, i32)) -> Self {
        Source { file, text, capability: if is_for(file, capability) { capability } else { HOPPER } }
    }

    /// What was compiled before: by the NVRTC that is here, or by any where there is none.
    pub fn kept(&self) -> Option<Compiled> {
        // NVRTC takes the emulated driver for a real one, and does not survive it: it is not even asked for its release.
        if emulated::is_active() {
            return self.read(&self.latest(PTX)?).map(Compiled::Ptx);
        }
        match release() {
            Some(release) => self.kept_of(release),
            None => {
                let machine = self.latest(MACHINE).and_then(|path| self.read(&path)).map(Compiled::Machine);
                machine.or_else(|| self.read(&self.latest(PTX)?).map(Compiled::Ptx))
            }
        }
    }

    fn kept_of(&self, release: Release) -> Option<Compiled> {
        let read = |ending| self.read(&self.path(release, ending)?);
        // Machine code is written first: where it is missing, there was none.
        read(MACHINE).map(Compiled::Machine).or_else(|| read(PTX).map(Compiled::Ptx))
    }

    /// The same, compiled where it was not.
    ///
    /// # Errors
    /// NVRTC missing, or refusing the source.
    pub fn compiled(&self) -> Result<Compiled> {
        let Some(release) = release() else {
            let (why, or) = if is_embedded() {
                (
                    "NVRTC is not installed",
                    "; this Warpstep holds kernels, and needs none of NVRTC's unless WARPSTEP_NVRTC=1",
                )
            } else {
                (
                    "this Warpstep was built without nvcc, and NVRTC is not installed either",
                    ", or build Warpstep where nvcc is on the path",
                )
            };
            return Err(Error::Device(format!(
                "{why}: install it (`{}`, and name its folder in LD_LIBRARY_PATH, or NVIDIA's CUDA toolkit){or}",
                Library::Nvrtc.install()
            )));
        };
        if let Some(kept) = self.kept_of(release) {
            return Ok(kept);
        }
        let (ptx, machine) = self.compile()?;
        for (bytes, ending) in [(machine.as_ref(), MACHINE), (Some(&ptx), PTX)] {
            if let (Some(bytes), Some(path)) = (bytes, self.path(release, ending)) {
                keep(&path, bytes);
            }
        }
        Ok(machine.map_or(Compiled::Ptx(ptx), Compiled::Machine))
    }

    /// PTX with a 0 at its end, and machine code where NVRTC knows the device.
    pub(super) fn compile(&self) -> Result<(Vec<u8>, Option<Vec<u8>>)> {
        let known = known();
        let number = 10 * self.capability.0 + self.capability.1;
        // What is Hopper's alone has a name of its own.
        let own = if self.capability == HOPPER { "a" } else { "" };
        let architecture = if known.is_empty() || known.contains(&number) {
            format!("--gpu-architecture=sm_{number}{own}")
        } else {
            // The driver makes code of the newest that is older.
            let older = known.into_iter().filter(|known| *known < number).max();
            format!("--gpu-architecture=compute_{}", older.unwrap_or(number))
        };
        let options: Vec<&str> = std::iter::once(architecture.as_str()).chain(FLAGS).collect();
        let program = Program::new(&self.text, self.file)?;
        // SAFETY: the program was made and is destroyed once, behind this.
        let compiled = unsafe { result::compile_program(program.0, &options) };
        compiled.map_err(|error| self.refused(&program, error))?;
        // SAFETY: as above; it was compiled.
        let ptx = unsafe { result::get_ptx(program.0) }.map_err(|error| self.refused(&program, error))?;
        let mut ptx: Vec<u8> = bytemuck::cast_vec(ptx);
        if ptx.last() != Some(&0) {
            ptx.push(0);
        }
        Ok((ptx, program.machine_code().map_err(|error| self.refused(&program, error))?))
    }

    fn refused(&self, program: &Program, error: result::NvrtcError) -> Error {
        // SAFETY: the program lives.
        let log = unsafe { result::get_program_log(program.0) }.unwrap_or_default();
        let log = String::from_utf8_lossy(bytemuck::cast_slice(&log)).into_owned();
        let log = log.trim_matches(['\0', '\n', ' ']);
        Error::DeviceFailed(format!("NVRTC does not compile kernels/{}.cu: {:?}\n{log}", self.file, error.0))
    }

    /// What the file in the cache is called in front of NVRTC's release.
    fn stem(&self) -> String {
        let key = blake3::hash(format!("{FLAGS:?}\n{}", self.text).as_bytes()).to_hex();
        format!("{}-{}-{}.{}-", self.file, &key[..16], self.capability.0, self.capability.1)
    }

    fn path(&self, (major, minor): Release, ending: &str) -> Option<PathBuf> {
        Some(cache_folder()?.join(format!("{}{major}.{minor}.{ending}", self.stem())))
    }

    /// The file in the cache of the latest release.
    fn latest(&self, ending: &str) -> Option<PathBuf> {
        let stem = self.stem();
        let release = |name: &str| -> Option<Release> {
            let (major, minor) = name.strip_prefix(&stem)?.strip_suffix(ending)?.strip_suffix('.')?.split_once('.')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        };
        let files = std::fs::read_dir(cache_folder()?).ok()?.flatten();
        files
            .filter_map(|file| Some((release(&file.file_name().to_string_lossy())?, file.path())))
            .max()
            .map(|(_, path)| path)
    }

    fn read(&self, path: &Path) -> Option<Vec<u8>> {
        let bytes = std::fs::read(path).ok()?;
        let whole = if path.extension()? == MACHINE { bytes.starts_with(b"\x7fELF") } else { bytes.ends_with(&[0]) };
        whole.then_some(bytes)
    }
}

/// A program of NVRTC's, destroyed with this.
struct Program(sys::nvrtcProgram);

impl Program {
    fn new(text: &str, file: &str) -> Result<Self> {
        let text = CString::new(text).map_err(|_| Error::Device(format!("kernels/{file}.cu has a 0 in it")))?;
        let name = CString::new(format!("{file}.cu")).unwrap_or_default();
        // NVRTC copies both.
        result::create_program(&text, Some(&name))
            .map(Program)
            .map_err(|error| Error::DeviceFailed(format!("NVRTC does not take kernels/{file}.cu: {:?}", error.0)))
    }

    /// None where it was compiled for no device in particular.
    fn machine_code(&self) -> std::result::Result<Option<Vec<u8>>, result::NvrtcError> {
        let mut bytes = 0;
        // SAFETY: the program was compiled; there is room for a number.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &mut bytes) }.result()?;
        if bytes == 0 {
            return Ok(None);
        }
        let mut code = vec![0u8; bytes];
        // SAFETY: as above; there is room for as many bytes as NVRTC said.
        unsafe { sys::nvrtcGetCUBIN(self.0, code.as_mut_ptr().cast::<c_char>()) }.result()?;
        Ok(Some(code))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        // A program that is not destroyed leaves nothing to be done.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// The release of the NVRTC that loads; none where none does.
pub(super) fn release() -> Option<Release> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: asks whether a library of this name loads, and then for two numbers, for which there is room.
    let told = unsafe { sys::is_culib_present() && sys::nvrtcVersion(&mut major, &mut minor).result().is_ok() };
    told.then_some((major, minor))
}

/// The devices that NVRTC makes machine code for, as 80 for compute capability 8.0; empty where it does not tell.
fn known() -> Vec<i32> {
    let mut count = 0;
    // SAFETY: NVRTC loads; there is room for a number.
    if unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }.result().is_err() {
        return Vec::new();
    }
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: there is room for as many numbers as NVRTC said.
    let told = unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result();
    if told.is_ok() { known } else { Vec::new() }
}

/// Writes the cache aside and renames it; a cache that cannot be written is only slower.
fn keep(path: &Path, bytes: &[u8]) {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}.tmp", std::process::id()));
    let aside = PathBuf::from(aside);
    let kept = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&aside, bytes))
        .and_then(|()| std::fs::rename(&aside, path));
    if kept.is_err() {
        let _ = std::fs::remove_file(&aside);
    }
}
