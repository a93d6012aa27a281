//! Whole files, unpacked where they are gzip, and mapped files.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use memmap2::Mmap;

use crate::error::{Error, Result};

/// A folder is no file: the system's own words tell neither what was expected nor what to do.
pub(crate) fn must_be_file(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(Error::data(path, "is a folder, expected a file; name one within it"));
    }
    Ok(())
}

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// All bytes of a file; unpacked where it is gzip, whatever its name.
///
/// # Errors
/// A file that cannot be read, or whose gzip stream is damaged or cut short.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    must_be_file(path)?;
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
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

/// The file mapped into memory, to be read only.
///
/// # Errors
/// A file that cannot be opened or mapped.
pub fn map(path: &Path) -> Result<Mmap> {
    must_be_file(path)?;
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    // SAFETY: the mapping is read-only and private to this process, and nothing here writes to the file. Another process
    // that shortens the file while it is mapped would end this one by SIGBUS; it cannot make it read foreign memory.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_is_not_utf8_is_told_with_line_and_byte() {
        let error = utf8(Path::new("a.txt"), b"one\ntwo \xe9\n".to_vec()).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("0xe9") && error.contains("offset 8"), "{error}");
    }
}
