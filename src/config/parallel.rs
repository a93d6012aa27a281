//! The section `[parallel]`.

use super::section::Section;
use crate::error::Result;
use crate::parallel::{ParallelOptions, Shard, Wire};

/// Keys that change how fast numbers come, and where they are kept, and not which.
pub(super) const NOT_IDENTITY: [&str; 5] = ["shard", "overlap", "bucket_mb", "timeout", "check_every_steps"];

/// The options of `[parallel]`.
pub(super) fn parallel(root: &mut Section, reproducible: bool) -> Result<ParallelOptions> {
    let defaults = ParallelOptions::default();
    let mut section = root.section("parallel")?;
    let options = ParallelOptions {
        reproducible,
        parts: section.optional("parts")?,
        wire: section.choice_or("reduce", &[("f32", Wire::F32), ("bf16", Wire::Bf16)], "f32")?,
        shard: section.choice_or(
            "shard",
            &[
                ("none", Shard::None),
                ("optimizer", Shard::Optimizer),
                ("gradients", Shard::Gradients),
                ("parameters", Shard::Parameters),
            ],
            "none",
        )?,
        overlap: section.or("overlap", defaults.overlap)?,
        bucket_mb: section.or("bucket_mb", defaults.bucket_mb)?,
        timeout: section.or("timeout", defaults.timeout)?,
        check_every_steps: section.or("check_every_steps", defaults.check_every_steps)?,
    };
    root.close("parallel", section, false)?;
    Ok(options)
}
