//! The fused update: a pass for the norm, a pass for everything else.
//!
//! Bytes a parameter, f32: 4 for the norm; then 12 (SGD), 20 (momentum) or 28 (Adam), and 4 more where gradients are set to
//! 0 in the same pass. The adaptive clip finds each unit's norms in the second pass, while they are in cache. LARS reads
//! parameters and gradients, LAMB reads parameters and moments, a second time; Muon multiplies matrices.
//!
//! Tensors are cut into pieces of fixed size, and what is summed over pieces is summed in their order: the same bits for
//! any number of threads. Padding is not touched.

mod alone;
mod muon;
mod part;
mod pieces;

use std::collections::VecDeque;
use std::ops::Range;

use rayon::prelude::*;

pub use self::alone::update_bf16;
use self::part::Part;
use self::pieces::{Arrays, Piece, squares};
use super::Cpu;
use super::parallel::vectorize;
use crate::backend::ops::Update;
use crate::backend::step::{self, Finished, Work};
use crate::backend::{Alone, Arena, Held, Together};
use crate::error::{Error, Result};
use crate::optim::{Group, MomentumForm, NormClip, Rule, RuleStep, StepOutcome, StepParams, UpdatePlan};
use crate::plan::ALIGNMENT;
use crate::real::Real;

/// Elements of a piece, fixed, so that sums do not depend on threads.
const PIECE: usize = 1 << 14;

impl<R: Real> Update for Cpu<R> {
    type Queue = VecDeque<Finished>;

    fn submit(&self, queue: &mut VecDeque<Finished>, work: Work<'_, Self>) -> Result<()> {
        step::at_once(self, queue, work)
    }

    fn finished(&self, queue: &mut VecDeque<Finished>, _: bool) -> Result<Option<Finished>> {
        Ok(queue.pop_front())
    }

    fn update(&self, arena: &mut Arena<Self>, plan: &UpdatePlan, step: &StepParams) -> Result<StepOutcome> {
        if plan.rounding.is_some() {
            return Err(Error::shape("update", "a plan of parameters in f32", "one of parameters in bf16 alone"));
        }
        let mut slots: Vec<&mut [R]> = arena.slots.iter_mut().map(Vec::as_mut_slice).collect();
        let whole = 0..arena.layout.padded_len();
        let kept = &mut arena.prepared;
        let part = Part { plan, elements: whole, together: &mut Alone };
        part.update(&mut arena.parameters, &mut arena.gradients, &mut slots, step, kept)
    }

    fn update_held(
        &self,
        arena: &mut Arena<Self>,
        plan: &UpdatePlan,
        step: &StepParams,
        together: &mut dyn Together,
    ) -> Result<StepOutcome> {
        let Some(Held { elements, parameters, gradients, .. }) = &mut arena.held else {
            return self.update(arena, plan, step);
        };
        let whole = arena.layout.padded_len();
        let parameters = match parameters {
            Some(parameters) => parameters.as_mut_slice(),
            None => arena.parameters.get_mut(elements.clone()).ok_or_else(|| not_held(whole, elements))?,
        };
        let gradients = match gradients {
            Some(gradients) => gradients.as_mut_slice(),
            None => arena.gradients.get_mut(elements.clone()).ok_or_else(|| not_held(whole, elements))?,
        };
        let mut slots: Vec<&mut [R]> = arena.slots.iter_mut().map(Vec::as_mut_slice).collect();
        let part = Part { plan, elements: elements.clone(), together };
        part.update(parameters, gradients, &mut slots, step, &mut arena.prepared)
    }

    fn norm_squares(&self, arena: &Arena<Self>) -> Result<Vec<f64>> {
        Ok(arena.prepared.clone())
    }

    fn average(&self, average: &mut Vec<R>, parameters: &Vec<R>, decay: f64) -> Result<()> {
        self::average(average, parameters, decay)
    }

    fn average_arena(&self, average: &mut Vec<R>, arena: &Arena<Self>, decay: f64) -> Result<()> {
        match &arena.held {
            None => self::average(average, &arena.parameters, decay),
            Some(Held { parameters: Some(parameters), .. }) => self::average(average, parameters, decay),
            Some(Held { elements, .. }) => {
                let whole = arena.layout.padded_len();
                let held = arena.parameters.get(elements.clone()).ok_or_else(|| not_held(whole, elements))?;
                self::average(average, held, decay)
            }
        }
    }
}

