//! Labelled sequences of tokens, all of one length.

use std::sync::Arc;

use super::super::{Dataset, Draw, InputMut, InputSpec, Pick, TargetMut, TargetSpec};
use super::TargetTable;
use crate::error::Result;

/// One split of labelled lines.
pub(crate) struct LabelledTokens {
    /// `[all samples, length]`.
    pub values: Arc<Vec<i32>>,
    pub length: usize,
    pub vocabulary: usize,
    pub targets: Arc<TargetTable>,
    pub indices: Vec<u32>,
}

impl Dataset for LabelledTokens {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn input(&self) -> InputSpec {
        InputSpec::Tokens { context: self.length, vocabulary: self.vocabulary }
    }

    fn target(&self) -> TargetSpec {
        self.targets.spec()
    }

    fn read(&self, pick: Pick, _draw: Option<Draw>, input: InputMut<'_>, target: TargetMut<'_>) -> Result<()> {
        let index = self.indices[super::sample(pick, self.len())?] as usize;
        input.tokens()?.copy_from_slice(&self.values[index * self.length..][..self.length]);
        self.targets.read(index, target)
    }

    fn is_plain(&self) -> bool {
        true
    }

    fn class_counts(&self) -> Option<Vec<usize>> {
        self.targets.counts(&self.indices)
    }
}
