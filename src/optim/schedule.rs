//! Learning-rate schedules: pure functions of the step.

use std::f64::consts::PI;

use crate::error::{Error, Result};

/// How the learning rate falls after the warm-up. `r` runs from 0 at the end of the warm-up to 1 at the end of the run;
/// `s` counts steps since the end of the warm-up; `d` is the peak less the floor.
#[derive(Clone, Debug, PartialEq)]
pub enum Decay {
    /// It does not.
    Constant,
    /// `floor + d (1 - r)^power`.
    Polynomial {
        /// The exponent.
        power: f64,
    },
    /// `floor + d (1 - r)`.
    Linear,
    /// `floor + d (1 + cos(pi r)) / 2`.
    Cosine,
    /// `peak gamma^(s / every)`, whole number division, or one factor for each milestone passed.
    Step {
        /// Steps between two falls; used where there are no milestones.
        every: u64,
        /// Steps (counted from the start of the run) at which it falls.
        milestones: Vec<u64>,
        /// The factor of a fall.
        gamma: f64,
    },
    /// `peak gamma^s`.
    Exponential {
        /// The factor of a step.
        gamma: f64,
    },
    /// Warm-up, stable, decay: the peak, then over the last `decay_steps` linearly to the floor.
    Wsd {
        /// Steps of the decay.
        decay_steps: u64,
    },
    /// One cycle (Smith 2018), as PyTorch's `OneCycleLR` with cosine legs: from `peak / initial_divisor` up to the peak, then
    /// down to `peak / initial_divisor / final_divisor`. It has its own warm-up.
    OneCycle {
        /// Share of the run that goes up.
        rise: f64,
        /// Peak over start.
        initial_divisor: f64,
        /// Start over end.
        final_divisor: f64,
    },
    /// `peak sqrt(w / (w + s))`, w the warm-up steps, at least 1 (Vaswani et al. 2017).
    InverseSqrt,
}

/// A schedule: linear warm-up, then [`Decay`], never below the floor.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// `schedule.kind` and its constants.
    pub decay: Decay,
    /// `schedule.warmup_steps`: step t of the warm-up w has `peak (t + 1) / (w + 1)`.
    pub warmup_steps: u64,
    /// `schedule.floor`: the least learning rate after the warm-up.
    pub floor: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Schedule { decay: Decay::Constant, warmup_steps: 0, floor: 0.0 }
    }
}

impl Schedule {
    /// The learning rate of step `step` (0 the first) of `total`, for a peak of `peak`.
    pub fn at(&self, step: u64, total: u64, peak: f64) -> f64 {
        if let Decay::OneCycle { rise, initial_divisor, final_divisor } = self.decay {
            return one_cycle(step, total, peak, [rise, initial_divisor, final_divisor]);
        }
        let warmup = self.warmup_steps;
        if step < warmup {
            return peak * (step + 1) as f64 / (warmup + 1) as f64;
        }
        let since = (step - warmup) as f64;
        let length = total.saturating_sub(warmup).max(1) as f64;
        let r = (since / length).min(1.0);
        let span = peak - self.floor;
        let rate = match &self.decay {
            Decay::Constant => peak,
            Decay::Polynomial { power } => self.floor + span * (1.0 - r).powf(*power),
            Decay::Linear => self.floor + span * (1.0 - r),
            Decay::Cosine => self.floor + span * 0.5 * (1.0 + (PI * r).cos()),
            Decay::Step { every, milestones, gamma } => {
                let falls = if milestones.is_empty() {
                    (step - warmup) / every.max(&1)
                } else {
                    milestones.iter().filter(|&&m| step >= m).count() as u64
                };
                peak * gamma.powf(falls as f64)
            }
            Decay::Exponential { gamma } => peak * gamma.powf(since),
            Decay::Wsd { decay_steps } => {
                let start = total.saturating_sub(*decay_steps);
                if step < start {
                    peak
                } else {
                    self.floor + span * (1.0 - (step - start) as f64 / (*decay_steps).max(1) as f64).max(0.0)
                }
            }
            Decay::InverseSqrt => {
                let w = warmup.max(1) as f64;
                peak * (w / (w + since)).sqrt()
            }
            Decay::OneCycle { .. } => peak,
        };
        rate.max(self.floor.min(peak))
    }

    /// Checks every constant against the length of the run and the peak.
    ///
    /// # Errors
    /// The run file's key, what was found, what was expected.
    pub fn validate(&self, total: u64, peak: f64) -> Result<()> {
        let wrong = |key: &str, found: String, expected: String| {
            Err(Error::config(format!("schedule.{key}"), format!("found {found}, expected {expected}")))
        };
        if self.warmup_steps >= total && self.warmup_steps > 0 {
            return wrong("warmup_steps", self.warmup_steps.to_string(), format!("fewer than the run's {total} steps"));
        }
        if !(0.0..=peak).contains(&self.floor) {
            let expected = format!("a number from 0 to optimizer.learning_rate = {peak}");
            return wrong("floor", self.floor.to_string(), expected);
        }
        match &self.decay {
            Decay::Polynomial { power } if !(*power > 0.0 && power.is_finite()) => {
                wrong("power", power.to_string(), "a number above 0".into())
            }
            Decay::Step { gamma, .. } | Decay::Exponential { gamma } if !(*gamma > 0.0 && *gamma <= 1.0) => {
                wrong("gamma", gamma.to_string(), "a number above 0, at most 1".into())
            }
            Decay::Step { every: 0, milestones, .. } if milestones.is_empty() => {
                wrong("every_steps", "0".into(), "1 or more, or schedule.milestones".into())
            }
            Decay::Wsd { decay_steps } if *decay_steps == 0 || decay_steps + self.warmup_steps > total => {
                let expected = format!("from 1 to the {total} steps of the run less the warm-up");
                wrong("decay_steps", decay_steps.to_string(), expected)
            }
            Decay::OneCycle { rise, initial_divisor, final_divisor } => {
                if !(*rise > 0.0 && *rise < 1.0) {
                    return wrong("rise", rise.to_string(), "a number between 0 and 1".into());
                }
                for (key, divisor) in [("initial_divisor", *initial_divisor), ("final_divisor", *final_divisor)] {
                    if divisor < 1.0 {
                        return wrong(key, divisor.to_string(), "a number of 1 or more".into());
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

fn one_cycle(step: u64, total: u64, peak: f64, [rise, initial, last]: [f64; 3]) -> f64 {
    let leg = |from: f64, to: f64, share: f64| to + (from - to) / 2.0 * (1.0 + (PI * share).cos());
    let (start, step) = (peak / initial, step as f64);
    let top = rise * total as f64 - 1.0;
    let end = total as f64 - 1.0;
    if step <= top {
        leg(start, peak, if top > 0.0 { step / top } else { 1.0 })
    } else {
        let share = if end > top { ((step - top) / (end - top)).min(1.0) } else { 1.0 };
        leg(peak, start / last, share)
    }
}
