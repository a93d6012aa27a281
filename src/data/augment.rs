//! Random changes to training samples: crops, flips, rotations, shifts in time, and SpecAugment's masks (Park et al. 2019).
//!
//! Every draw is keyed by seed, pass and sample, so it depends neither on threads nor on a resume.

use super::Draw;
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose, to_unit};

/// Keys of `data.augment`; each is off where it is not given.
#[derive(Clone, Debug, PartialEq)]
pub struct AugmentOptions {
    /// `data.augment.crop`: pad by this many pixels on every side, then cut the picture's size out at random.
    pub crop: usize,
    /// `data.augment.flip`: mirror left and right, one time in two.
    pub flip: bool,
    /// `data.augment.rotate`: turn by at most this many degrees.
    pub rotate: f32,
    /// `data.augment.time_shift`: move by at most this many frames (samples, for waveforms).
    pub time_shift: usize,
    /// `data.augment.time_mask`: widest band of frames that is masked.
    pub time_mask: usize,
    /// `data.augment.frequency_mask`: widest band of mels that is masked.
    pub frequency_mask: usize,
    /// `data.augment.masks`: how many masks of each kind (default 1).
    pub masks: usize,
}

impl Default for AugmentOptions {
    fn default() -> Self {
        AugmentOptions { crop: 0, flip: false, rotate: 0.0, time_shift: 0, time_mask: 0, frequency_mask: 0, masks: 1 }
    }
}

impl AugmentOptions {
    /// Whether nothing is asked for.
    pub fn is_off(&self) -> bool {
        *self == AugmentOptions { masks: self.masks, ..AugmentOptions::default() }
    }
}

/// What the samples are, for the augmentations that fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    Picture,
    Spectrum,
    Waveform,
    Other,
}

/// The augmentations of one training split.
#[derive(Clone, Debug)]
pub(crate) struct Augment {
    options: AugmentOptions,
    height: usize,
    width: usize,
    /// What lies outside of a sample, a channel.
    background: Vec<f32>,
}

/// Blocks of random words that one sample may use.
const BLOCKS_PER_SAMPLE: u64 = 64;
const GEOMETRY: u64 = 0;
const TIME: u64 = 1;
const MASKS: u64 = 2;

impl Augment {
    /// `shape` as in the data, `background: [channels]`.
    ///
    /// # Errors
    /// An augmentation that does not fit the data.
    pub fn new(
        options: &AugmentOptions,
        subject: Subject,
        shape: &[usize],
        background: Vec<f32>,
    ) -> Result<Option<Self>> {
        if options.is_off() {
            return Ok(None);
        }
        let (height, width) = match shape {
            [_, height, width] => (*height, *width),
            [width] => (1, *width),
            _ => (0, 0),
        };
        let spectrum = subject == Subject::Spectrum;
        let timed = spectrum || subject == Subject::Waveform;
        for (key, given, fits, expected) in [
            ("crop", options.crop > 0, subject == Subject::Picture, "pictures"),
            ("flip", options.flip, subject == Subject::Picture, "pictures"),
            ("rotate", options.rotate != 0.0, subject == Subject::Picture, "pictures"),
            ("time_shift", options.time_shift > 0, timed, "audio"),
            ("time_mask", options.time_mask > 0, spectrum, "audio with features = \"log_mel\""),
            ("frequency_mask", options.frequency_mask > 0, spectrum, "audio with features = \"log_mel\""),
        ] {
            if given && !fits {
                return Err(Error::config(
                    format!("data.augment.{key}"),
                    format!("found it set, but it is for {expected}"),
                ));
            }
        }
        let limit = |key: &str, value: usize, most: usize| {
            if value <= most {
                return Ok(());
            }
            Err(Error::config(
                format!("data.augment.{key}"),
                format!("found {value}, expected {most} at most for samples of shape {shape:?}"),
            ))
        };
        limit("crop", options.crop, height.min(width))?;
        limit("time_shift", options.time_shift, width)?;
        limit("time_mask", options.time_mask, width)?;
        limit("frequency_mask", options.frequency_mask, height)?;
        limit("masks", options.masks, ((BLOCKS_PER_SAMPLE - MASKS) / 2) as usize)?;
        if !(0.0..=180.0).contains(&options.rotate) {
            return Err(Error::config("data.augment.rotate", format!("found {}, expected 0 to 180", options.rotate)));
        }
        Ok(Some(Augment { options: options.clone(), height, width, background }))
    }

