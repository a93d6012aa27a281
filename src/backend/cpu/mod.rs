//! The CPU backend: ndarray views, products by the gemm crate, threads by rayon.
//!
//! Every result has the same bits for any number of threads: work is cut into pieces of fixed size, and what is summed
//! over pieces is summed in their order.

mod activation;
mod attention;
mod attention_scores;
mod batch_norm;
mod columns;
mod conv;
mod dropout;
mod elementwise;
mod embedding;
mod gather;
mod joint;
mod layer_norm;
mod linear;
mod loss;
mod mel;
mod panels;
mod parallel;
mod pool;
mod product;
mod profile;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod transpose;
mod update;
mod windows;
mod winograd;

pub use update::{average, update, update_bf16};

use std::marker::PhantomData;
use std::num::NonZero;
use std::ops::Range;

use rayon::prelude::*;

use self::parallel::{PIECE, vectorize};
use super::step::Gather;
use super::{Act, Activations, Arena, Backend, Memory, Numeric, Op, Slice, StepContext};
use crate::error::{Error, Result};
use crate::host;
use crate::real::Real;

/// The CPU, computing in `R`: f32 to train, f64 to check gradients.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu<R> {
    real: PhantomData<R>,
}

impl<R: Real> Cpu<R> {
    /// The CPU with the threads of the present rayon pool.
    pub fn new() -> Self {
        Cpu { real: PhantomData }
    }
}

/// What is wrong with so many threads, in words; nothing for 1 to 4096, which is more than any machine has processors.
pub fn wrong_threads(threads: Option<usize>) -> Option<String> {
    let found = threads.filter(|threads| !(1..=4096).contains(threads))?;
    Some(format!("found {found}, expected 1 to 4096"))
}

/// Makes the pool of threads that every [`Cpu`] of this process works with: so many, or as many as `RAYON_NUM_THREADS` says, or one a
/// processor. The calling thread is one of them: what it begins reaches the others without a queue, and it works along rather than be
/// woken at every end. A pool of one is another thread, since those that load data ahead use the pool while the caller waits for them.
///
/// # Errors
/// There is a pool already, or threads that the system refuses.
pub fn set_threads(threads: Option<usize>) -> std::result::Result<(), rayon::ThreadPoolBuildError> {
    let named = || std::env::var("RAYON_NUM_THREADS").ok()?.parse().ok();
    let threads = threads.or_else(named).filter(|&threads| threads > 0);
    let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, NonZero::get));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    if threads > 1 { pool.use_current_thread().build_global() } else { pool.build_global() }
}

impl<R: Real> Backend for Cpu<R> {
    type Real = R;
    type Storage = R;
    type Recording = ();
    /// The sum of squares of each tensor's gradients at the last update.
    type Prepared = Vec<f64>;
    type Buffer<T: bytemuck::Pod + Send + Sync> = Vec<T>;
    const INPUT_SLOTS: usize = 1;

    fn description(&self) -> String {
        let threads = rayon::current_num_threads();
        format!("CPU, {threads} thread{}, {}", if threads == 1 { "" } else { "s" }, R::NAME)
    }

    fn allocate<T: bytemuck::Pod + Send + Sync>(&self, len: usize) -> Result<Vec<T>> {
        host::zeros(len)
    }

    fn upload<T: bytemuck::Pod + Send + Sync>(&self, to: &mut Vec<T>, offset: usize, from: &[T]) -> Result<()> {
        let len = to.len();
        let part = to
            .get_mut(offset..offset.saturating_add(from.len()))
            .ok_or_else(|| does_not_fit(len, offset, from.len()))?;
        part.copy_from_slice(from);
        Ok(())
    }

    fn download<T: bytemuck::Pod + Send + Sync>(&self, from: &Vec<T>, offset: usize, to: &mut [T]) -> Result<()> {
        let part = from
            .get(offset..offset.saturating_add(to.len()))
            .ok_or_else(|| does_not_fit(from.len(), offset, to.len()))?;
        to.copy_from_slice(part);
        Ok(())
    }

    fn gather(&self, activations: &mut Activations<Self>, gather: &Gather<'_>) -> Result<()> {
        gather::gather(activations, gather)
    }

