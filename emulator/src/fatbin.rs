//! Fatbins: the container that nvcc puts SASS and PTX in.
//!
//! A header (magic 0xBA55ED50, version, length of the header, length of what follows) and then entries, each with a header of
//! its own: kind (1 is PTX, 2 SASS), version, length of the header, length of the payload, whose compressed length is 0 where it
//! is stored as it is. The layout is not documented; it was read off files that nvcc 13.0 made.

/// Why a fatbin could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FatbinError {
    /// Not one, or cut short.
    #[error("this is no fatbin, or its end is missing")]
    Malformed,
    /// Its PTX is compressed.
    #[error("the PTX of this fatbin is compressed; compile with nvcc --no-compress")]
    Compressed,
    /// It holds SASS alone.
    #[error("this fatbin holds no PTX; compile with -gencode arch=compute_80,code=compute_80")]
    NoPtx,
}

const MAGIC: u32 = 0xba55_ed50;
const PTX: u16 = 1;
/// In an entry's flags: the payload is compressed (LZ4 or Zstandard).
const COMPRESSED: u64 = 0x2000 | 0x8000;

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
            if u64_at(bytes, at + 40)? & COMPRESSED != 0 {
                return Err(FatbinError::Compressed);
            }
            let text = bytes.get(at + header..at + header + payload).ok_or(FatbinError::Malformed)?;
            let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
            return String::from_utf8(text.to_vec()).map_err(|_| FatbinError::Malformed);
        }
        at += header + payload;
    }
    Err(FatbinError::NoPtx)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fatbin(entries: &[(u16, u64, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (kind, flags, payload) in entries {
            let mut header = vec![0u8; 64];
            header[..2].copy_from_slice(&kind.to_le_bytes());
            header[4..8].copy_from_slice(&64u32.to_le_bytes());
            header[8..16].copy_from_slice(&(payload.len() as u64).to_le_bytes());
            header[40..48].copy_from_slice(&flags.to_le_bytes());
            body.extend(header);
            body.extend_from_slice(payload);
        }
        let mut out = MAGIC.to_le_bytes().to_vec();
        out.extend([1, 0, 16, 0]);
        out.extend((body.len() as u64).to_le_bytes());
        out.extend(body);
        out
    }

    #[test]
    fn finds_the_text_among_the_entries() {
        assert_eq!(ptx(&fatbin(&[(2, 0, b"sass"), (1, 0, b"text\0\0")])), Ok("text".to_owned()));
        assert_eq!(ptx(&fatbin(&[(2, 0, b"sass")])), Err(FatbinError::NoPtx));
        assert_eq!(ptx(&fatbin(&[(1, 0x2000, b"text")])), Err(FatbinError::Compressed));
        assert_eq!(ptx(b"\x7fELF"), Err(FatbinError::Malformed));
        let whole = fatbin(&[(1, 0, b"text")]);
        assert_eq!(ptx(&whole[..whole.len() - 2]), Err(FatbinError::Malformed));
    }
}