    /// Changes one normalized sample in place. `values: [channels, height, width]`.
    pub fn apply(&self, values: &mut [f32], draw: Draw, sample: usize) {
        let words = Philox::new(draw.seed, Purpose::Augmentation, draw.epoch as u32);
        let base = sample as u64 * BLOCKS_PER_SAMPLE;
        let options = &self.options;
        if options.crop > 0 || options.flip || options.rotate > 0.0 {
            self.geometry(values, words.block(base + GEOMETRY));
        }
        if options.time_shift > 0 {
            let by =
                below(words.block(base + TIME)[0], 2 * options.time_shift + 1) as isize - options.time_shift as isize;
            self.shift(values, 0, by, false);
        }
        if options.time_mask > 0 || options.frequency_mask > 0 {
            let mean = mean(values);
            for mask in 0..options.masks as u64 {
                let block = words.block(base + MASKS + mask);
                self.mask(values, band(block[0], block[1], options.time_mask, self.width), mean, false);
                self.mask(values, band(block[2], block[3], options.frequency_mask, self.height), mean, true);
            }
        }
    }

    fn geometry(&self, values: &mut [f32], words: [u32; 4]) {
        let options = &self.options;
        let offset = |word| below(word, 2 * options.crop + 1) as isize - options.crop as isize;
        let (down, right) = (offset(words[0]), offset(words[1]));
        let flip = options.flip && words[2] >> 31 == 1;
        if options.rotate > 0.0 {
            let degrees = (to_unit(words[3]) * 2.0 - 1.0) * options.rotate;
            self.rotate(values, degrees.to_radians(), down as f32, right as f32, flip);
        } else {
            self.shift(values, down, right, flip);
        }
    }

    /// Moves every channel by whole pixels, after mirroring it where `flip` says so.
    fn shift(&self, values: &mut [f32], down: isize, right: isize, flip: bool) {
        if down == 0 && right == 0 && !flip {
            return;
        }
        let (height, width) = (self.height as isize, self.width as isize);
        let mut source = vec![0.0; self.height * self.width];
        for (plane, background) in values.chunks_mut(source.len()).zip(&self.background) {
            source.copy_from_slice(plane);
            for y in 0..height {
                for x in 0..width {
                    let (from_y, from_x) = (y - down, x - right);
                    let inside = (0..height).contains(&from_y) && (0..width).contains(&from_x);
                    let from_x = if flip { width - 1 - from_x } else { from_x };
                    plane[(y * width + x) as usize] =
                        if inside { source[(from_y * width + from_x) as usize] } else { *background };
                }
            }
        }
    }

    /// Mirrors, turns about the middle, and moves every channel, by bilinear interpolation.
    fn rotate(&self, values: &mut [f32], angle: f32, down: f32, right: f32, flip: bool) {
        let (height, width) = (self.height as isize, self.width as isize);
        let (middle_y, middle_x) = ((height - 1) as f32 / 2.0, (width - 1) as f32 / 2.0);
        let (sin, cos) = angle.sin_cos();
        let mut source = vec![0.0; self.height * self.width];
        for (plane, background) in values.chunks_mut(source.len()).zip(&self.background) {
            source.copy_from_slice(plane);
            let at = |y: isize, x: isize| {
                let inside = (0..height).contains(&y) && (0..width).contains(&x);
                if inside { source[(y * width + x) as usize] } else { *background }
            };
            for y in 0..height {
                for x in 0..width {
                    let (dy, dx) = (y as f32 - down - middle_y, x as f32 - right - middle_x);
                    let from_y = cos * dy - sin * dx + middle_y;
                    let turned_x = sin * dy + cos * dx;
                    let from_x = if flip { middle_x - turned_x } else { middle_x + turned_x };
                    let (top, left) = (from_y.floor(), from_x.floor());
                    let (fy, fx) = (from_y - top, from_x - left);
                    let (top, left) = (top as isize, left as isize);
                    let upper = at(top, left) * (1.0 - fx) + at(top, left + 1) * fx;
                    let lower = at(top + 1, left) * (1.0 - fx) + at(top + 1, left + 1) * fx;
                    plane[(y * width + x) as usize] = upper * (1.0 - fy) + lower * fy;
                }
            }
        }
    }

