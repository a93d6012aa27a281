//! NVIDIA's libraries on this machine: which load, from where, of what version, and what installs the others.
//!
//! Asks with names and symbols of its own rather than through cudarc, which panics where a library or a function is missing.

use std::ffi::{CStr, c_int, c_void};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};

use libloading::os::unix::Library as Loaded;

use super::alias;
use crate::error::{Error, Result};

/// A library of NVIDIA's that Warpstep uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// The driver, which every use of a GPU needs.
    Driver,
    /// Products of matrices.
    CublasLt,
    /// Convolutions.
    Cudnn,
    /// Exchanges between several GPUs.
    Nccl,
    /// The compiler for kernels, where none were embedded when Warpstep was built.
    Nvrtc,
}

/// A library that loads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The name that it was found under: `libcuda.so.1`.
    pub name: String,
    /// The file, links followed; none where the loader does not tell.
    pub path: Option<PathBuf>,
    /// Its version as it tells it; none where it does not.
    pub version: Option<String>,
}

impl Library {
    /// All of them, in the order in which people look for what is missing.
    pub const ALL: [Library; 5] = [Library::Driver, Library::CublasLt, Library::Cudnn, Library::Nccl, Library::Nvrtc];

    /// What people call it.
    pub fn title(self) -> &'static str {
        match self {
            Library::Driver => "driver",
            Library::CublasLt => "cuBLASLt",
            Library::Cudnn => "cuDNN",
            Library::Nccl => "NCCL",
            Library::Nvrtc => "NVRTC",
        }
    }

    /// What it is needed for.
    pub fn purpose(self) -> &'static str {
        match self {
            Library::Driver => "every use of a GPU",
            Library::CublasLt => "products of matrices: almost every model",
            Library::Cudnn => "convolutions",
            Library::Nccl => "several GPUs",
            Library::Nvrtc => "kernels, where Warpstep was built without nvcc",
        }
    }

    /// The command that installs it.
    pub fn install(self) -> &'static str {
        match self {
            Library::Driver => {
                "sudo ubuntu-drivers install (Ubuntu; else https://www.nvidia.com/drivers), 580 or newer"
            }
            Library::CublasLt => "pip install nvidia-cublas",
            Library::Cudnn => "pip install nvidia-cudnn-cu13",
            Library::Nccl => "pip install nvidia-nccl-cu13",
            Library::Nvrtc => "pip install nvidia-cuda-nvrtc==13.*",
        }
    }

    /// The middle of its file's name.
    fn stem(self) -> &'static str {
        match self {
            Library::Driver => "cuda",
            Library::CublasLt => "cublasLt",
            Library::Cudnn => "cudnn",
            Library::Nccl => "nccl",
            Library::Nvrtc => "nvrtc",
        }
    }

    /// The names that it may have, cudarc's first.
    fn names(self) -> Vec<String> {
        let mut names = cudarc::get_lib_name_candidates(self.stem());
        if self == Library::Nccl {
            names.push(NCCL.installed.to_owned());
        }
        names
    }

    /// Looks for it, by loading it.
    pub fn find(self) -> Option<Found> {
        self.names().into_iter().find_map(|name| {
            // SAFETY: NVIDIA's libraries and the emulated device's initialize themselves when they are loaded, as they do for
            // every program that is linked with them.
            let library = unsafe { Loaded::new(&name) }.ok()?;
            let found = Found { path: self.path(&library), version: self.version(&library), name };
            // It stays loaded: some of them do not survive being unloaded.
            std::mem::forget(library);
            Some(found)
        })
    }

    /// Whether it loads.
    pub fn is_present(self) -> bool {
        self.find().is_some()
    }

    /// A function that every version of it has.
    fn landmark(self) -> &'static CStr {
        match self {
            Library::Driver => c"cuDriverGetVersion",
            Library::CublasLt => c"cublasLtGetVersion",
            Library::Cudnn => c"cudnnGetVersion",
            Library::Nccl => c"ncclGetVersion",
            Library::Nvrtc => c"nvrtcVersion",
        }
    }

    fn path(self, library: &Loaded) -> Option<PathBuf> {
        // SAFETY: the symbol is asked for its address alone.
        let landmark = unsafe { library.get::<*mut c_void>(self.landmark().to_bytes_with_nul()) }.ok()?;
        let mut info = MaybeUninit::<libc::Dl_info>::zeroed();
        // SAFETY: any address may be asked about; what is written is a valid `Dl_info` where the answer is not 0.
        let info = unsafe {
            if libc::dladdr(landmark.into_raw().cast_const(), info.as_mut_ptr()) == 0 {
                return None;
            }
            info.assume_init()
        };
        if info.dli_fname.is_null() {
            return None;
        }
        // SAFETY: the loader's own text, which lives as long as the library is loaded.
        let name = unsafe { CStr::from_ptr(info.dli_fname) };
        let path = PathBuf::from(name.to_string_lossy().into_owned());
        Some(path.canonicalize().unwrap_or(path))
    }

    fn version(self, library: &Loaded) -> Option<String> {
        let name = self.landmark().to_bytes_with_nul();
        let (mut first, mut second): (c_int, c_int) = (0, 0);
        // SAFETY: each function's type is the one that NVIDIA documents: of the driver and NCCL, a status and a number by
        // pointer; of NVRTC, two numbers; of the others, a number returned. A status other than 0 leaves nothing to be read.
        unsafe {
            match self {
                Library::Driver | Library::Nccl => {
                    let ask = library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(name).ok()?;
                    if ask(&mut first) != 0 {
                        return None;
                    }
                }
                Library::Nvrtc => {
                    let ask = library.get::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(name).ok()?;
                    if ask(&mut first, &mut second) != 0 {
                        return None;
                    }
                }
                Library::CublasLt | Library::Cudnn => {
                    let ask = library.get::<unsafe extern "C" fn() -> usize>(name).ok()?;
                    first = c_int::try_from(ask()).ok()?;
                }
            }
        }
        Some(match self {
            Library::Driver => format!("CUDA {}.{}", first / 1000, first % 1000 / 10),
            Library::Nvrtc => format!("{first}.{second}"),
            Library::CublasLt | Library::Cudnn | Library::Nccl => parts(first),
        })
    }

    /// Where a folder of Python packages holds it, though the loader does not look there.
    pub fn beside_python(self, folders: &[PathBuf]) -> Option<PathBuf> {
        let start = format!("lib{}.so", self.stem());
        folders.iter().find_map(|folder| {
            let files = std::fs::read_dir(folder).ok()?;
            let mut files: Vec<PathBuf> = files.flatten().map(|file| file.path()).collect();
            files.sort();
            files.into_iter().find(|file| {
                let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                name == start || name.strip_prefix(&start).is_some_and(|rest| rest.starts_with('.'))
            })
        })
    }
}

