//! The plain rule: norm, clip, decay and rule of some elements, one after another, as `src/optim` defines them.

use rayon::prelude::*;

use super::Values;
use super::sample::Part;
use crate::backend::cpu;
use crate::optim::{
    Clip, Group, MomentumForm, NormClip, Rule, RuleStep, StepParams, TensorPlan, UpdatePlan, round_stochastically,
};
use crate::random::{Philox, Purpose};
use crate::real::{Element, Real};

/// Steps 1 to 3 of the update.
#[derive(Clone, Copy)]
pub(super) struct Scale<R> {
    divide: R,
    bound: R,
    coefficient: R,
}

impl<R: Real> Scale<R> {
    /// Without the norm clip.
    pub fn new(plan: &UpdatePlan, step: &StepParams) -> Self {
        Scale {
            divide: R::from_f64(1.0 / step.divisor),
            bound: plan.clip.value.map_or(R::infinity(), R::from_f64),
            coefficient: R::one(),
        }
    }

    /// With this coefficient of a norm clip.
    pub fn with(self, coefficient: f64) -> Self {
        Scale { coefficient: R::from_f64(coefficient), ..self }
    }

    fn of(&self, gradient: R) -> R {
        let g = gradient * self.divide;
        let g = if g > self.bound {
            self.bound
        } else if g < -self.bound {
            -self.bound
        } else {
            g
        };
        g * self.coefficient
    }
}

/// What the whole gradient says.
pub(super) struct Gradients {
    /// Sum of squares of each tensor, after the division and the value clip.
    pub squares: Vec<f64>,
    /// Whether every gradient was finite.
    pub finite: bool,
    /// Values that the value clip changes.
    pub clamped: u64,
}

impl Gradients {
    pub fn new<R: Real>(gradients: &[R], plan: &UpdatePlan, scale: &Scale<R>) -> Self {
        let mut own = Gradients { squares: Vec::new(), finite: true, clamped: 0 };
        for tensor in &plan.tensors {
            let found: Vec<(f64, bool, u64)> = gradients[tensor.offset..tensor.offset + tensor.len]
                .par_chunks(1 << 12)
                .map(|chunk| {
                    chunk.iter().fold((0.0, true, 0), |(sum, finite, clamped), &g| {
                        let (divided, x) = (g * scale.divide, scale.of(g).f64());
                        (
                            x.mul_add(x, sum),
                            finite && divided.is_finite(),
                            clamped + u64::from(divided.abs() > scale.bound),
                        )
                    })
                })
                .collect();
            own.squares.push(found.iter().map(|part| part.0).sum());
            own.finite &= found.iter().all(|part| part.1);
            own.clamped += found.iter().map(|part| part.2).sum::<u64>();
        }
        own
    }
}

/// The sum of squares, in the order that is part of its definition: spans of 2048 values; within a span value i belongs to sum
/// i % 128, and halves of the sums are added at the end.
fn squares<R: Real>(values: &[R]) -> f64 {
    let mut total = 0.0;
    for span in values.chunks(2048) {
        let mut sums = vec![0.0f64; 128];
        for (i, x) in span.iter().enumerate() {
            sums[i % 128] = x.f64().mul_add(x.f64(), sums[i % 128]);
        }
        while sums.len() > 1 {
            let upper = sums.split_off(sums.len() / 2);
            sums.iter_mut().zip(upper).for_each(|(low, high)| *low += high);
        }
        total += sums[0];
    }
    total
}

/// The norm of values that are summed piece by piece.
fn norm<R: Real>(values: &[R], piece: usize) -> f64 {
    values.chunks(piece).map(squares).sum::<f64>().sqrt()
}

/// What a part should be after the update. `scale` has the coefficient of the clips by global or tensor norm.
pub(super) fn replay<R: Real>(
    plan: &UpdatePlan,
    step: &StepParams,
    part: &Part,
    before: &Values<R>,
    gradients: &[R],
    scale: Scale<R>,
) -> Values<R> {
    let tensor = &plan.tensors[part.tensor];
    let group = &plan.groups[usize::from(tensor.group)];
    let r: RuleStep<R> = group.step(step);
    let theta = &before.parameters;
    let g = clipped(plan, tensor, theta, gradients, scale);
    let piece = plan.piece(part.tensor);
    let mut after = Values { parameters: theta.clone(), slots: before.slots.clone() };
    match group.rule {
        Rule::Lars { trust, .. } => {
            // The clipped gradients' squares are added up unit by unit where the clip looks at units.
            let unit = if matches!(plan.clip.norm, NormClip::Adaptive { .. }) { tensor.unit() } else { piece };
            let slope = g.chunks(piece).map(|piece| piece.chunks(unit).map(squares).sum::<f64>()).sum::<f64>().sqrt();
            let (weights, decay) = (norm(theta, piece), if group.decoupled { 0.0 } else { group.weight_decay });
            let ratio = if weights > 0.0 && slope > 0.0 { trust * weights / (slope + decay * weights) } else { 1.0 };
            let rate = R::from_f64(group.learning_rate(step) * ratio);
            for (i, &g) in g.iter().enumerate() {
                let (g, t) = r.decay(theta[i], g);
                (after.parameters[i], after.slots[0][i]) = r.lars(t, g, before.slots[0][i], rate);
            }
        }
        Rule::Lamb { .. } => {
            let mut directions = vec![R::zero(); g.len()];
            for (i, &g) in g.iter().enumerate() {
                let (m, v) = r.moments(g, before.slots[0][i], before.slots[1][i]);
                (after.slots[0][i], after.slots[1][i]) = (m, v);
                directions[i] = r.lamb_direction(theta[i], m, v);
            }
            let (weights, direction) = (norm(theta, piece), norm(&directions, piece));
            let ratio = if weights > 0.0 && direction > 0.0 { weights / direction } else { 1.0 };
            let rate = R::from_f64(group.learning_rate(step) * ratio);
            for (i, theta) in after.parameters.iter_mut().enumerate() {
                *theta = r.lamb(*theta, after.slots[0][i], after.slots[1][i], rate);
            }
        }
        Rule::Muon { nesterov, .. } => {
            let mut directions = vec![R::zero(); g.len()];
            for (i, &g) in g.iter().enumerate() {
                let (g, _) = r.decay(theta[i], g);
                (directions[i], after.slots[0][i]) = r.muon(g, before.slots[0][i], nesterov);
            }
            after.parameters = muon_in_f64(tensor, group, step, theta, &directions);
        }
        _ => {
            for (i, &g) in g.iter().enumerate() {
                element(group, &r, g, i, &mut after);
            }
        }
    }
    if let Some(seed) = plan.rounding {
        let words = Philox::new(seed, Purpose::Rounding, step.step as u32);
        for (i, theta) in after.parameters.iter_mut().enumerate() {
            let rounded = round_stochastically(theta.f32(), words.word((part.start + i) as u64));
            *theta = R::from_f64(rounded.f64());
        }
    }
    after
}

