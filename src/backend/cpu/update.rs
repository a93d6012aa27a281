//! The fused update: a pass for the norm, a pass for everything else.
//!
//! Bytes a parameter, f32: 4 for the norm; then 12 (SGD), 20 (momentum) or 28 (Adam), and 4 more where gradients are set to
//! 0 in the same pass. LAMB, LARS and Muon look at whole tensors and take further passes.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::{sum, vectorize};
use super::product::product;
use crate::backend::Arena;
use crate::backend::ops::Update;
use crate::error::{Error, Result};
use crate::optim::{Clip, Group, MomentumForm, NormClip, Rule, RuleStep, StepOutcome, StepParams, UpdatePlan};
use crate::plan::ALIGNMENT;
use crate::real::Real;

/// Elements of a piece of the arena: a multiple of [`ALIGNMENT`], fixed, so that sums do not depend on threads.
const PIECE: usize = 1 << 15;
/// Elements that are summed in the arena's own type before the sum goes on in f64.
const BLOCK: usize = 1 << 10;

impl<R: Real> Update for Cpu<R> {
    fn update(&self, arena: &mut Arena<Self>, plan: &UpdatePlan, step: &StepParams) -> Result<StepOutcome> {
        let mut slots: Vec<&mut [R]> = arena.slots.iter_mut().map(Vec::as_mut_slice).collect();
        update(&mut arena.parameters, &mut arena.gradients, &mut slots, plan, step)
    }

    fn average(&self, average: &mut Vec<R>, parameters: &Vec<R>, decay: f64) -> Result<()> {
        self::average(average, parameters, decay)
    }
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
/// are those that the plan names.
///
/// # Errors
/// Slices that do not fit the plan.
pub fn update<R: Real>(
    parameters: &mut [R],
    gradients: &mut [R],
    slots: &mut [&mut [R]],
    plan: &UpdatePlan,
    step: &StepParams,
) -> Result<StepOutcome> {
    let len = plan.block_groups.len() * ALIGNMENT;
    let lens = [parameters.len(), gradients.len()].into_iter().chain(slots.iter().map(|s| s.len()));
    if lens.clone().any(|l| l != len) || slots.len() < plan.slots.len() {
        return Err(Error::shape(
            "update",
            format!("parameters, gradients and {} slots of {len} elements", plan.slots.len()),
            format!("{:?}", lens.collect::<Vec<_>>()),
        ));
    }
    let mut outcome = StepOutcome { clip_coefficient: 1.0, ..StepOutcome::default() };
    let divide = R::from_f64(1.0 / step.divisor);
    let bound = plan.clip.value.map_or(R::infinity(), R::from_f64);
    let norm = squares(gradients, divide, bound).sqrt();
    outcome.grad_norm = norm;
    if !norm.is_finite() {
        outcome.skipped = true;
        if step.zero_gradients {
            gradients.fill(R::zero());
        }
        return Ok(outcome);
    }
    outcome.clip_coefficient = plan.clip.coefficient(norm);
    let mut scale = Scale { divide, bound, coefficient: R::from_f64(outcome.clip_coefficient) };
    if matches!(plan.clip.norm, NormClip::Tensor { .. } | NormClip::Adaptive { .. }) {
        clip_tensors(parameters, gradients, plan, &scale);
        scale = Scale { divide: R::one(), bound: R::infinity(), coefficient: R::one() };
    }
    let mut tail = slots.iter_mut();
    let first = tail.next().map_or(&mut [][..], |s| &mut **s);
    let second = tail.next().map_or(&mut [][..], |s| &mut **s);
    if plan.groups.iter().any(|g| g.rule.is_tensor_wise()) {
        for tensor in &plan.tensors {
            let range = tensor.offset..tensor.offset + tensor.len;
            let slot = |slot: &[R]| if slot.is_empty() { 0..0 } else { range.clone() };
            let (a, b) = (slot(first), slot(second));
            let arrays = Arrays {
                theta: &mut parameters[range.clone()],
                gradient: &mut gradients[range],
                first: &mut first[a],
                second: &mut second[b],
            };
            tensor_wise(arrays, tensor.units, &plan.groups[usize::from(tensor.group)], &scale, step);
        }
        return Ok(outcome);
    }
    let pieces = parameters.par_chunks_mut(PIECE).zip(gradients.par_chunks_mut(PIECE)).enumerate();
    let run = |piece: usize, arrays: Arrays<'_, R>| {
        let blocks = &plan.block_groups[piece * (PIECE / ALIGNMENT)..][..arrays.theta.len() / ALIGNMENT];
        by_group(blocks, arrays, |group, arrays| element_wise(arrays, &plan.groups[usize::from(group)], &scale, step));
    };
    match (first.is_empty(), second.is_empty()) {
        (true, _) => pieces.for_each(|(i, (theta, gradient))| {
            run(i, Arrays { theta, gradient, first: &mut [], second: &mut [] });
        }),
        (false, true) => pieces.zip(first.par_chunks_mut(PIECE)).for_each(|((i, (theta, gradient)), first)| {
            run(i, Arrays { theta, gradient, first, second: &mut [] });
        }),
        (false, false) => pieces
            .zip(first.par_chunks_mut(PIECE).zip(second.par_chunks_mut(PIECE)))
            .for_each(|((i, (theta, gradient)), (first, second))| run(i, Arrays { theta, gradient, first, second })),
    }
    Ok(outcome)
}

