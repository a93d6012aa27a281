//! Writing so that a file is there whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes `bytes` to `path`: aside, flushed to the disk, then renamed over what was there. A link stays one, and what it leads to is
/// written; what is no file, a device or a pipe, is written into.
///
/// # Errors
/// What the operating system refuses; a file is then as it was.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let followed = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let path = followed.as_path();
    if fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        let opened = fs::OpenOptions::new().write(true).open(path);
        return opened.and_then(|mut to| to.write_all(bytes)).map_err(|e| Error::io("write", path, e));
    }
    let aside = aside(path);
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    let written = write().map_err(|e| Error::io("write", path, e)).and_then(|()| rename(&aside, path));
    if written.is_err() {
        // A disk that is full gets its room back.
        let _ = fs::remove_file(&aside);
    }
    written
}

/// Renames `from` to `to` and flushes the folder that holds them.
///
/// # Errors
/// What the operating system refuses.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| Error::io("rename", from, e))?;
    match to.parent() {
        Some(parent) if parent.as_os_str().is_empty() => sync(Path::new(".")),
        Some(parent) => sync(parent),
        None => Ok(()),
    }
}

/// Flushes a file or a folder to the disk.
///
/// # Errors
/// What the operating system refuses.
pub fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io("flush", path, e))
}

/// A hidden name beside `path` that nobody reads.
pub fn aside(path: &Path) -> PathBuf {
    let name = path.file_name().map_or_else(|| "file".into(), |n| n.to_string_lossy().into_owned());
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}
