//! The emulated NCCL, called as programs call it: ranks in threads and in processes, results against sums made here, wrong use.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::process::Command;
use std::sync::{Barrier, Once};
use std::time::{SystemTime, UNIX_EPOCH};

// The library that holds the functions below.
use warpstep_emulator as _;

#[derive(Clone, Copy)]
#[repr(C)]
struct UniqueId([u8; 128]);

unsafe extern "C" {
    fn cuInit(flags: u32) -> c_int;
    fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> c_int;
    fn cuCtxSetCurrent(context: usize) -> c_int;
    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int;
    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> c_int;
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> c_int;
    fn cuStreamCreate(stream: *mut usize, flags: u32) -> c_int;
    fn cuStreamWaitEvent(stream: usize, event: usize, flags: u32) -> c_int;
    fn cuEventCreate(event: *mut usize, flags: u32) -> c_int;
    fn cuEventRecord(event: usize, stream: usize) -> c_int;
    fn cuStreamBeginCapture_v2(stream: usize, mode: u32) -> c_int;
    fn cuStreamEndCapture(stream: usize, graph: *mut usize) -> c_int;
    fn cuGraphInstantiateWithFlags(to: *mut usize, graph: usize, flags: u64) -> c_int;
    fn cuGraphLaunch(graph: usize, stream: usize) -> c_int;

    fn ncclGetUniqueId(id: *mut UniqueId) -> c_int;
    fn ncclCommInitRank(comm: *mut usize, ranks: c_int, id: UniqueId, rank: c_int) -> c_int;
    fn ncclCommInitAll(comms: *mut usize, ranks: c_int, devices: *const c_int) -> c_int;
    fn ncclCommDestroy(comm: usize) -> c_int;
    fn ncclCommAbort(comm: usize) -> c_int;
    fn ncclCommGetAsyncError(comm: usize, error: *mut c_int) -> c_int;
    fn ncclCommCount(comm: usize, count: *mut c_int) -> c_int;
    fn ncclCommUserRank(comm: usize, rank: *mut c_int) -> c_int;
    fn ncclCommCuDevice(comm: usize, device: *mut c_int) -> c_int;
    fn ncclGetLastError(comm: usize) -> *const c_char;
    fn ncclGetVersion(version: *mut c_int) -> c_int;
    fn ncclGroupStart() -> c_int;
    fn ncclGroupEnd() -> c_int;
    fn ncclRedOpCreatePreMulSum(op: *mut c_int, scalar: *const f32, ty: c_int, residence: c_int, comm: usize) -> c_int;
    fn ncclRedOpDestroy(op: c_int, comm: usize) -> c_int;
    fn ncclAllReduce(from: u64, to: u64, count: usize, ty: c_int, op: c_int, comm: usize, stream: usize) -> c_int;
    fn ncclReduceScatter(from: u64, to: u64, count: usize, ty: c_int, op: c_int, comm: usize, stream: usize) -> c_int;
    fn ncclAllGather(from: u64, to: u64, count: usize, ty: c_int, comm: usize, stream: usize) -> c_int;
    fn ncclBroadcast(from: u64, to: u64, count: usize, ty: c_int, root: c_int, comm: usize, stream: usize) -> c_int;
    fn ncclReduce(
        from: u64,
        to: u64,
        count: usize,
        ty: c_int,
        op: c_int,
        root: c_int,
        comm: usize,
        stream: usize,
    ) -> c_int;
    fn ncclSend(from: u64, count: usize, ty: c_int, peer: c_int, comm: usize, stream: usize) -> c_int;
    fn ncclRecv(to: u64, count: usize, ty: c_int, peer: c_int, comm: usize, stream: usize) -> c_int;
}

const F32: c_int = 7;
const SUM: c_int = 0;
const MOST: c_int = 2;
const MEAN: c_int = 4;
const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;
const REMOTE_ERROR: c_int = 6;
const UNJOINED: c_int = 904;
const ISOLATION: c_int = 905;
const DEVICES: usize = 4;

fn ok(status: c_int) {
    assert_eq!(status, 0, "{}", last_error());
}

fn last_error() -> String {
    // SAFETY: a text that stays until the thread's next error.
    unsafe { CStr::from_ptr(ncclGetLastError(0)) }.to_string_lossy().into_owned()
}

fn unique_id() -> UniqueId {
    start();
    let mut id = UniqueId([0; 128]);
    // SAFETY: room for an id.
    ok(unsafe { ncclGetUniqueId(&mut id) });
    id
}

