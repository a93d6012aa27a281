//! Folders of PNG and JPEG pictures, one folder a class.

use std::io::Cursor;
use std::path::Path;

use image::{DynamicImage, ImageReader, imageops::FilterType};

use super::super::augment::Subject;
use super::super::dataset::{Decode, RealTable, TargetTable, Values};
use super::super::options::{Color, ImagesOptions, Normalize};
use super::super::preprocess::Recipe;
use super::super::reading::Reading;
use super::super::source::{ClassFile, Held, Lookup, by_class, read_raw};
use super::{Pool, held, read_all, room};
use crate::error::{Error, Result};

/// Decoded pictures are kept in memory up to this size.
const CACHE_BYTES: usize = 1 << 30;

const ENDINGS: [&str; 3] = ["png", "jpg", "jpeg"];

/// Opens a folder.
pub(crate) fn open(options: &ImagesOptions, lookup: &Lookup, reading: &Reading) -> Result<Pool> {
    let place = lookup.folder_for("data.path", &options.path)?;
    let (names, mut files) = by_class(&place, &ENDINGS)?;
    files.sort_by_key(|f| f.held);
    if let Some(sides) = options.resize.filter(|sides| !sides.iter().all(|side| (1..=1 << 14).contains(side))) {
        return Err(Error::config("data.resize", format!("found {sides:?}, expected sides of 1 to 16384")));
    }
    // `by_class` gives at least one file.
    let first = decode(&files[0].path)?;
    let colored = match options.color {
        Some(color) => color == Color::Rgb,
        None => first.color().has_color(),
    };
    let form = Form {
        channels: if colored { 3 } else { 1 },
        height: options.resize.map_or(first.height() as usize, |r| r[0]),
        width: options.resize.map_or(first.width() as usize, |r| r[1]),
        resize: options.resize.is_some(),
    };
    let bytes = form.elements().saturating_mul(files.len());
    let values = if options.cache.unwrap_or(bytes <= CACHE_BYTES) {
        let mut values = room::<u8>(&place, files.len(), form.elements())?;
        read_all(reading, &files, &mut values, form.elements(), |file, out| form.read(&file.path, out))?;
        Values::Bytes(values)
    } else {
        Values::Files(Box::new(Pictures { form, files: files.clone() }))
    };
    let Form { channels, height, width, .. } = form;
    Ok(Pool {
        table: RealTable { shape: vec![channels, height, width], channels, full_scale: 255.0, background: 0.0, values },
        targets: TargetTable::Class { labels: files.iter().map(|f| f.class).collect(), names },
        own_validation: held(&files, Held::Validation),
        own_test: held(&files, Held::Test),
        names: Some(files.into_iter().map(|f| f.name).collect()),
        pattern: None,
        subject: Subject::Picture,
        normalize: Normalize::Unit,
        pictures: None,
        recipe: Recipe::Image { channels, height, width, full_scale: 255.0 },
        place,
    })
}

/// The form that all pictures are brought to.
#[derive(Clone, Copy)]
pub(crate) struct Form {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    /// Bring pictures of other sizes to this one; else they are an error.
    pub resize: bool,
}

impl Form {
    pub fn elements(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// The pixels of a file (`=`). `out: [channels, height, width]`.
    pub fn read(&self, path: &Path, out: &mut [u8]) -> Result<()> {
        let mut picture = decode(path)?;
        let found = (picture.height() as usize, picture.width() as usize);
        if found != (self.height, self.width) {
            if !self.resize {
                return Err(Error::data(
                    path,
                    format!(
                        "is {} high and {} wide, expected {} and {} as the first picture; set data.resize",
                        found.0, found.1, self.height, self.width
                    ),
                ));
            }
            picture = picture.resize_exact(self.width as u32, self.height as u32, FilterType::Triangle);
        }
        if self.channels == 1 {
            out.copy_from_slice(picture.to_luma8().as_raw());
        } else {
            let pixels = picture.to_rgb8();
            let plane = self.height * self.width;
            for (i, pixel) in pixels.as_raw().chunks_exact(3).enumerate() {
                for (channel, value) in pixel.iter().enumerate() {
                    out[channel * plane + i] = *value;
                }
            }
        }
        Ok(())
    }
}

fn decode(path: &Path) -> Result<DynamicImage> {
    let bytes = read_raw(path)?;
    let wrong = |e: String| {
        let reason = e.split_whitespace().collect::<Vec<_>>().join(" ");
        Error::data(path, format!("is not a picture that can be read ({reason}); expected PNG or JPEG"))
    };
    let picture = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| wrong(e.to_string()))?
        .decode()
        .map_err(|e| wrong(e.to_string()))?;
    if picture.width() == 0 || picture.height() == 0 {
        return Err(wrong("it has no pixels".into()));
    }
    Ok(picture)
}

/// Pictures that are decoded when they are read.
struct Pictures {
    form: Form,
    files: Vec<ClassFile>,
}

impl Decode for Pictures {
    fn decode(&self, index: usize, out: &mut [f32]) -> Result<()> {
        let mut pixels = vec![0; self.form.elements()];
        self.form.read(&self.files[index].path, &mut pixels)?;
        out.iter_mut().zip(pixels).for_each(|(out, pixel)| *out = f32::from(pixel));
        Ok(())
    }
}
