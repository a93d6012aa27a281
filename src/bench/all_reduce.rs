//! The sum over processes by size: the bus bandwidth that several processes reach together, as nccl-tests counts it.

use std::ops::Range;

use super::measure::{Ground, Here, spread, width};
use super::place::Bed;
use super::results::Figure;
use crate::error::Result;
use crate::parallel::{Collective, broadcast};

/// What results call these figures.
pub const SUITE: &str = "all_reduce";
/// Bytes of the smallest and of the largest sum.
const SIZES: [usize; 2] = [4 << 10, 64 << 20];
/// Times are not quoted where quartiles lie further apart than this, over the median.
const WIDEST: f64 = 0.25;
/// Repetitions that do not count.
const WARM_UP: usize = 3;

/// The sizes, in bytes: powers of 4.
pub fn sizes() -> impl Iterator<Item = usize> {
    std::iter::successors(Some(SIZES[0]), |bytes| Some(4 * bytes)).take_while(|&bytes| bytes <= SIZES[1])
}

/// `64KiB/2_processes`: the bytes, and how many sum them.
pub fn name(bytes: usize, world: usize) -> String {
    let size = if bytes < 1 << 20 { format!("{}KiB", bytes >> 10) } else { format!("{}MiB", bytes >> 20) };
    format!("{size}/{world}_processes")
}

/// Sums by all processes, each about `seconds` long. `told` hears of each figure; in every process, with its own times.
///
/// # Errors
/// A device, a process or a network that failed.
pub fn all_reduce<B: Bed>(
    backend: &B,
    collective: &dyn Collective,
    seconds: f64,
    wanted: &dyn Fn(&str) -> bool,
    told: &mut dyn FnMut(Figure) -> Result<()>,
) -> Result<()> {
    let world = collective.world();
    for bytes in sizes().filter(|&bytes| wanted(&name(bytes, world))) {
        let mut sum = Sum::new(backend, collective, bytes / size_of::<f32>())?;
        let ground = Here::new(backend);
        let timed = |sum: &mut Sum<'_, B>| -> Result<f64> {
            collective.barrier()?;
            let begun = ground.now();
            sum.run()?;
            ground.wait()?;
            Ok(ground.now() - begun)
        };
        let mut once = 0.0;
        for _ in 0..WARM_UP {
            once = timed(&mut sum)?;
        }
        // One process says how often, so that all do as often.
        let mut count = ((seconds / once.max(1e-7)) as u64).clamp(5, 10_000).to_le_bytes().to_vec();
        broadcast(collective, 0, &mut count)?;
        let count = count.try_into().map_or(5, u64::from_le_bytes);
        let mut times = Vec::new();
        for _ in 0..count {
            times.push(timed(&mut sum)?);
        }
        let found = spread(&times);
        let moved = 2.0 * (world - 1) as f64 / world as f64 * bytes as f64;
        let wide = width(&found);
        let refused = sum.verify()?.or_else(|| ground.refusal()).or_else(|| {
            (wide > WIDEST).then(|| format!("the quartiles are {:.0} % of the median apart", 100.0 * wide))
        });
        told(Figure {
            suite: SUITE.into(),
            name: name(bytes, world),
            seconds: found,
            amount: (moved, "byte".into()),
            bytes: Some(moved),
            refused,
            ..Figure::default()
        })?;
    }
    Ok(())
}

/// A sum over processes, again and again.
struct Sum<'a, B: Bed> {
    backend: &'a B,
    collective: &'a dyn Collective,
    values: B::Buffer<f32>,
    elements: Range<usize>,
}

impl<'a, B: Bed> Sum<'a, B> {
    fn new(backend: &'a B, collective: &'a dyn Collective, len: usize) -> Result<Self> {
        Ok(Sum { backend, collective, values: backend.allocate(len)?, elements: 0..len })
    }

    fn run(&mut self) -> Result<()> {
        self.collective.fork()?;
        self.collective.all_reduce_sum(self.backend.slice(&mut self.values, self.elements.clone())?)?;
        self.collective.join()
    }

    /// Whether every process's values were added, and once: each gives its number and the position.
    fn verify(&mut self) -> Result<Option<String>> {
        let (rank, world, len) = (self.collective.rank(), self.collective.world(), self.elements.len());
        let of = |rank: usize, at: usize| ((at % 1000) * (rank + 1)) as f32;
        let own: Vec<f32> = (0..len).map(|at| of(rank, at)).collect();
        self.backend.upload(&mut self.values, 0, &own)?;
        self.run()?;
        let mut sums = vec![0f32; len];
        self.backend.download(&self.values, 0, &mut sums)?;
        let expected = |at: usize| (0..world).map(|rank| of(rank, at)).sum::<f32>();
        let wrong = (0..len).find(|&at| sums[at] != expected(at));
        Ok(wrong.map(|at| format!("value {at} is {}, expected {}: the sum was not taken", sums[at], expected(at))))
    }
}