/// Before the driver is asked for the first time.
fn start() {
    static START: Once = Once::new();
    START.call_once(|| {
        // SAFETY: nothing of the C library reads the environment meanwhile.
        unsafe { std::env::set_var("WARPSTEP_EMULATOR_DEVICES", DEVICES.to_string()) };
        // SAFETY: the driver's start.
        ok(unsafe { cuInit(0) });
    });
}

/// A rank of a test, on the device of its number.
struct Rank {
    comm: usize,
    stream: usize,
}

fn on_device(device: usize) {
    start();
    let mut context = 0;
    // SAFETY: room for a context, which this thread takes.
    unsafe {
        ok(cuDevicePrimaryCtxRetain(&mut context, device as c_int));
        ok(cuCtxSetCurrent(context));
    }
}

fn upload(values: &[f32]) -> u64 {
    let mut address = 0;
    // SAFETY: room for an address, and as many values.
    unsafe {
        ok(cuMemAlloc_v2(&mut address, values.len().max(1) * 4));
        ok(cuMemcpyHtoD_v2(address, values.as_ptr().cast(), values.len() * 4));
    }
    address
}

fn download(address: u64, len: usize) -> Vec<f32> {
    let mut values = vec![0.0f32; len];
    // SAFETY: room for as many values.
    ok(unsafe { cuMemcpyDtoH_v2(values.as_mut_ptr().cast(), address, len * 4) });
    values
}

impl Rank {
    fn join(id: UniqueId, rank: usize, ranks: usize) -> Rank {
        on_device(rank);
        let (mut comm, mut stream) = (0, 0);
        // SAFETY: room for both.
        unsafe {
            ok(ncclCommInitRank(&mut comm, ranks as c_int, id, rank as c_int));
            ok(cuStreamCreate(&mut stream, 0));
        }
        Rank { comm, stream }
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // SAFETY: a communicator, destroyed or aborted once before at most, which is told and no more.
        unsafe { ncclCommDestroy(self.comm) };
    }
}

/// A body for each of so many ranks, a thread each; in threads of this process.
fn in_threads(ranks: usize, body: impl Fn(usize, Rank) + Sync) {
    let id = unique_id();
    std::thread::scope(|scope| {
        for rank in 0..ranks {
            let body = &body;
            scope.spawn(move || body(rank, Rank::join(id, rank, ranks)));
        }
    });
}

/// What rank `rank` holds at `i`: sums of it depend on their order.
fn value(seed: u64, rank: usize, i: usize) -> f32 {
    let mixed = (seed ^ (rank as u64) << 40 ^ i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 40) as f32 / 1e4 * if mixed & 1 == 0 { 1.0 } else { -1e-3 }
}

fn values(seed: u64, rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| value(seed, rank, i)).collect()
}

/// The sum in the order of ranks.
fn summed(seed: u64, ranks: usize, i: usize) -> f32 {
    (1..ranks).fold(value(seed, 0, i), |sum, rank| sum + value(seed, rank, i))
}