    fn read_statistic(&self, activations: &Activations<Self>, act: Act, to: &mut [R]) -> Result<()> {
        self.download(&activations.values, activations.range(act).start, to)
    }

    fn parameters_changed(&self, _: &mut Arena<Self>) -> Result<()> {
        Ok(())
    }

    /// Within the pool: an operation then reaches the threads without waking them through a queue.
    fn run(&self, program: &[Box<dyn Op<Self>>], memory: &mut Memory<'_, Self>, step: &StepContext) -> Result<()> {
        rayon::scope(|_| program.iter().try_for_each(|op| op.run(self, memory, step)))
    }

    fn run_each(
        &self,
        program: &[Box<dyn Op<Self>>],
        memory: &mut Memory<'_, Self>,
        step: &StepContext,
        after: &mut (dyn FnMut(&mut Memory<'_, Self>, usize) -> Result<()> + Send),
    ) -> Result<()> {
        rayon::scope(|_| {
            program.iter().enumerate().try_for_each(|(number, op)| {
                op.run(self, memory, step)?;
                after(memory, number)
            })
        })
    }

    fn add_to(&self, to: &mut Vec<R>, from: &Vec<R>, elements: Range<usize>) -> Result<()> {
        let (to, from) = both(to, from, elements)?;
        to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| {
            vectorize(
                #[inline(always)]
                || to.iter_mut().zip(from).for_each(|(to, &from)| *to += from),
            );
        });
        Ok(())
    }

    fn copy_part(&self, to: &mut Vec<R>, offset: usize, from: &Vec<R>, elements: Range<usize>) -> Result<()> {
        let (of_to, of_from, len) = (to.len(), from.len(), elements.len());
        let to = to.get_mut(offset..offset + len).ok_or_else(|| does_not_fit(of_to, offset, len))?;
        let from = from.get(elements.clone()).ok_or_else(|| does_not_fit(of_from, elements.start, len))?;
        to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    }

    fn clear(&self, values: &mut Vec<R>, elements: Range<usize>) -> Result<()> {
        let len = values.len();
        let values =
            values.get_mut(elements.clone()).ok_or_else(|| does_not_fit(len, elements.start, elements.len()))?;
        values.fill(R::default());
        Ok(())
    }

    fn divide(&self, values: &mut Vec<R>, divisor: R, elements: Range<usize>) -> Result<()> {
        let len = values.len();
        let values =
            values.get_mut(elements.clone()).ok_or_else(|| does_not_fit(len, elements.start, elements.len()))?;
        values.iter_mut().for_each(|value| *value /= divisor);
        Ok(())
    }

    fn slice<'a, T: Numeric>(&self, buffer: &'a mut Vec<T>, elements: Range<usize>) -> Result<Slice<'a>> {
        let len = buffer.len();
        let part = buffer.get_mut(elements.clone());
        let part = part.ok_or_else(|| does_not_fit(len, elements.start, elements.len()))?;
        Ok(Slice::Host(T::host(part)))
    }
}

fn does_not_fit(len: usize, offset: usize, part: usize) -> Error {
    Error::shape("copy", format!("a part of {len} elements"), format!("{part} elements from {offset} on"))
}

/// The same elements of two buffers.
fn both<'a, R>(to: &'a mut [R], from: &'a [R], elements: Range<usize>) -> Result<(&'a mut [R], &'a [R])> {
    let len = to.len().min(from.len());
    match (to.get_mut(elements.clone()), from.get(elements.clone())) {
        (Some(to), Some(from)) => Ok((to, from)),
        _ => Err(does_not_fit(len, elements.start, elements.len())),
    }
}

/// A matrix of values from -1/2 to 1/2, the same ones for the same stream.
#[cfg(test)]
fn random<R: Real>(rows: usize, columns: usize, stream: u32) -> ndarray::Array2<R> {
    use crate::random::{Philox, Purpose};
    let numbers = Philox::new(1, Purpose::Sampling, stream);
    let value = |(i, j)| R::from_f32(numbers.uniform((i * columns + j) as u64) - 0.5);
    ndarray::Array2::from_shape_fn((rows, columns), value)
}