/// `90102` as `9.1.2`.
fn parts(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// The folders `nvidia/*/lib` of the packages of the Python on the path; none where there is no Python.
pub fn python_folders() -> Vec<PathBuf> {
    let script = "import site, sysconfig; print('\\n'.join([sysconfig.get_path('purelib'), *site.getsitepackages(), \
                  site.getusersitepackages()]))";
    let Ok(output) = std::process::Command::new("python3").args(["-c", script]).output() else { return Vec::new() };
    let mut found = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(packages) = std::fs::read_dir(Path::new(line).join("nvidia")) else { continue };
        found.extend(packages.flatten().map(|package| package.path().join("lib")).filter(|folder| folder.is_dir()));
    }
    found.sort();
    found.dedup();
    found
}

/// A library that is installed under another name than cudarc looks for.
struct Renamed {
    title: &'static str,
    /// What it is installed as.
    installed: &'static str,
    /// What cudarc looks for.
    linked: &'static str,
    /// Whether cudarc finds it.
    ///
    /// # Safety
    /// Asks whether a library loads; nothing of it is called.
    present: unsafe fn() -> bool,
}

/// Packages install its library; the name without a number only comes with a toolkit's developer files.
const NCCL: Renamed = Renamed {
    title: "NCCL",
    installed: "libnccl.so.2",
    linked: "libnccl.so",
    present: cudarc::nccl::sys::is_culib_present,
};

