//! What ranks and the hub say to each other, over a TCP connection of the loopback interface.

use std::io::{self, Read, Write};

/// Numbers of NCCL's results.
pub(super) mod status {
    pub const SUCCESS: i32 = 0;
    pub const UNHANDLED_CUDA_ERROR: i32 = 1;
    pub const SYSTEM_ERROR: i32 = 2;
    pub const INTERNAL_ERROR: i32 = 3;
    pub const INVALID_ARGUMENT: i32 = 4;
    pub const INVALID_USAGE: i32 = 5;
    pub const REMOTE_ERROR: i32 = 6;
}

/// Why something failed: NCCL's result, and a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub status: i32,
    pub text: String,
}

pub(super) fn failure(status: i32, text: impl Into<String>) -> Failure {
    Failure { status, text: text.into() }
}

/// What a call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    Reduce,
    Send,
    Receive,
}

impl Kind {
    const ALL: [Kind; 7] = [
        Kind::AllReduce,
        Kind::ReduceScatter,
        Kind::AllGather,
        Kind::Broadcast,
        Kind::Reduce,
        Kind::Send,
        Kind::Receive,
    ];

    fn name(self) -> &'static str {
        match self {
            Kind::AllReduce => "all_reduce",
            Kind::ReduceScatter => "reduce_scatter",
            Kind::AllGather => "all_gather",
            Kind::Broadcast => "broadcast",
            Kind::Reduce => "reduce",
            Kind::Send => "send",
            Kind::Receive => "receive",
        }
    }
}

/// A call as ranks must agree on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub kind: Kind,
    /// `ncclDataType_t`.
    pub ty: u8,
    /// `ncclRedOp_t`: 0 to 4.
    pub op: u8,
    /// The root, or the peer.
    pub root: u32,
    /// Values, as the call's `count` has it.
    pub count: u64,
}

impl std::fmt::Display for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ty = super::reduce::name(self.ty);
        write!(f, "{} of {} {ty}", self.kind.name(), self.count)?;
        match self.kind {
            Kind::AllReduce | Kind::ReduceScatter => write!(f, " by operation {}", self.op),
            Kind::Reduce => write!(f, " by operation {} to rank {}", self.op, self.root),
            Kind::Broadcast => write!(f, " from rank {}", self.root),
            Kind::Send => write!(f, " to rank {}", self.root),
            Kind::Receive => write!(f, " from rank {}", self.root),
            Kind::AllGather => Ok(()),
        }
    }
}

pub(super) enum Message {
    /// A rank joins: of how many, on which device, and the secret of the id.
    Hello {
        rank: u32,
        ranks: u32,
        device: u32,
        token: [u8; 16],
    },
    /// All have joined.
    Welcome,
    Work {
        id: u64,
        header: Header,
        data: Vec<u8>,
    },
    Done {
        id: u64,
        data: Vec<u8>,
    },
    Failed(Failure),
    /// A rank is done, in order.
    Goodbye,
    /// A rank gives up.
    Abort,
}

fn frame(kind: u8, parts: &[&[u8]]) -> Vec<u8> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let mut out = Vec::with_capacity(9 + len);
    out.push(kind);
    out.extend((len as u64).to_le_bytes());
    parts.iter().for_each(|part| out.extend_from_slice(part));
    out
}

impl Message {
    pub fn send(&self, to: &mut impl Write) -> io::Result<()> {
        let bytes = match self {
            Message::Hello { rank, ranks, device, token } => {
                frame(0, &[&rank.to_le_bytes(), &ranks.to_le_bytes(), &device.to_le_bytes(), token])
            }
            Message::Welcome => frame(1, &[]),
            Message::Work { id, header, data } => frame(
                2,
                &[
                    &id.to_le_bytes(),
                    &[header.kind as u8, header.ty, header.op],
                    &header.root.to_le_bytes(),
                    &header.count.to_le_bytes(),
                    data,
                ],
            ),
            Message::Done { id, data } => frame(3, &[&id.to_le_bytes(), data]),
            Message::Failed(Failure { status, text }) => frame(4, &[&status.to_le_bytes(), text.as_bytes()]),
            Message::Goodbye => frame(5, &[]),
            Message::Abort => frame(6, &[]),
        };
        to.write_all(&bytes)
    }

    pub fn receive(from: &mut impl Read) -> io::Result<Message> {
        let mut head = [0; 9];
        from.read_exact(&mut head)?;
        let (kind, len) = (head[0], u64::from_le_bytes(take(&head, 1)?));
        let mut body = Vec::new();
        from.take(len).read_to_end(&mut body)?;
        if body.len() as u64 != len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let word = |at| Ok::<u32, io::Error>(u32::from_le_bytes(take(&body, at)?));
        Ok(match kind {
            0 => Message::Hello { rank: word(0)?, ranks: word(4)?, device: word(8)?, token: take(&body, 12)? },
            1 => Message::Welcome,
            2 => {
                let [kind, ty, op] = take(&body, 8)?;
                let kind = *Kind::ALL.get(usize::from(kind)).ok_or(io::ErrorKind::InvalidData)?;
                let header = Header { kind, ty, op, root: word(11)?, count: u64::from_le_bytes(take(&body, 15)?) };
                let id = u64::from_le_bytes(take(&body, 0)?);
                Message::Work { id, header, data: body.split_off(23) }
            }
            3 => {
                let id = u64::from_le_bytes(take(&body, 0)?);
                Message::Done { id, data: body.split_off(8) }
            }
            4 => {
                let status = i32::from_le_bytes(take(&body, 0)?);
                Message::Failed(Failure { status, text: String::from_utf8_lossy(&body[4..]).into_owned() })
            }
            5 => Message::Goodbye,
            6 => Message::Abort,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        })
    }
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
