//! The parameter arena: every tensor's range of elements in one contiguous buffer.

use std::collections::HashMap;
use std::ops::Range;

use crate::error::{Error, Result};

/// Each tensor starts at a multiple of this many elements, so that one range serves f32 and bf16 arenas alike and a
/// parameter group is one byte for each such block.
pub const ALIGNMENT: usize = 128;

/// A parameter tensor before it has a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// The name that its PyTorch twin has, such as `blocks.0.attn.qkv.weight`.
    pub name: String,
    /// Its shape, outermost first.
    pub shape: Vec<usize>,
}

/// A parameter tensor in the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamEntry {
    /// The name that its PyTorch twin has.
    pub name: String,
    /// Its shape, outermost first.
    pub shape: Vec<usize>,
    /// First element in the arena; a multiple of [`ALIGNMENT`].
    pub offset: usize,
    /// Number of elements, padding not counted.
    pub len: usize,
}

impl ParamEntry {
    /// The elements it takes, padding not counted.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

/// Name to range of elements, for one arena and everything laid out as it is (gradients, optimizer slots).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParamLayout {
    entries: Vec<ParamEntry>,
    by_name: HashMap<String, usize>,
    len: usize,
}

impl ParamLayout {
    /// Lays the tensors out in the given order.
    ///
    /// # Errors
    /// A name that stands twice, or an arena of more elements than `usize` counts.
    pub fn new(specs: &[ParamSpec]) -> Result<Self> {
        let mut layout = ParamLayout::default();
        for spec in specs {
            let too_large = || Error::shape(&spec.name, "a tensor that memory can hold", format!("{:?}", spec.shape));
            let len = spec.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(too_large)?;
            let padded = len.checked_next_multiple_of(ALIGNMENT).ok_or_else(too_large)?;
            let entry = ParamEntry { name: spec.name.clone(), shape: spec.shape.clone(), offset: layout.len, len };
            if layout.by_name.insert(spec.name.clone(), layout.entries.len()).is_some() {
                return Err(Error::shape("model", "parameter names that differ", format!("`{}` twice", spec.name)));
            }
            layout.entries.push(entry);
            layout.len = layout.len.checked_add(padded).ok_or_else(too_large)?;
        }
        Ok(layout)
    }

    /// The tensors, in arena order.
    pub fn entries(&self) -> &[ParamEntry] {
        &self.entries
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&ParamEntry> {
        self.by_name.get(name).map(|&i| &self.entries[i])
    }

    /// Elements of the arena, padding counted: a multiple of [`ALIGNMENT`].
    pub fn padded_len(&self) -> usize {
        self.len
    }

    /// Number of parameters, padding not counted.
    pub fn parameters(&self) -> usize {
        self.entries.iter().map(|e| e.len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, shape: &[usize]) -> ParamSpec {
        ParamSpec { name: name.into(), shape: shape.into() }
    }

    #[test]
    fn tensors_are_aligned_and_do_not_overlap() {
        let layout =
            ParamLayout::new(&[spec("a", &[3, 5]), spec("b", &[128]), spec("c", &[]), spec("d", &[129])]).unwrap();
        let offsets: Vec<usize> = layout.entries().iter().map(|e| e.offset).collect();
        assert_eq!(offsets, [0, 128, 256, 384]);
        assert_eq!(layout.padded_len(), 640);
        assert_eq!(layout.parameters(), 15 + 128 + 1 + 129);
        assert_eq!(layout.get("c").unwrap().range(), 256..257);
    }

    #[test]
    fn a_name_that_stands_twice_is_an_error() {
        assert!(ParamLayout::new(&[spec("a", &[1]), spec("a", &[2])]).is_err());
    }
}
