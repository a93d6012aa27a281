//! Optimizer options, parameter groups, and the plan of an update that they make for a layout.

use std::ops::Range;

use regex::Regex;

use super::{Clip, MuonScale, NormClip, Rule, RuleStep, StepParams};
use crate::error::{Error, Result};
use crate::plan::{ALIGNMENT, ParamLayout};
use crate::real::Real;

/// Parameters that a pattern names, and what is different for them.
#[derive(Clone, Debug)]
pub struct GroupPattern {
    /// `optimizer.groups.pattern`: a regular expression, found anywhere in the parameter's name.
    pub pattern: Regex,
    /// `optimizer.groups.learning_rate_scale`: factor of the learning rate.
    pub learning_rate_scale: f64,
    /// `optimizer.groups.weight_decay`.
    pub weight_decay: Option<f64>,
    /// `optimizer.groups.rule`. Muon is taken at its word for any matrix, tables and the output layer too.
    pub rule: Option<Rule>,
    /// Whether decay is decoupled, as the group's rule has it; where not set, as the optimizer has it.
    pub decoupled: Option<bool>,
}

/// Options of the optimizer. The run file's key stands in the text of each field.
#[derive(Clone, Debug)]
pub struct OptimizerOptions {
    /// `optimizer.rule` and its constants.
    pub rule: Rule,
    /// `optimizer.learning_rate`: the schedule's peak.
    pub learning_rate: f64,
    /// `optimizer.weight_decay`.
    pub weight_decay: f64,
    /// `optimizer.decay`: `"decoupled"` or `"coupled"`.
    pub decoupled: bool,
    /// `optimizer.decay_on = "matrices"`: no decay on tensors of fewer than two dimensions, norms and biases that is.
    pub decay_matrices_only: bool,
    /// `optimizer.clip`.
    pub clip: Clip,
    /// `optimizer.groups`: the first pattern that fits counts.
    pub groups: Vec<GroupPattern>,
    /// `optimizer.master`: whether parameters that are stored in bf16 are kept in f32 besides. Without, an update is computed in f32
    /// and rounded stochastically, which saves 4 bytes a parameter and 6 of memory traffic.
    pub master: bool,
}

impl OptimizerOptions {
    /// A rule with nothing besides.
    pub fn new(rule: Rule, learning_rate: f64) -> Self {
        OptimizerOptions {
            rule,
            learning_rate,
            weight_decay: 0.0,
            decoupled: rule.decouples_decay(),
            decay_matrices_only: false,
            clip: Clip::default(),
            groups: Vec::new(),
            master: true,
        }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// The run file's key, what was found, what was expected.
    pub fn validate(&self) -> Result<()> {
        let wrong = |key: &str, found: f64, expected: &str| {
            Err(Error::config(format!("optimizer.{key}"), format!("found {found}, expected {expected}")))
        };
        let at_least_zero = |x: f64| x >= 0.0 && x.is_finite();
        if !(self.learning_rate > 0.0 && self.learning_rate.is_finite()) {
            return wrong("learning_rate", self.learning_rate, "a number above 0");
        }
        if !at_least_zero(self.weight_decay) {
            return wrong("weight_decay", self.weight_decay, "a number of 0 or more");
        }
        for (number, group) in self.groups.iter().enumerate() {
            let of = |key: &str| format!("groups[{number}].{key}");
            if !at_least_zero(group.learning_rate_scale) {
                return wrong(&of("learning_rate_scale"), group.learning_rate_scale, "a number of 0 or more");
            }
            if let Some(decay) = group.weight_decay.filter(|&d| !at_least_zero(d)) {
                return wrong(&of("weight_decay"), decay, "a number of 0 or more");
            }
        }
        let groups = self.groups.iter().enumerate();
        let own = groups.filter_map(|(number, group)| Some((format!("groups[{number}]."), group.rule?)));
        for (of, rule) in own.chain([(String::new(), self.rule)]) {
            let wrong = |key: &str, found: f64, expected: &str| wrong(&format!("{of}{key}"), found, expected);
            let (fractions, epsilon): (Vec<(&str, f64)>, Option<f64>) = match rule {
                Rule::Sgd => (vec![], None),
                Rule::Momentum { momentum, dampening, nesterov, gamma, .. } => {
                    if !(gamma > 0.0 && gamma.is_finite()) {
                        return wrong("gamma", gamma, "a number above 0");
                    }
                    if nesterov && dampening != 0.0 {
                        return wrong("dampening", dampening, "0 with nesterov");
                    }
                    if nesterov && momentum <= 0.0 {
                        return wrong("momentum", momentum, "a number above 0 with nesterov");
                    }
                    if !(0.0..=1.0).contains(&dampening) {
                        return wrong("dampening", dampening, "a number from 0 to 1");
                    }
                    (vec![("momentum", momentum)], None)
                }
                Rule::Lars { momentum, trust } => {
                    if !(trust > 0.0 && trust.is_finite()) {
                        return wrong("trust", trust, "a number above 0");
                    }
                    (vec![("momentum", momentum)], None)
                }
                Rule::Muon { momentum, .. } => (vec![("momentum", momentum)], None),
                Rule::Adam { betas, epsilon } | Rule::Lamb { betas, epsilon } => {
                    (vec![("betas", betas[0]), ("betas", betas[1])], Some(epsilon))
                }
                Rule::Lion { betas } => (vec![("betas", betas[0]), ("betas", betas[1])], None),
            };
            for (key, value) in fractions {
                if !(0.0..1.0).contains(&value) {
                    return wrong(key, value, "a number from 0 to below 1");
                }
            }
            // In f32, where 0 would make 0 / 0 of parameters whose gradients were always 0.
            if let Some(epsilon) = epsilon.filter(|&e| !(e as f32 > 0.0 && e.is_finite())) {
                return wrong("epsilon", epsilon, "a number above 0 in f32 too, as 1e-8 is");
            }
        }
        self.clip.validate()
    }
}

/// What a group of parameters is updated by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// The rule.
    pub rule: Rule,
    /// Factor of the learning rate.
    pub learning_rate_scale: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Whether the decay is decoupled.
    pub decoupled: bool,
}

