//! A warp, and the loop that executes its instructions.

mod execute;

pub(super) use execute::all_lanes;

use super::access::Flight;
use super::trace::Knowledge;
use super::{BarrierState, Block, Found, Run};
use crate::fault::FaultKind;
use crate::ptx::{Combine, Kernel, Lanes, Op};

/// A copy to shared memory that was asked for and is not done: lane by lane.
pub(crate) struct PendingCopy {
    pub to: u64,
    pub lane: u8,
    pub data: [u8; 16],
    pub bytes: u8,
}

pub(crate) struct Warp {
    pub index: u32,
    pub threads: u32,
    pub registers: Vec<Lanes>,
    pub predicates: Vec<u32>,
    /// Lanes that have not left the kernel.
    pub live: u32,
    /// The group that runs: its place and its lanes.
    pub pc: u32,
    pub mask: u32,
    /// Groups that wait for it further on.
    others: Vec<(u32, u32)>,
    carry: u32,
    pub waiting: Option<u8>,
    /// What to do with the result of a barrier that reduces.
    reduction: Option<(Combine, Result<u32, u32>)>,
    pub local: Vec<u8>,
    pub local_written: Vec<u8>,
    /// What of others' accesses comes before its own.
    pub knows: Knowledge,
    pub copies: Vec<PendingCopy>,
    pub groups: std::collections::VecDeque<Vec<PendingCopy>>,
    pub flight: Flight,
}

pub(crate) enum Status {
    /// More to do.
    Running,
    Waiting(u8),
    Done,
}

/// What an instruction leads to.
enum Next {
    On,
    Wait(u8),
    Left,
}

impl Warp {
    pub fn new(kernel: &Kernel, index: u32, threads: u32) -> Self {
        Warp {
            index,
            threads,
            registers: vec![[0; 32]; kernel.registers],
            predicates: vec![0; kernel.predicates],
            live: 0,
            pc: 0,
            mask: 0,
            others: Vec::new(),
            carry: 0,
            waiting: None,
            reduction: None,
            local: vec![0; kernel.local * 32],
            local_written: vec![0; kernel.local * 32],
            knows: Knowledge::default(),
            copies: Vec::new(),
            groups: std::collections::VecDeque::new(),
            flight: Flight::new(if kernel.in_groups { kernel.registers } else { 0 }),
        }
    }

    /// Back to the first instruction, for the next block, which starts at `clock`.
    pub fn restart(&mut self, clock: u32) {
        self.knows.begin(clock);
        let lanes = (self.threads - self.index * 32).min(32);
        self.live = if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 };
        self.mask = self.live;
        self.pc = 0;
        self.others.clear();
        self.waiting = None;
        self.reduction = None;
        self.copies.clear();
        self.groups.clear();
        self.flight.restart();
        self.local_written.fill(0);
    }

    /// Hands the result of a barrier that reduces to every lane.
    pub fn finish_reduction(&mut self, state: &BarrierState) {
        let Some((with, target)) = self.reduction.take() else { return };
        let holds = match with {
            Combine::And => state.all,
            _ => state.any,
        };
        match target {
            Ok(predicate) => self.predicates[predicate as usize] = if holds { u32::MAX } else { 0 },
            Err(register) => self.registers[register as usize] = [u64::from(state.count); 32],
        }
    }

    pub fn write(&mut self, register: u32, mask: u32, values: &Lanes) {
        let target = &mut self.registers[register as usize];
        if mask == u32::MAX {
            *target = *values;
            return;
        }
        for (lane, slot) in target.iter_mut().enumerate() {
            if mask >> lane & 1 == 1 {
                *slot = values[lane];
            }
        }
    }

    fn write_pred(&mut self, predicate: u32, mask: u32, values: u32) {
        let target = &mut self.predicates[predicate as usize];
        *target = *target & !mask | values & mask;
    }

    pub fn pred(&self, pred: crate::ptx::Pred) -> u32 {
        let values = self.predicates[pred.index as usize];
        if pred.negated { !values } else { values }
    }

    /// Picks the group that stands furthest back, joined with all that stand where it does.
    fn regroup(&mut self) {
        if self.mask != 0 {
            self.others.push((self.pc, self.mask));
        }
        let Some(first) = self.others.iter().map(|&(pc, _)| pc).min() else { return };
        (self.pc, self.mask) = (first, 0);
        let mask = &mut self.mask;
        self.others.retain(|&(pc, lanes)| {
            if pc == first {
                *mask |= lanes;
            }
            pc != first
        });
    }

    fn split(&mut self, active: u32, to: u32) {
        let rest = self.mask & !active;
        if active != 0 && rest != 0 {
            self.others.push((to, active));
            self.mask = rest;
            self.pc += 1;
        } else {
            self.pc = if active != 0 { to } else { self.pc + 1 };
        }
    }
}

pub(crate) fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (lane < 32).then_some(lane as usize)
    })
}

impl Run<'_> {
    /// Runs a warp until it waits, ends, or has executed `quantum` instructions.
    pub(super) fn run_warp(&mut self, block: &mut Block, warp: &mut Warp, quantum: u64) -> Result<Status, Found> {
        let kernel = self.kernel;
        let mut left = quantum;
        while left > 0 {
            left -= 1;
            let at = warp.pc as usize;
            let instruction = &kernel.code[at];
            let active = match instruction.guard {
                Some(guard) => warp.mask & warp.pred(guard),
                None => warp.mask,
            };
            let executed = u64::from(active.count_ones());
            self.counts.instructions[instruction.class as usize] += executed;
            self.instructions += 1;
            if self.instructions > self.launch.checks.instructions {
                let kind = FaultKind::Endless { instructions: self.instructions };
                return Err(found(kind, block, warp, 0, at));
            }
            if let Op::Branch { to } = instruction.op {
                warp.split(active, to);
                if !warp.others.is_empty() {
                    warp.regroup();
                }
                continue;
            }
            if let Op::BranchIndexed { targets, a } = &instruction.op {
                let index = warp.registers[*a as usize];
                for i in lanes(active) {
                    let Some(&to) = targets.get(index[i] as usize) else {
                        let kind = FaultKind::BranchTable { index: index[i], length: targets.len() as u64 };
                        return Err(found(kind, block, warp, i, at));
                    };
                    warp.others.push((to, 1 << i));
                }
                warp.mask &= !active;
                warp.pc += 1;
                warp.regroup();
                continue;
            }
            let mut next = Next::On;
            if active != 0 {
                let mut lane = active.trailing_zeros() as usize;
                if kernel.in_groups {
                    warp.flight.access(instruction).map_err(|kind| found(kind, block, warp, lane, at))?;
                }
                next = self
                    .execute(block, warp, active, at, &mut lane)
                    .map_err(|kind| found(*kind, block, warp, lane, at))?;
            }
            warp.pc += 1;
            if let Next::Left = next {
                warp.live &= !active;
                warp.mask &= !active;
                if warp.live == 0 {
                    return Ok(Status::Done);
                }
            }
            if !warp.others.is_empty() {
                warp.regroup();
            }
            if let Next::Wait(number) = next {
                return Ok(Status::Waiting(number));
            }
        }
        Ok(Status::Running)
    }
}

fn found(kind: FaultKind, block: &Block, warp: &Warp, lane: usize, at: usize) -> Found {
    Found { kind, block: block.coordinates, thread: warp.index * 32 + lane as u32, instruction: at }
}
