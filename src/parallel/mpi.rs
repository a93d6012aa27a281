//! Processes that speak MPI (Open MPI or MPICH), each with slices of its host's memory.
//!
//! Calls go to the library as the `mpi` crate binds it; every status is checked. MPI's own handler of errors, which ends the
//! process without a word of ours, is replaced by one that returns them.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};
use mpi::ffi;

use super::collective::{Collective, host_slice};
use crate::backend::{Number, Slice};
use crate::error::{Error, Result};

/// Elements of one call at most: MPI counts them in an `int`.
const MOST: usize = 1 << 28;

/// All processes that `mpirun`, or what took its place, started.
pub struct Mpi {
    /// Held while the library works: the gradients' thread and the trainer's call it in turn.
    calls: Mutex<Operations>,
    rank: usize,
    world: usize,
}

/// Sums of types that MPI does not know.
struct Operations {
    bf16: ffi::MPI_Op,
    f16: ffi::MPI_Op,
}

// SAFETY: handles of MPI name things of the whole process; they are used while `calls` is locked.
unsafe impl Send for Operations {}

fn check(action: &str, status: c_int) -> Result<()> {
    if status == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut len = 0;
    // SAFETY: the text has the room that MPI asks for.
    let told = unsafe { ffi::MPI_Error_string(status, text.as_mut_ptr().cast(), &mut len) };
    let text = if told == ffi::MPI_SUCCESS as c_int {
        String::from_utf8_lossy(&text[..len as usize]).into_owned()
    } else {
        format!("status {status}")
    };
    Err(Error::Collective(format!("MPI cannot {action}: {text}")))
}

/// `inout += in`, element by element, of numbers that MPI moves as 16 bits.
macro_rules! sum_of_halves {
    ($name:ident, $ty:ty) => {
        unsafe extern "C" fn $name(from: *mut c_void, to: *mut c_void, len: *mut c_int, _: *mut ffi::MPI_Datatype) {
            // SAFETY: MPI hands over two arrays of `len` elements of the type that the sum was asked for, aligned as that is.
            let (from, to) = unsafe {
                let len = *len as usize;
                (
                    std::slice::from_raw_parts(from.cast::<$ty>(), len),
                    std::slice::from_raw_parts_mut(to.cast::<$ty>(), len),
                )
            };
            for (to, from) in to.iter_mut().zip(from) {
                *to = <$ty>::from_f32(to.to_f32() + from.to_f32());
            }
        }
    };
}
sum_of_halves!(sum_bf16, bf16);
sum_of_halves!(sum_f16, f16);

impl Mpi {
    /// Joins the processes. Once in a process.
    ///
    /// # Errors
    /// An MPI that cannot be started, or that cannot be called by several threads in turn.
    pub fn join() -> Result<Self> {
        // SAFETY: the constants and the arguments are those that MPI documents; `MPI_Init_thread` takes null arguments since MPI 2.
        unsafe {
            let mut initialized = 0;
            check("tell whether it runs", ffi::MPI_Initialized(&mut initialized))?;
            if initialized != 0 {
                return Err(Error::Device("MPI runs already in this process; join it once".into()));
            }
            let mut provided = 0;
            let wanted = ffi::RSMPI_THREAD_SERIALIZED;
            check("start", ffi::MPI_Init_thread(std::ptr::null_mut(), std::ptr::null_mut(), wanted, &mut provided))?;
            if provided < wanted {
                return Err(Error::Device(
                    "this MPI cannot be called by several threads in turn (MPI_THREAD_SERIALIZED); expected one that can, as \
                     Open MPI and MPICH are by default"
                        .into(),
                ));
            }
            let comm = ffi::RSMPI_COMM_WORLD;
            check("return errors", ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN))?;
            let (mut rank, mut world) = (0, 0);
            check("tell the rank", ffi::MPI_Comm_rank(comm, &mut rank))?;
            check("tell the number of processes", ffi::MPI_Comm_size(comm, &mut world))?;
            let mut operations = Operations { bf16: ffi::RSMPI_SUM, f16: ffi::RSMPI_SUM };
            check("make a sum", ffi::MPI_Op_create(Some(sum_bf16), 1, &mut operations.bf16))?;
            check("make a sum", ffi::MPI_Op_create(Some(sum_f16), 1, &mut operations.f16))?;
            Ok(Mpi { calls: Mutex::new(operations), rank: rank as usize, world: world as usize })
        }
    }

    fn calls(&self) -> MutexGuard<'_, Operations> {
        // A thread that panicked left no call half done.
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn partner(&self, partner: usize) -> Result<c_int> {
        if partner < self.world {
            return Ok(partner as c_int);
        }
        Err(Error::shape("MPI", format!("a rank below {}", self.world), partner.to_string()))
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        let mut operations = self.calls();
        // SAFETY: made by `join`, and used by nobody any more. A process that could not finish has said why before.
        unsafe {
            ffi::MPI_Op_free(&mut operations.bf16);
            ffi::MPI_Op_free(&mut operations.f16);
            ffi::MPI_Finalize();
        }
    }
}

