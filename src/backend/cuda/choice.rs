//! Which of the library's algorithms a product takes: the fastest on this device, measured once and kept on disk.
//!
//! Algorithms differ in their order of sums, so another algorithm gives other bits. A run gives the same bits as the one before
//! because the choice is made once: what was measured is written to the cache, where the first that writes wins, and read from
//! then on, by every process. Where it cannot be written, where a run asks for the same bits on any machine, and within a
//! recording, the library's own first proposal is taken, which is a function of the shape. Every algorithm that is proposed
//! gives the same bits each time it runs (see `Limits` in blas.rs). What a run took is kept in its folder besides.

use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t;

use super::blas::{Blas, Described, fits, multiply};
use super::context::Device;
use super::kept::{Entry, fastest, times};
use super::product::{Product, Shape};
use crate::error::Result;

/// What was chosen.
pub(super) struct Choice {
    /// None where the library has no algorithm.
    pub algorithm: Option<cublasLtMatmulAlgo_t>,
    /// Whether it is to be kept; a choice made within a recording is made again outside.
    pub is_final: bool,
}

/// First line of an entry.
const HEAD: &str = "warpstep product 1";

/// Chooses among what the library proposes, best first.
///
/// # Safety
/// As [`Device::product`].
pub(super) unsafe fn choose(
    device: &Device,
    blas: &Blas,
    shape: &Shape,
    described: &Described,
    product: &Product,
    found: &[cublasLtMatmulAlgo_t],
) -> Result<Choice> {
    let first = found.first().copied();
    if !device.options().measure || found.len() < 2 {
        return Ok(Choice { algorithm: first, is_final: true });
    }
    if device.is_recording()? {
        return Ok(Choice { algorithm: first, is_final: false });
    }
    let question = format!("{} {shape:?}", blas.version());
    let entry = Entry::new(device, "products", HEAD, &question);
    let algorithm = entry.find_or_measure(
        |&data| fits(blas, described, &cublasLtMatmulAlgo_t { data }),
        || {
            // What is measured must be what is taken when it is read again.
            let fit: Vec<_> = found.iter().filter(|algorithm| fits(blas, described, algorithm)).copied().collect();
            // SAFETY: as the caller promises.
            Ok(unsafe { measure(device, blas, described, product, &fit)? }.map(|algorithm| algorithm.data))
        },
    )?;
    if let (None, Some(first)) = (&algorithm, &first) {
        entry.keep_for_run(&first.data);
    }
    Ok(Choice { algorithm: algorithm.map(|data| cublasLtMatmulAlgo_t { data }).or(first), is_final: true })
}

/// The fastest by the median of its times; none where there is no room to measure.
///
/// # Safety
/// As [`Device::product`].
unsafe fn measure(
    device: &Device,
    blas: &Blas,
    described: &Described,
    product: &Product,
    found: &[cublasLtMatmulAlgo_t],
) -> Result<Option<cublasLtMatmulAlgo_t>> {
    // What is written `=` is written again by the product itself. What is added to is read where it is and written elsewhere.
    let room = if product.add { Some(device.allocate(bytes_of_out(product))) } else { None };
    let to = match room {
        None => product.out.address,
        Some(Ok(address)) => address,
        Some(Err(_)) => return Ok(None),
    };
    // SAFETY: as the caller promises; `to` has the room of `out`.
    let run = |which: usize| unsafe { multiply(device, blas, described, product, to, &found[which]) }.is_ok();
    let times = times(device, found.len(), run);
    if product.add {
        // After the work that uses it, whatever came of it.
        let finished = device.synchronize();
        device.release(to);
        finished?;
    }
    Ok(fastest(&times?).map(|which| found[which]))
}

/// Bytes from the first value of `out` to its last.
fn bytes_of_out(product: &Product) -> usize {
    let [m, _, n] = product.size;
    let width = if product.types[1] == "f32" { 4 } else { 2 };
    (m.saturating_sub(1) * product.out.stride + n).max(1) * width
}
