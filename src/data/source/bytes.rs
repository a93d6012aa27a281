//! Whole files, unpacked where they are gzip, and places within files.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use flate2::read::MultiGzDecoder;

use crate::error::{Error, Result};

/// A folder is no file: the system's own words tell neither what was expected nor what to do.
fn must_be_file(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(Error::data(path, "is a folder, expected a file; name one within it"));
    }
    Ok(())
}

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// All bytes of a file as they are. What is no file is told of when it could not be read: to look before is a way more to the server
/// of each of many small files.
pub(crate) fn read_raw(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| must_be_file(path).err().unwrap_or_else(|| Error::io("read", path, e)))
}

/// All bytes of a file; unpacked where it is gzip, whatever its name.
///
/// # Errors
/// A file that cannot be read, or whose gzip stream is damaged or cut short.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = read_raw(path)?;
    if !bytes.starts_with(&GZIP_MAGIC) {
        return Ok(bytes);
    }
    let mut unpacked = Vec::with_capacity(bytes.len().saturating_mul(2));
    MultiGzDecoder::new(&bytes[..]).read_to_end(&mut unpacked).map_err(|e| {
        Error::data(
            path,
            format!(
                "the gzip stream is damaged or cut short after {} unpacked bytes ({e}); fetch the file again",
                unpacked.len()
            ),
        )
    })?;
    Ok(unpacked)
}

/// The text of a UTF-8 file, also gzip, without a byte order mark at its start.
///
/// # Errors
/// As [`read`]; bytes that are not UTF-8, with line and byte.
pub fn read_text(path: &Path) -> Result<String> {
    let mut text = utf8(path, read(path)?)?;
    if text.starts_with('\u{feff}') {
        text.remove(0);
    }
    Ok(text)
}

/// `bytes` of the file `path` as text.
fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let bytes = e.as_bytes();
        let line = bytes[..at].iter().filter(|b| **b == b'\n').count() + 1;
        let byte = bytes.get(at).copied().unwrap_or(0);
        Error::data(
            path,
            format!("not UTF-8 at line {line}: found byte 0x{byte:02x} at offset {at}; convert the file to UTF-8"),
        )
    })
}

/// A file that is read at any place, by any thread, for as long as a run takes. It is not mapped into memory: of a mapped file that is cut
/// short, or that a server loses, a process learns by the signal that ends it, and where places are read at random, the system reads as
/// much around each as it does for those who read on.
#[derive(Debug)]
pub struct PlacedFile {
    file: Arc<File>,
    path: PathBuf,
    /// Bytes of it when it was opened.
    len: u64,
}

impl PlacedFile {
    /// Opens a file.
    ///
    /// # Errors
    /// A file that cannot be opened; a folder.
    pub fn open(path: &Path) -> Result<Self> {
        must_be_file(path)?;
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let len = file.metadata().map_err(|e| Error::io("look at", path, e))?.len();
        Ok(PlacedFile { file: Arc::new(file), path: path.to_path_buf(), len })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of it when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it had no byte when it was opened.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes from number `offset` on (`=`), as many as `out` holds.
    ///
    /// # Errors
    /// A file that is shorter, as one is that was cut since it was opened; what the operating system refuses.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(out, offset).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => Error::data(
                &self.path,
                format!(
                    "ends before byte {}, expected the {} bytes that it had when it was opened; leave data as they are while they are \
                     trained on",
                    offset + out.len() as u64,
                    self.len
                ),
            ),
            _ => Error::io("read", &self.path, e),
        })
    }

    /// What reads all of it ahead.
    pub fn ahead(&self) -> Ahead {
        Ahead(Arc::downgrade(&self.file))
    }
}

/// A file that is to be in the system's memory before any place of it is asked for: one way through takes a small part of the time that
/// as many bytes take place by place.
#[derive(Debug)]
pub struct Ahead(Weak<File>);

impl Ahead {
    /// Reads it once, as long as somebody has it open. What cannot be read is left to whoever needs it.
    pub fn read(&self) {
        let (mut room, mut at) = (vec![0; 1 << 20], 0);
        while let Some(file) = self.0.upgrade() {
            match file.read_at(&mut room, at) {
                Ok(read) if read > 0 => at += read as u64,
                _ => break,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_is_not_utf8_is_told_with_line_and_byte() {
        let error = utf8(Path::new("a.txt"), b"one\ntwo \xe9\n".to_vec()).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("0xe9") && error.contains("offset 8"), "{error}");
    }

    #[test]
    fn a_file_is_read_ahead_once_and_only_while_it_is_open() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("a.bin");
        const BYTES: u64 = 5 << 20;
        std::fs::write(&path, vec![7; BYTES as usize])?;
        // Bytes that this thread has read, by what the system tells.
        let read = || {
            let text = std::fs::read_to_string("/proc/thread-self/io").ok()?;
            text.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse::<u64>().ok())
        };
        let file = PlacedFile::open(&path)?;
        let ahead = file.ahead();
        let Some(before) = read() else {
            println!("skipped: the system does not tell what a thread has read");
            return Ok(());
        };
        ahead.read();
        let once = read().unwrap_or_default() - before;
        assert!((BYTES..BYTES + 10_000).contains(&once), "{once}");
        drop(file);
        ahead.read();
        let after = read().unwrap_or_default() - before - once;
        assert!(after < 10_000, "{after}");
        Ok(())
    }
}
