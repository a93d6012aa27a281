//! Batch `n` is the same whatever read it, and when: on one thread or several, from the start or after a resume, alone or
//! as a share of a larger batch.

use std::collections::HashSet;
use std::error::Error as StdError;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use warpstep::data::options::{InlineOptions, InlineTargets, Sampling};
use warpstep::data::{
    Batch, DataOptions, Dataset, Draw, FormatOptions, InputMut, InputSpec, Inputs, Loader, Pick, Prefetch,
    SamplerOptions, TargetMut, TargetSpec, open,
};
use warpstep::plan::Share;
use warpstep::{Error, Result};

type TestResult = Result<(), Box<dyn StdError>>;

/// Samples whose one value is their number; one of them may fail. Counts how often it is read.
struct Numbers {
    len: usize,
    fails: Option<usize>,
    reads: AtomicUsize,
}

impl Numbers {
    fn new(len: usize, fails: Option<usize>) -> Arc<Self> {
        Arc::new(Numbers { len, fails, reads: AtomicUsize::new(0) })
    }
}

impl Dataset for Numbers {
    fn len(&self) -> usize {
        self.len
    }
    fn input(&self) -> InputSpec {
        InputSpec::Real { shape: vec![1] }
    }
    fn target(&self) -> TargetSpec {
        TargetSpec::Real { width: 1 }
    }
    fn read(&self, pick: Pick, _draw: Option<Draw>, input: InputMut<'_>, target: TargetMut<'_>) -> Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let Pick::Sample(index) = pick else { return Err(Error::Training("no window".into())) };
        if self.fails == Some(index) {
            return Err(Error::data("numbers", format!("sample {index} is damaged")));
        }
        let (InputMut::Real(input), TargetMut::Real(target)) = (input, target) else {
            return Err(Error::Training("real values only".into()));
        };
        (input[0], target[0]) = (index as f32, -(index as f32));
        Ok(())
    }
}

fn options(batch_size: usize, sampling: Sampling) -> SamplerOptions {
    SamplerOptions { batch_size, accumulate: 1, seed: 42, sampling, drop_last: true, share: Share::default() }
}

fn numbers(batch: &Batch) -> Vec<usize> {
    match &batch.inputs {
        Inputs::Real(values) => values.iter().map(|v| *v as usize).collect(),
        Inputs::Tokens(_) => Vec::new(),
    }
}

fn take(options: SamplerOptions, first: u64, count: usize, threads: usize) -> Result<Vec<Vec<usize>>> {
    let prefetch = Prefetch { batches: 3, threads };
    let mut loader = Loader::train(Numbers::new(103, None), options, first, prefetch)?;
    let mut taken = Vec::new();
    for _ in 0..count {
        match loader.next() {
            Some(batch) => {
                let batch = batch?;
                taken.push(numbers(&batch));
                loader.recycle(batch);
            }
            None => break,
        }
    }
    Ok(taken)
}

#[test]
fn a_pass_has_every_sample_at_most_once_and_each_pass_another_order() -> TestResult {
    let taken = take(options(10, Sampling::Shuffle), 0, 20, 1)?;
    for pass in taken.chunks(10) {
        let distinct: HashSet<usize> = pass.concat().into_iter().collect();
        assert_eq!(distinct.len(), 100);
    }
    assert_ne!(taken[..10], taken[10..]);
    Ok(())
}

#[test]
fn batches_are_the_same_for_any_number_of_threads_and_after_a_resume() -> TestResult {
    for sampling in [Sampling::Shuffle, Sampling::Random, Sampling::Sequential] {
        let whole = take(options(10, sampling), 0, 45, 1)?;
        for threads in [2, 3, 5] {
            assert_eq!(take(options(10, sampling), 0, 45, threads)?, whole, "{sampling:?} {threads}");
        }
        assert_eq!(take(options(10, sampling), 17, 28, 2)?, whole[17..], "{sampling:?}");
    }
    Ok(())
}

#[test]
fn the_shares_of_two_processes_are_the_batch_of_one() -> TestResult {
    for sampling in [Sampling::Shuffle, Sampling::Random, Sampling::Sequential] {
        let whole = take(options(10, sampling), 0, 25, 1)?;
        let share = |rank| {
            let share = Share::of_rank(rank, 2);
            take(SamplerOptions { share, ..options(10, sampling) }, 0, 25, 1)
        };
        let (left, right) = (share(0)?, share(1)?);
        for (batch, (left, right)) in whole.iter().zip(left.into_iter().zip(right)) {
            assert_eq!(*batch, [left, right].concat(), "{sampling:?}");
        }
    }
    Ok(())
}

