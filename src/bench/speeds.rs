//! How fast the device is, as this run has seen it: what floors are computed from.

use super::device::{ProductTask, TrafficTask};
use super::measure::{Asked, Ground, Settings, measure};
use super::place::{Bed, Precision};
use super::results::Figure;
use crate::backend::profile::{Kind, Traffic};
use crate::error::Result;

/// Speeds of a device in a precision.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speeds {
    /// The precision of products.
    pub precision: Precision,
    /// Bytes a second of a copy within the memory, those read and those written together.
    pub copy: f64,
    /// The fastest bytes a second seen of the memory: copied, read, written, or both where they are.
    pub fastest_memory: f64,
    /// Floating-point operations a second of the fastest product.
    pub product: f64,
    /// What nothing can be faster than: `product`, and some more, since no shape was tried that could not be.
    pub fastest_product: f64,
}

/// Shapes of products of which the fastest counts: rows, inputs, outputs.
fn shapes<B: Bed>(backend: &B) -> Vec<[usize; 3]> {
    match backend.kind() {
        Kind::Host => vec![[1024; 3], [256, 768, 3072], [128, 784, 256]],
        Kind::Gpu => vec![[8192; 3], [8192, 4096, 4096], [4096; 3]],
        Kind::Emulated => vec![[32; 3]],
    }
}

/// How much faster than the fastest product that was tried another may be.
const UNTRIED: f64 = 1.25;

impl Speeds {
    /// Where nothing is timed.
    pub(super) fn unknown(precision: Precision) -> Self {
        let none = f64::NAN;
        Speeds { precision, copy: none, fastest_memory: none, product: none, fastest_product: none }
    }

    /// Measures them. The median counts for the copy, the fastest of all for limits.
    ///
    /// # Errors
    /// Not enough memory, or a device that failed.
    pub fn measure<B: Bed>(
        backend: &B,
        ground: &dyn Ground,
        settings: &Settings,
        precision: Precision,
    ) -> Result<Self> {
        let plain = |name: &str| Asked {
            figure: Figure { suite: "device".to_owned(), name: name.to_owned(), ..Figure::default() },
            limit: &|_| None,
        };
        let (mut copy, mut fastest_memory) = (0.0, 0.0f64);
        for traffic in [Traffic::Copy, Traffic::Read, Traffic::Write, Traffic::InPlace] {
            let mut task = TrafficTask::in_memory(backend, traffic)?;
            let figure = measure(ground, settings, &mut task, None, plain("memory"))?;
            if traffic == Traffic::Copy {
                copy = task.bytes() / figure.seconds.median;
            }
            fastest_memory = fastest_memory.max(task.bytes() / figure.seconds.min);
        }
        let mut product = 0.0f64;
        for shape in shapes(backend) {
            let mut task = ProductTask::new(backend, shape)?;
            let figure = measure(ground, settings, &mut task, None, plain("product"))?;
            product = product.max(task.flops() / figure.seconds.lower_quartile);
        }
        Ok(Speeds { precision, copy, fastest_memory, product, fastest_product: UNTRIED * product })
    }

    /// `227 GFLOP/s in f32`.
    pub fn product_text(&self) -> String {
        format!("{:.0} GFLOP/s in {}", self.product / 1e9, self.precision.name())
    }
}
