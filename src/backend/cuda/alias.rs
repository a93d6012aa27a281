//! A loaded library under a second name.
//!
//! A program that asks the loader for `libx.so` is given a library that is loaded already if that is the name it calls itself by
//! (its `DT_SONAME`). So a file is written and loaded that calls itself `libx.so`, holds nothing, and needs `libx.so.2`: symbols
//! looked up in it are found in what it needs. No compiler, no link on the library path, no second start of the program.

use std::io::Write;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::error::{Error, Result};

/// Makes the library `of`, which is loaded already, answer to the name `name` as well, until the process ends.
///
/// # Errors
/// A temporary file that cannot be written or loaded.
pub(super) fn provide(name: &str, of: &str) -> Result<()> {
    let path = std::env::temp_dir().join(format!("warpstep-{}-{name}", std::process::id()));
    // What an earlier process of this number may have left is not written into, and not followed where it is a link.
    let _ = std::fs::remove_file(&path);
    std::fs::File::create_new(&path)
        .and_then(|mut file| file.write_all(&image(name, of)))
        .map_err(|error| Error::io("write", &path, error))?;
    // SAFETY: the file holds no code, so nothing runs when it is loaded; what it needs is loaded already.
    let loaded = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
    // What is loaded stays so without its file.
    let removed = std::fs::remove_file(&path);
    let library = loaded.map_err(|error| Error::Device(format!("cannot give {of} the name {name}: {error}")))?;
    std::mem::forget(library);
    removed.map_err(|error| Error::io("remove", &path, error))
}

/// Sizes of the parts of a 64-bit ELF file ("Tool Interface Standard, Executable and Linking Format", and its 64-bit form).
const HEADER: usize = 64;
const SEGMENT: usize = 56;
const SEGMENTS: usize = 3;
const ENTRY: usize = 16;
const ENTRIES: usize = 8;
const SYMBOL: usize = 24;
/// Kinds of segments.
const LOAD: u32 = 1;
const DYNAMIC: u32 = 2;
const STACK: u32 = 0x6474_e551;
/// A segment that is read and written. Not executed: a library without such a stack segment would ask for a stack that is.
const READ_WRITE: u32 = 6;
/// At least a page on every machine.
const PAGE: u64 = 1 << 16;
/// This machine's number.
const MACHINE: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };

/// A shared library that calls itself `name`, needs `of`, and holds nothing else. It is loaded as a whole, at any address.
fn image(name: &str, of: &str) -> Vec<u8> {
    let dynamic = HEADER + SEGMENTS * SEGMENT;
    let symbols = dynamic + ENTRIES * ENTRY;
    let hash = symbols + SYMBOL;
    let strings = hash + 4 * size_of::<u32>();
    let text = format!("\0{name}\0{of}\0");
    let whole = (strings + text.len()) as u64;
    let mut out = Vec::with_capacity(whole as usize);
    // 64 bits, little-endian, version 1.
    out.extend(b"\x7fELF\x02\x01\x01");
    out.resize(16, 0);
    // A shared library; no entry point, no sections.
    out.extend([3, MACHINE].map(u16::to_le_bytes).as_flattened());
    out.extend(1u32.to_le_bytes());
    out.extend([0, HEADER as u64, 0].map(u64::to_le_bytes).as_flattened());
    out.extend(0u32.to_le_bytes());
    out.extend([HEADER, SEGMENT, SEGMENTS, 64, 0, 0].map(|n| (n as u16).to_le_bytes()).as_flattened());
    let segments = [(LOAD, 0, whole, PAGE), (DYNAMIC, dynamic as u64, (ENTRIES * ENTRY) as u64, 8), (STACK, 0, 0, 16)];
    for (kind, at, len, alignment) in segments {
        out.extend([kind, READ_WRITE].map(u32::to_le_bytes).as_flattened());
        out.extend([at, at, at, len, len, alignment].map(u64::to_le_bytes).as_flattened());
    }
    // DT_SONAME, DT_NEEDED, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_NULL.
    let entries =
        [(14, 1), (1, 2 + name.len()), (4, hash), (5, strings), (6, symbols), (10, text.len()), (11, SYMBOL), (0, 0)];
    for (tag, value) in entries {
        out.extend([tag, value as u64].map(u64::to_le_bytes).as_flattened());
    }
    // The symbol that stands for none, and a hash table of one bucket that holds it.
    out.resize(hash, 0);
    out.extend([1u32, 1, 0, 0].map(u32::to_le_bytes).as_flattened());
    out.extend(text.as_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const REAL: &str = "libm.so.6";
    const SECOND: &str = "libwarpstep_second_name.so";

    #[test]
    fn a_library_answers_to_its_second_name() {
        // SAFETY: the C library's own part, whose `floor` takes and gives a double.
        unsafe {
            let real = Library::new(REAL).unwrap();
            assert!(Library::new(SECOND).is_err());
            provide(SECOND, REAL).unwrap();
            let second = Library::new(SECOND).unwrap();
            let floor = second.get::<unsafe extern "C" fn(f64) -> f64>(b"floor").unwrap();
            assert_eq!(floor(2.5), 2.0);
            let same = real.get::<unsafe extern "C" fn(f64) -> f64>(b"floor").unwrap();
            assert_eq!(*floor as usize, *same as usize);
        }
    }
}
