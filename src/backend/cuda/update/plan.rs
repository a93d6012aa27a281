//! The plan of an update as the kernels read it: structs shared with kernels/update.cu, uploaded once.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::optim::{Clip, Group, MomentumForm, NormClip, Rule, UpdatePlan};
use crate::plan::ALIGNMENT;

/// `enum RuleKind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Kind {
    Sgd = 0,
    Momentum = 1,
    Nesterov = 2,
    Polyak = 3,
    Adam = 4,
    Lion = 5,
    Lars = 6,
    Lamb = 7,
    Muon = 8,
}

impl Kind {
    pub fn of(rule: &Rule) -> Self {
        match *rule {
            Rule::Sgd => Kind::Sgd,
            Rule::Momentum { form: MomentumForm::Polyak, .. } => Kind::Polyak,
            Rule::Momentum { nesterov: true, .. } => Kind::Nesterov,
            Rule::Momentum { .. } => Kind::Momentum,
            Rule::Adam { .. } => Kind::Adam,
            Rule::Lion { .. } => Kind::Lion,
            Rule::Lars { .. } => Kind::Lars,
            Rule::Lamb { .. } => Kind::Lamb,
            Rule::Muon { .. } => Kind::Muon,
        }
    }

    /// The kernel's name where all groups have this rule.
    pub fn kernel(self) -> &'static str {
        match self {
            Kind::Sgd => "sgd",
            Kind::Momentum => "momentum",
            Kind::Nesterov => "nesterov",
            Kind::Polyak => "polyak",
            Kind::Adam => "adam",
            Kind::Lion => "lion",
            Kind::Lars | Kind::Lamb | Kind::Muon => "mixed",
        }
    }
}

/// `struct Piece`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Piece {
    pub offset: u64,
    pub len: u32,
    pub tensor: u32,
}

/// `struct Tensor`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Tensor {
    pub offset: u64,
    pub len: u64,
    pub first_piece: u32,
    pub pieces: u32,
    pub unit: u32,
    pub first_unit: u32,
    pub group: u32,
    pub padding: u32,
}

/// `struct GroupOptions`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct GroupOptions {
    learning_rate_scale: f64,
    weight_decay: f64,
    a: f64,
    b: f64,
    epsilon: f64,
    dampening: f64,
    gamma: f64,
    trust: f64,
    rule: i32,
    decoupled: i32,
}

impl GroupOptions {
    fn new(group: &Group) -> Self {
        let mut options = GroupOptions {
            learning_rate_scale: group.learning_rate_scale,
            weight_decay: group.weight_decay,
            gamma: 1.0,
            rule: Kind::of(&group.rule) as i32,
            decoupled: i32::from(group.decoupled),
            ..GroupOptions::zeroed()
        };
        match group.rule {
            Rule::Sgd => {}
            Rule::Momentum { momentum, dampening, gamma, .. } => {
                (options.a, options.dampening, options.gamma) = (momentum, dampening, gamma);
            }
            Rule::Adam { betas, epsilon } | Rule::Lamb { betas, epsilon } => {
                ([options.a, options.b], options.epsilon) = (betas, epsilon);
            }
            Rule::Lion { betas } => [options.a, options.b] = betas,
            Rule::Lars { momentum, trust } => (options.a, options.trust) = (momentum, trust),
            Rule::Muon { momentum, .. } => options.a = momentum,
        }
        options
    }
}

/// `struct ClipOptions`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct ClipOptions {
    pub bound: f32,
    norm: i32,
    max_norm: f64,
    epsilon: f64,
}

impl ClipOptions {
    pub fn new(clip: &Clip) -> Self {
        let (norm, max_norm, epsilon) = match clip.norm {
            NormClip::Off => (0, 0.0, 0.0),
            NormClip::Global { max_norm } => (1, max_norm, 0.0),
            NormClip::Tensor { max_norm } => (2, max_norm, 0.0),
            NormClip::Adaptive { clipping, epsilon } => (3, clipping, epsilon),
        };
        ClipOptions { bound: clip.value.map_or(f32::INFINITY, |bound| bound as f32), norm, max_norm, epsilon }
    }
}

/// `struct UpdateParams`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct UpdateParams {
    pub learning_rate: f64,
    pub divisor: f64,
}

/// `struct Outcome`.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Outcome {
    pub grad_norm: f64,
    pub clip_coefficient: f64,
    pub applied: u64,
    pub clamped: u64,
    pub skipped: u32,
    pub least: u32,
}

/// `struct RuleStep`: thirteen constants.
pub(super) const RULE_STEP_WORDS: usize = 13;

/// `struct Pass`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Pass {
    pub block_groups: u64,
    pub block_tensors: u64,
    pub tensors: u64,
    pub coefficients: u64,
    pub unit_coefficients: u64,
    pub steps: u64,
    pub groups: u64,
    pub rates: u64,
    pub params: u64,
    pub outcome: u64,
    pub len: u64,
    pub seed: u64,
    pub bound: f32,
    pub zero_gradients: i32,
}

/// `struct Norm`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Norm {
    pub pieces: u64,
    pub squares: u64,
    pub clamped: u64,
    pub tensor_squares: u64,
    pub barrier: u64,
    pub clip: ClipOptions,
    pub piece_count: u32,
    pub tensor_count: u32,
    pub group_count: u32,
    pub padding: u32,
}

