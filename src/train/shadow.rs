//! Shadow checks: a sample of a live update is replayed on the host by the plain rule, and compared with what the device left.
//!
//! [`Shadow::before`] copies some blocks of parameters and slots, [`Watched::after`] copies what became of them, and the whole
//! gradient. Norm and clip are computed anew from that gradient, in f64, so a clip that is skipped, or that divides by the squared
//! norm, shows; then `src/optim`'s rule is applied element by element. Nothing here shares code with a backend, but for Muon's products.
//!
//! All rules but Muon are defined to the bit, sums included (see [`UpdatePlan::piece`]), so the error allowed is 0. Muon's products
//! may be taken in any order: its parameters are compared with an iteration in f64, to [`muon_ulp`] units in the last place of the
//! largest value that goes into them.

mod replay;
mod sample;

use rayon::prelude::*;

use self::replay::{Gradients, Scale, replay};
use self::sample::{Part, draw};
use crate::backend::ops::Update;
use crate::backend::{Arena, Backend};
use crate::error::{Error, Result};
use crate::host;
use crate::optim::{NormClip, Rule, StepOutcome, StepParams, UpdatePlan};
use crate::real::{Element, Real};

/// Units in the last place that parameters under Muon may be off by after so many iterations: of the largest of the parameter and
/// the tensor's largest step. Each iteration multiplies what rounding leaves outside a matrix's rank by up to 3.4445, and gradients of
/// a few samples are of a low one. When this was measured, products in f32 left 5.2 units times all of that at most, of 15,000 matrices
/// up to 40 x 200 (of normal values, of ranks 1 to 4, of equal columns, gradients of classes), 65 after one iteration, and 26 after
/// five for matrices of normal values up to 1024 x 256. A device whose products round their factors is allowed as much more as they
/// lose ([`Update::product_bits`]).
pub fn muon_ulp(iterations: u32) -> f64 {
    128.0 + 12.0 * 3.4445f64.powf(f64::from(iterations))
}

/// How far two norms of the same gradient may be apart, relatively: sums of squares in f64, in another order.
const NORM_TOLERANCE: f64 = 1e-9;

/// Draws the samples of a run.
#[derive(Clone, Copy, Debug)]
pub struct Shadow {
    seed: u64,
}

/// What was copied before an update.
pub struct Watched<R> {
    parts: Vec<Part>,
    before: Vec<Values<R>>,
    /// The gradient, where the update sets it to 0.
    gradients: Option<Vec<R>>,
}

/// The values of a part of a tensor.
struct Values<R> {
    parameters: Vec<R>,
    slots: Vec<Vec<R>>,
}

/// What a replay found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Replayed {
    /// The largest error, in units in the last place.
    pub ulp: f64,
    /// Parameters that were compared.
    pub compared: usize,
}

impl Shadow {
    /// Samples that depend on this seed and the number of the update alone.
    pub fn new(seed: u64) -> Self {
        Shadow { seed }
    }

    /// Copies a sample of the arena before the update that `step` describes. All work before it is done afterwards, and the
    /// gradient need not be there yet unless the update sets it to 0.
    ///
    /// # Errors
    /// A device that failed.
    pub fn before<B: Backend>(
        &self,
        backend: &B,
        arena: &Arena<B>,
        plan: &UpdatePlan,
        step: &StepParams,
    ) -> Result<Watched<B::Real>> {
        let parts = draw(plan, self.seed, step.step);
        let before = parts.iter().map(|part| values(backend, arena, plan, part)).collect::<Result<_>>()?;
        let gradients = step.zero_gradients.then(|| gradients(backend, arena)).transpose()?;
        Ok(Watched { parts, before, gradients })
    }
}

fn download<B: Backend, T: Element>(backend: &B, from: &B::Buffer<T>, part: &Part) -> Result<Vec<T>> {
    let mut values = vec![T::default(); part.len];
    backend.download(from, part.start, &mut values)?;
    Ok(values)
}

fn values<B: Backend>(backend: &B, arena: &Arena<B>, plan: &UpdatePlan, part: &Part) -> Result<Values<B::Real>> {
    let parameters = if plan.rounding.is_some() {
        let stored: Vec<B::Storage> = download(backend, &arena.stored, part)?;
        stored.into_iter().map(|value| B::Real::from_f64(value.f64())).collect()
    } else {
        download(backend, &arena.parameters, part)?
    };
    let slots = arena.slots.iter().take(plan.slots.len());
    Ok(Values { parameters, slots: slots.map(|slot| download(backend, slot, part)).collect::<Result<_>>()? })
}

