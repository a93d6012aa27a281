//! Speeds that a benchmark has measured, in the place of those of a data sheet.

use std::path::Path;

use super::Device;
use crate::bench::all_reduce::SUITE;
use crate::bench::compare::read;
use crate::bench::results::Figure;
use crate::config::Precision;
use crate::error::{Error, Result};

/// Takes over the copy within memory, the fastest product in the run's precision, and the largest bus bandwidth of sums over
/// processes, as far as they are there. Figures that were refused do not count.
///
/// # Errors
/// A file that is no result of `warpstep bench`, or that holds none of these.
pub(super) fn apply(path: &Path, precision: Precision, device: &mut Device) -> Result<()> {
    let results = read(path)?;
    let precision = match precision {
        Precision::F32 => "f32",
        Precision::Tf32 => "tf32",
        Precision::Bf16 => "bf16",
        Precision::F16 => "f16",
    };
    let fastest = |means: &dyn Fn(&Figure) -> bool, amount: &dyn Fn(&Figure) -> Option<f64>| {
        let usable = results.figures.iter().filter(|figure| figure.refused.is_none() && means(figure));
        usable.filter_map(|figure| Some(amount(figure)? / figure.seconds.median)).max_by(f64::total_cmp)
    };
    let (bytes, flops) = (|figure: &Figure| figure.bytes, |figure: &Figure| figure.flops);
    let product = |figure: &Figure| {
        figure.suite == "device"
            && figure.name.starts_with("product/")
            && figure.name.rsplit('/').next() == Some(precision)
    };
    let copy = fastest(&|figure| figure.suite == "device" && figure.name == "copy/memory", &bytes);
    let product = fastest(&product, &flops);
    let sums = fastest(&|figure| figure.suite == SUITE, &bytes);
    if copy.is_none() && product.is_none() && sums.is_none() {
        let problem = format!(
            "holds none of device/copy/memory, device/product/../{precision} and all_reduce that may be quoted; expected what \
             `warpstep bench device --json FILE` writes, or that of several processes"
        );
        return Err(Error::data(path, problem));
    }
    if let Some(copy) = copy {
        device.speed.copy = copy;
    }
    if let Some(product) = product {
        device.speed.product = product;
    }
    if let Some(sums) = sums {
        device.node_bandwidth = sums;
    }
    device.title += &format!(", with what was measured on {}", results.machine.device);
    Ok(())
}
