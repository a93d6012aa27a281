//! The update rules: each an element function, written once, generic over f32 and f64.

use crate::real::Real;

/// The sign convention of momentum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MomentumForm {
    /// `v = mu v + (1 - dampening) g; theta = theta - lr v`.
    Pytorch,
    /// `v = beta v - lr g; theta = theta + gamma v` (Polyak 1964).
    Polyak,
}

/// By what Muon's orthogonal update is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MuonScale {
    /// `sqrt(max(1, rows / columns))` (Jordan 2024).
    Original,
    /// `0.2 sqrt(max(rows, columns))`: the root mean square of an AdamW update (Liu et al. 2025).
    MatchRmsAdamw,
}

/// An update rule: data, which every backend interprets alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// `theta = theta - lr g`.
    Sgd,
    /// Momentum.
    Momentum {
        /// Sign convention.
        form: MomentumForm,
        /// mu, or beta.
        momentum: f64,
        /// Share of the gradient held back after the first step; PyTorch's form only.
        dampening: f64,
        /// `g + mu v` in place of v; PyTorch's form only.
        nesterov: bool,
        /// Factor of v; Polyak's form only.
        gamma: f64,
    },
    /// Adam (Kingma and Ba 2015), and AdamW where decay is decoupled (Loshchilov and Hutter 2019).
    Adam {
        /// Decay of the first and second moment.
        betas: [f64; 2],
        /// Added to the root of the second moment.
        epsilon: f64,
    },
    /// Lion (Chen et al. 2023): `theta - lr sign(beta1 m + (1 - beta1) g)`.
    Lion {
        /// For the update, for the moment.
        betas: [f64; 2],
    },
    /// LAMB (You et al. 2020): Adam's direction plus decay, scaled tensor by tensor to the weights' norm. Coupled decay is
    /// the paper's: part of the direction.
    Lamb {
        /// Decay of the first and second moment.
        betas: [f64; 2],
        /// Added to the root of the second moment.
        epsilon: f64,
    },
    /// LARS (You et al. 2017): momentum with a learning rate of each tensor's own, `trust |theta| / (|g| + wd |theta|)`
    /// (1 where a norm is 0). Coupled decay is the paper's.
    Lars {
        /// Decay of the velocity.
        momentum: f64,
        /// Trust coefficient.
        trust: f64,
    },
    /// Muon (Jordan 2024), for matrices: momentum made orthogonal by Newton and Schulz's iteration.
    Muon {
        /// Decay of the momentum.
        momentum: f64,
        /// Whether the gradient looks ahead.
        nesterov: bool,
        /// Iterations.
        steps: u32,
        /// Scale of the update.
        scale: MuonScale,
    },
}

impl Rule {
    /// Names of the slots that the rule keeps, as PyTorch names them in its state.
    pub fn slots(&self) -> &'static [&'static str] {
        match self {
            Rule::Sgd => &[],
            Rule::Momentum { .. } | Rule::Lars { .. } | Rule::Muon { .. } => &["momentum_buffer"],
            Rule::Adam { .. } | Rule::Lamb { .. } => &["exp_avg", "exp_avg_sq"],
            Rule::Lion { .. } => &["exp_avg"],
        }
    }

    /// Whether weight decay is decoupled where the user does not say.
    pub fn decouples_decay(&self) -> bool {
        matches!(self, Rule::Lion { .. } | Rule::Muon { .. })
    }
}

/// A rule's constants for one step and one group, rounded to the arena's type once.
#[derive(Clone, Copy, Debug)]
pub struct RuleStep<T> {
    /// Learning rate of the group.
    pub learning_rate: T,
    /// Coupled decay; 0 when decoupled.
    pub coupled: T,
    /// `1 - lr wd` when decoupled; 1 otherwise.
    pub shrink: T,
    /// First constant of the rule: momentum, beta1.
    pub a: T,
    /// Second constant: beta2.
    pub b: T,
    /// What the gradient is multiplied by on its way into the velocity.
    pub feed: T,
    /// `1 - beta2`.
    pub feed_b: T,
    /// Added to a root.
    pub epsilon: T,
    /// `lr / (1 - beta1^t)`.
    pub corrected_rate: T,
    /// `1 / (1 - beta1^t)`.
    pub correction: T,
    /// `1 / sqrt(1 - beta2^t)`.
    pub root_correction: T,
    /// Polyak's gamma.
    pub gamma: T,
}