impl Group {
    /// The group's learning rate.
    pub fn learning_rate(&self, step: &StepParams) -> f64 {
        step.learning_rate * self.learning_rate_scale
    }

    /// The rule's constants for this step.
    pub fn step<T: Real>(&self, step: &StepParams) -> RuleStep<T> {
        RuleStep::new(&self.rule, self.learning_rate(step), self.weight_decay, self.decoupled, step.step)
    }
}

/// A tensor in the plan of an update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPlan {
    /// First element in the arena.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
    /// Number of output units: the first dimension, or 1 for fewer than two dimensions.
    pub units: usize,
    /// Its group.
    pub group: u8,
}

impl TensorPlan {
    /// Elements of an output unit, at least 1.
    pub fn unit(&self) -> usize {
        (self.len / self.units.max(1)).max(1)
    }
}

/// The plan of an update: made once for a layout, interpreted by every backend.
#[derive(Clone, Debug, PartialEq)]
pub struct UpdatePlan {
    /// The groups.
    pub groups: Vec<Group>,
    /// The group of each block of [`ALIGNMENT`] elements.
    pub block_groups: Vec<u8>,
    /// The tensors, in arena order.
    pub tensors: Vec<TensorPlan>,
    /// How gradients are clipped.
    pub clip: Clip,
    /// Names of the slots: the longest list of the groups' rules.
    pub slots: &'static [&'static str],
    /// The seed of the stochastic rounding where parameters are kept in bf16 alone, without a copy in f32.
    pub rounding: Option<u64>,
}

/// Elements of a piece of a tensor, where it has no more than [`MOST_PIECES`] of them.
const PIECE: usize = 1 << 14;
/// Pieces of a tensor at the most: their sums are added up one after the other.
const MOST_PIECES: usize = 256;

impl UpdatePlan {
    /// How many elements of a tensor are summed up together, wherever something is summed over a tensor: sums over pieces are then
    /// added in their order, so that a sum has the same bits for any number of threads or multiprocessors. Where a clip looks at
    /// output units, a piece is a whole number of units.
    ///
    /// A sum of squares over a piece, in f64: spans of 2048 elements in their order; within a span element i belongs to sum
    /// `i % 128`, each sum takes its elements in order, and halves of the sums are added at the end (64, 32, .. 1).
    pub fn piece(&self, tensor: usize) -> usize {
        match self.clip.norm {
            NormClip::Adaptive { .. } => {
                let unit = self.tensors[tensor].unit();
                (PIECE / unit).max(1) * unit
            }
            NormClip::Off | NormClip::Global { .. } | NormClip::Tensor { .. } => {
                PIECE * self.tensors[tensor].len.div_ceil(PIECE * MOST_PIECES).next_power_of_two()
            }
        }
    }

    /// The pieces that lie within `elements`: index of the tensor, and elements in the arena. In arena order.
    pub fn pieces(&self, elements: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        self.tensors.iter().enumerate().flat_map(move |(index, tensor)| {
            let (piece, end) = (self.piece(index), tensor.offset + tensor.len);
            let pieces = (tensor.offset..end).step_by(piece).map(move |start| start..end.min(start + piece));
            let within = elements.clone();
            let pieces = pieces.filter(move |piece| within.start <= piece.start && piece.end <= within.end);
            pieces.map(move |piece| (index, piece))
        })
    }