/// The gradients after steps 1 to 3.
fn clipped<R: Real>(plan: &UpdatePlan, tensor: &TensorPlan, theta: &[R], gradients: &[R], scale: Scale<R>) -> Vec<R> {
    let NormClip::Adaptive { clipping, epsilon } = plan.clip.norm else {
        return gradients.iter().map(|&g| scale.of(g)).collect();
    };
    let mut all = Vec::with_capacity(gradients.len());
    for (theta, gradients) in theta.chunks(tensor.unit()).zip(gradients.chunks(tensor.unit())) {
        let unit: Vec<R> = gradients.iter().map(|&g| scale.of(g)).collect();
        let most = clipping * squares(theta).sqrt().max(epsilon);
        let norm = squares(&unit).sqrt();
        let coefficient = if norm > most { R::from_f64(most / norm.max(1e-6)) } else { R::one() };
        all.extend(unit.into_iter().map(|g| g * coefficient));
    }
    all
}

/// Steps 4 and 5 of an element under a rule that looks at elements alone.
fn element<R: Real>(group: &Group, r: &RuleStep<R>, g: R, i: usize, after: &mut Values<R>) {
    let Values { parameters, slots } = after;
    let (g, t) = r.decay(parameters[i], g);
    match group.rule {
        Rule::Sgd => parameters[i] = r.sgd(t, g),
        Rule::Momentum { form: MomentumForm::Pytorch, nesterov, .. } => {
            (parameters[i], slots[0][i]) = r.momentum(t, g, slots[0][i], nesterov);
        }
        Rule::Momentum { form: MomentumForm::Polyak, .. } => {
            (parameters[i], slots[0][i]) = r.polyak(t, g, slots[0][i]);
        }
        Rule::Adam { .. } => {
            (parameters[i], slots[0][i], slots[1][i]) = r.adam(t, g, slots[0][i], slots[1][i]);
        }
        Rule::Lion { .. } => (parameters[i], slots[0][i]) = r.lion(t, g, slots[0][i]),
        Rule::Lars { .. } | Rule::Lamb { .. } | Rule::Muon { .. } => {}
    }
}

/// A matrix's parameters under Muon, computed in f64 from `theta`, those before, and from the directions that its momentum gives. These
/// are rounded as the update rounds them: outside a matrix's rank the iteration would make much of another rounding.
fn muon_in_f64<R: Real>(
    tensor: &TensorPlan,
    group: &Group,
    step: &StepParams,
    theta: &[R],
    directions: &[R],
) -> Vec<R> {
    let len = tensor.len.next_multiple_of(crate::plan::ALIGNMENT);
    let padded = |values: &[R]| {
        let mut wide: Vec<f64> = values.iter().map(|x| x.f64()).collect();
        wide.resize(len, 0.0);
        wide
    };
    // A decay that is added to the gradient is in the direction.
    let weight_decay = if group.decoupled { group.weight_decay } else { 0.0 };
    let plan = UpdatePlan {
        groups: vec![Group { weight_decay, ..*group }],
        block_groups: vec![0; len / crate::plan::ALIGNMENT],
        tensors: vec![TensorPlan { offset: 0, group: 0, ..tensor.clone() }],
        clip: Clip::default(),
        slots: group.rule.slots(),
        rounding: None,
    };
    // A momentum that is the gradient stays so, and is the direction.
    let (mut theta, mut gradients, mut momentum) = (padded(theta), padded(directions), padded(directions));
    let step = StepParams { divisor: 1.0, zero_gradients: false, ..*step };
    match cpu::update(&mut theta, &mut gradients, &mut [&mut momentum], &plan, &step) {
        Ok(_) => theta[..tensor.len].iter().map(|&x| R::from_f64(x)).collect(),
        // The plan above fits its arrays; what does not would show as an error of every element.
        Err(_) => vec![R::nan(); tensor.len],
    }
}
