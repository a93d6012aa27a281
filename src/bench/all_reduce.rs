//! The sum over processes by size: the bus bandwidth that several processes reach together, as nccl-tests counts it.

use std::ops::Range;

use super::measure::{Ground, Here, spread, width};
use super::place::Bed;
use super::results::Figure;
use crate::backend::profile::Kind;
use crate::error::Result;
use crate::parallel::{Collective, broadcast};

/// What results call these figures.
pub const SUITE: &str = "all_reduce";
/// Bytes of the smallest sum, and of the largest: as many as the gradients of a model of 134M parameters.
const SIZES: [usize; 2] = [4 << 10, 512 << 20];
/// The largest on the emulated device.
const LARGEST_EMULATED: usize = 64 << 20;
/// Values that are made and looked at in one go.
const TILE: usize = 1 << 20;
/// Times are not quoted where quartiles lie further apart than this, over the median.
const WIDEST: f64 = 0.25;
/// Repetitions that do not count.
const WARM_UP: usize = 3;

/// The sizes, in bytes: each four times the one before, but for the last.
pub fn sizes() -> impl Iterator<Item = usize> {
    let grown = std::iter::successors(Some(SIZES[0]), |bytes| Some(4 * bytes));
    grown.take_while(|&bytes| bytes < SIZES[1]).chain([SIZES[1]])
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
    let most = if backend.kind() == Kind::Emulated { LARGEST_EMULATED } else { SIZES[1] };
    for bytes in sizes().filter(|&bytes| bytes <= most && wanted(&name(bytes, world))) {
        let mut sum = Sum::new(backend, collective, bytes / size_of::<f32>())?;
        let ground = Here::new(backend);
        let timed = |sum: &mut Sum<'_, B>| -> Result<f64> {
            // Else they would grow until they are all infinite.
            sum.restore()?;
            ground.wait()?;
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
    /// What they are before a sum.
    own: B::Buffer<f32>,
    elements: Range<usize>,
}

impl<'a, B: Bed> Sum<'a, B> {
    /// Memory with values of this process: pages that were never written are all the same one.
    fn new(backend: &'a B, collective: &'a dyn Collective, len: usize) -> Result<Self> {
        let (values, mut own) = (backend.allocate(len)?, backend.allocate(len)?);
        for from in (0..len).step_by(TILE) {
            let tile: Vec<f32> = (from..len.min(from + TILE)).map(|at| value(collective.rank(), at)).collect();
            backend.upload(&mut own, from, &tile)?;
        }
        let mut sum = Sum { backend, collective, values, own, elements: 0..len };
        sum.restore()?;
        Ok(sum)
    }

    /// The values as they were before any sum.
    fn restore(&mut self) -> Result<()> {
        self.backend.copy(&mut self.values, &self.own)
    }

    fn run(&mut self) -> Result<()> {
        self.collective.fork()?;
        self.collective.all_reduce_sum(self.backend.slice(&mut self.values, self.elements.clone())?)?;
        self.collective.join()
    }

    /// Whether every process's values were added, and once: each gives its number and the position.
    fn verify(&mut self) -> Result<Option<String>> {
        let (world, len) = (self.collective.world(), self.elements.len());
        self.restore()?;
        self.run()?;
        for from in (0..len).step_by(TILE) {
            let mut sums = vec![0f32; TILE.min(len - from)];
            self.backend.download(&self.values, from, &mut sums)?;
            let expected = |at: usize| (0..world).map(|rank| value(rank, from + at)).sum::<f32>();
            if let Some(at) = (0..sums.len()).find(|&at| sums[at] != expected(at)) {
                let (place, found, expected) = (from + at, sums[at], expected(at));
                return Ok(Some(format!("value {place} is {found}, expected {expected}: the sum was not taken")));
            }
        }
        Ok(None)
    }
}

/// What a process gives at a position: whole numbers, whose sums are exact, in no order.
fn value(rank: usize, at: usize) -> f32 {
    ((at.wrapping_mul(2_654_435_761) >> 16) % 1000 * (rank + 1)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::parallel::Single;

    #[test]
    fn sums_go_up_to_those_of_a_large_model() {
        let names: Vec<String> = sizes().map(|bytes| name(bytes, 8)).collect();
        assert_eq!(
            (names.first().map(String::as_str), names.last().map(String::as_str)),
            (Some("4KiB/8_processes"), Some("512MiB/8_processes"))
        );
        assert!(sizes().is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn what_is_summed_is_filled_before_it_is_timed_and_stays_what_it_was() {
        let cpu = Cpu::<f32>::new();
        let mut sum = Sum::new(&cpu, &Single, 3000).unwrap();
        assert!(sum.values.iter().map(|value| value.to_bits()).collect::<std::collections::BTreeSet<_>>().len() > 500);
        let before = sum.values.clone();
        for _ in 0..3 {
            sum.restore().unwrap();
            sum.run().unwrap();
        }
        assert_eq!(sum.values, before);
        assert_eq!(sum.verify().unwrap(), None);
        sum.own[17] = 0.5;
        assert!(sum.verify().unwrap().is_some_and(|wrong| wrong.starts_with("value 17 is 0.5")));
    }
}
