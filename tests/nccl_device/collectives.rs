//! Each collective against its definition.

use std::ops::Range;
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use half::{bf16, f16};
use warpstep::backend::cuda::{Cuda, Device};
use warpstep::backend::{Backend, Numeric, Slice};
use warpstep::parallel::{Collective, ID_BYTES, Nccl, room_of_tree, tree_sum};
use warpstep::random::{Philox, Purpose};
use warpstep::real::Element;

use crate::{ALONE, device, is_there, together};

fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    println!("seed {seed}");
    seed
}

/// Small whole numbers, whose sums every type holds.
fn drawn<T: Element>(seed: u64, rank: usize, len: usize) -> Vec<T> {
    let stream = Philox::new(seed, Purpose::Shuffle, rank as u32);
    (0..len as u64).map(|i| T::from_f64(stream.below(i, 31) as f64 - 15.0)).collect()
}

fn summed<T: Element>(seed: u64, world: usize, len: usize) -> Vec<T> {
    let all: Vec<Vec<T>> = (0..world).map(|rank| drawn(seed, rank, len)).collect();
    (0..len).map(|i| T::from_f64(all.iter().map(|values| values[i].f64()).sum())).collect()
}

/// Runs a collective on values of a device, or of the host.
fn with_values<T: Numeric>(
    device: &Arc<Device>,
    nccl: &Nccl,
    on_device: bool,
    values: &[T],
    work: impl Fn(Slice<'_>),
) -> Vec<T> {
    let mut values = values.to_vec();
    if !on_device {
        work(Slice::Host(T::host(&mut values)));
        return values;
    }
    let backend = Cuda::<f32>::new(device.clone());
    // Not at the beginning of the buffer.
    let mut buffer = backend.allocate::<T>(values.len() + 64).unwrap();
    backend.upload(&mut buffer, 64, &values).unwrap();
    nccl.fork().unwrap();
    work(backend.slice(&mut buffer, 64..64 + values.len()).unwrap());
    nccl.join().unwrap();
    backend.download(&buffer, 64, &mut values).unwrap();
    values
}

/// Shards of 40 elements: as long as each other, or not, one of them empty.
fn shards(world: usize, even: bool) -> Vec<Range<usize>> {
    let each = 40 / world;
    let mut shards: Vec<_> = (0..world).map(|rank| rank * each..(rank + 1) * each).collect();
    if !even {
        shards[0].end = 3;
        shards[1].start = 3;
        (shards[world - 2].end, shards[world - 1].start) = (40, 40);
    }
    shards
}

fn collectives_of<T: Numeric + Element>(seed: u64, world: usize) {
    together(world, |nccl, device| {
        let (rank, own) = (nccl.rank(), drawn::<T>(seed, nccl.rank(), 40));
        let sums = summed::<T>(seed, world, 40);
        for on_device in [true, false] {
            let run = |work: &dyn Fn(Slice<'_>)| with_values(&device, &nccl, on_device, &own, work);
            assert_eq!(run(&|values| nccl.all_reduce_sum(values).unwrap()), sums);
            let root = world - 1;
            assert_eq!(run(&|values| nccl.broadcast(values, root).unwrap()), drawn::<T>(seed, root, 40));
            for even in [true, false] {
                let shards = shards(world, even);
                let found = run(&|values| nccl.reduce_scatter_sum(values, &shards).unwrap());
                assert_eq!(found[shards[rank].clone()], sums[shards[rank].clone()]);
                let found = run(&|values| nccl.all_gather(values, &shards).unwrap());
                for (from, shard) in shards.iter().enumerate() {
                    assert_eq!(found[shard.clone()], drawn::<T>(seed, from, 40)[shard.clone()]);
                }
            }
            let partner = rank ^ 1;
            let found = run(&|mut values| {
                let [send, receive] = values.parts([0..10, 20..30]).unwrap();
                nccl.swap(partner, send, receive).unwrap();
            });
            assert_eq!(found[20..30], drawn::<T>(seed, partner, 40)[..10]);
            assert_eq!((&found[..20], &found[30..]), (&own[..20], &own[30..]));
        }
        nccl.barrier().unwrap();
    });
}

#[test]
fn collectives_of_every_type_are_as_defined_on_the_device_and_the_host() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let seed = fresh_seed();
    collectives_of::<f32>(seed, 4);
    collectives_of::<f64>(seed, 2);
    collectives_of::<bf16>(seed, 2);
    collectives_of::<f16>(seed, 2);
}

#[test]
fn bytes_are_moved_and_never_summed_and_shards_must_fit() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    together(2, |nccl, _| {
        let mut bytes = [nccl.rank() as u8 + 1; 6];
        nccl.all_gather(bytes.as_mut_slice().into(), &[0..2, 2..6]).unwrap();
        assert_eq!(bytes, [1, 1, 2, 2, 2, 2]);
        let refused = [
            nccl.all_reduce_sum(bytes.as_mut_slice().into()),
            nccl.all_gather(bytes.as_mut_slice().into(), &[0..2, 3..6]),
            nccl.all_gather(bytes.as_mut_slice().into(), &[0..2, 2..7]),
            nccl.all_gather(bytes.as_mut_slice().into(), std::slice::from_ref(&(0..6))),
            nccl.broadcast(bytes.as_mut_slice().into(), 2),
        ];
        assert!(refused.iter().all(Result::is_err), "{refused:?}");
        // Nothing was broken by it.
        nccl.barrier().unwrap();
    });
}

