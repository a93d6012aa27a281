//! Fatbins: the container that nvcc puts SASS and PTX in.
//!
//! A header (magic 0xBA55ED50, version, length of the header, length of what follows) and then entries, each with a header of
//! its own: kind (1 is PTX, 2 SASS), version, length of the header, length of the payload, and where that is compressed its
//! length without padding and what it decompresses to. The layout is not documented; it was read off files that nvcc 13.0 made.

use std::io::Read as _;

/// Why a fatbin could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FatbinError {
    /// Not one, or cut short.
    #[error("this is no fatbin, or its end is missing")]
    Malformed,
    /// Its PTX is compressed, and not by Zstandard.
    #[error("the PTX of this fatbin is compressed by LZ4; compile with nvcc --compress-mode=size")]
    Compressed,
    /// It holds SASS alone.
    #[error("this fatbin holds no PTX; compile with -gencode arch=compute_80,code=compute_80")]
    NoPtx,
}

const MAGIC: u32 = 0xba55_ed50;
const PTX: u16 = 1;
/// In an entry's flags: what its payload is compressed by.
const LZ4: u64 = 0x2000;
const ZSTANDARD: u64 = 0x8000;

fn read<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], FatbinError> {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).ok_or(FatbinError::Malformed)
}

fn u16_at(bytes: &[u8], at: usize) -> Result<usize, FatbinError> {
    Ok(usize::from(u16::from_le_bytes(read(bytes, at)?)))
}

fn u32_at(bytes: &[u8], at: usize) -> Result<usize, FatbinError> {
    Ok(u32::from_le_bytes(read(bytes, at)?) as usize)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, FatbinError> {
    Ok(u64::from_le_bytes(read(bytes, at)?))
}

/// Whether these bytes begin as a fatbin does.
pub fn is_fatbin(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC.to_le_bytes())
}

/// Length of a whole fatbin, from the 16 bytes of its header.
///
/// # Errors
/// [`FatbinError::Malformed`].
pub fn length(header: &[u8]) -> Result<usize, FatbinError> {
    if !is_fatbin(header) {
        return Err(FatbinError::Malformed);
    }
    Ok(u16_at(header, 6)? + u64_at(header, 8)? as usize)
}

/// What a frame of Zstandard holds: `length` bytes.
fn decompress(frame: &[u8], length: u64) -> Result<Vec<u8>, FatbinError> {
    let decoder = ruzstd::decoding::StreamingDecoder::new(frame).map_err(|_| FatbinError::Malformed)?;
    let mut out = Vec::new();
    let read = decoder.take(length).read_to_end(&mut out).map_err(|_| FatbinError::Malformed)?;
    if read as u64 == length { Ok(out) } else { Err(FatbinError::Malformed) }
}

/// The PTX text of a fatbin.
///
/// # Errors
/// [`FatbinError`].
pub fn ptx(bytes: &[u8]) -> Result<String, FatbinError> {
    let end = length(bytes)?.min(bytes.len());
    let mut at = u16_at(bytes, 6)?;
    while at + 64 <= end {
        let (kind, header, payload) = (u16_at(bytes, at)?, u32_at(bytes, at + 4)?, u64_at(bytes, at + 8)? as usize);
        if header == 0 {
            return Err(FatbinError::Malformed);
        }
        if kind == usize::from(PTX) {
            let flags = u64_at(bytes, at + 40)?;
            let payload = bytes.get(at + header..at + header + payload).ok_or(FatbinError::Malformed)?;
            let text = if flags & LZ4 != 0 {
                return Err(FatbinError::Compressed);
            } else if flags & ZSTANDARD != 0 {
                let payload = payload.get(..u32_at(bytes, at + 16)?).ok_or(FatbinError::Malformed)?;
                &decompress(payload, u64_at(bytes, at + 56)?)?
            } else {
                payload
            };
            let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
            return String::from_utf8(text.to_vec()).map_err(|_| FatbinError::Malformed);
        }
        at += header + payload;
    }
    Err(FatbinError::NoPtx)
}

#[cfg(test)]
mod tests {
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    /// A fatbin of entries: kind, flags, payload, and what that decompresses to.
    fn fatbin(entries: &[(u16, u64, &[u8], usize)]) -> Vec<u8> {
        let mut body = Vec::new();
        for (kind, flags, payload, whole) in entries {
            let padded = payload.len().next_multiple_of(8);
            let mut header = [0u8; 64];
            header[..2].copy_from_slice(&kind.to_le_bytes());
            header[4..8].copy_from_slice(&64u32.to_le_bytes());
            header[8..16].copy_from_slice(&(padded as u64).to_le_bytes());
            header[16..20].copy_from_slice(&(payload.len() as u32).to_le_bytes());
            header[40..48].copy_from_slice(&flags.to_le_bytes());
            header[56..].copy_from_slice(&(*whole as u64).to_le_bytes());
            body.extend(header);
            body.extend_from_slice(payload);
            body.resize(body.len() + padded - payload.len(), 0);
        }
        let mut out = MAGIC.to_le_bytes().to_vec();
        out.extend([1, 0, 16, 0]);
        out.extend((body.len() as u64).to_le_bytes());
        out.extend(body);
        out
    }

    #[test]
    fn finds_the_text_among_the_entries() {
        assert_eq!(ptx(&fatbin(&[(2, 0, b"sass", 0), (1, 0, b"text\0\0", 0)])), Ok("text".to_owned()));
        assert_eq!(ptx(&fatbin(&[(2, 0, b"sass", 0)])), Err(FatbinError::NoPtx));
        assert_eq!(ptx(&fatbin(&[(1, LZ4, b"text", 4)])), Err(FatbinError::Compressed));
        assert_eq!(ptx(b"\x7fELF"), Err(FatbinError::Malformed));
        let whole = fatbin(&[(1, 0, b"text", 0)]);
        assert_eq!(ptx(&whole[..whole.len() - 2]), Err(FatbinError::Malformed));
    }

    #[test]
    fn decompresses_the_text() {
        let text = "mov.u32 %r1, %tid.x;\n".repeat(9000);
        let frame = compress_to_vec(text.as_bytes(), CompressionLevel::Fastest);
        assert!(frame.len() < text.len() / 2);
        let of = |frame: &[u8], length| ptx(&fatbin(&[(2, ZSTANDARD, b"sass", 9), (1, ZSTANDARD, frame, length)]));
        assert_eq!(of(&frame, text.len()), Ok(text.clone()));
        // It says that it holds more, it is cut short, it is none.
        assert_eq!(of(&frame, text.len() + 1), Err(FatbinError::Malformed));
        assert_eq!(of(&frame[..frame.len() - 9], text.len()), Err(FatbinError::Malformed));
        assert_eq!(of(b"text", 4), Err(FatbinError::Malformed));
    }
}