fn not_held(whole: usize, elements: &Range<usize>) -> Error {
    Error::shape("update", format!("elements among {whole}"), format!("{elements:?}"))
}

/// `average = decay * average + (1 - decay) * parameters`, as `average + (1 - decay) (parameters - average)`.
///
/// # Errors
/// Slices of other lengths.
pub fn average<R: Real>(average: &mut [R], parameters: &[R], decay: f64) -> Result<()> {
    if average.len() != parameters.len() {
        let found = format!("{} and {}", average.len(), parameters.len());
        return Err(Error::shape("average", "as many averages as parameters", found));
    }
    let share = R::from_f64(1.0 - decay);
    average.par_chunks_mut(PIECE).zip(parameters.par_chunks(PIECE)).for_each(|(average, parameters)| {
        vectorize(
            #[inline(always)]
            || average.iter_mut().zip(parameters).for_each(|(a, &p)| *a = share.mul_add(p - *a, *a)),
        );
    });
    Ok(())
}

/// One update of a whole arena, as [`crate::optim`] defines it. All slices are laid out as the plan's layout says; slots
/// are those that the plan names, zeros before the first update.
///
/// Gradients are read, or read and set to 0 where `step` says so; what is in the padding stays as it is.
///
/// # Errors
/// Slices that do not fit the plan, or what [`StepParams::check`] refuses.
pub fn update<R: Real>(
    parameters: &mut [R],
    gradients: &mut [R],
    slots: &mut [&mut [R]],
    plan: &UpdatePlan,
    step: &StepParams,
) -> Result<StepOutcome> {
    let whole = 0..plan.block_groups.len() * ALIGNMENT;
    let part = Part { plan, elements: whole, together: &mut Alone };
    part.update(parameters, gradients, slots, step, &mut Vec::new())
}

/// What the gradient goes through before decay: steps 1 to 3.
#[derive(Clone, Copy)]
struct Scale<R> {
    divide: R,
    bound: R,
    coefficient: R,
}

impl<R: Real> Scale<R> {
    /// Divided, clipped by value, then by norm.
    #[inline(always)]
    fn of(&self, gradient: R) -> R {
        clamp(gradient * self.divide, self.bound) * self.coefficient
    }

    /// The sum of squares of what [`Scale::of`] gives.
    fn squares(&self, gradients: &[R]) -> f64 {
        vectorize(
            #[inline(always)]
            || {
                squares(
                    [gradients],
                    #[inline(always)]
                    |[g]| self.of(g),
                )
            },
        )
    }

    /// How many of the gradients the value clip changes.
    fn clamped(&self, gradients: &[R]) -> u64 {
        vectorize(
            #[inline(always)]
            || gradients.iter().map(|&g| u64::from((g * self.divide).abs() > self.bound)).sum(),
        )
    }

    /// As [`Scale::squares`], but not finite where a gradient is not, which the value clip would hide.
    fn checked_squares(&self, gradients: &[R]) -> f64 {
        let clamps = self.bound.is_finite();
        vectorize(
            #[inline(always)]
            || {
                // An infinite bound changes no value: the same sums, by half the instructions.
                if clamps {
                    squares(
                        [gradients],
                        #[inline(always)]
                        |[g]| (g * self.divide).mul_add(R::zero(), self.of(g)),
                    )
                } else {
                    squares(
                        [gradients],
                        #[inline(always)]
                        |[g]| g * self.divide * self.coefficient,
                    )
                }
            },
        )
    }
}

/// `clamp(g, -bound, bound)`; a NaN stays one.
#[inline(always)]
fn clamp<R: Real>(g: R, bound: R) -> R {
    let g = if g > bound { bound } else { g };
    if g < -bound { -bound } else { g }
}

/// The sum of squares of the values.
fn plain_squares<R: Real>(values: &[R]) -> f64 {
    vectorize(
        #[inline(always)]
        || {
            squares(
                [values],
                #[inline(always)]
                |[x]| x,
            )
        },
    )
}

/// What each tensor and each group is updated by, once the norm is known.
struct Pass<'a, R> {
    plan: &'a UpdatePlan,
    step: &'a StepParams,
    /// Steps 1 to 3 of each tensor.
    scales: Vec<Scale<R>>,
    /// The rule's constants of each group.
    rules: Vec<RuleStep<R>>,
}