    fn mask(&self, values: &mut [f32], band: std::ops::Range<usize>, fill: f32, rows: bool) {
        for plane in values.chunks_mut(self.height * self.width) {
            if rows {
                plane[band.start * self.width..band.end * self.width].fill(fill);
            } else {
                plane.chunks_mut(self.width).for_each(|row| row[band.clone()].fill(fill));
            }
        }
    }
}

/// The mean, summed in eight lanes so that additions need not wait for each other.
fn mean(values: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let chunks = values.chunks_exact(8);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, value)| *lane += value);
    }
    (lanes.iter().sum::<f32>() + rest) / values.len().max(1) as f32
}

/// A whole number below `bound` from one random word.
fn below(word: u32, bound: usize) -> usize {
    ((u64::from(word) * bound as u64) >> 32) as usize
}

/// A band of `0 ..= widest` out of `len`.
fn band(width_word: u32, start_word: u32, widest: usize, len: usize) -> std::ops::Range<usize> {
    let width = below(width_word, widest + 1);
    let start = below(start_word, len - width + 1);
    start..start + width
}

#[cfg(test)]
mod tests {
    use super::*;

    fn augment(options: AugmentOptions, subject: Subject) -> Augment {
        Augment::new(&options, subject, &[1, 4, 6], vec![-1.0]).ok().flatten().expect("options that fit")
    }

    #[test]
    fn a_draw_depends_on_seed_pass_and_sample_alone() {
        let options = AugmentOptions { crop: 2, flip: true, rotate: 15.0, ..Default::default() };
        let augment = augment(options, Subject::Picture);
        let picture: Vec<f32> = (0..24).map(|v| v as f32).collect();
        let changed = |seed, epoch, sample| {
            let mut values = picture.clone();
            augment.apply(&mut values, Draw { seed, epoch }, sample);
            values
        };
        assert_eq!(changed(1, 2, 3), changed(1, 2, 3));
        assert_ne!(changed(1, 2, 3), changed(2, 2, 3));
        assert_ne!(changed(1, 2, 3), changed(1, 3, 3));
        assert_ne!(changed(1, 2, 3), changed(1, 2, 4));
    }

    #[test]
    fn a_crop_moves_the_picture_and_fills_with_the_background() {
        let augment = augment(AugmentOptions { crop: 1, ..Default::default() }, Subject::Picture);
        let mut values: Vec<f32> = (0..24).map(|v| v as f32).collect();
        augment.shift(&mut values, 1, -1, false);
        assert_eq!(values[..6], [-1.0; 6]);
        assert_eq!(values[6..12], [1.0, 2.0, 3.0, 4.0, 5.0, -1.0]);
    }

    #[test]
    fn a_turn_by_nothing_gives_the_moved_and_mirrored_picture() {
        let augment = augment(AugmentOptions { rotate: 1.0, ..Default::default() }, Subject::Picture);
        let picture: Vec<f32> = (0..24).map(|v| (v * v) as f32).collect();
        for (down, right, flip) in [(0, 0, false), (1, -2, false), (-1, 1, true)] {
            let (mut turned, mut moved) = (picture.clone(), picture.clone());
            augment.rotate(&mut turned, 0.0, down as f32, right as f32, flip);
            augment.shift(&mut moved, down, right, flip);
            assert_eq!(turned, moved, "{down} {right} {flip}");
        }
    }

    #[test]
    fn masks_cover_bands_no_wider_than_asked() {
        let options = AugmentOptions { time_mask: 3, frequency_mask: 2, ..Default::default() };
        let augment = augment(options, Subject::Spectrum);
        let mut masked = 0;
        for sample in 0..200 {
            let mut values: Vec<f32> = (0..24).map(|v| 100.0 + v as f32).collect();
            augment.apply(&mut values, Draw { seed: 5, epoch: 0 }, sample);
            let mean = 111.5;
            let columns = (0..6).filter(|x| (0..4).all(|y| values[y * 6 + x] == mean)).count();
            let rows = (0..4).filter(|y| (0..6).all(|x| values[y * 6 + x] == mean)).count();
            assert!(columns <= 3 && rows <= 2, "{columns} {rows}");
            masked += columns + rows;
        }
        assert!(masked > 100, "{masked}");
    }

    #[test]
    fn an_augmentation_that_does_not_fit_is_refused() {
        let options = AugmentOptions { flip: true, ..Default::default() };
        let error = Augment::new(&options, Subject::Spectrum, &[1, 4, 6], vec![0.0]).unwrap_err().to_string();
        assert!(error.contains("data.augment.flip"), "{error}");
    }
}