/// What the gradient goes through before decay.
#[derive(Clone, Copy)]
struct Scale<R> {
    divide: R,
    bound: R,
    coefficient: R,
}

impl<R: Real> Scale<R> {
    #[inline(always)]
    fn of(&self, gradient: R) -> R {
        clamp(gradient * self.divide, self.bound) * self.coefficient
    }
}

/// `clamp(g, -bound, bound)`; a NaN stays one.
#[inline(always)]
fn clamp<R: Real>(g: R, bound: R) -> R {
    let g = if g > bound { bound } else { g };
    if g < -bound { -bound } else { g }
}

/// The same elements of every arena.
struct Arrays<'a, R> {
    theta: &'a mut [R],
    gradient: &'a mut [R],
    first: &'a mut [R],
    second: &'a mut [R],
}

/// `sum of clamp(g / divisor)^2`: blocks in 16 lanes of the arena's type, blocks and pieces in f64, all in order.
fn squares<R: Real>(gradients: &[R], divide: R, bound: R) -> f64 {
    let piece = |piece: &[R]| {
        vectorize(
            #[inline(always)]
            || {
                let mut total = 0.0;
                for block in piece.chunks(BLOCK) {
                    total += sum(
                        block.len(),
                        #[inline(always)]
                        |i| {
                            let g = clamp(block[i] * divide, bound);
                            g * g
                        },
                    )
                    .f64();
                }
                total
            },
        )
    };
    if gradients.len() <= PIECE {
        return piece(gradients);
    }
    let partials: Vec<f64> = gradients.par_chunks(PIECE).map(piece).collect();
    partials.iter().sum()
}

/// Steps 1 to 3 for clips that look at tensors: the gradients are written back, divided and clipped.
fn clip_tensors<R: Real>(parameters: &[R], gradients: &mut [R], plan: &UpdatePlan, scale: &Scale<R>) {
    for tensor in &plan.tensors {
        let range = tensor.offset..tensor.offset + tensor.len;
        let (theta, gradient) = (&parameters[range.clone()], &mut gradients[range]);
        gradient.par_chunks_mut(PIECE).for_each(|g| g.iter_mut().for_each(|g| *g = scale.of(*g)));
        let norm = |values: &[R]| squares(values, R::one(), R::infinity()).sqrt();
        match plan.clip {
            Clip { norm: NormClip::Tensor { max_norm }, .. } => {
                let coefficient = R::from_f64((max_norm / (norm(gradient) + 1e-6)).min(1.0));
                gradient.par_chunks_mut(PIECE).for_each(|g| g.iter_mut().for_each(|g| *g *= coefficient));
            }
            Clip { norm: NormClip::Adaptive { clipping, epsilon }, .. } => {
                let unit = (tensor.len / tensor.units.max(1)).max(1);
                gradient.par_chunks_mut(unit).zip(theta.par_chunks(unit)).for_each(|(gradient, theta)| {
                    let most = clipping * norm(theta).max(epsilon);
                    let found = norm(gradient);
                    if found > most {
                        let coefficient = R::from_f64(most / found);
                        gradient.iter_mut().for_each(|g| *g *= coefficient);
                    }
                });
            }
            Clip { norm: NormClip::Off | NormClip::Global { .. }, .. } => {}
        }
    }
}

/// Calls `run` for each run of blocks of one group.
fn by_group<R>(blocks: &[u8], mut arrays: Arrays<'_, R>, run: impl Fn(u8, Arrays<'_, R>)) {
    for blocks in blocks.chunk_by(|a, b| a == b) {
        let len = blocks.len() * ALIGNMENT;
        let (theta, rest_theta) = arrays.theta.split_at_mut(len);
        let (gradient, rest_gradient) = arrays.gradient.split_at_mut(len);
        let (first, rest_first) = arrays.first.split_at_mut(len.min(arrays.first.len()));
        let (second, rest_second) = arrays.second.split_at_mut(len.min(arrays.second.len()));
        run(blocks[0], Arrays { theta, gradient, first, second });
        arrays = Arrays { theta: rest_theta, gradient: rest_gradient, first: rest_first, second: rest_second };
    }
}