/// Every collective once, each against its definition.
fn all_collectives(seed: u64, rank: usize, ranks: usize, own: &Rank) {
    let Rank { comm, stream } = *own;
    let each = 37;
    let len = each * ranks;
    let from = upload(&values(seed, rank, len));
    let to = upload(&vec![0.0; len]);
    let expected: Vec<f32> = (0..len).map(|i| summed(seed, ranks, i)).collect();
    // SAFETY: buffers of as many values as each call takes.
    unsafe {
        ok(ncclAllReduce(from, to, len, F32, SUM, comm, stream));
        assert_eq!(download(to, len), expected);
        ok(ncclAllReduce(from, to, len, F32, MOST, comm, stream));
        let most = |i| (0..ranks).map(|rank| value(seed, rank, i)).fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(download(to, len), (0..len).map(most).collect::<Vec<_>>());
        ok(ncclAllReduce(from, to, len, F32, MEAN, comm, stream));
        let mean: Vec<f32> = expected.iter().map(|sum| sum / ranks as f32).collect();
        assert_eq!(download(to, len), mean);
        ok(ncclReduceScatter(from, to, each, F32, SUM, comm, stream));
        assert_eq!(download(to, each), expected[rank * each..(rank + 1) * each]);
        ok(ncclAllGather(from, to, each, F32, comm, stream));
        let gathered: Vec<f32> = (0..ranks).flat_map(|rank| values(seed, rank, each)).collect();
        assert_eq!(download(to, len), gathered);
        let root = ranks - 1;
        ok(ncclBroadcast(from, to, len, F32, root as c_int, comm, stream));
        assert_eq!(download(to, len), values(seed, root, len));
        ok(ncclReduce(from, to, len, F32, SUM, root as c_int, comm, stream));
        assert_eq!(download(to, len), if rank == root { expected.clone() } else { values(seed, root, len) });
        // A ring: to the next, from the one before, at once.
        let (next, last) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
        ok(ncclGroupStart());
        ok(ncclSend(from, len, F32, next as c_int, comm, stream));
        ok(ncclRecv(to, len, F32, last as c_int, comm, stream));
        ok(ncclGroupEnd());
        assert_eq!(download(to, len), values(seed, last, len));
        // Each rank's own factor first.
        let (factor, mut op) = (1.0 / (rank + 1) as f32, 0);
        ok(ncclRedOpCreatePreMulSum(&mut op, &factor, F32, 1, comm));
        ok(ncclAllReduce(from, to, len, F32, op, comm, stream));
        ok(ncclRedOpDestroy(op, comm));
        let scaled = |rank: usize, i| value(seed, rank, i) * (1.0 / (rank + 1) as f32);
        let sum = |i| (1..ranks).fold(scaled(0, i), |sum, rank| sum + scaled(rank, i));
        assert_eq!(download(to, len), (0..len).map(sum).collect::<Vec<_>>());
        // In place, several in one group, and of nothing.
        ok(ncclGroupStart());
        ok(ncclAllReduce(from, from, len, F32, SUM, comm, stream));
        ok(ncclAllReduce(from, from, 0, F32, SUM, comm, stream));
        ok(ncclGroupEnd());
        assert_eq!(download(from, len), expected);
        let (mut count, mut number, mut device) = (0, 0, 0);
        ok(ncclCommCount(comm, &mut count));
        ok(ncclCommUserRank(comm, &mut number));
        ok(ncclCommCuDevice(comm, &mut device));
        assert_eq!([count, number, device], [ranks as c_int, rank as c_int, rank as c_int]);
    }
}

fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    println!("seed {seed}");
    seed
}

#[test]
fn collectives_of_threads_are_as_defined() {
    let seed = fresh_seed();
    for ranks in [1, 2, 4] {
        in_threads(ranks, |rank, own| {
            if ranks > 1 {
                all_collectives(seed, rank, ranks, &own);
            } else {
                let from = upload(&[3.0]);
                // SAFETY: one value.
                ok(unsafe { ncclAllReduce(from, from, 1, F32, SUM, own.comm, own.stream) });
                assert_eq!(download(from, 1), [3.0]);
            }
        });
    }
}

/// The environment of a rank that a test started as a process: seed, rank, ranks, id.
const PART: &str = "WARPSTEP_TEST_NCCL_RANK";

/// Does nothing but in a process that [`collectives_of_processes_are_as_defined`] started.
#[test]
fn a_rank_in_a_process_of_its_own() {
    let Ok(part) = std::env::var(PART) else { return };
    let numbers: Vec<&str> = part.split(' ').collect();
    let (seed, rank, ranks) = (numbers[0].parse().unwrap(), numbers[1].parse().unwrap(), numbers[2].parse().unwrap());
    let mut id = UniqueId([0; 128]);
    for (byte, text) in id.0.iter_mut().zip(numbers[3].as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(text).unwrap(), 16).unwrap();
    }
    all_collectives(seed, rank, ranks, &Rank::join(id, rank, ranks));
}

#[test]
fn collectives_of_processes_are_as_defined() {
    let seed = fresh_seed();
    for ranks in [2, 4] {
        let id = unique_id();
        let hex: String = id.0.iter().map(|byte| format!("{byte:02x}")).collect();
        let children: Vec<_> = (1..ranks)
            .map(|rank| {
                Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", "a_rank_in_a_process_of_its_own", "--nocapture"])
                    .env(PART, format!("{seed} {rank} {ranks} {hex}"))
                    .spawn()
                    .unwrap()
            })
            .collect();
        all_collectives(seed, 0, ranks, &Rank::join(id, 0, ranks));
        for child in children {
            assert!(child.wait_with_output().unwrap().status.success());
        }
    }
}