/// CUDA 12.9 was the last toolkit that had it under the older name; version 3 has the same functions.
#[cfg(feature = "nvtx")]
const NVTX: Renamed = Renamed {
    title: "NVTX",
    installed: "libnvtx3interop.so.1",
    linked: "libnvToolsExt.so",
    present: cudarc::nvtx::sys::is_culib_present,
};

impl Renamed {
    /// Makes it loadable by the name that cudarc looks for, where only the other is there. Does nothing where cudarc finds it by
    /// itself, or where it is not there at all. To be called before anything else of cudarc's part for it.
    fn provide(&self) -> Result<()> {
        // SAFETY: as `present` tells.
        if unsafe { (self.present)() } {
            return Ok(());
        }
        // SAFETY: as in `Library::find`.
        let Ok(library) = (unsafe { Loaded::new(self.installed) }) else { return Ok(()) };
        // The alias below needs it for as long as the process lives.
        std::mem::forget(library);
        alias::provide(self.linked, self.installed)?;
        // SAFETY: as above.
        if unsafe { (self.present)() } {
            return Ok(());
        }
        let Renamed { title, installed, linked, .. } = self;
        Err(Error::Device(format!(
            "{title} is here as {installed}, but could not be given the name {linked}: make a link of that name to it in a folder \
             that LD_LIBRARY_PATH names"
        )))
    }
}

/// Makes NCCL loadable by cudarc, where it is there. To be called before anything of cudarc's `nccl`.
///
/// # Errors
/// A temporary file that cannot be written or loaded.
pub fn provide_nccl() -> Result<()> {
    NCCL.provide()
}

/// Makes NVIDIA's library of ranges loadable by cudarc, where it is there. Whether it is.
///
/// # Errors
/// A temporary file that cannot be written or loaded.
#[cfg(feature = "nvtx")]
pub(super) fn provide_nvtx() -> Result<bool> {
    NVTX.provide()?;
    // SAFETY: as `present` tells.
    Ok(unsafe { (NVTX.present)() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_nvidia_writes_them() {
        assert_eq!(parts(130_102), "13.1.2");
        assert_eq!(parts(91_002), "9.10.2");
        assert_eq!(parts(22_803), "2.28.3");
    }

    #[test]
    fn nccl_is_found_by_cudarc_under_the_name_that_packages_install() {
        // A stand-in that calls itself as NCCL's packages call it; the math library is what it holds.
        alias::provide(NCCL.installed, "libm.so.6").unwrap();
        provide_nccl().unwrap();
        // SAFETY: asks whether a library of this name loads; nothing of it is called.
        assert!(unsafe { cudarc::nccl::sys::is_culib_present() });
        assert!(Library::Nccl.is_present());
    }

    #[cfg(feature = "nvtx")]
    #[test]
    fn the_library_of_ranges_is_found_by_cudarc_under_its_present_name() {
        alias::provide(NVTX.installed, "libm.so.6").unwrap();
        assert!(provide_nvtx().unwrap());
    }

    #[test]
    fn a_library_beside_python_is_found_under_a_numbered_name_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["libcudnn_ops.so.9", "libnccl.so.2", "libcudnn.sock"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let folders = [folder.path().to_owned()];
        assert_eq!(Library::Nccl.beside_python(&folders), Some(folder.path().join("libnccl.so.2")));
        assert_eq!(Library::Cudnn.beside_python(&folders), None);
    }
}
