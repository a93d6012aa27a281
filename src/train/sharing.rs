//! How a run's processes share work and memory: what does not go together, and who exchanges what.

use std::sync::Arc;

use super::run::Run;
use super::step::{Trainer, can_be_shared_out};
use crate::backend::ops::Update;
use crate::backend::{Backend, Exchange};
use crate::error::{Error, Result};
use crate::parallel::{Collective, Gradients, GradientsOptions, Shard, Windowed, buckets};

/// Fails where something that is asked for does not go with what is shared out.
pub(super) fn check_sharding<B: Backend + Update>(run: &Run<B>) -> Result<()> {
    if run.parallel.shard == Shard::None {
        return Ok(());
    }
    if run.options.shadow_every_steps.is_some() && run.collective.world() > 1 {
        return Err(Error::config(
            "run.shadow_every_steps",
            "looks at all gradients and slots, of which parallel.shard leaves each process a part; expected parallel.shard = \"none\" \
             with it",
        ));
    }
    can_be_shared_out(&run.optimizer)
}

/// What makes the gradients of a trainer's parts those of the whole batch.
///
/// # Errors
/// A thread that cannot be started.
pub(crate) fn exchange<B: Backend<Real = f32> + Update>(
    trainer: &Trainer<B>,
    options: GradientsOptions,
    collective: &Arc<dyn Collective>,
    bucket: usize,
) -> Result<Box<dyn Exchange<B>>> {
    let collective = Arc::clone(collective);
    Ok(match trainer.sharding() {
        None => {
            let arena = trainer.arena();
            let buckets = buckets(&trainer.program().ops, &arena.ranges, &arena.layout, bucket)?;
            Box::new(Gradients::new(options, collective, buckets)?)
        }
        Some(sharding) if sharding.options.shard < Shard::Gradients => {
            Box::new(Gradients::sharded(options, collective, sharding)?)
        }
        Some(sharding) => Box::new(Windowed::new(options, collective, sharding)?),
    })
}