impl<T: Real> RuleStep<T> {
    /// The constants of applied update number `step` (1 the first time). Computed in f64, rounded once.
    pub fn new(rule: &Rule, learning_rate: f64, weight_decay: f64, decoupled: bool, step: u64) -> Self {
        let (mut a, mut b, mut feed, mut epsilon, mut gamma) = (0.0, 0.0, 1.0, 0.0, 1.0);
        match *rule {
            Rule::Sgd => {}
            Rule::Momentum { form, momentum, dampening, gamma: factor, .. } => {
                a = momentum;
                gamma = factor;
                feed = match form {
                    MomentumForm::Pytorch if step <= 1 => 1.0,
                    MomentumForm::Pytorch => 1.0 - dampening,
                    MomentumForm::Polyak => learning_rate,
                };
            }
            Rule::Adam { betas, epsilon: e } | Rule::Lamb { betas, epsilon: e } => {
                [a, b] = betas;
                feed = 1.0 - a;
                epsilon = e;
            }
            Rule::Lion { betas } => {
                [a, b] = betas;
                feed = 1.0 - a;
            }
            Rule::Lars { momentum, .. } => a = momentum,
            Rule::Muon { momentum, .. } => {
                a = momentum;
                feed = 1.0 - momentum;
            }
        }
        let correction = 1.0 / (1.0 - power(a, step));
        let r = T::from_f64;
        RuleStep {
            learning_rate: r(learning_rate),
            coupled: r(if decoupled { 0.0 } else { weight_decay }),
            shrink: r(if decoupled { 1.0 - learning_rate * weight_decay } else { 1.0 }),
            a: r(a),
            b: r(b),
            feed: r(feed),
            feed_b: r(1.0 - b),
            epsilon: r(epsilon),
            corrected_rate: r(learning_rate * correction),
            correction: r(correction),
            root_correction: r(1.0 / (1.0 - power(b, step)).sqrt()),
            gamma: r(gamma),
        }
    }

    /// Step 4 of the update: decay. Returns gradient and parameter.
    #[inline(always)]
    pub fn decay(&self, theta: T, g: T) -> (T, T) {
        (self.coupled.mul_add(theta, g), theta * self.shrink)
    }

    /// `theta - lr g`.
    #[inline(always)]
    pub fn sgd(&self, theta: T, g: T) -> T {
        (-self.learning_rate).mul_add(g, theta)
    }

    /// PyTorch's momentum. Returns parameter and velocity.
    #[inline(always)]
    pub fn momentum(&self, theta: T, g: T, v: T, nesterov: bool) -> (T, T) {
        let v = self.a.mul_add(v, self.feed * g);
        let direction = if nesterov { self.a.mul_add(v, g) } else { v };
        ((-self.learning_rate).mul_add(direction, theta), v)
    }

    /// Polyak's momentum. Returns parameter and velocity.
    #[inline(always)]
    pub fn polyak(&self, theta: T, g: T, v: T) -> (T, T) {
        let v = self.a.mul_add(v, -(self.feed * g));
        (self.gamma.mul_add(v, theta), v)
    }

    /// Adam's moments.
    #[inline(always)]
    pub fn moments(&self, g: T, m: T, v: T) -> (T, T) {
        (self.a.mul_add(m, self.feed * g), self.b.mul_add(v, self.feed_b * g * g))
    }

    /// `sqrt(v) / sqrt(1 - beta2^t) + epsilon`.
    #[inline(always)]
    pub fn denominator(&self, v: T) -> T {
        v.sqrt().mul_add(self.root_correction, self.epsilon)
    }

    /// Adam. Returns parameter and moments.
    #[inline(always)]
    pub fn adam(&self, theta: T, g: T, m: T, v: T) -> (T, T, T) {
        let (m, v) = self.moments(g, m, v);
        ((-self.corrected_rate).mul_add(m / self.denominator(v), theta), m, v)
    }

    /// LAMB's direction, from the new moments.
    #[inline(always)]
    pub fn lamb_direction(&self, theta: T, m: T, v: T) -> T {
        self.coupled.mul_add(theta, self.correction * m / self.denominator(v))
    }

    /// LAMB, with the learning rate of the tensor. Returns the parameter.
    #[inline(always)]
    pub fn lamb(&self, theta: T, m: T, v: T, rate: T) -> T {
        (-rate).mul_add(self.lamb_direction(theta, m, v), theta * self.shrink)
    }

    /// LARS, with the learning rate of the tensor. Returns parameter and velocity.
    #[inline(always)]
    pub fn lars(&self, theta: T, g: T, v: T, rate: T) -> (T, T) {
        let v = self.a.mul_add(v, rate * g);
        (theta - v, v)
    }

    /// What Muon makes orthogonal, and the momentum.
    #[inline(always)]
    pub fn muon(&self, g: T, m: T, nesterov: bool) -> (T, T) {
        let m = self.feed.mul_add(g - m, m);
        (if nesterov { self.a.mul_add(m - g, g) } else { m }, m)
    }

    /// Lion. Returns parameter and moment.
    #[inline(always)]
    pub fn lion(&self, theta: T, g: T, m: T) -> (T, T) {
        let direction = self.a.mul_add(m, self.feed * g);
        let zero = T::zero();
        let sign = if direction > zero {
            T::one()
        } else if direction < zero {
            -T::one()
        } else {
            zero
        };
        ((-self.learning_rate).mul_add(sign, theta), self.b.mul_add(m, self.feed_b * g))
    }
}

/// `base^exponent` by squaring: multiplications alone, so the same bits on every device.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}