#[test]
fn a_captured_collective_is_done_at_each_replay() {
    in_threads(2, |rank, own| {
        let buffer = upload(&[rank as f32 + 1.0; 8]);
        let (mut graph, mut executable) = (0, 0);
        // SAFETY: handles that the driver gave, and room for each.
        unsafe {
            ok(cuStreamBeginCapture_v2(own.stream, 0));
            ok(ncclAllReduce(buffer, buffer, 8, F32, SUM, own.comm, own.stream));
            ok(ncclGroupStart());
            ok(ncclAllReduce(buffer, buffer, 4, F32, MOST, own.comm, own.stream));
            ok(ncclGroupEnd());
            ok(cuStreamEndCapture(own.stream, &mut graph));
            ok(cuGraphInstantiateWithFlags(&mut executable, graph, 0));
            assert_eq!(download(buffer, 1), [rank as f32 + 1.0], "nothing runs while it is captured");
            for replay in 1..4 {
                ok(cuGraphLaunch(executable, own.stream));
                // 1 + 2 = 3 on both, which doubles from then on.
                assert_eq!(download(buffer, 8), [3.0 * 2f32.powi(replay - 1); 8]);
            }
        }
    });
}

#[test]
fn a_capture_draws_in_another_stream_and_gives_it_back_when_that_is_joined() {
    in_threads(2, |rank, own| {
        let (mut main, mut forked, mut joined) = (0, 0, 0);
        let (mut graph, mut executable) = (0, 0);
        let peer = 1 - rank as c_int;
        let [sums, sent, received] = [2, 3, 3].map(|len| upload(&vec![rank as f32 + 1.0; len]));
        // SAFETY: handles that the driver gave, and room for each; buffers of as many values as each call takes.
        unsafe {
            ok(cuStreamCreate(&mut main, 1));
            ok(cuEventCreate(&mut forked, 2));
            ok(cuEventCreate(&mut joined, 2));
            let fork = |after: bool| {
                ok(cuStreamBeginCapture_v2(main, 0));
                ok(cuEventRecord(forked, main));
                ok(cuStreamWaitEvent(own.stream, forked, 0));
                ok(ncclReduceScatter(sums, sums + 4 * rank as u64, 1, F32, SUM, own.comm, own.stream));
                if after {
                    ok(cuEventRecord(joined, own.stream));
                    ok(cuStreamWaitEvent(main, joined, 0));
                }
            };
            fork(true);
            ok(ncclGroupStart());
            ok(ncclSend(sent, 3, F32, peer, own.comm, own.stream));
            ok(ncclRecv(received, 3, F32, peer, own.comm, own.stream));
            ok(ncclGroupEnd());
            assert_eq!(cuStreamEndCapture(main, &mut graph), UNJOINED, "the second half was not joined");
            fork(true);
            ok(cuStreamEndCapture(main, &mut graph));
            ok(cuGraphInstantiateWithFlags(&mut executable, graph, 0));
            assert_eq!(download(sums, 2), [rank as f32 + 1.0; 2], "nothing ran yet");
            ok(cuGraphLaunch(executable, main));
            assert_eq!(download(sums + 4 * rank as u64, 1), [3.0]);
            // Its stream is its own again: what is queued there is done.
            ok(ncclAllGather(sums + 4 * rank as u64, sums, 1, F32, own.comm, own.stream));
            assert_eq!(download(sums, 2), [3.0, 3.0]);
            // A recording cannot wait for what stands outside of it.
            ok(cuEventRecord(joined, own.stream));
            ok(cuStreamBeginCapture_v2(main, 0));
            assert_eq!(cuStreamWaitEvent(main, joined, 0), ISOLATION);
            assert_ne!(cuStreamEndCapture(main, &mut graph), 0);
        }
    });
}

#[test]
fn one_thread_drives_several_devices_in_a_group() {
    start();
    let devices: Vec<c_int> = (0..3).collect();
    let mut comms = [0usize; 3];
    on_device(0);
    // SAFETY: room for three communicators on three devices.
    ok(unsafe { ncclCommInitAll(comms.as_mut_ptr(), 3, devices.as_ptr()) });
    let buffers: Vec<u64> = (0..3)
        .map(|device| {
            on_device(device);
            upload(&[device as f32; 5])
        })
        .collect();
    // SAFETY: a group that is started is ended.
    unsafe {
        ok(ncclGroupStart());
        for (&buffer, &comm) in buffers.iter().zip(&comms) {
            ok(ncclAllReduce(buffer, buffer, 5, F32, SUM, comm, 0));
        }
        ok(ncclGroupEnd());
    }
    for (device, &buffer) in buffers.iter().enumerate() {
        on_device(device);
        assert_eq!(download(buffer, 5), [3.0; 5]);
        // SAFETY: destroyed once.
        ok(unsafe { ncclCommDestroy(comms[device]) });
    }
}

