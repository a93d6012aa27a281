//! The handwritten digits that are part of the program: 1,797 pictures of 8x8 pixels with 17 grey values, from the test set
//! of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI), as the crate smartcore carries them.

use super::super::augment::Subject;
use super::super::dataset::{RealTable, TargetTable, Values};
use super::super::options::Normalize;
use super::super::preprocess::Recipe;
use super::Pool;

const SIDE: usize = 8;
const FULL_SCALE: f32 = 16.0;

/// All digits.
pub(crate) fn open() -> Pool {
    let digits = smartcore::dataset::digits::load_dataset();
    let count = digits.num_samples;
    Pool {
        place: "digits".into(),
        table: RealTable {
            shape: vec![1, SIDE, SIDE],
            channels: 1,
            full_scale: FULL_SCALE,
            background: 0.0,
            values: Values::Bytes(digits.data.iter().map(|v| *v as u8).collect()),
        },
        targets: TargetTable::Class {
            labels: digits.target.iter().map(|v| *v as i32).collect(),
            names: (0..10).map(|d| d.to_string()).collect(),
        },
        names: None,
        pattern: None,
        own_validation: count..count,
        own_test: count..count,
        subject: Subject::Picture,
        normalize: Normalize::Unit,
        pictures: None,
        recipe: Recipe::Image { channels: 1, height: SIDE, width: SIDE, full_scale: FULL_SCALE },
    }
}
