//! Messages on a connection: the number of bytes (`u32`, little endian), a tag, the bytes.

use std::io::{self, Read, Write};
use std::net::TcpStream;

/// Bytes of a message at most: what is larger is damaged.
const MOST: u32 = 64 << 20;

/// Bytes before those of a message.
pub(in crate::parallel) const HEADER: usize = 5;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::parallel) enum Tag {
    /// Rank 0 has everybody.
    Welcome = 1,
    /// Rank 0 wants none of it; the bytes say why.
    Refused = 2,
    /// Part of [`super::Rendezvous::broadcast`].
    Broadcast = 3,
    /// Part of [`super::Rendezvous::gather`].
    Gather = 4,
    /// Part of [`super::Rendezvous::barrier`].
    Barrier = 5,
    /// A word of the watch.
    Watch = 6,
}

const TAGS: [Tag; 6] = [Tag::Welcome, Tag::Refused, Tag::Broadcast, Tag::Gather, Tag::Barrier, Tag::Watch];

/// What stands before this many bytes.
pub(in crate::parallel) fn header(tag: Tag, len: usize) -> io::Result<[u8; HEADER]> {
    let len = u32::try_from(len).ok().filter(|&len| len <= MOST);
    let [a, b, c, d] = len.ok_or_else(|| io::Error::other("the message is too long"))?.to_le_bytes();
    Ok([a, b, c, d, tag as u8])
}

/// Tag and number of bytes.
pub(in crate::parallel) fn parse_header(header: [u8; HEADER]) -> io::Result<(Tag, usize)> {
    let [a, b, c, d, number] = header;
    let len = u32::from_le_bytes([a, b, c, d]);
    let tag = TAGS.into_iter().find(|&tag| tag as u8 == number);
    match tag {
        Some(tag) if len <= MOST => Ok((tag, len as usize)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the bytes are not Warpstep's")),
    }
}

pub(super) fn write(stream: &mut TcpStream, tag: Tag, bytes: &[u8]) -> io::Result<()> {
    // One write, so that a small message is one packet.
    let mut message = header(tag, bytes.len())?.to_vec();
    message.extend_from_slice(bytes);
    stream.write_all(&message)
}

/// Reads no byte more than the message has: whoever goes on with the connection finds the next one whole.
pub(super) fn read(stream: &mut TcpStream) -> io::Result<(Tag, Vec<u8>)> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let (tag, len) = parse_header(header)?;
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes)?;
    Ok((tag, bytes))
}
