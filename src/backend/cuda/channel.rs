//! Tensors `[batch, channels, spatial]` cut by channel (kernels/channel.cuh).

use super::launch::{Arg, Grid};
use crate::error::{Error, Result};

/// As the kernels take it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::NoUninit)]
#[repr(C)]
pub(super) struct ChannelShape {
    channels: u32,
    spatial: u32,
    /// Values of a channel.
    count: u32,
    /// Values of a part.
    part: u32,
}

const _: () = assert!(size_of::<ChannelShape>() == 16, "as the kernels'");

impl From<ChannelShape> for Arg {
    fn from(shape: ChannelShape) -> Self {
        Arg::of(&shape)
    }
}

/// Values that make another part worth a block.
const PART: usize = 8192;
/// Parts are merged by one warp, one a lane.
const MOST_PARTS: usize = 32;
/// Every part but the last is a multiple of this, so that no access of any width lies in two.
const WIDEST: usize = 8;

/// How the channels of a tensor are cut: by its shape alone, so that sums have one order on every device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Channels {
    pub shape: ChannelShape,
    /// Parts of a channel.
    pub parts: usize,
}

impl Channels {
    /// Cuts `[batch, channels, spatial]`.
    pub fn new(operation: &str, [batch, channels, spatial]: [usize; 3]) -> Result<Self> {
        let count = batch * spatial;
        let part = count.div_ceil(count.div_ceil(PART).clamp(1, MOST_PARTS)).next_multiple_of(WIDEST);
        let small = |value: usize| {
            i32::try_from(value).map(|value| value as u32).map_err(|_| {
                let found = format!("[{batch}, {channels}, {spatial}]");
                Error::shape(operation, "fewer than 2^31 channels, and values a channel", found)
            })
        };
        let shape = ChannelShape {
            channels: small(channels)?,
            spatial: small(spatial)?,
            count: small(count)?,
            part: small(part)?,
        };
        Ok(Channels { shape, parts: count.div_ceil(part).max(1) })
    }

    /// A block for each channel and part.
    pub fn grid(&self) -> Grid {
        let mut grid = Grid::new(self.shape.channels as usize, 256);
        grid.blocks[1] = self.parts as u32;
        grid
    }

    /// A block for each channel.
    pub fn grid_of_one_part(&self) -> Grid {
        Grid::new(self.shape.channels as usize, 256)
    }

    /// The form of a kernel for values of `bytes` bytes: how wide an access never leaves a row of `spatial` values.
    pub fn kernel(&self, name: &str, bytes: usize) -> String {
        let width = match self.shape.spatial as usize * bytes {
            row if row % 16 == 0 => "wide",
            row if row % 8 == 0 => "half",
            _ => "narrow",
        };
        format!("{name}_{width}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_value_and_are_few_enough_for_a_warp() {
        for count in [1, 7, 8, PART - 1, PART, PART + 1, 3 * PART + 5, 64 * PART, 64 * PART + 1, 1 << 30] {
            let channels = Channels::new("test", [count, 3, 1]).unwrap();
            let part = channels.shape.part as usize;
            assert!(channels.parts <= MOST_PARTS && part.is_multiple_of(WIDEST), "{count}: {channels:?}");
            assert!(part * channels.parts >= count && part * (channels.parts - 1) < count, "{count}: {channels:?}");
        }
        assert!(Channels::new("test", [1 << 16, 3, 1 << 15]).is_err());
    }

    #[test]
    fn widths_follow_from_the_row() {
        let width = |spatial, bytes| Channels::new("test", [2, 3, spatial]).unwrap().kernel("k", bytes);
        assert_eq!([width(4, 4), width(2, 4), width(3, 4)], ["k_wide", "k_half", "k_narrow"]);
        assert_eq!([width(16, 2), width(12, 2), width(6, 2)], ["k_wide", "k_half", "k_narrow"]);
    }
}