const _: () = {
    assert!(size_of::<Piece>() == 16);
    assert!(size_of::<Tensor>() == 40 && std::mem::offset_of!(Tensor, unit) == 24);
    assert!(size_of::<GroupOptions>() == 72 && std::mem::offset_of!(GroupOptions, rule) == 64);
    assert!(size_of::<ClipOptions>() == 24 && std::mem::offset_of!(ClipOptions, max_norm) == 8);
    assert!(size_of::<UpdateParams>() == 16);
    assert!(size_of::<Outcome>() == 40 && std::mem::offset_of!(Outcome, skipped) == 32);
    assert!(size_of::<Pass>() == 104 && std::mem::offset_of!(Pass, bound) == 96);
    assert!(size_of::<Norm>() == 80 && std::mem::offset_of!(Norm, piece_count) == 64);
};

/// Everything that is uploaded of a plan, for a process that updates some elements of the arena.
///
/// Pieces, tensors and units are all there, since sums are taken over all of them; places count from the first element that is
/// updated, modulo 2^64, as do the blocks' tables, which are of what is updated alone.
pub(super) struct Tables {
    pub pieces: Vec<Piece>,
    pub tensors: Vec<Tensor>,
    pub groups: Vec<GroupOptions>,
    pub block_groups: Vec<u8>,
    pub block_tensors: Vec<u32>,
    /// The tensor of each output unit, where the clip looks at units; else empty.
    pub unit_tensors: Vec<u32>,
    /// The pieces that are updated.
    pub own_pieces: Range<usize>,
    /// The output units that are updated.
    pub own_units: Range<usize>,
}

impl Tables {
    /// `own`: the elements that are updated, cut as [`UpdatePlan::cuts`] says.
    pub fn new(plan: &UpdatePlan, own: &Range<usize>) -> Self {
        let adaptive = matches!(plan.clip.norm, NormClip::Adaptive { .. });
        let mut tables = Tables {
            pieces: Vec::new(),
            tensors: Vec::new(),
            groups: plan.groups.iter().map(GroupOptions::new).collect(),
            block_groups: plan.block_groups[own.start / ALIGNMENT..own.end / ALIGNMENT].to_vec(),
            block_tensors: Vec::new(),
            unit_tensors: Vec::new(),
            own_pieces: 0..0,
            own_units: 0..0,
        };
        let place = |element: usize| (element as u64).wrapping_sub(own.start as u64);
        let mut block_tensors = vec![0; plan.block_groups.len()];
        for (index, tensor) in plan.tensors.iter().enumerate() {
            let unit = tensor.unit();
            let piece = plan.piece(index);
            // How many pieces or units of a length begin before an element.
            let begun = |element: usize, each: usize| {
                element.saturating_sub(tensor.offset).div_ceil(each).min(tensor.len.div_ceil(each))
            };
            let (first_piece, first_unit) = (tables.pieces.len() as u32, tables.unit_tensors.len() as u32);
            tables.own_pieces.start += begun(own.start, piece);
            tables.own_pieces.end += begun(own.end, piece);
            tables.pieces.extend((0..tensor.len).step_by(piece).map(|start| Piece {
                offset: place(tensor.offset + start),
                len: piece.min(tensor.len - start) as u32,
                tensor: index as u32,
            }));
            tables.tensors.push(Tensor {
                offset: place(tensor.offset),
                len: tensor.len as u64,
                first_piece,
                pieces: tables.pieces.len() as u32 - first_piece,
                unit: unit as u32,
                first_unit,
                group: u32::from(tensor.group),
                padding: 0,
            });
            if adaptive {
                tables.own_units.start += begun(own.start, unit);
                tables.own_units.end += begun(own.end, unit);
                let units = tables.unit_tensors.len() + tensor.len.div_ceil(unit);
                tables.unit_tensors.resize(units, index as u32);
            }
            block_tensors[tensor.offset / ALIGNMENT..(tensor.offset + tensor.len).div_ceil(ALIGNMENT)]
                .fill(index as u32);
        }
        tables.block_tensors = block_tensors[own.start / ALIGNMENT..own.end / ALIGNMENT].to_vec();
        tables
    }

    /// Bytes on the device: the tables, and the sums, coefficients and scalars of the same sizes ([`super::Prepared`]).
    pub fn device_bytes(&self) -> usize {
        let [pieces, tensors, units] = [self.pieces.len(), self.tensors.len(), self.unit_tensors.len()];
        let (double, single) = (size_of::<f64>(), size_of::<f32>());
        let of_piece = size_of::<Piece>() + 2 * double + size_of::<u32>();
        let of_tensor = size_of::<Tensor>() + double + 3 * single;
        let of_group = size_of::<GroupOptions>() + RULE_STEP_WORDS * single;
        let of_block = self.block_groups.len() + size_of_val(self.block_tensors.as_slice());
        let scalars = size_of::<UpdateParams>() + size_of::<Outcome>() + size_of::<u32>();
        let of_unit = size_of::<u32>() + single;
        pieces * of_piece + tensors * of_tensor + self.groups.len() * of_group + units * of_unit + of_block + scalars
    }
}