#[test]
fn an_abort_ends_what_the_others_wait_for() {
    in_threads(3, |rank, own| {
        let buffer = upload(&[1.0]);
        if rank == 0 {
            // SAFETY: aborted once; the drop afterwards is told that it is gone.
            ok(unsafe { ncclCommAbort(own.comm) });
            return;
        }
        // SAFETY: one value.
        let status = unsafe { ncclAllReduce(buffer, buffer, 1, F32, SUM, own.comm, own.stream) };
        assert_eq!(status, REMOTE_ERROR);
        assert!(last_error().contains("rank 0"), "{}", last_error());
        let mut error = 0;
        // SAFETY: room for a number.
        ok(unsafe { ncclCommGetAsyncError(own.comm, &mut error) });
        assert_eq!(error, REMOTE_ERROR);
    });
}

#[test]
fn ranks_that_do_not_agree_are_both_named() {
    in_threads(2, |rank, own| {
        let buffer = upload(&[1.0; 16]);
        // SAFETY: 16 values.
        let status = unsafe { ncclAllReduce(buffer, buffer, 8 + rank, F32, SUM, own.comm, own.stream) };
        assert_eq!(status, INVALID_USAGE);
        let text = last_error();
        for part in ["rank 0 asks for all_reduce of 8 f32", "rank 1 for all_reduce of 9 f32"] {
            assert!(text.contains(part) || text.contains(&part.replace(" asks", "")), "{text}");
        }
    });
    in_threads(2, |rank, own| {
        let buffer = upload(&[1.0; 16]);
        // SAFETY: 16 values.
        let status = unsafe {
            if rank == 0 {
                ncclSend(buffer, 4, F32, 1, own.comm, own.stream)
            } else {
                ncclRecv(buffer, 5, F32, 0, own.comm, own.stream)
            }
        };
        assert_eq!(status, INVALID_USAGE);
        assert!(last_error().contains("send of 4 f32 to rank 1"), "{}", last_error());
    });
}

#[test]
fn wrong_arguments_are_refused() {
    let meeting = Barrier::new(2);
    in_threads(2, |rank, own| {
        let Rank { comm, stream } = own;
        let buffer = upload(&[1.0; 4]);
        on_device(3);
        let foreign = upload(&[1.0; 4]);
        on_device(rank);
        // SAFETY: none of these calls gets as far as its buffers.
        let refused = unsafe {
            [
                (ncclAllReduce(buffer, buffer, 5, F32, SUM, comm, stream), "lies in no allocation"),
                (ncclAllReduce(foreign, buffer, 4, F32, SUM, comm, stream), "memory of device 3"),
                (ncclAllReduce(buffer, buffer, 4, 99, SUM, comm, stream), "no type"),
                (ncclAllReduce(buffer, buffer, 4, F32, 99, comm, stream), "no operation"),
                (ncclBroadcast(buffer, buffer, 4, F32, 2, comm, stream), "rank 2 of 2"),
                (ncclAllReduce(buffer, buffer, 4, F32, SUM, 0xdead, stream), "no communicator"),
            ]
            .map(|(status, _)| status)
        };
        assert_eq!(refused, [INVALID_ARGUMENT; 6]);
        // SAFETY: no group was started.
        assert_eq!(unsafe { ncclGroupEnd() }, INVALID_USAGE);
        meeting.wait();
        // SAFETY: four values, and room for a number.
        unsafe {
            ok(ncclAllReduce(buffer, buffer, 4, F32, SUM, comm, stream));
            let mut version = 0;
            ok(ncclGetVersion(&mut version));
            assert!(version > 22000);
        }
        assert_eq!(download(buffer, 4), [2.0; 4], "what was refused changed nothing");
    });
}

#[test]
fn two_ranks_of_one_device_are_refused() {
    let id = unique_id();
    let statuses: Vec<c_int> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..2)
            .map(|rank| {
                scope.spawn(move || {
                    on_device(0);
                    let mut comm = 0;
                    // SAFETY: room for a communicator.
                    unsafe { ncclCommInitRank(&mut comm, 2, id, rank) }
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert_eq!(statuses, [INVALID_USAGE; 2]);
}
