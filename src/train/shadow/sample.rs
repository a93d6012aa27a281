//! Which parts of an arena are looked at.

use crate::optim::{NormClip, Rule, UpdatePlan};
use crate::plan::ALIGNMENT;
use crate::random::{Philox, Purpose};

/// Blocks of the arena that are drawn for a replay.
const DRAWS: u64 = 96;
/// Tensors at most that are looked at whole, where their rule needs that: copies and products cost what they cost.
const WHOLE: usize = 4;

/// A part of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Part {
    /// Number of the tensor in the plan.
    pub tensor: usize,
    /// First element in the arena.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
}

/// The parts of an update's replay, by seed and number of the update: half of the draws take any tensor, so that small ones are seen
/// as often as large ones, the other half any element. Small arenas are looked at whole.
pub(super) fn draw(plan: &UpdatePlan, seed: u64, step: u64) -> Vec<Part> {
    let words = Philox::new(seed, Purpose::Shadow, step as u32);
    let present: Vec<usize> = (0..plan.tensors.len()).filter(|&t| plan.tensors[t].len > 0).collect();
    let blocks = |tensor: usize| plan.tensors[tensor].len.div_ceil(ALIGNMENT) as u64;
    let all: u64 = present.iter().map(|&tensor| blocks(tensor)).sum();
    let mut drawn: Vec<(usize, u64)> = Vec::new();
    if all <= DRAWS {
        drawn.extend(present.iter().flat_map(|&tensor| (0..blocks(tensor)).map(move |block| (tensor, block))));
    } else {
        for i in 0..DRAWS {
            if i % 2 == 0 {
                let tensor = present[words.below(2 * i, present.len() as u64) as usize];
                drawn.push((tensor, words.below(2 * i + 1, blocks(tensor))));
            } else {
                let mut at = words.below(2 * i, all);
                for &tensor in &present {
                    if at < blocks(tensor) {
                        drawn.push((tensor, at));
                        break;
                    }
                    at -= blocks(tensor);
                }
            }
        }
    }
    let mut whole: Vec<usize> = Vec::new();
    let mut parts: Vec<Part> = Vec::new();
    for (index, block) in drawn {
        let tensor = &plan.tensors[index];
        let rule = plan.groups[usize::from(tensor.group)].rule;
        if matches!(rule, Rule::Lars { .. } | Rule::Lamb { .. } | Rule::Muon { .. }) {
            if !whole.contains(&index) && whole.len() < WHOLE {
                whole.push(index);
                parts.push(Part { tensor: index, start: tensor.offset, len: tensor.len });
            }
            continue;
        }
        let first = block as usize * ALIGNMENT;
        // A whole number of units, where a clip looks at units.
        let unit = if matches!(plan.clip.norm, NormClip::Adaptive { .. }) { tensor.unit() } else { 1 };
        let from = first / unit * unit;
        let to = (first + ALIGNMENT).min(tensor.len).next_multiple_of(unit).min(tensor.len);
        parts.push(Part { tensor: index, start: tensor.offset + from, len: to - from });
    }
    parts.sort_unstable();
    parts.dedup();
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::{Clip, OptimizerOptions};
    use crate::plan::{ParamLayout, ParamSpec};

    fn plan(rule: Rule, clip: NormClip) -> UpdatePlan {
        let shapes: [(&str, &[usize]); 4] =
            [("large.weight", &[300, 210]), ("small", &[7]), ("none", &[0]), ("b", &[130])];
        let specs: Vec<_> =
            shapes.iter().map(|&(name, shape)| ParamSpec { name: name.into(), shape: shape.into() }).collect();
        let mut options = OptimizerOptions::new(rule, 0.1);
        options.clip = Clip { value: None, norm: clip };
        UpdatePlan::new(&options, &ParamLayout::new(&specs).unwrap()).unwrap()
    }

    #[test]
    fn every_tensor_and_in_time_every_block_is_looked_at() {
        let plan = plan(Rule::Sgd, NormClip::Off);
        let mut seen = std::collections::BTreeSet::new();
        for step in 1..100 {
            let parts = draw(&plan, 5, step);
            assert_eq!(parts, draw(&plan, 5, step));
            for tensor in [0, 1, 3] {
                assert!(parts.iter().any(|part| part.tensor == tensor), "step {step} has nothing of tensor {tensor}");
            }
            seen.extend(parts.iter().map(|part| (part.start, part.len)));
        }
        assert_eq!(seen.len(), (300 * 210usize).div_ceil(128) + 1 + 2, "blocks seen of all");
    }

    #[test]
    fn parts_are_whole_units_or_whole_tensors_where_a_clip_or_a_rule_needs_that() {
        let adaptive = NormClip::Adaptive { clipping: 0.1, epsilon: 1e-3 };
        for part in draw(&plan(Rule::Sgd, adaptive), 5, 1) {
            if part.tensor == 0 {
                assert_eq!((part.start % 210, part.len % 210), (0, 0));
            }
        }
        for part in draw(&plan(Rule::Lars { momentum: 0.9, trust: 0.1 }, adaptive), 5, 1) {
            assert_eq!(part.len, [300 * 210, 7, 0, 130][part.tensor]);
        }
    }
}