    /// Where the arena can be cut so that the update of each part can be computed by itself, but for sums over pieces: where pieces
    /// begin; of matrices that Muon multiplies only where they begin themselves. In order, each a multiple of [`ALIGNMENT`].
    pub fn cuts(&self) -> Vec<usize> {
        let whole = |tensor: &TensorPlan| matches!(self.groups[usize::from(tensor.group)].rule, Rule::Muon { .. });
        let of = |(index, tensor): (usize, &TensorPlan)| {
            let piece = if whole(tensor) { tensor.len.max(1) } else { self.piece(index) };
            (tensor.offset..tensor.offset + tensor.len).step_by(piece)
        };
        self.tensors.iter().enumerate().flat_map(of).filter(|cut| cut.is_multiple_of(ALIGNMENT)).collect()
    }

    /// The plan of `options` for the tensors of `layout`.
    ///
    /// # Errors
    /// Options that do not validate, more than 256 groups, or a pattern that names no parameter.
    pub fn new(options: &OptimizerOptions, layout: &ParamLayout) -> Result<Self> {
        options.validate()?;
        let mut groups: Vec<Group> = Vec::new();
        let mut tensors = Vec::new();
        let mut block_groups = vec![0u8; layout.padded_len() / ALIGNMENT];
        let mut used = vec![false; options.groups.len()];
        for entry in layout.entries() {
            let found = options.groups.iter().position(|g| g.pattern.is_match(&entry.name));
            if let Some(index) = found {
                used[index] = true;
            }
            let pattern = found.map(|index| &options.groups[index]);
            let matrix = entry.shape.len() >= 2;
            let own_rule = pattern.and_then(|p| p.rule);
            let rule = own_rule.unwrap_or(options.rule);
            let (rule, decoupled) = match rule {
                Rule::Muon { .. } if !matrix || (own_rule.is_none() && is_table(&entry.name)) => {
                    (Rule::Adam { betas: [0.9, 0.95], epsilon: 1e-8 }, true)
                }
                rule => (rule, pattern.and_then(|p| p.decoupled).unwrap_or(options.decoupled)),
            };
            let default_decay = if options.decay_matrices_only && !matrix { 0.0 } else { options.weight_decay };
            let group = Group {
                rule,
                learning_rate_scale: pattern.map_or(1.0, |p| p.learning_rate_scale),
                weight_decay: pattern.and_then(|p| p.weight_decay).unwrap_or(default_decay),
                decoupled,
            };
            let index = groups.iter().position(|g| *g == group).unwrap_or_else(|| {
                groups.push(group);
                groups.len() - 1
            });
            let group = u8::try_from(index)
                .map_err(|_| Error::config("optimizer.groups", "found more than 256 groups, expected at most 256"))?;
            let blocks = entry.offset / ALIGNMENT..(entry.offset + entry.len).div_ceil(ALIGNMENT);
            block_groups[blocks].fill(group);
            let units = if matrix { entry.shape[0] } else { 1 };
            tensors.push(TensorPlan { offset: entry.offset, len: entry.len, units, group });
        }
        if let Some(index) = used.iter().position(|used| !used) {
            let pattern = &options.groups[index].pattern;
            if let Some(entry) = layout.entries().iter().find(|entry| pattern.is_match(&entry.name)) {
                let before = options.groups.iter().find(|group| group.pattern.is_match(&entry.name));
                let before = before.map_or("", |group| group.pattern.as_str());
                return Err(Error::config(
                    "optimizer.groups.pattern",
                    format!(
                        "found `{pattern}`, all of whose parameters groups before it take, such as `{before}` takes `{}`; expected \
                         parameters of its own: put it before them, or leave it out",
                        entry.name
                    ),
                ));
            }
            let names: Vec<&str> = layout.entries().iter().map(|e| e.name.as_str()).take(8).collect();
            return Err(Error::config(
                "optimizer.groups.pattern",
                format!(
                    "found `{pattern}`, which names no parameter; expected a pattern that fits one of {}, ..",
                    names.join(", ")
                ),
            ));
        }
        let slots = groups.iter().map(|g| g.rule.slots()).max_by_key(|s| s.len()).unwrap_or(&[]);
        Ok(UpdatePlan { groups, block_groups, tensors, clip: options.clip, slots, rounding: None })
    }
}

/// Whether a parameter is a table of vectors or the output layer, which Muon leaves to AdamW.
fn is_table(name: &str) -> bool {
    name.split('.').any(|part| {
        matches!(part, "wte" | "wpe" | "lm_head" | "embedding" | "positions" | "head" | "classifier" | "fc")
    })
}

impl MuonScale {
    /// The factor for a matrix of `rows` and `columns`.
    pub fn factor(self, rows: usize, columns: usize) -> f64 {
        let (rows, columns) = (rows as f64, columns as f64);
        match self {
            MuonScale::Original => (rows / columns).max(1.0).sqrt(),
            MuonScale::MatchRmsAdamw => 0.2 * rows.max(columns).sqrt(),
        }
    }
}
