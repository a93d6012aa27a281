//! The plan of a run whose memory is shared out over processes: who holds what, and which windows the program sees the rest through.

use std::ops::Range;

use super::buckets::{Bucket, buckets};
use super::gradients::Wire;
use super::options::Shard;
use crate::backend::ops::Update;
use crate::backend::{Backend, Op, Use};
use crate::error::Result;
use crate::optim::UpdatePlan;
use crate::plan::{Hold, Lifetime, MemoryPlan, ParamLayout, Window, shards};

/// How memory is shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardingOptions {
    /// What of it.
    pub shard: Shard,
    /// This process.
    pub rank: usize,
    /// All processes.
    pub world: usize,
    /// Elements of gradients that are summed together, and of parameters that are gathered together.
    pub bucket: usize,
    /// Whether gradients of several micro-batches are added up before they are summed over processes, as the order of
    /// [`crate::plan::Share::reproducible`] asks for: their window then is as large as all of them.
    pub adds_up: bool,
    /// What gradients are sent as.
    pub wire: Wire,
}

/// The plan that follows from the options for a model and its optimizer.
#[derive(Clone, Debug, PartialEq)]
pub struct Sharding {
    /// What it is made by.
    pub options: ShardingOptions,
    /// The elements of each process.
    pub shards: Vec<Range<usize>>,
    /// Pieces of the update in each of them.
    pub pieces: Vec<usize>,
    /// The buckets of the training program.
    pub buckets: Vec<Bucket>,
    /// Elements of each parameter in the arena.
    pub ranges: Vec<Range<usize>>,
    /// The window of gradients: where each parameter's stands, and its elements; none where all are kept.
    pub gradients: Option<(Vec<Range<usize>>, usize)>,
    /// The training program's window of parameters; none where all are kept.
    pub parameters: Option<Window>,
}

impl Sharding {
    /// The plan for a training program.
    ///
    /// # Errors
    /// A program of another model than the layout's.
    pub fn new<B: Update>(
        options: ShardingOptions,
        program: &[Box<dyn Op<B>>],
        layout: &ParamLayout,
        ranges: &[Range<usize>],
        update: &UpdatePlan,
    ) -> Result<Self> {
        let buckets = buckets(program, ranges, layout, options.bucket)?;
        let shards = shards(layout.padded_len(), &update.cuts(), options.world);
        let gradients = match options.shard {
            Shard::None | Shard::Optimizer => None,
            Shard::Gradients | Shard::Parameters if options.adds_up => Some((ranges.to_vec(), layout.padded_len())),
            Shard::Gradients | Shard::Parameters => Some(gradient_window(program, ranges, &buckets)),
        };
        let pieces = shards.iter().map(|shard| update.pieces(shard).count()).collect();
        let sharding =
            Sharding { options, shards, pieces, buckets, ranges: ranges.to_vec(), gradients, parameters: None };
        let parameters = sharding.window(program);
        Ok(Sharding { parameters, ..sharding })
    }

    /// The window through which a program sees parameters; none where all are kept.
    pub fn window<B: Update>(&self, program: &[Box<dyn Op<B>>]) -> Option<Window> {
        (self.options.shard == Shard::Parameters).then(|| {
            let lens: Vec<usize> = self.ranges.iter().map(Range::len).collect();
            let mut uses = vec![Vec::new(); lens.len()];
            for (number, op) in program.iter().enumerate() {
                op.uses(&mut |used| {
                    let Use::Parameter(param) = used else { return };
                    let uses: &mut Vec<usize> = &mut uses[param.0 as usize];
                    if uses.last() != Some(&number) {
                        uses.push(number);
                    }
                });
            }
            Window::new(&lens, &uses, self.options.bucket, B::QUEUES_SUMS)
        })
    }

    /// The elements that this process holds.
    pub fn own(&self) -> Range<usize> {
        self.shards[self.options.rank].clone()
    }

    /// What this process holds.
    pub fn hold(&self) -> Hold {
        Hold {
            elements: self.own(),
            parameters: self.parameters.as_ref().map(|window| window.len),
            gradients: self.gradients.clone(),
        }
    }
}

/// Where the gradient of each parameter stands from its first write until its bucket is complete, and elements in all.
fn gradient_window<B: Backend>(
    program: &[Box<dyn Op<B>>],
    ranges: &[Range<usize>],
    buckets: &[Bucket],
) -> (Vec<Range<usize>>, usize) {
    let mut first_write = vec![None; ranges.len()];
    for (number, op) in program.iter().enumerate() {
        op.uses(&mut |used| {
            if let Use::Gradient(grad) = used {
                first_write[grad.param.0 as usize].get_or_insert(number);
            }
        });
    }
    let lives: Vec<Lifetime> = ranges
        .iter()
        .zip(&first_write)
        .map(|(range, first)| {
            let bucket = buckets.iter().find(|bucket| bucket.elements.contains(&range.start));
            let last = bucket.map_or(program.len(), |bucket| bucket.after);
            Lifetime { first: first.unwrap_or(last), last, len: range.len() }
        })
        .collect();
    let plan = MemoryPlan::new(&lives);
    let places = plan.offsets.iter().zip(ranges).map(|(&offset, range)| offset..offset + range.len()).collect();
    (places, plan.peak)
}