fn datatype(number: Number) -> ffi::MPI_Datatype {
    // SAFETY: constants of the library, set before it is started.
    unsafe {
        match number {
            Number::U8 => ffi::RSMPI_UINT8_T,
            Number::Bf16 | Number::F16 => ffi::RSMPI_UINT16_T,
            Number::F32 => ffi::RSMPI_FLOAT,
            Number::F64 => ffi::RSMPI_DOUBLE,
        }
    }
}

impl Operations {
    fn sum(&self, number: Number) -> Result<ffi::MPI_Op> {
        match number {
            Number::Bf16 => Ok(self.bf16),
            Number::F16 => Ok(self.f16),
            // SAFETY: a constant of the library.
            Number::F32 | Number::F64 => Ok(unsafe { ffi::RSMPI_SUM }),
            Number::U8 => Err(Error::shape("MPI", "numbers to add", "bytes")),
        }
    }
}

/// Counts and places of shards, as MPI wants them.
fn counts(shards: &[Range<usize>], world: usize) -> Result<(Vec<c_int>, Vec<c_int>)> {
    let fits = |value: usize| c_int::try_from(value).ok();
    let pairs: Option<Vec<_>> = shards.iter().map(|s| Some((fits(s.len())?, fits(s.start)?))).collect();
    match pairs {
        Some(pairs) if shards.len() == world && shards.windows(2).all(|two| two[0].end == two[1].start) => {
            Ok(pairs.into_iter().unzip())
        }
        _ => Err(Error::shape("MPI", format!("{world} shards one after the other, below 2^31"), format!("{shards:?}"))),
    }
}