fn gradients<B: Backend>(backend: &B, arena: &Arena<B>) -> Result<Vec<B::Real>> {
    let mut gradients = host::zeros(arena.layout.padded_len())?;
    backend.download(&arena.gradients, 0, &mut gradients)?;
    Ok(gradients)
}

/// The rest of two numbers that should be one, relative to the expected one.
fn apart(found: f64, expected: f64) -> f64 {
    if found == expected { 0.0 } else { (found - expected).abs() / expected.abs() }
}

impl<R: Real> Watched<R> {
    /// Compares what the update left with the plain rule.
    ///
    /// # Errors
    /// A parameter or slot that is off by more than its rule allows: tensor, element, found and expected. A norm, a coefficient, a
    /// count or a decision that is not what the gradient gives. A device that failed.
    pub fn after<B: Backend<Real = R> + Update>(
        self,
        backend: &B,
        arena: &Arena<B>,
        plan: &UpdatePlan,
        step: &StepParams,
        outcome: &StepOutcome,
    ) -> Result<Replayed> {
        let Watched { parts, before, gradients: kept } = self;
        let gradients = match kept {
            Some(gradients) => gradients,
            None => gradients(backend, arena)?,
        };
        let wrong = |what: &str, found: String, expected: String| {
            Err(Error::Training(format!(
                "update {}: the device's {what} is {found}, the plain rule gives {expected} (run.shadow_every_steps)",
                step.step
            )))
        };
        let plain = Scale::new(plan, step);
        let own = Gradients::new(&gradients, plan, &plain);
        if own.finite == outcome.skipped {
            let decision = |skipped: bool| if skipped { "to skip" } else { "to apply" }.to_owned();
            return wrong("decision", decision(outcome.skipped), decision(!own.finite));
        }
        // Where the device's sums are right they decide, so that a coefficient is rounded from the same number.
        let squares = backend.norm_squares(arena)?;
        let near = |found: f64, own: f64| if apart(found, own) <= NORM_TOLERANCE { found } else { own };
        let norm = near(outcome.grad_norm, own.squares.iter().sum::<f64>().sqrt());
        let tensor_squares: Vec<f64> =
            own.squares.iter().enumerate().map(|(t, &own)| near(squares.get(t).copied().unwrap_or(own), own)).collect();
        let coefficient = |tensor: usize| match plan.clip.norm {
            NormClip::Global { max_norm } => (max_norm / (norm + 1e-6)).min(1.0),
            NormClip::Tensor { max_norm } => (max_norm / (tensor_squares[tensor].sqrt() + 1e-6)).min(1.0),
            NormClip::Off | NormClip::Adaptive { .. } => 1.0,
        };
        let mut replayed = Replayed::default();
        for (part, before) in parts.iter().zip(before) {
            let after = values(backend, arena, plan, part)?;
            let own = &gradients[part.start..part.start + part.len];
            let expected = if outcome.skipped {
                Values { parameters: before.parameters.clone(), slots: before.slots.clone() }
            } else {
                let scale = plain.with(coefficient(part.tensor));
                replay(plan, step, part, &before, own, scale)
            };
            compare(backend, arena, (plan, step, part), [&before, &after, &expected], &mut replayed)?;
            if plan.rounding.is_none() && std::any::TypeId::of::<B::Storage>() != std::any::TypeId::of::<R>() {
                let copy: Vec<B::Storage> = download(backend, &arena.stored, part)?;
                for (i, (copy, master)) in copy.iter().zip(&after.parameters).enumerate() {
                    let rounded = B::Storage::from_f32(master.f32());
                    if *copy != rounded {
                        let place = place(arena, part, i);
                        return wrong(&format!("copy of {place}"), format!("{copy:?}"), format!("{rounded:?}"));
                    }
                }
            }
        }
        if !outcome.skipped {
            let expected = own.squares.iter().sum::<f64>().sqrt();
            if apart(outcome.grad_norm, expected) > NORM_TOLERANCE {
                return wrong("gradient norm", outcome.grad_norm.to_string(), expected.to_string());
            }
            if !matches!(plan.clip.norm, NormClip::Adaptive { .. }) {
                let least = (0..plan.tensors.len()).map(coefficient).fold(1.0, f64::min);
                // Some devices keep it in f32.
                if apart(outcome.clip_coefficient, least) > 1e-6 {
                    return wrong("clip coefficient", outcome.clip_coefficient.to_string(), least.to_string());
                }
            }
            if outcome.clamped != own.clamped {
                let what = "count of values that the value clip changed";
                return wrong(what, outcome.clamped.to_string(), own.clamped.to_string());
            }
        }
        Ok(replayed)
    }
}

