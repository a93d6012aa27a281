//! What processes that share an arena out give to each other: numbers for each piece, parameters, tensors that a program needs.

use std::ops::Range;
use std::sync::Arc;

use super::collective::Collective;
use super::reducer::within;
use super::sharding::Sharding;
use crate::backend::{Arena, Backend, Numeric, Slice};
use crate::error::{Error, Result};
use crate::plan::{Gather, overlap};

/// The processes, and the elements of each.
pub(super) struct Ranks {
    pub collective: Arc<dyn Collective>,
    /// Empty where each has all.
    shards: Vec<Range<usize>>,
    /// Pieces of the update in each shard.
    pieces: Vec<usize>,
    /// Values on their way.
    room: Vec<f32>,
}

impl Ranks {
    /// Processes that keep all alike.
    pub fn all_alike(collective: Arc<dyn Collective>) -> Self {
        Ranks { collective, shards: Vec::new(), pieces: Vec::new(), room: Vec::new() }
    }

    /// Processes that share out.
    pub fn new(collective: Arc<dyn Collective>, sharding: &Sharding) -> Self {
        let (shards, pieces) = (sharding.shards.clone(), sharding.pieces.clone());
        Ranks { collective, shards, pieces, room: Vec::new() }
    }

    pub fn world(&self) -> usize {
        self.collective.world()
    }

    /// The number of this process, and how many there are.
    pub fn place(&self) -> (usize, usize) {
        (self.collective.rank(), self.collective.world())
    }

    /// Fills in the shares of the other processes, all as long.
    pub fn gather_slice(&self, values: Slice<'_>) -> Result<()> {
        let world = self.world();
        let each = values.len() / world;
        let shards: Vec<Range<usize>> = (0..world).map(|rank| rank * each..(rank + 1) * each).collect();
        self.collective.fork()?;
        self.collective.all_gather(values, &shards)
    }

    /// Fills in what other processes know of their pieces of the update: `values` holds as many bytes for each.
    pub fn gather_pieces(&self, values: Slice<'_>) -> Result<()> {
        let pieces: usize = self.pieces.iter().sum();
        let each = values.len().checked_div(pieces).unwrap_or(0);
        if each * pieces != values.len() {
            return Err(Error::shape(
                "gather",
                format!("as many bytes for each of {pieces} pieces"),
                values.len().to_string(),
            ));
        }
        let places = one_after_the_other(&self.pieces.iter().map(|count| count * each).collect::<Vec<_>>());
        self.collective.fork()?;
        self.collective.all_gather(values, &places)
    }

    /// The elements of this process; all, where each has all.
    pub fn own(&self) -> Range<usize> {
        self.shards.get(self.collective.rank()).cloned().unwrap_or(0..usize::MAX)
    }

    /// The elements of each process; none where each has all.
    pub fn shards(&self) -> &[Range<usize>] {
        &self.shards
    }

    /// Each process's part of `elements`, counted from their first; empty where each has all.
    pub fn shards_of(&self, elements: &Range<usize>) -> Vec<Range<usize>> {
        within(elements, &self.shards)
    }

    /// Numbers of every process, in the order of ranks.
    pub fn gather(&self, of_this: &[f64]) -> Result<Vec<f64>> {
        self.gather_lens(of_this, &vec![of_this.len(); self.world()])
    }

    /// A number for each piece of the update, out of those of this process's.
    pub fn pieces(&self, of_this: &[f64]) -> Result<Vec<f64>> {
        self.gather_lens(of_this, &self.pieces)
    }

    fn gather_lens(&self, of_this: &[f64], lens: &[usize]) -> Result<Vec<f64>> {
        let places = one_after_the_other(lens);
        let own = places.get(self.collective.rank()).cloned().unwrap_or_default();
        if own.len() != of_this.len() {
            return Err(Error::shape("gather", format!("{} numbers", own.len()), of_this.len().to_string()));
        }
        let mut all = vec![0f64; places.last().map_or(0, |last| last.end)];
        all[own].copy_from_slice(of_this);
        self.collective.all_gather(all.as_mut_slice().into(), &places)?;
        Ok(all)
    }