impl Collective for Mpi {
    fn name(&self) -> &'static str {
        "MPI"
    }

    /// Some launchers stumble over processes that have left MPI, live on, and then end with an error one by one: Open MPI 4.1's mpirun
    /// with PMIx 4.2 crashed, or did not end, in an eighth of such ends.
    fn is_left_last(&self) -> bool {
        true
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn all_reduce_sum(&self, values: Slice<'_>) -> Result<()> {
        let mut values = host_slice("MPI", values)?;
        let calls = self.calls();
        let number = values.number();
        let (kind, sum) = (datatype(number), calls.sum(number)?);
        for part in values.bytes_mut().chunks_mut(MOST * number.bytes()) {
            let own = aligned_copy(part);
            let len = (part.len() / number.bytes()) as c_int;
            // SAFETY: both arrays hold `len` elements; all processes make the same call.
            let status = unsafe {
                let to = part.as_mut_ptr().cast();
                ffi::MPI_Allreduce(own.as_ptr().cast(), to, len, kind, sum, ffi::RSMPI_COMM_WORLD)
            };
            check("sum over processes", status)?;
        }
        Ok(())
    }

    fn reduce_scatter_sum(&self, values: Slice<'_>, shards: &[Range<usize>]) -> Result<()> {
        let mut values = host_slice("MPI", values)?;
        let (counts, _) = counts(shards, self.world)?;
        let number = values.number();
        let calls = self.calls();
        let (kind, sum) = (datatype(number), calls.sum(number)?);
        let bytes = values.bytes_mut();
        let (first, own) = (shards[0].start, &shards[self.rank]);
        let all = aligned_copy(part_of(bytes, &(first..shards[self.world - 1].end), number)?);
        let own = part_of(bytes, own, number)?;
        // SAFETY: `all` holds the elements of all shards, `own` those of this process's; all processes make the same call.
        let status = unsafe {
            let to = own.as_mut_ptr().cast();
            ffi::MPI_Reduce_scatter(all.as_ptr().cast(), to, counts.as_ptr(), kind, sum, ffi::RSMPI_COMM_WORLD)
        };
        check("sum over processes", status)
    }

    fn all_gather(&self, values: Slice<'_>, shards: &[Range<usize>]) -> Result<()> {
        let mut values = host_slice("MPI", values)?;
        let (counts, places) = counts(shards, self.world)?;
        if counts.iter().all(|&count| count == 0) {
            // The address of an empty array may be the one that stands for something else in MPI.
            return Ok(());
        }
        let number = values.number();
        let _calls = self.calls();
        let kind = datatype(number);
        let bytes = values.bytes_mut();
        let own = aligned_copy(part_of(bytes, &shards[self.rank], number)?);
        let all = part_of(bytes, &(0..shards[self.world - 1].end), number)?;
        // SAFETY: `own` holds this process's shard, `all` every shard where its place says; all processes make the same call.
        let status = unsafe {
            let (from, len) = (own.as_ptr().cast(), counts[self.rank]);
            let to = all.as_mut_ptr().cast();
            let comm = ffi::RSMPI_COMM_WORLD;
            ffi::MPI_Allgatherv(from, len, kind, to, counts.as_ptr(), places.as_ptr(), kind, comm)
        };
        check("gather from processes", status)
    }

    fn broadcast(&self, values: Slice<'_>, root: usize) -> Result<()> {
        let mut values = host_slice("MPI", values)?;
        let root = self.partner(root)?;
        if values.is_empty() {
            return Ok(());
        }
        let number = values.number();
        let _calls = self.calls();
        for part in values.bytes_mut().chunks_mut(MOST * number.bytes()) {
            let len = (part.len() / number.bytes()) as c_int;
            // SAFETY: an array of `len` elements; all processes make the same call.
            let status =
                unsafe { ffi::MPI_Bcast(part.as_mut_ptr().cast(), len, datatype(number), root, ffi::RSMPI_COMM_WORLD) };
            check("send to all processes", status)?;
        }
        Ok(())
    }

    fn swap(&self, partner: usize, send: Slice<'_>, receive: Slice<'_>) -> Result<()> {
        const TAG: c_int = 1;
        let (mut send, mut receive) = (host_slice("MPI", send)?, host_slice("MPI", receive)?);
        let partner = self.partner(partner)?;
        let number = send.number();
        if receive.number() != number {
            return Err(Error::shape("MPI", format!("{number:?}"), format!("{:?}", receive.number())));
        }
        let most = MOST * number.bytes();
        let (mut to_send, mut to_receive) = (send.bytes_mut(), receive.bytes_mut());
        let _calls = self.calls();
        while !(to_send.is_empty() && to_receive.is_empty()) {
            let (sent, rest) = to_send.split_at_mut(most.min(to_send.len()));
            let (received, rest_received) = to_receive.split_at_mut(most.min(to_receive.len()));
            let lens = [sent.len(), received.len()].map(|bytes| (bytes / number.bytes()) as c_int);
            // SAFETY: two arrays of `lens` elements, which do not overlap.
            let status = unsafe {
                ffi::MPI_Sendrecv(
                    sent.as_ptr().cast(),
                    lens[0],
                    datatype(number),
                    partner,
                    TAG,
                    received.as_mut_ptr().cast(),
                    lens[1],
                    datatype(number),
                    partner,
                    TAG,
                    ffi::RSMPI_COMM_WORLD,
                    ffi::RSMPI_STATUS_IGNORE,
                )
            };
            check("swap with a process", status)?;
            (to_send, to_receive) = (rest, rest_received);
        }
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        let _calls = self.calls();
        // SAFETY: all processes make the same call.
        check("wait for all processes", unsafe { ffi::MPI_Barrier(ffi::RSMPI_COMM_WORLD) })
    }
}

/// The bytes again, aligned for any number, since MPI must not read where it writes.
fn aligned_copy(bytes: &[u8]) -> Vec<u64> {
    let mut copy = vec![0u64; bytes.len().div_ceil(8)];
    bytemuck::cast_slice_mut::<u64, u8>(&mut copy)[..bytes.len()].copy_from_slice(bytes);
    copy
}

/// The bytes of some elements.
fn part_of<'a>(bytes: &'a mut [u8], elements: &Range<usize>, number: Number) -> Result<&'a mut [u8]> {
    let len = bytes.len() / number.bytes();
    bytes
        .get_mut(elements.start * number.bytes()..elements.end * number.bytes())
        .ok_or_else(|| Error::shape("MPI", format!("a shard of {len} elements"), format!("{elements:?}")))
}
