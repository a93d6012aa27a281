//! The emulated device in the place of a GPU: a folder of stand-ins for NVIDIA's libraries on the library path.
//!
//! The path is read when a process starts, so a process that wants the emulated device starts itself again.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result};

/// The emulator's library.
const LIBRARY: &str = "libwarpstep_emulator.so";

/// The names that programs look for. `libcuda.so` and the like are what linkers call them, the numbered ones what NVIDIA's
/// own packages install.
const NAMES: &[&str] = &[
    "libcuda.so",
    "libcuda.so.1",
    "libcublasLt.so",
    "libcublasLt.so.13",
    "libcudnn.so",
    "libcudnn.so.9",
    "libnccl.so",
    "libnccl.so.2",
];

/// Tells a process that it has been started with the stand-ins: the folder they lie in.
const MARK: &str = "WARPSTEP_EMULATED";

/// Whether this process runs on the emulated device.
pub fn is_active() -> bool {
    std::env::var_os(MARK).is_some()
}

/// The emulator's library: `$WARPSTEP_EMULATOR`, or beside this program, where cargo leaves it.
pub fn find_library() -> Option<PathBuf> {
    let named = std::env::var_os("WARPSTEP_EMULATOR").map(PathBuf::from);
    let program = std::env::current_exe().ok();
    let beside = program.iter().flat_map(|program| program.ancestors().skip(1).take(2)).flat_map(|folder| {
        [folder.to_owned(), folder.join("deps"), folder.join("lib")].map(|folder| folder.join(LIBRARY))
    });
    // Cargo leaves the emulator in one place when it builds and in another when it tests: the newer is the one that fits.
    let newest = || {
        beside.filter(|path| path.is_file()).max_by_key(|path| path.metadata().and_then(|file| file.modified()).ok())
    };
    named.filter(|path| path.is_file()).or_else(newest)
}

/// Starts this process again, with the same arguments, on the emulated device. Comes back only where that fails.
///
/// # Errors
/// No emulator beside this program, or a folder of links that cannot be made.
pub fn start_again() -> Error {
    match prepare() {
        Ok(folder) => {
            let mut path = OsString::from(&folder);
            if let Some(old) = std::env::var_os("LD_LIBRARY_PATH").filter(|old| !old.is_empty()) {
                path.push(":");
                path.push(old);
            }
            let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
            let error = Command::new(&program)
                .args(std::env::args_os().skip(1))
                .env("LD_LIBRARY_PATH", path)
                .env(MARK, &folder)
                .exec();
            Error::io("start", program, error)
        }
        Err(error) => error,
    }
}

/// Makes the folder of stand-ins.
fn prepare() -> Result<PathBuf> {
    let library = find_library().ok_or_else(|| {
        Error::Device(format!(
            "the emulated device was not found ({LIBRARY}): build it with `cargo build --release --workspace`, which leaves it \
             beside the program, or name the file in WARPSTEP_EMULATOR"
        ))
    })?;
    let library = library.canonicalize().map_err(|error| Error::io("find", &library, error))?;
    // One folder for each library, so that programs of different builds do not meet.
    let key = blake3::hash(library.as_os_str().as_encoded_bytes()).to_hex();
    let folder = std::env::temp_dir().join(format!("warpstep-emulated-{}-{}", user(), &key[..12]));
    std::fs::create_dir_all(&folder).map_err(|error| Error::io("create", &folder, error))?;
    for name in NAMES {
        link(&library, &folder.join(name))?;
    }
    Ok(folder)
}

/// Distinguishes the folders of several people on one machine.
fn user() -> String {
    std::env::var("USER").unwrap_or_default().chars().filter(char::is_ascii_alphanumeric).collect()
}

fn link(library: &Path, at: &Path) -> Result<()> {
    if std::fs::read_link(at).is_ok_and(|target| target == library) {
        return Ok(());
    }
    // Aside and renamed: another process may be making the same folder.
    let aside = at.with_extension(format!("{}.tmp", std::process::id()));
    std::os::unix::fs::symlink(library, &aside)
        .and_then(|()| std::fs::rename(&aside, at))
        .map_err(|error| Error::io("create", at, error))
}