    /// Gives all processes this one's elements of the parameters as operations read them, and gets theirs. In the host's memory about
    /// `most` elements at a time; a device does it in its own, before what is queued there from now on.
    pub fn spread<B: Backend<Real = f32>>(&mut self, backend: &B, arena: &mut Arena<B>, most: usize) -> Result<()> {
        if !self.collective.is_queued() {
            return self.spread_on_host(backend, &mut arena.parameters, most);
        }
        let all = 0..arena.layout.padded_len();
        self.collective.fork()?;
        let values = if arena.shares_out_masters() {
            backend.slice(&mut arena.stored, all)?
        } else {
            backend.slice(&mut arena.parameters, all)?
        };
        self.collective.all_gather(values, &self.shards)?;
        self.collective.join()
    }

    fn spread_on_host<B: Backend<Real = f32>>(
        &mut self,
        backend: &B,
        buffer: &mut B::Buffer<f32>,
        most: usize,
    ) -> Result<()> {
        let longest = self.shards.iter().map(Range::len).max().unwrap_or(0);
        let each = most.div_ceil(self.world()).max(1);
        for first in (0..longest).step_by(each) {
            let parts: Vec<Range<usize>> = self
                .shards
                .iter()
                .map(|shard| overlap(shard, &(shard.start + first..shard.start + first + each)))
                .collect();
            let places = one_after_the_other(&parts.iter().map(Range::len).collect::<Vec<_>>());
            let (own, place) = (self.collective.rank(), |rank: usize| places[rank].clone());
            self.room.resize(places.last().map_or(0, |last| last.end), 0.0);
            backend.download(buffer, parts[own].start, &mut self.room[place(own)])?;
            self.collective.all_gather(self.room.as_mut_slice().into(), &places)?;
            for (rank, part) in parts.iter().enumerate().filter(|(rank, _)| *rank != own) {
                backend.upload(buffer, part.start, &self.room[place(rank)])?;
            }
        }
        Ok(())
    }

    /// Brings tensors of `ranges` in the arena, whose elements of this process stand in `own`, to their places in `window`.
    pub fn bring<B: Backend<Real = f32>>(
        &mut self,
        backend: &B,
        (own, window): (&B::Buffer<f32>, &mut B::Buffer<f32>),
        ranges: &[Range<usize>],
        gather: &Gather,
    ) -> Result<()> {
        // Of each process what it has of each tensor, one after the other.
        let parts = |shard: &Range<usize>| {
            let shard = shard.clone();
            let of = gather.tensors.iter().map(move |(tensor, place)| {
                let part = overlap(&ranges[*tensor], &shard);
                let to = place.start + (part.start - ranges[*tensor].start);
                (part, to)
            });
            of.filter(|(part, _)| !part.is_empty())
        };
        let lens: Vec<usize> = self.shards.iter().map(|shard| parts(shard).map(|(part, _)| part.len()).sum()).collect();
        let places = one_after_the_other(&lens);
        let rank = self.collective.rank();
        let mine = &self.shards[rank];
        self.room.resize(places.last().map_or(0, |last| last.end), 0.0);
        let mut at = places[rank].start;
        for (part, _) in parts(mine) {
            backend.download(own, part.start - mine.start, &mut self.room[at..at + part.len()])?;
            at += part.len();
        }
        self.collective.all_gather(self.room.as_mut_slice().into(), &places)?;
        let mut at = 0;
        for (part, to) in self.shards.iter().flat_map(parts) {
            backend.upload(window, to, &self.room[at..at + part.len()])?;
            at += part.len();
        }
        Ok(())
    }

    /// As [`Ranks::bring`], within a device's memory, on the collective's stream.
    pub fn bring_queued<B: Backend, T: Numeric>(
        &self,
        backend: &B,
        (own, window): (&mut B::Buffer<T>, &mut B::Buffer<T>),
        ranges: &[Range<usize>],
        gather: &Gather,
    ) -> Result<()> {
        let mine = self.own();
        self.collective.fork()?;
        for (tensor, place) in &gather.tensors {
            let (range, part) = (&ranges[*tensor], overlap(&ranges[*tensor], &mine));
            if !part.is_empty() {
                let from = backend.slice(own, part.start - mine.start..part.end - mine.start)?;
                let at = place.start + (part.start - range.start);
                self.collective.copy(backend.slice(window, at..at + part.len())?, from)?;
            }
            self.collective.all_gather(backend.slice(window, place.clone())?, &self.shards_of(range))?;
        }
        Ok(())
    }
}

/// Ranges of these lengths without gaps.
fn one_after_the_other(lens: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    let next = |len: &usize| {
        let start = end;
        end += len;
        start..end
    };
    lens.iter().map(next).collect()
}