/// The name of an element.
fn place<B: Backend>(arena: &Arena<B>, part: &Part, index: usize) -> String {
    let entry = &arena.layout.entries()[part.tensor];
    let mut rest = part.start + index - entry.offset;
    let mut coordinates: Vec<String> = Vec::new();
    for &size in entry.shape.iter().rev() {
        coordinates.push((rest % size.max(1)).to_string());
        rest /= size.max(1);
    }
    coordinates.reverse();
    format!("`{}`[{}]", entry.name, coordinates.join(", "))
}

/// One unit in the last place of `value`, in a type of so many bits of fraction.
fn ulp(value: f64, fraction_bits: i32) -> f64 {
    // Below the least normal value the grid is no finer.
    let least = if fraction_bits == 52 { f64::MIN_EXP - 1 } else { f32::MIN_EXP - 1 };
    let exponent = if value == 0.0 { least } else { value.abs().log2().floor() as i32 };
    2f64.powi(exponent.max(least) - fraction_bits)
}

/// Compares a part with what was expected of it, `[before, after, expected]`.
fn compare<B: Update>(
    backend: &B,
    arena: &Arena<B>,
    (plan, step, part): (&UpdatePlan, &StepParams, &Part),
    [before, after, expected]: [&Values<B::Real>; 3],
    replayed: &mut Replayed,
) -> Result<()> {
    let real_bits = if B::Real::NAME == "f64" { 52 } else { 23 };
    let parameter_bits = if plan.rounding.is_some() { 7 } else { real_bits };
    let muon = match plan.groups[usize::from(plan.tensors[part.tensor].group)].rule {
        Rule::Muon { steps, .. } => Some(muon_ulp(steps)),
        _ => None,
    };
    // Muon's step may be larger than the parameter, whose last places then say nothing.
    let moves = before.parameters.par_iter().zip(&expected.parameters).map(|(b, e)| (b.f64() - e.f64()).abs());
    let largest_step = if muon.is_some() { moves.reduce(|| 0.0, f64::max) } else { 0.0 };
    let arrays = std::iter::once(("parameter", &after.parameters, &expected.parameters, parameter_bits));
    let slots = plan.slots.iter().zip(after.slots.iter().zip(&expected.slots));
    let slots = slots.map(|(name, (after, expected))| (*name, after, expected, real_bits));
    for (array, found, expected, bits) in arrays.chain(slots) {
        let of_muon = muon.filter(|_| array == "parameter");
        let allowed = match (of_muon, plan.rounding) {
            (None, _) => 0.0,
            (Some(ulp), None) => ulp * f64::from(1u32 << (23 - backend.product_bits().min(23))),
            // What f64 gives may be rounded to the other side.
            (Some(_), Some(_)) => 1.0,
        };
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let (found, expected) = (found.f64(), expected.f64());
            if found == expected {
                continue;
            }
            let scale = if of_muon.is_some() { expected.abs().max(largest_step) } else { expected };
            let error = (found - expected).abs() / ulp(scale, bits);
            if error > allowed || error.is_nan() {
                return Err(Error::Training(format!(
                    "update {}: {array} {} is {found:e}, the plain rule gives {expected:e}: {error} units in the last place apart, \
                     {allowed} are allowed (run.shadow_every_steps)",
                    step.step,
                    place(arena, part, i),
                )));
            }
            replayed.ulp = replayed.ulp.max(error);
        }
    }
    replayed.compared += part.len;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_in_the_last_place_are_those_of_f32() {
        for value in [1.0f32, 1.5, -3.0, 0.1, 1e-30, 1e20, 1e-39, 0.0] {
            let next = f32::from_bits(value.abs().to_bits() + 1);
            assert_eq!(ulp(f64::from(value), 23), f64::from(next) - f64::from(value.abs()), "{value}");
        }
        assert_eq!(ulp(1.0, 52), f64::EPSILON);
        assert_eq!(ulp(1.0, 7), 1.0 / 128.0);
    }
}
