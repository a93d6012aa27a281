//! The collectives, sends and receives, their arguments checked before anything is queued.

use std::ffi::c_int;
use std::sync::PoisonError;

use super::rank::{Ask, Comm};
use super::reduce;
use super::wire::{Header, Kind, failure, status};
use super::{Call, GROUP, call, find, queue};
use crate::memory::{HOST, Memory};

pub(super) fn type_of(ty: c_int) -> Call<(u8, usize)> {
    let known = u8::try_from(ty).ok().and_then(|ty| Some((ty, reduce::bytes(ty)?)));
    known.ok_or_else(|| failure(status::INVALID_ARGUMENT, format!("{ty} is no type of values")))
}

/// A buffer lies whole within the memory of the communicator's device.
pub(super) fn check_buffer(comm: &Comm, what: &str, address: u64, bytes: usize) -> Call<()> {
    let wrong = |text: String| Err(failure(status::INVALID_ARGUMENT, text));
    if bytes == 0 {
        return Ok(());
    }
    match Memory::global().range(address) {
        Some((_, _, device)) if device != comm.device && device != HOST => wrong(format!(
            "{what} at {address:#x} is memory of device {device}; the communicator's rank {} has device {}",
            comm.rank, comm.device
        )),
        Some((start, len, _)) if address + bytes as u64 <= start + len as u64 => Ok(()),
        _ => wrong(format!("{what} of {bytes} bytes at {address:#x} lies in no allocation")),
    }
}

/// A call's arguments as C hands them over.
struct Arguments {
    kind: Kind,
    from: u64,
    to: u64,
    count: usize,
    ty: c_int,
    op: c_int,
    root: c_int,
    comm: usize,
    stream: usize,
}

/// Checks a call and queues it, or keeps it until its group ends.
fn submit(arguments: &Arguments) -> c_int {
    call(|| {
        let Arguments { kind, from, to, count, ty, op, root, comm, stream } = *arguments;
        let comm = find(comm)?;
        let (ty, size) = type_of(ty)?;
        let wrong = |text: String| Err(failure(status::INVALID_ARGUMENT, text));
        if root < 0 || root as u32 >= comm.ranks {
            return wrong(format!("rank {root} of {} ranks", comm.ranks));
        }
        let own = root as u32 == comm.rank;
        if matches!(kind, Kind::Send | Kind::Receive) && own && comm.ranks == 1 {
            return Err(failure(status::INVALID_USAGE, "a rank sends to itself, alone"));
        }
        let factor = match u8::try_from(op) {
            Ok(op) if op < reduce::OPERATIONS => None,
            _ => {
                let factors = comm.factors.lock().unwrap_or_else(PoisonError::into_inner);
                match factors.get(&op) {
                    Some((of, factor)) if *of == ty => Some(factor.clone()),
                    Some(_) => return wrong(format!("operation {op} was made for another type")),
                    None => return wrong(format!("{op} is no operation of this communicator")),
                }
            }
        };
        let (ranks, bytes) = (comm.ranks as usize, count * size);
        let (sent, received) = match kind {
            Kind::AllReduce => (bytes, bytes),
            Kind::ReduceScatter => (bytes * ranks, bytes),
            Kind::AllGather => (bytes, bytes * ranks),
            Kind::Broadcast => (if own { bytes } else { 0 }, bytes),
            Kind::Reduce => (bytes, if own { bytes } else { 0 }),
            Kind::Send => (bytes, 0),
            Kind::Receive => (0, bytes),
        };
        check_buffer(&comm, "what is sent", from, sent)?;
        check_buffer(&comm, "what is received", to, received)?;
        if let Some(failed) = comm.failed() {
            return Err(failed);
        }
        let op = if factor.is_some() { reduce::SUM } else { op as u8 };
        let root = root as u32;
        let header = Header { kind, ty, op, root, count: count as u64 };
        let ask = Ask { header, from: (from, sent), to: (to, received), factor };
        let grouped = GROUP.with_borrow(|group| group.depth > 0);
        if grouped {
            GROUP.with_borrow_mut(|group| group.calls.push((stream, comm, ask)));
            return Ok(());
        }
        queue(vec![(stream, comm, ask)])
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclAllReduce(
    from: u64,
    to: u64,
    count: usize,
    ty: c_int,
    op: c_int,
    comm: usize,
    stream: usize,
) -> c_int {
    submit(&Arguments { kind: Kind::AllReduce, from, to, count, ty, op, root: 0, comm, stream })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclReduceScatter(
    from: u64,
    to: u64,
    count: usize,
    ty: c_int,
    op: c_int,
    comm: usize,
    stream: usize,
) -> c_int {
    submit(&Arguments { kind: Kind::ReduceScatter, from, to, count, ty, op, root: 0, comm, stream })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclAllGather(from: u64, to: u64, count: usize, ty: c_int, comm: usize, stream: usize) -> c_int {
    submit(&Arguments { kind: Kind::AllGather, from, to, count, ty, op: 0, root: 0, comm, stream })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclBroadcast(
    from: u64,
    to: u64,
    count: usize,
    ty: c_int,
    root: c_int,
    comm: usize,
    stream: usize,
) -> c_int {
    submit(&Arguments { kind: Kind::Broadcast, from, to, count, ty, op: 0, root, comm, stream })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclBcast(buffer: u64, count: usize, ty: c_int, root: c_int, comm: usize, stream: usize) -> c_int {
    ncclBroadcast(buffer, buffer, count, ty, root, comm, stream)
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "the library's own list")]
pub extern "C" fn ncclReduce(
    from: u64,
    to: u64,
    count: usize,
    ty: c_int,
    op: c_int,
    root: c_int,
    comm: usize,
    stream: usize,
) -> c_int {
    submit(&Arguments { kind: Kind::Reduce, from, to, count, ty, op, root, comm, stream })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclSend(from: u64, count: usize, ty: c_int, peer: c_int, comm: usize, stream: usize) -> c_int {
    submit(&Arguments { kind: Kind::Send, from, to: 0, count, ty, op: 0, root: peer, comm, stream })
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclRecv(to: u64, count: usize, ty: c_int, peer: c_int, comm: usize, stream: usize) -> c_int {
    submit(&Arguments { kind: Kind::Receive, from: 0, to, count, ty, op: 0, root: peer, comm, stream })
}