impl<R: Real> Pass<'_, R> {
    fn group(&self, tensor: usize) -> (&Group, &RuleStep<R>) {
        let group = usize::from(self.plan.tensors[tensor].group);
        (&self.plan.groups[group], &self.rules[group])
    }

    /// How many elements of a tensor go through steps 1 to 3 together.
    fn unit(&self, tensor: usize) -> usize {
        match self.plan.clip.norm {
            NormClip::Adaptive { .. } => self.plan.tensors[tensor].unit(),
            NormClip::Off | NormClip::Global { .. } | NormClip::Tensor { .. } => usize::MAX,
        }
    }

    /// Steps 1 to 3 of one unit, and the coefficient of its adaptive clip.
    fn unit_scale(&self, tensor: usize, theta: &[R], gradient: &[R]) -> (Scale<R>, f64) {
        let scale = self.scales[tensor];
        let NormClip::Adaptive { clipping, epsilon } = self.plan.clip.norm else { return (scale, 1.0) };
        let most = clipping * plain_squares(theta).sqrt().max(epsilon);
        let norm = scale.squares(gradient).sqrt();
        if norm <= most {
            return (scale, 1.0);
        }
        let coefficient = most / norm.max(1e-6);
        (Scale { coefficient: R::from_f64(coefficient), ..scale }, coefficient)
    }

    /// `rate * ratio(norms)` of each tensor that `applies` names, 0 for the others; rounded once.
    fn rates(&self, applies: fn(&Rule) -> bool, ratio: impl Fn(&Group, usize) -> f64) -> Vec<R> {
        let rate = |tensor: usize| {
            let group = self.group(tensor).0;
            let rate = if applies(&group.rule) { group.learning_rate(self.step) * ratio(group, tensor) } else { 0.0 };
            R::from_f64(rate)
        };
        (0..self.plan.tensors.len()).map(rate).collect()
    }

    /// The learning rate of each tensor under LARS.
    fn lars_rates(&self, pieces: &[Piece<'_, R>], part: &mut Part<'_>) -> Result<Vec<R>> {
        let is_lars = |rule: &Rule| matches!(rule, Rule::Lars { .. });
        if !self.plan.groups.iter().any(|group| is_lars(&group.rule)) {
            return Ok(Vec::new());
        }
        let only = |piece: &Piece<'_, R>, f: &dyn Fn() -> f64| {
            if is_lars(&self.group(piece.tensor).0.rule) { f() } else { 0.0 }
        };
        let weights = part.sums(pieces, |piece| only(piece, &|| plain_squares(piece.arrays.theta)))?;
        let slopes = part.sums(pieces, |piece| {
            only(piece, &|| {
                let unit = self.unit(piece.tensor);
                let units = piece.arrays.theta.chunks(unit).zip(piece.arrays.gradient.chunks(unit));
                units.map(|(t, g)| self.unit_scale(piece.tensor, t, g).0.squares(g)).sum()
            })
        })?;
        Ok(self.rates(is_lars, |group, tensor| {
            let Rule::Lars { trust, .. } = group.rule else { return 1.0 };
            let (weights, slope) = (weights[tensor].sqrt(), slopes[tensor].sqrt());
            let decay = if group.decoupled { 0.0 } else { group.weight_decay };
            if weights > 0.0 && slope > 0.0 { trust * weights / (slope + decay * weights) } else { 1.0 }
        }))
    }

    /// The second half of LAMB: the step along the directions, by the ratio of the norms that the first half found.
    fn finish_lamb(&self, pieces: &mut [Piece<'_, R>], found: &[Found], part: &mut Part<'_>) -> Result<()> {
        let is_lamb = |rule: &Rule| matches!(rule, Rule::Lamb { .. });
        if !self.plan.groups.iter().any(|group| is_lamb(&group.rule)) {
            return Ok(());
        }
        let weights = part.sums_of(&found.iter().map(|found| found.weights).collect::<Vec<_>>())?;
        let directions = part.sums_of(&found.iter().map(|found| found.directions).collect::<Vec<_>>())?;
        let rates = self.rates(is_lamb, |_, tensor| {
            let (weights, direction) = (weights[tensor].sqrt(), directions[tensor].sqrt());
            if weights > 0.0 && direction > 0.0 { weights / direction } else { 1.0 }
        });
        let lamb = |piece: &Piece<'_, R>| Some(self.group(piece.tensor)).filter(|(group, _)| is_lamb(&group.rule));
        pieces.par_iter_mut().for_each(|piece| {
            let Some((_, r)) = lamb(piece) else { return };
            let rate = rates[piece.tensor];
            let Arrays { theta, first, second, .. } = piece.arrays.all();
            vectorize(
                #[inline(always)]
                || {
                    for ((t, &m), &v) in theta.iter_mut().zip(&*first).zip(&*second) {
                        *t = r.lamb(*t, m, v, rate);
                    }
                },
            );
        });
        Ok(())
    }

    /// Steps 1 to 6 of a piece: all of them for rules that look at elements alone and for LARS, the moments for LAMB,
    /// nothing for Muon.
    fn piece(&self, piece: &mut Piece<'_, R>, lars: &[R]) -> Found {
        let tensor = piece.tensor;
        let (group, r) = self.group(tensor);
        let mut found = Found { coefficient: 1.0, weights: 0.0, directions: 0.0 };
        if matches!(group.rule, Rule::Muon { .. }) {
            return found;
        }
        let lars = lars.get(tensor).copied().unwrap_or_default();
        for arrays in piece.arrays.all().chunks(self.unit(tensor)) {
            let (scale, coefficient) = self.unit_scale(tensor, arrays.theta, arrays.gradient);
            found.coefficient = found.coefficient.min(coefficient);
            element_wise(arrays, &group.rule, r, &scale, lars);
        }
        if matches!(group.rule, Rule::Lamb { .. }) {
            let Arrays { theta, first, second, .. } = &piece.arrays;
            found.weights = plain_squares(theta);
            found.directions = vectorize(
                #[inline(always)]
                || {
                    squares(
                        [&**theta, &**first, &**second],
                        #[inline(always)]
                        |[t, m, v]| r.lamb_direction(t, m, v),
                    )
                },
            );
        }
        if self.step.zero_gradients {
            piece.arrays.gradient.fill(R::zero());
        }
        found
    }
}

