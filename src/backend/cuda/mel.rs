//! Log-mel pictures (kernels/mel.cu).

use std::f64::consts::TAU;
use std::sync::{Arc, PoisonError};

use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;

use super::context::{Device, driver_error};
use super::launch::{Arg, Grid, args};
use super::{Cuda, Storage};
use crate::backend::ops::{LogMelForward, Mel};
use crate::backend::{Memory, StepContext};
use crate::error::{Error, Result};
use crate::log_mel::LogMel;

const FILE: &str = "mel";
const THREADS: u32 = 256;
/// Frames of a block share about so many bytes of shared memory, which leaves room for several blocks.
const SHARED: usize = 36 << 10;

/// `MelShape` of the kernels.
#[derive(Clone, Copy, Debug, bytemuck::NoUninit)]
#[repr(C)]
struct MelShape {
    samples: i32,
    frames: i32,
    hop: i32,
    n_fft: i32,
    mels: i32,
    tiles: i32,
    passes: i32,
    unused: i32,
    radices: [u16; 16],
}

const _: () = assert!(size_of::<MelShape>() == 64, "as the kernels'");

impl From<MelShape> for Arg {
    fn from(shape: MelShape) -> Self {
        Arg::of(&shape)
    }
}

/// The factors of the transform's passes: fours first, since a pass of them is the cheapest for its size.
fn radices(mut len: usize) -> Vec<u16> {
    let mut found = Vec::new();
    let mut radix = 4;
    while len > 1 {
        if len.is_multiple_of(radix) {
            found.push(radix as u16);
            len /= radix;
        } else {
            radix = match radix {
                4 => 2,
                2 => 3,
                odd => odd + 2,
            };
        }
    }
    found
}

/// Bytes of shared memory that a frame takes.
fn bytes_of_frame(n_fft: usize) -> usize {
    8 * n_fft + 16
}

/// What the kernel looks up, kept by the device: bands (first bin, first weight, weights, 0), roots of unity `exp(-2 pi i k / n)`,
/// the window, the bands' weights.
struct Tables {
    bytes: Vec<u8>,
    roots: usize,
    window: usize,
    weights: usize,
}

impl Tables {
    fn new(transform: &LogMel) -> Self {
        let mut bytes = Vec::new();
        let mut begin = 0;
        for (first, weights) in transform.bands() {
            let band = [*first as i32, begin, weights.len() as i32, 0];
            bytes.extend_from_slice(bytemuck::cast_slice(&band));
            begin += weights.len() as i32;
        }
        let roots = bytes.len();
        let n = transform.n_fft();
        for k in 0..n {
            let (sin, cos) = (TAU * k as f64 / n as f64).sin_cos();
            bytes.extend_from_slice(bytemuck::cast_slice(&[cos as f32, -sin as f32]));
        }
        let window = bytes.len();
        bytes.extend_from_slice(bytemuck::cast_slice(transform.window()));
        let weights = bytes.len();
        for (_, weights) in transform.bands() {
            bytes.extend_from_slice(bytemuck::cast_slice(weights));
        }
        Tables { bytes, roots, window, weights }
    }
}

/// A transform whose tables the device keeps.
pub(super) struct KeptTables {
    transform: Arc<LogMel>,
    /// Of all of it, and of the bands.
    pub address: u64,
    /// Addresses of roots, window and weights.
    parts: [u64; 3],
}

impl<S: Storage> Mel for Cuda<S> {
    fn log_mel_forward(&self, memory: &mut Memory<'_, Self>, args: &LogMelForward, _: &StepContext) -> Result<()> {
        let transform = &args.transform;
        let (device, n_fft) = (self.device(), transform.n_fft());
        let [mels, frames] = transform.shape();
        let frame = bytes_of_frame(n_fft);
        let most = device.shared_memory()?;
        if frame > most {
            return Err(Error::config(
                "data.mel.n_fft",
                format!(
                    "found {n_fft}, expected {} at most: a window is transformed in the {most} bytes of shared memory of {}; \
                     or features = \"log_mel\", which transforms it while data is read",
                    (most - 16) / 8,
                    device.name()
                ),
            ));
        }
        let together = [8, 4, 2].into_iter().find(|&frames| frames * frame <= SHARED).unwrap_or(1);
        let tiles = frames.div_ceil(together);
        let factors = radices(n_fft / 2);
        let mut shape = MelShape {
            samples: transform.samples() as i32,
            frames: frames as i32,
            hop: transform.hop() as i32,
            n_fft: n_fft as i32,
            mels: mels as i32,
            tiles: tiles as i32,
            passes: factors.len() as i32,
            unused: 0,
            radices: [0; 16],
        };
        shape.radices[..factors.len()].copy_from_slice(&factors);
        let (tables, [roots, window, weights]) = device.mel_tables(transform)?;
        let (x, y) = (Self::act(memory, args.x), Self::act(memory, args.y));
        let list = args![x, y, tables, roots, window, weights, shape, args.scale as f32, args.shift as f32];
        let blocks = Grid::new(args.batch * tiles, THREADS).with_shared(together * frame);
        let grid = Grid { threads: [THREADS / together as u32, together as u32, 1], ..blocks };
        // SAFETY: x holds `batch` waveforms, y as many pictures; the tables are those of the transform, for as long as the device.
        unsafe { self.launch(FILE, "log_mel", grid, list) }
    }
}

impl Device {
    /// Bytes of shared memory that a block may have.
    fn shared_memory(&self) -> Result<usize> {
        let most = self.context().attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
        most.map(|most| most as usize).map_err(|error| driver_error("ask for the shared memory of a block", error))
    }

    /// Addresses of a transform's tables: bands; roots, window, weights. They are copied in the first, unrecorded run of a program
    /// and stay, since recordings name them.
    fn mel_tables(&self, transform: &Arc<LogMel>) -> Result<(u64, [u64; 3])> {
        // Before the lock, which a thread that has claimed the device waits for.
        let _claim = self.claim();
        let mut kept = self.mel_tables.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |other: &Arc<LogMel>| Arc::ptr_eq(other, transform) || other == transform;
        let at = match kept.iter().position(|tables| same(&tables.transform)) {
            Some(at) => at,
            None => {
                let tables = Tables::new(transform);
                let address = self.allocate(tables.bytes.len())?;
                let parts = [tables.roots, tables.window, tables.weights].map(|offset| address + offset as u64);
                kept.push(KeptTables { transform: transform.clone(), address, parts });
                self.write(address, &tables.bytes)?;
                kept.len() - 1
            }
        };
        Ok((kept[at].address, kept[at].parts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_the_product_of_its_passes() {
        for len in 1..5000 {
            let found = radices(len);
            assert_eq!(found.iter().map(|&radix| usize::from(radix)).product::<usize>(), len);
            assert!(found.len() <= 16);
        }
    }
}