#[test]
fn the_parts_of_a_reproducible_batch_are_the_batch_of_one_at_any_world_size() -> TestResult {
    for sampling in [Sampling::Shuffle, Sampling::Random, Sampling::Sequential] {
        let whole = take(options(12, sampling), 0, 12, 1)?;
        for world in [1, 2, 4] {
            // Three batches a step: a process takes its first part of all three, then its next.
            let mut parts = vec![Vec::new(); 12];
            for rank in 0..world {
                let share = Share::reproducible(rank, world, 4).ok_or("a share")?;
                let passes = 4 * share.passes(3);
                let taken =
                    take(SamplerOptions { share, accumulate: 3, ..options(12, sampling) }, 0, passes as usize, 2)?;
                for (pass, taken) in taken.into_iter().enumerate() {
                    parts[share.pass(pass as u64, 3).micro_batch as usize].extend(taken);
                }
            }
            assert_eq!(parts, whole, "{sampling:?} {world}");
        }
    }
    Ok(())
}

#[test]
fn an_evaluation_in_turns_sees_what_one_process_sees() -> TestResult {
    let prefetch = Prefetch { batches: 4, threads: 2 };
    let one: Vec<Batch> = Loader::batches(Numbers::new(103, None), 10, prefetch)?.collect::<Result<_>>()?;
    let mut all = vec![Vec::new(); 11];
    for rank in 0..4 {
        let loader = Loader::every(Numbers::new(103, None), 10, (rank, 4), usize::MAX, prefetch)?;
        for (turn, batch) in loader.enumerate() {
            all[turn * 4 + rank] = numbers(&batch?);
        }
    }
    assert_eq!(all, one.iter().map(numbers).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn an_evaluation_sees_every_sample_once_in_order() -> TestResult {
    let loader = Loader::batches(Numbers::new(103, None), 10, Prefetch { batches: 4, threads: 3 })?;
    let batches: Vec<Batch> = loader.collect::<Result<_>>()?;
    assert_eq!(batches.len(), 11);
    assert_eq!(batches[10].samples, 3);
    let all: Vec<usize> = batches.iter().flat_map(numbers).collect();
    assert_eq!(all, (0..103).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn an_error_comes_in_its_place_and_ends_the_loader() -> TestResult {
    let mut loader = Loader::batches(Numbers::new(103, Some(35)), 10, Prefetch { batches: 4, threads: 2 })?;
    for _ in 0..3 {
        assert!(loader.next().ok_or("ended early")?.is_ok());
    }
    let error = loader.next().ok_or("ended early")?.err().ok_or("no error")?;
    assert!(error.to_string().contains("sample 35 is damaged"), "{error}");
    assert!(loader.next().is_none());
    Ok(())
}

#[test]
fn a_loader_reads_no_further_than_it_may_and_dropping_it_ends_its_threads() -> TestResult {
    let dataset = Numbers::new(1_000_000, None);
    let prefetch = Prefetch { batches: 4, threads: 2 };
    let mut loader = Loader::train(Arc::clone(&dataset) as _, options(10, Sampling::Sequential), 0, prefetch)?;
    loader.next().ok_or("ended early")??;
    std::thread::sleep(std::time::Duration::from_millis(100));
    drop(loader);
    // One taken, four waiting, and one in the hands of each thread.
    let reads = dataset.reads.load(Ordering::Relaxed);
    assert!(reads <= 10 * (1 + 4 + 2), "{reads}");
    assert_eq!(Arc::strong_count(&dataset), 1);
    Ok(())
}

#[test]
fn augmentations_are_for_training_alone_and_do_not_depend_on_threads() -> TestResult {
    let mut digits = DataOptions::new(FormatOptions::Digits);
    digits.augment.crop = 2;
    digits.augment.rotate = 10.0;
    let plain = open(&DataOptions::new(FormatOptions::Digits), None, 1)?;
    let one = open(&digits, None, 1)?;
    digits.threads = 3;
    let several = open(&digits, None, 1)?;
    let ten = |data: &warpstep::data::OpenedData, first| -> Result<Vec<Batch>> {
        data.train_batches(64, 9, first)?.take(30).collect()
    };
    let augmented = ten(&one, 0)?;
    assert_eq!(augmented, ten(&several, 0)?);
    assert_eq!(augmented[7..], ten(&several, 7)?[..23]);
    assert_ne!(augmented, ten(&plain, 0)?);
    let evaluated =
        |data: &warpstep::data::OpenedData| -> Result<Vec<Batch>> { data.batches(&data.splits.train, 100)?.collect() };
    assert_eq!(evaluated(&one)?, evaluated(&plain)?);
    Ok(())
}

#[test]
fn full_batches_in_their_own_order_are_possible() -> TestResult {
    let inputs = vec![vec![1.0, 2.0], vec![2.0, 4.0], vec![3.0, 6.0]];
    let targets = InlineTargets::Real(vec![vec![1.0], vec![3.0], vec![5.0]]);
    let mut options = DataOptions::new(FormatOptions::Inline(InlineOptions { inputs, targets }));
    options.sampling = Some(Sampling::Sequential);
    let data = open(&options, None, 1)?;
    assert_eq!(data.batches_per_epoch(3)?, 1);
    for batch in data.train_batches(3, 1, 0)?.take(5) {
        assert_eq!(batch?.inputs, Inputs::Real(vec![1.0, 2.0, 2.0, 4.0, 3.0, 6.0]));
    }
    Ok(())
}
