//! The update of a part of an arena: of all of it, or of what one of several processes holds.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::pieces::{Arrays, Piece, cut};
use super::{Found, Pass, Scale};
use crate::backend::Together;
use crate::error::{Error, Result};
use crate::optim::{NormClip, StepOutcome, StepParams, UpdatePlan};
use crate::real::Real;

/// The part of an arena that one process updates, by pieces that no other has a share of.
pub(super) struct Part<'a> {
    pub plan: &'a UpdatePlan,
    pub elements: Range<usize>,
    pub together: &'a mut dyn Together,
}

impl Part<'_> {
    /// As [`super::update`], of slices that hold this part's elements, and leaves the sum of squares of each tensor's gradients in `kept`.
    pub fn update<R: Real>(
        mut self,
        parameters: &mut [R],
        gradients: &mut [R],
        slots: &mut [&mut [R]],
        step: &StepParams,
        kept: &mut Vec<f64>,
    ) -> Result<StepOutcome> {
        self.check(parameters, gradients, slots)?;
        step.check()?;
        let plan = self.plan;
        let mut slots = slots.iter_mut().map(|slot| &mut **slot);
        let mut arrays = Arrays {
            theta: parameters,
            gradient: gradients,
            first: slots.next().unwrap_or_default(),
            second: slots.next().unwrap_or_default(),
        };
        let scale = Scale {
            divide: R::from_f64(1.0 / step.divisor),
            bound: plan.clip.value.map_or(R::infinity(), R::from_f64),
            coefficient: R::one(),
        };
        let mut pieces = cut(arrays.all(), plan, &self.elements);
        let (gradients, clamped) = self.norms(&pieces, &scale)?;
        let grad_norm = gradients.iter().sum::<f64>().sqrt();
        kept.clone_from(&gradients);
        if !grad_norm.is_finite() {
            drop(pieces);
            if step.zero_gradients {
                arrays.gradient.fill(R::zero());
            }
            return Ok(StepOutcome { grad_norm, clip_coefficient: 1.0, clamped, skipped: true });
        }
        let global = plan.clip.coefficient(grad_norm);
        let coefficients: Vec<f64> = match plan.clip.norm {
            NormClip::Tensor { max_norm } => {
                gradients.iter().map(|s| (max_norm / (s.sqrt() + 1e-6)).min(1.0)).collect()
            }
            NormClip::Off | NormClip::Global { .. } | NormClip::Adaptive { .. } => vec![global; gradients.len()],
        };
        let pass = Pass {
            plan,
            step,
            scales: coefficients.iter().map(|&c| Scale { coefficient: R::from_f64(c), ..scale }).collect(),
            rules: plan.groups.iter().map(|group| group.step(step)).collect(),
        };
        let lars = pass.lars_rates(&pieces, &mut self)?;
        // One at a time: they are of different sizes, and runs of them left a thread waiting.
        let found: Vec<Found> = pieces.par_iter_mut().with_max_len(1).map(|piece| pass.piece(piece, &lars)).collect();
        pass.finish_lamb(&mut pieces, &found, &mut self)?;
        drop(pieces);
        let muon = pass.muon(&mut arrays, &self.elements)?;
        let mut least = found.iter().map(|found| found.coefficient).fold(muon, f64::min);
        if let NormClip::Adaptive { .. } = plan.clip.norm {
            least = self.together.processes(least)?.into_iter().fold(least, f64::min);
        }
        let clip_coefficient = coefficients.into_iter().fold(least, f64::min);
        Ok(StepOutcome { grad_norm, clip_coefficient, clamped, skipped: false })
    }

    fn check<R>(&self, parameters: &[R], gradients: &[R], slots: &[&mut [R]]) -> Result<()> {
        let (len, slots_wanted) = (self.elements.len(), self.plan.slots.len());
        let lens = [parameters.len(), gradients.len()].into_iter().chain(slots.iter().map(|s| s.len()));
        if lens.clone().any(|l| l != len) || slots.len() < slots_wanted {
            return Err(Error::shape(
                "update",
                format!("parameters, gradients and {slots_wanted} slots of {len} elements"),
                format!("{:?}", lens.collect::<Vec<_>>()),
            ));
        }
        Ok(())
    }

    /// The sum of squares of each tensor's gradients, and how many the value clip changes.
    fn norms<R: Real>(&mut self, pieces: &[Piece<'_, R>], scale: &Scale<R>) -> Result<(Vec<f64>, u64)> {
        let clamps = self.plan.clip.value.is_some();
        let clamped = AtomicU64::new(0);
        let squares = self.sums(pieces, |piece| {
            if clamps {
                clamped.fetch_add(scale.clamped(piece.arrays.gradient), Ordering::Relaxed);
            }
            scale.checked_squares(piece.arrays.gradient)
        })?;
        let mut clamped = clamped.into_inner();
        if clamps {
            // Counts below 2^53, which f64 adds without rounding.
            clamped = self.together.processes(clamped as f64)?.into_iter().sum::<f64>() as u64;
        }
        Ok((squares, clamped))
    }

    /// `f` of every piece, in parallel, summed over the pieces of each tensor in their order, those of other processes included.
    pub fn sums<R: Real>(
        &mut self,
        pieces: &[Piece<'_, R>],
        f: impl Fn(&Piece<'_, R>) -> f64 + Sync,
    ) -> Result<Vec<f64>> {
        let partial: Vec<f64> = pieces.par_iter().with_max_len(1).map(&f).collect();
        self.sums_of(&partial)
    }

    /// The sum for each tensor of a number for each piece of this process.
    pub fn sums_of(&mut self, partial: &[f64]) -> Result<Vec<f64>> {
        let all = self.together.pieces(partial)?;
        let lens = self.plan.tensors.iter().enumerate().map(|(index, t)| t.len.div_ceil(self.plan.piece(index)));
        if lens.clone().sum::<usize>() != all.len() {
            let expected = format!("sums over {} pieces", lens.sum::<usize>());
            return Err(Error::shape("update", expected, all.len().to_string()));
        }
        let mut all = all.into_iter();
        Ok(lens.map(|len| all.by_ref().take(len).fold(0.0, |sum, partial| sum + partial)).collect())
    }
}
