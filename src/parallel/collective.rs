//! What several processes do together: sums, gatherings, copies from one to all.

use std::ops::Range;

use half::bf16;

use crate::backend::{HostSlice, Number, Slice};
use crate::error::{Error, Result};

/// The processes that train one model, and what they do together. Every process makes the same calls in the same order, with slices
/// of the same length and type.
///
/// A collective [on a stream](Collective::is_queued) takes slices of its device, and calls queue their work behind
/// [`Collective::fork`]; any other takes slices of the host, and calls return when they are done.
pub trait Collective: Send + Sync {
    /// What carries it: `MPI`, `NCCL`, `one process`.
    fn name(&self) -> &'static str;

    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// How many processes there are.
    fn world(&self) -> usize;

    /// Whether calls with slices of a device queue work that can be recorded with the step.
    fn is_queued(&self) -> bool {
        false
    }

    /// Whether processes leave it as the last of what they do, after the [watch](super::watch::Watch) over them has ended: where what started
    /// them watches over that itself. Any other is left while the watch goes on, which tells of a process that fails there.
    fn is_left_last(&self) -> bool {
        false
    }

    /// `values = sum over ranks of values`: the same bits in every process.
    ///
    /// # Errors
    /// A process or a network that failed.
    fn all_reduce_sum(&self, values: Slice<'_>) -> Result<()>;

    /// `values[shards[rank]] = sum over ranks of values[shards[rank]]`; what becomes of the other elements is open. A shard a rank,
    /// one after the other, without gaps.
    ///
    /// # Errors
    /// A process or a network that failed.
    fn reduce_scatter_sum(&self, values: Slice<'_>, shards: &[Range<usize>]) -> Result<()>;

    /// `values[shards[r]] = those of rank r`, for every r. A shard a rank, one after the other, without gaps.
    ///
    /// # Errors
    /// A process or a network that failed.
    fn all_gather(&self, values: Slice<'_>, shards: &[Range<usize>]) -> Result<()>;

    /// `values = those of rank root`.
    ///
    /// # Errors
    /// A process or a network that failed.
    fn broadcast(&self, values: Slice<'_>, root: usize) -> Result<()>;

    /// Sends `send` to `partner`, and receives `receive` from it, which does the same at the same time.
    ///
    /// # Errors
    /// A process or a network that failed.
    fn swap(&self, partner: usize, send: Slice<'_>, receive: Slice<'_>) -> Result<()>;

    /// Returns when every process has called it.
    ///
    /// # Errors
    /// A process or a network that failed.
    fn barrier(&self) -> Result<()>;

    /// `to += from`, in f32, in the order of what this collective has queued.
    ///
    /// # Errors
    /// Slices of other types or of different lengths, or a device that failed.
    fn add(&self, to: Slice<'_>, from: Slice<'_>) -> Result<()> {
        match (host_slice(self.name(), to)?, host_slice(self.name(), from)?) {
            (HostSlice::F32(to), HostSlice::F32(from)) if to.len() == from.len() => {
                to.iter_mut().zip(&*from).for_each(|(to, &from)| *to += from);
                Ok(())
            }
            (to, from) => Err(other_types("add", to.number(), to.len(), from.number(), from.len())),
        }
    }

    /// `to = from`, from f32 to bf16 (to the nearest) or from bf16 to f32, in the order of what this collective has queued.
    ///
    /// # Errors
    /// As [`Collective::add`].
    fn convert(&self, to: Slice<'_>, from: Slice<'_>) -> Result<()> {
        match (host_slice(self.name(), to)?, host_slice(self.name(), from)?) {
            (HostSlice::Bf16(to), HostSlice::F32(from)) if to.len() == from.len() => {
                to.iter_mut().zip(&*from).for_each(|(to, &from)| *to = bf16::from_f32(from));
                Ok(())
            }
            (HostSlice::F32(to), HostSlice::Bf16(from)) if to.len() == from.len() => {
                to.iter_mut().zip(&*from).for_each(|(to, from)| *to = from.to_f32());
                Ok(())
            }
            (to, from) => Err(other_types("convert", to.number(), to.len(), from.number(), from.len())),
        }
    }

    /// `to = from`, of one type, in the order of what this collective has queued.
    ///
    /// # Errors
    /// As [`Collective::add`].
    fn copy(&self, to: Slice<'_>, from: Slice<'_>) -> Result<()> {
        let (mut to, mut from) = (host_slice(self.name(), to)?, host_slice(self.name(), from)?);
        if (to.number(), to.len()) != (from.number(), from.len()) {
            return Err(other_types("copy", to.number(), to.len(), from.number(), from.len()));
        }
        to.bytes_mut().copy_from_slice(from.bytes_mut());
        Ok(())
    }

    /// Ends what waits for other processes, in whichever thread, with an error. Nothing can be done together afterwards.
    fn abort(&self) {}

    /// Work that is queued from now on by this collective begins after what the device has queued so far.
    ///
    /// # Errors
    /// A device that failed.
    fn fork(&self) -> Result<()> {
        Ok(())
    }

    /// Work that the device queues from now on begins after what this collective has queued so far.
    ///
    /// # Errors
    /// A device that failed.
    fn join(&self) -> Result<()> {
        Ok(())
    }

    /// Remembers what this collective has queued so far by a number below 2 [`IN_FLIGHT`](crate::backend::IN_FLIGHT).
    ///
    /// # Errors
    /// A number that there is not, or a device that failed.
    fn mark(&self, _number: usize) -> Result<()> {
        Ok(())
    }

    /// Work that the device queues from now on begins after what was remembered last by this number ([`Collective::mark`]).
    ///
    /// # Errors
    /// As [`Collective::mark`].
    fn join_mark(&self, _number: usize) -> Result<()> {
        Ok(())
    }
}

/// Slices that an operation cannot take together.
pub(super) fn other_types(operation: &str, to: Number, to_len: usize, from: Number, from_len: usize) -> Error {
    let found = format!("{from_len} of {from:?} and {to_len} of {to:?}");
    Error::shape(operation, "two slices of one length, of types that it knows", found)
}

/// The slice as one of the host's, where a collective takes no other.
///
/// # Errors
/// A slice of a device.
pub fn host_slice<'a>(name: &str, values: Slice<'a>) -> Result<HostSlice<'a>> {
    match values {
        Slice::Host(values) => Ok(values),
        Slice::Device(_) => Err(Error::shape(name, "memory of the host", "memory of a device")),
    }
}

/// The bytes of every process, in the order of ranks. They may differ in number.
///
/// # Errors
/// A process or a network that failed.
pub fn gather(collective: &dyn Collective, of_this: &[u8]) -> Result<Vec<Vec<u8>>> {
    let (rank, world) = (collective.rank(), collective.world());
    let mut lens = vec![0u8; 8 * world];
    lens[8 * rank..8 * (rank + 1)].copy_from_slice(&(of_this.len() as u64).to_le_bytes());
    let each: Vec<Range<usize>> = (0..world).map(|r| 8 * r..8 * (r + 1)).collect();
    collective.all_gather(lens.as_mut_slice().into(), &each)?;
    let mut shards = Vec::with_capacity(world);
    let mut end = 0;
    for len in lens.as_chunks::<8>().0 {
        let start = end;
        end += u64::from_le_bytes(*len) as usize;
        shards.push(start..end);
    }
    let mut all = vec![0u8; end];
    all[shards[rank].clone()].copy_from_slice(of_this);
    collective.all_gather(all.as_mut_slice().into(), &shards)?;
    Ok(shards.into_iter().map(|shard| all[shard].to_vec()).collect())
}

/// The bytes of process `root`, in all.
///
/// # Errors
/// A process or a network that failed.
pub fn broadcast(collective: &dyn Collective, root: usize, bytes: &mut Vec<u8>) -> Result<()> {
    let mut len = (bytes.len() as u64).to_le_bytes();
    collective.broadcast(len.as_mut_slice().into(), root)?;
    bytes.resize(u64::from_le_bytes(len) as usize, 0);
    collective.broadcast(bytes.as_mut_slice().into(), root)
}

/// What every process got, or the first error of any: all go on, or all end, and one says why.
///
/// # Errors
/// The process's own error where no process before it has one of its own; else [`Error::Peer`]. A network that failed.
pub fn agree<T>(collective: &dyn Collective, own: Result<T>) -> Result<T> {
    if collective.world() == 1 {
        return own;
    }
    // Words of its own count before a peer's, which that one says: processes may have agreed on them within.
    let told = own.as_ref().err().map(|error| {
        let of_peer = u8::from(matches!(error, Error::Peer { .. }));
        [&[of_peer], error.for_peers().as_slice()].concat()
    });
    let all = gather(collective, &told.unwrap_or_default())?;
    let failed = all.iter().enumerate().filter_map(|(rank, told)| Some((rank, told.split_first()?)));
    match failed.min_by_key(|(_, (of_peer, _))| **of_peer) {
        Some((rank, (_, told))) if rank != collective.rank() => Err(Error::of_peer(rank, told)),
        _ => own,
    }
}

/// Whether it is so in any process.
///
/// # Errors
/// A process or a network that failed.
pub fn any(collective: &dyn Collective, own: bool) -> Result<bool> {
    Ok(gather(collective, &[u8::from(own)])?.concat().contains(&1))
}

/// One process, which has nobody to talk to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Single;

impl Collective for Single {
    fn name(&self) -> &'static str {
        "one process"
    }

    fn rank(&self) -> usize {
        0
    }

    fn world(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, _: Slice<'_>) -> Result<()> {
        Ok(())
    }

    fn reduce_scatter_sum(&self, _: Slice<'_>, _: &[Range<usize>]) -> Result<()> {
        Ok(())
    }

    fn all_gather(&self, _: Slice<'_>, _: &[Range<usize>]) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, _: Slice<'_>, _: usize) -> Result<()> {
        Ok(())
    }

    fn swap(&self, partner: usize, _: Slice<'_>, _: Slice<'_>) -> Result<()> {
        Err(Error::shape("swap", "a partner among 1 process", format!("process {partner}")))
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}