/// What the pass over a piece found.
struct Found {
    /// The least coefficient of the adaptive clip.
    coefficient: f64,
    /// LAMB's sums of squares: of the weights, and of the directions.
    weights: f64,
    directions: f64,
}

/// Steps 1 to 5 of every element.
fn element_wise<R: Real>(arrays: Arrays<'_, R>, rule: &Rule, r: &RuleStep<R>, scale: &Scale<R>, lars: R) {
    let Arrays { theta, gradient, first, second } = arrays;
    let (r, scale) = (*r, *scale);
    vectorize(
        #[inline(always)]
        || {
            let pairs = theta.iter_mut().zip(&*gradient);
            match *rule {
                Rule::Sgd => {
                    for (theta, &g) in pairs {
                        let (g, t) = r.decay(*theta, scale.of(g));
                        *theta = r.sgd(t, g);
                    }
                }
                Rule::Momentum { form: MomentumForm::Pytorch, nesterov: false, .. } => {
                    for ((theta, &g), v) in pairs.zip(first) {
                        let (g, t) = r.decay(*theta, scale.of(g));
                        (*theta, *v) = r.momentum(t, g, *v, false);
                    }
                }
                Rule::Momentum { form: MomentumForm::Pytorch, nesterov: true, .. } => {
                    for ((theta, &g), v) in pairs.zip(first) {
                        let (g, t) = r.decay(*theta, scale.of(g));
                        (*theta, *v) = r.momentum(t, g, *v, true);
                    }
                }
                Rule::Momentum { form: MomentumForm::Polyak, .. } => {
                    for ((theta, &g), v) in pairs.zip(first) {
                        let (g, t) = r.decay(*theta, scale.of(g));
                        (*theta, *v) = r.polyak(t, g, *v);
                    }
                }
                Rule::Adam { .. } => {
                    for (((theta, &g), m), v) in pairs.zip(first).zip(second) {
                        let (g, t) = r.decay(*theta, scale.of(g));
                        (*theta, *m, *v) = r.adam(t, g, *m, *v);
                    }
                }
                Rule::Lion { .. } => {
                    for ((theta, &g), m) in pairs.zip(first) {
                        let (g, t) = r.decay(*theta, scale.of(g));
                        (*theta, *m) = r.lion(t, g, *m);
                    }
                }
                Rule::Lars { .. } => {
                    for ((theta, &g), v) in pairs.zip(first) {
                        let (g, t) = r.decay(*theta, scale.of(g));
                        (*theta, *v) = r.lars(t, g, *v, lars);
                    }
                }
                Rule::Lamb { .. } => {
                    for ((&g, m), v) in gradient.iter().zip(first).zip(second) {
                        (*m, *v) = r.moments(scale.of(g), *m, *v);
                    }
                }
                Rule::Muon { .. } => {}
            }
        },
    );
}