#[test]
fn a_tree_sum_on_devices_has_the_bits_of_the_tree_over_ranks() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let seed = fresh_seed();
    let normal = |rank: usize, len: usize| -> Vec<f32> {
        let stream = Philox::new(seed, Purpose::Augmentation, rank as u32);
        (0..len as u64).map(|i| stream.normal(i) as f32).collect()
    };
    for world in [2, 4] {
        together(world, |nccl, device| {
            let backend = Cuda::<f32>::new(device.clone());
            for len in [1, 15, 16, 33, 130, 1000] {
                let all: Vec<Vec<f32>> = (0..world).map(|rank| normal(rank, len)).collect();
                let expected: Vec<u32> = (0..len)
                    .map(|i| match world {
                        2 => all[0][i] + all[1][i],
                        _ => (all[0][i] + all[1][i]) + (all[2][i] + all[3][i]),
                    })
                    .map(f32::to_bits)
                    .collect();
                let mut room = backend.allocate::<f32>(room_of_tree(len)).unwrap();
                let room_len = room.len();
                let room = Mutex::new(&mut room);
                let found = with_values(&device, &nccl, true, &all[nccl.rank()], |values| {
                    let mut room = room.lock().unwrap();
                    tree_sum(&nccl, values, backend.slice(&mut room, 0..room_len).unwrap()).unwrap();
                });
                assert_eq!(found.into_iter().map(f32::to_bits).collect::<Vec<_>>(), expected, "{len} in {world}");
            }
        });
    }
}

#[test]
fn an_abort_from_another_thread_ends_a_wait_for_a_process_that_does_not_come() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let met = Barrier::new(2);
    let ended = together(2, |nccl, _| {
        if nccl.rank() == 1 {
            // Joined, and gone silent.
            met.wait();
            return None;
        }
        let waiting = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| nccl.all_reduce_sum([1f32; 4].as_mut_slice().into()));
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert!(!waiting.is_finished(), "nobody answered");
            nccl.abort();
            waiting.join().unwrap()
        });
        met.wait();
        let after = nccl.barrier().unwrap_err().to_string();
        assert!(after.contains("given up"), "{after}");
        nccl.abort();
        Some(waiting.unwrap_err().to_string())
    });
    let error = ended[0].as_ref().unwrap();
    assert!(error.contains("sum values over processes"), "{error}");
}

/// An id is needed by every process.
#[test]
fn an_id_of_nobody_is_refused() {
    if !is_there() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let device = device(0);
    let error = Nccl::join(&device, &[0; ID_BYTES], 0, 1).err().expect("no such processes").to_string();
    assert!(error.contains("join 1 processes as number 0"), "{error}");
    let error = Nccl::join(&device, &Nccl::unique_id().unwrap(), 2, 2).err().expect("no such rank").to_string();
    assert!(error.contains("rank below 2"), "{error}");
}