/// Steps 1 to 6 in one pass, for the rules that look at elements alone.
fn element_wise<R: Real>(arrays: Arrays<'_, R>, group: &Group, scale: &Scale<R>, step: &StepParams) {
    let r: RuleStep<R> = group.step(step);
    let Arrays { theta, gradient, first, second } = arrays;
    let zero = step.zero_gradients;
    vectorize(
        #[inline(always)]
        || {
            let pairs = theta.iter_mut().zip(gradient.iter());
            match group.rule {
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
                    for ((theta, &g), (m, v)) in pairs.zip(first.iter_mut().zip(second)) {
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
                Rule::Lamb { .. } | Rule::Lars { .. } | Rule::Muon { .. } => {}
            }
            if zero {
                gradient.fill(R::zero());
            }
        },
    );
}

/// The update of one tensor, for plans in which some rule looks at whole tensors.
fn tensor_wise<R: Real>(arrays: Arrays<'_, R>, units: usize, group: &Group, scale: &Scale<R>, step: &StepParams) {
    let r: RuleStep<R> = group.step(step);
    let norm = |values: &[R]| squares(values, R::one(), R::infinity()).sqrt();
    let Arrays { theta, gradient, first, second } = arrays;
    match group.rule {
        Rule::Lamb { .. } => {
            gradient.iter_mut().for_each(|g| *g = scale.of(*g));
            // The direction takes the gradient's place.
            let decay = R::from_f64(group.weight_decay);
            let corrected = r.corrected_rate / r.learning_rate;
            for (((g, m), v), &t) in gradient.iter_mut().zip(first).zip(second).zip(theta.iter()) {
                (*m, *v) = r.moments(*g, *m, *v);
                *g = decay.mul_add(t, corrected * *m / r.denominator(*v));
            }
            let (weights, direction) = (norm(theta), norm(gradient));
            let trust = if weights > 0.0 && direction > 0.0 { weights / direction } else { 1.0 };
            let rate = r.learning_rate * R::from_f64(trust);
            theta.iter_mut().zip(gradient.iter()).for_each(|(t, &g)| *t = (-rate).mul_add(g, *t));
        }
        Rule::Lars { trust, .. } => {
            gradient.iter_mut().for_each(|g| *g = scale.of(*g));
            let (weights, slope) = (norm(theta), norm(gradient));
            let ratio = if weights > 0.0 && slope > 0.0 {
                trust * weights / (slope + group.weight_decay * weights)
            } else {
                1.0
            };
            let rate = r.learning_rate * R::from_f64(ratio);
            let decay = R::from_f64(group.weight_decay);
            for ((t, &g), v) in theta.iter_mut().zip(gradient.iter()).zip(first) {
                *v = r.a.mul_add(*v, rate * decay.mul_add(*t, g));
                *t -= *v;
            }
        }
        Rule::Muon { nesterov, steps, scale: muon, .. } => {
            let columns = theta.len() / units.max(1);
            for (g, m) in gradient.iter_mut().zip(first) {
                let scaled = scale.of(*g);
                *m = r.feed.mul_add(scaled - *m, *m);
                *g = if nesterov { r.a.mul_add(*m - scaled, scaled) } else { *m };
            }
            let direction = orthogonal(gradient, units, columns, steps);
            let rate = r.learning_rate * R::from_f64(muon.factor(units, columns));
            theta.iter_mut().zip(direction).for_each(|(t, d)| *t = (-rate).mul_add(d, *t * r.shrink));
        }
        Rule::Sgd | Rule::Momentum { .. } | Rule::Adam { .. } | Rule::Lion { .. } => {
            element_wise(Arrays { theta, gradient, first, second }, group, scale, step);
            return;
        }
    }
    if step.zero_gradients {
        gradient.fill(R::zero());
    }
}

/// Newton and Schulz's quintic iteration towards the nearest semi-orthogonal matrix (Jordan 2024): `[rows, columns]`.
fn orthogonal<R: Real>(matrix: &[R], rows: usize, columns: usize, steps: u32) -> Vec<R> {
    use ndarray::{Array2, ArrayView2};
    let [a, b, c] = [3.4445, -4.7750, 2.0315].map(R::from_f64);
    let Ok(view) = ArrayView2::from_shape((rows, columns), matrix) else { return matrix.to_vec() };
    let tall = rows > columns;
    let mut x = if tall { view.t().as_standard_layout().into_owned() } else { view.to_owned() };
    let norm = R::from_f64(squares(matrix, R::one(), R::infinity()).sqrt().max(1e-7));
    x.mapv_inplace(|value| value / norm);
    let side = x.nrows();
    let mut gram = Array2::<R>::zeros((side, side));
    let mut square = gram.clone();
    let mut next = Array2::<R>::zeros(x.raw_dim());
    for _ in 0..steps {
        product(gram.view_mut(), x.view(), x.t(), false);
        product(square.view_mut(), gram.view(), gram.view(), false);
        gram.zip_mut_with(&square, |g, &s| *g = b * *g + c * s);
        product(next.view_mut(), gram.view(), x.view(), false);
        x.zip_mut_with(&next, |x, &n| *x = a.mul_add(*x, n));
    }
    let x = if tall { x.t().as_standard_layout().into_owned() } else { x };
    x.into_raw_vec_and_offset().0
}
