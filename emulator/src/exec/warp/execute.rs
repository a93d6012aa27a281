//! What each instruction does to a warp.

use super::{Next, Warp, lanes};
use crate::exec::access::groups::together;
use crate::exec::access::{self, publish};
use crate::exec::{Block, Run, matrix};
use crate::fault::FaultKind;
use crate::ptx::{Combine, Lanes, Op, Shuffle, Vote, insert_bits};

impl Run<'_> {
    pub(super) fn execute(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        active: u32,
        at: usize,
        lane: &mut usize,
    ) -> Result<Next, Box<FaultKind>> {
        let kernel = self.kernel;
        let op = &kernel.code[at].op;
        if active == u32::MAX && whole_warp(warp, op) {
            return Ok(Next::On);
        }
        let mut out: Lanes = [0; 32];
        match op {
            Op::Map1 { f, d, a } => {
                f(&warp.registers[*a as usize], &mut out);
                warp.write(*d, active, &out);
            }
            Op::Map2 { f, d, a, b } => {
                f(&warp.registers[*a as usize], &warp.registers[*b as usize], &mut out);
                warp.write(*d, active, &out);
            }
            Op::Map3 { f, d, a, b, c } => {
                let [a, b, c] = [a, b, c].map(|&register| &warp.registers[register as usize]);
                f(a, b, c, &mut out);
                warp.write(*d, active, &out);
            }
            Op::Convert { conversion, d, a } => {
                let a = &warp.registers[*a as usize];
                out = std::array::from_fn(|lane| conversion.run(a[lane]));
                warp.write(*d, active, &out);
            }
            Op::Logic3 { table, mask, d, a, b, c } => {
                let [a, b, c] = [a, b, c].map(|&register| &warp.registers[register as usize]);
                out = std::array::from_fn(|i| logic(*table, a[i], b[i], c[i]) & mask);
                warp.write(*d, active, &out);
            }
            Op::Insert { wide, d, a, b, start, length } => {
                let [a, b, start, length] = [a, b, start, length].map(|&register| &warp.registers[register as usize]);
                out = std::array::from_fn(|i| insert_bits(*wide, a[i], b[i], start[i], length[i]));
                warp.write(*d, active, &out);
            }
            Op::Compare { f, d, opposite, a, b, combine } => {
                let holds = f(&warp.registers[*a as usize], &warp.registers[*b as usize]);
                let with = |holds: u32| match combine {
                    Some((with, pred)) => joined(*with, holds, warp.pred(*pred)),
                    None => holds,
                };
                let (first, second) = (with(holds), with(!holds));
                warp.write_pred(*d, active, first);
                if let Some(opposite) = opposite {
                    warp.write_pred(*opposite, active, second);
                }
            }
            Op::SetValue { f, value, d, a, b, combine } => {
                let mut holds = f(&warp.registers[*a as usize], &warp.registers[*b as usize]);
                if let Some((with, pred)) = combine {
                    holds = joined(*with, holds, warp.pred(*pred));
                }
                out = std::array::from_fn(|lane| if holds >> lane & 1 == 1 { *value } else { 0 });
                warp.write(*d, active, &out);
            }
            Op::Select { d, a, b, by } => {
                let holds = warp.pred(*by);
                let (a, b) = (&warp.registers[*a as usize], &warp.registers[*b as usize]);
                out = std::array::from_fn(|lane| if holds >> lane & 1 == 1 { a[lane] } else { b[lane] });
                warp.write(*d, active, &out);
            }
            Op::PredLogic { with, d, a, b } => {
                let value = joined(*with, warp.pred(*a), warp.pred(*b));
                warp.write_pred(*d, active, value);
            }
            Op::PredMove { d, a } => {
                let value = warp.pred(*a);
                warp.write_pred(*d, active, value);
            }
            Op::Unpack { bits, d, a } => {
                let source = warp.registers[*a as usize];
                let mask = if *bits == 64 { u64::MAX } else { (1 << bits) - 1 };
                for (i, d) in d.iter().enumerate() {
                    if let Some(d) = d {
                        out = std::array::from_fn(|lane| source[lane] >> (usize::from(*bits) * i) & mask);
                        warp.write(*d, active, &out);
                    }
                }
            }
            Op::Pack { bits, d, a } => {
                for (i, a) in a.iter().enumerate() {
                    let a = &warp.registers[*a as usize];
                    for lane in 0..32 {
                        out[lane] |= a[lane] << (usize::from(*bits) * i);
                    }
                }
                warp.write(*d, active, &out);
            }
            Op::AddCarry { d, a, b, bits, subtract, carry_in, carry_out } => {
                let (a, b) = (warp.registers[*a as usize], warp.registers[*b as usize]);
                let mut carries = 0;
                for i in 0..32 {
                    let carried = u128::from(*carry_in && warp.carry >> i & 1 == 1);
                    let (a, b) = (u128::from(a[i]), u128::from(b[i]));
                    let sum = if *subtract { a.wrapping_sub(b).wrapping_sub(carried) } else { a + b + carried };
                    carries |= u32::from(sum >> bits & 1 == 1) << i;
                    out[i] = (sum & ((1 << bits) - 1)) as u64;
                }
                warp.set_carry(*carry_out, carries, active);
                warp.write(*d, active, &out);
            }
            Op::MulAddCarry { d, a, b, c, bits, high, carry_in, carry_out } => {
                let [a, b, c] = [a, b, c].map(|&register| warp.registers[register as usize]);
                let mut carries = 0;
                for i in 0..32 {
                    let product = u128::from(a[i]) * u128::from(b[i]);
                    let part = if *high { product >> bits } else { product & ((1 << bits) - 1) };
                    let sum = part + u128::from(c[i]) + u128::from(*carry_in && warp.carry >> i & 1 == 1);
                    carries |= u32::from(sum >> bits & 1 == 1) << i;
                    out[i] = (sum & ((1 << bits) - 1)) as u64;
                }
                warp.set_carry(*carry_out, carries, active);
                warp.write(*d, active, &out);
            }
            Op::Clock { d, bits } => {
                let now = if *bits == 64 { self.instructions } else { self.instructions & 0xffff_ffff };
                warp.write(*d, active, &[now; 32]);
            }
            Op::Load { .. } => self.load(block, warp, active, at, lane)?,
            Op::Store { .. } => self.store(block, warp, active, at, lane)?,
            Op::Atomic { .. } => self.atomic(block, warp, active, at, lane)?,
            Op::CopyAsync { .. } => self.copy_async(block, warp, active, at, lane)?,
            Op::CopyCommit => {
                let group = std::mem::take(&mut warp.copies);
                warp.groups.push_back(group);
            }
            Op::CopyWait { but } => self.finish_copies(block, warp, *but as usize, lane)?,
            Op::LoadMatrix { .. } => self.load_matrix(block, warp, active, at, lane)?,
            Op::Matrix { matrix, d, a, b, c } => {
                all_lanes(active, "mma", lane)?;
                matrix::multiply(warp, *matrix, d, a, b, c);
                self.trace.lanes_meet(&mut warp.knows, active);
            }
            Op::GroupMatrix { .. } => self.group_matrix(block, warp, active, at, lane)?,
            Op::GroupFence => {
                together(warp, active, at, "wgmma.fence", lane)?;
                warp.flight.fence();
            }
            Op::GroupCommit => {
                together(warp, active, at, "wgmma.commit_group", lane)?;
                warp.flight.commit();
            }
            Op::GroupWait { but } => {
                together(warp, active, at, "wgmma.wait_group", lane)?;
                self.wait_group(block, warp, *but as usize, lane)?;
            }
            Op::ProxyFence => publish(block, warp.index, active),
            Op::MoveMatrix { d, a } => {
                all_lanes(active, "movmatrix", lane)?;
                out = matrix::transpose(&warp.registers[*a as usize]);
                warp.write(*d, active, &out);
                self.trace.lanes_meet(&mut warp.knows, active);
            }
            Op::IsSpace { d, a, space } => {
                let a = &warp.registers[*a as usize];
                let values =
                    (0..32).fold(0, |mask, lane| mask | u32::from(access::space_of(a[lane]) == *space) << lane);
                warp.write_pred(*d, active, values);
            }
            Op::Shuffle { .. } => {
                shuffle(warp, active, op, lane)?;
                self.trace.lanes_meet(&mut warp.knows, active);
            }
            Op::WarpBarrier { members } => {
                let members = warp.registers[*members as usize][*lane] as u32;
                self.trace.lanes_meet(&mut warp.knows, active & members);
            }
            Op::Vote { kind, d, value, members } => {
                let members = self.members(warp, active, *members, "vote", lane)?;
                let (holds, among) = (warp.pred(*value) & active, members);
                let answer = match kind {
                    Vote::All => holds & among == among,
                    Vote::Any => holds & among != 0,
                    Vote::Uniform => holds & among == among || holds & among == 0,
                    Vote::Ballot => {
                        warp.write(*d, active, &[u64::from(holds & among); 32]);
                        return Ok(Next::On);
                    }
                };
                warp.write_pred(*d, active, if answer { u32::MAX } else { 0 });
            }
            Op::Match { all, d, present, a, members } => {
                let members = self.members(warp, active, *members, "match", lane)?;
                let a = warp.registers[*a as usize];
                let same =
                    |lane: usize| lanes(members).filter(|&other| a[other] == a[lane]).fold(0, |m, l| m | 1u32 << l);
                let first = same(*lane);
                out = std::array::from_fn(|lane| {
                    u64::from(if *all { if first == members { members } else { 0 } } else { same(lane) })
                });
                if let Some(d) = d {
                    warp.write(*d, active, &out);
                }
                if let Some(present) = present {
                    warp.write_pred(*present, active, if first == members { u32::MAX } else { 0 });
                }
            }
            Op::ActiveMask { d } => warp.write(*d, active, &[u64::from(active); 32]),
            Op::Reduce { f, d, a, members } => {
                let members = self.members(warp, active, *members, "redux", lane)?;
                let a = &warp.registers[*a as usize];
                let total = lanes(members).map(|lane| a[lane]).reduce(f).unwrap_or_default();
                warp.write(*d, active, &[total; 32]);
            }
            Op::Barrier { .. } => return self.barrier(block, warp, active, at, lane),
            Op::Fence { within } => self.trace.fence(*within, (block.number, warp.index), &mut warp.knows),
            Op::Nothing | Op::Branch { .. } | Op::BranchIndexed { .. } => {}
            Op::Exit => return Ok(Next::Left),
            Op::Trap => return Err(FaultKind::Trap.into()),
        }
        Ok(Next::On)
    }

    /// The lanes that take part in an instruction of the warp, who meet by it.
    fn members(
        &mut self,
        warp: &mut Warp,
        active: u32,
        members: u32,
        instruction: &'static str,
        lane: &mut usize,
    ) -> Result<u32, Box<FaultKind>> {
        let members = warp.registers[members as usize][*lane] as u32;
        if let Some(absent) = lanes(members & warp.live & !active).next() {
            return Err(FaultKind::AbsentLane { instruction, lane: absent as u32 }.into());
        }
        self.trace.lanes_meet(&mut warp.knows, active & members);
        Ok(active & members)
    }

    fn barrier(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        active: u32,
        at: usize,
        lane: &mut usize,
    ) -> Result<Next, Box<FaultKind>> {
        let Op::Barrier { number, threads, arrive, reduce } = &self.kernel.code[at].op else { return Ok(Next::On) };
        let number = warp.registers[*number as usize][*lane] as usize;
        let whole: u32 = self.launch.block.iter().product();
        let expected = threads.map_or(whole, |threads| warp.registers[threads as usize][*lane] as u32);
        if number >= block.barriers.len() {
            let message = format!("barrier {number} of {}", block.barriers.len());
            return Err(FaultKind::Launch(message).into());
        }
        let state = &mut block.barriers[number];
        if active != warp.live {
            *lane = (warp.live & !active).trailing_zeros() as usize;
            return Err(FaultKind::DivergentBarrier {
                barrier: number as u32,
                arrived: active.count_ones(),
                expected: warp.live.count_ones(),
                reason: "the others of its warp went another way",
            }
            .into());
        }
        if let Some((with, value, target)) = reduce {
            let holds = warp.pred(*value) & active;
            state.all = (state.arrived == 0 || state.all) && holds == active;
            state.any |= holds != 0;
            state.count += holds.count_ones();
            warp.reduction = Some((*with, *target));
        }
        let clock = self.trace.tick();
        state.knows.get_or_insert_default().gather(&warp.knows, warp.index, clock);
        // A warp counts whole where a number of threads is asked for.
        state.arrived += if threads.is_some() { 32 } else { active.count_ones() };
        state.expected = expected;
        Ok(if *arrive { Next::On } else { Next::Wait(number as u8) })
    }
}

/// An instruction that the whole warp executes together; without a lane, a fault of that lane.
pub(in crate::exec) fn all_lanes(active: u32, instruction: &'static str, lane: &mut usize) -> Result<(), FaultKind> {
    if active == u32::MAX {
        return Ok(());
    }
    *lane = (!active).trailing_zeros() as usize;
    Err(FaultKind::AbsentLane { instruction, lane: *lane as u32 })
}

impl Warp {
    fn set_carry(&mut self, wanted: bool, carries: u32, active: u32) {
        if wanted {
            self.carry = self.carry & !active | carries & active;
        }
    }
}

/// Instructions of arithmetic that all lanes execute, whose target is none of their operands, write where the result belongs.
fn whole_warp(warp: &mut Warp, op: &Op) -> bool {
    let at = |register: &u32| *register as usize;
    match op {
        Op::Map1 { f, d, a } => match warp.registers.get_disjoint_mut([at(d), at(a)]) {
            Ok([d, a]) => f(a, d),
            Err(_) => return false,
        },
        Op::Map2 { f, d, a, b } => match warp.registers.get_disjoint_mut([at(d), at(a), at(b)]) {
            Ok([d, a, b]) => f(a, b, d),
            Err(_) => return false,
        },
        Op::Map3 { f, d, a, b, c } => match warp.registers.get_disjoint_mut([at(d), at(a), at(b), at(c)]) {
            Ok([d, a, b, c]) => f(a, b, c, d),
            Err(_) => return false,
        },
        _ => return false,
    }
    true
}

fn joined(with: Combine, a: u32, b: u32) -> u32 {
    match with {
        Combine::And => a & b,
        Combine::Or => a | b,
        Combine::Xor => a ^ b,
    }
}

fn shuffle(warp: &mut Warp, active: u32, op: &Op, lane: &mut usize) -> Result<(), Box<FaultKind>> {
    let Op::Shuffle { kind, d, present, a, b, c, members } = op else { return Ok(()) };
    let [values, b, c, members] = [a, b, c, members].map(|&register| warp.registers[register as usize]);
    let mut out: Lanes = [0; 32];
    let mut inside = 0;
    for i in lanes(active) {
        *lane = i;
        let me = i as i64;
        let (by, clamp, segment) = ((b[i] & 31) as i64, (c[i] & 31) as i64, (c[i] >> 8 & 31) as i64);
        let (most, least) = (me & segment | clamp & !segment, me & segment);
        let (from, holds) = match kind {
            Shuffle::Up => (me - by, me - by >= most),
            Shuffle::Down => (me + by, me + by <= most),
            Shuffle::Butterfly => (me ^ by, me ^ by <= most),
            Shuffle::Index => (least | by & !segment, (least | by & !segment) <= most),
        };
        let from = if holds { from } else { me } as usize;
        if active >> from & 1 == 0 || members[i] >> from & 1 == 0 {
            return Err(FaultKind::AbsentLane { instruction: "shfl", lane: from as u32 }.into());
        }
        inside |= u32::from(holds) << i;
        out[i] = values[from];
    }
    warp.write(*d, active, &out);
    if let Some(present) = present {
        warp.write_pred(*present, active, inside);
    }
    Ok(())
}

/// `table`'s function of three bits, over whole words.
fn logic(table: u8, a: u64, b: u64, c: u64) -> u64 {
    let pick = |bit: u8, value: u64| if table >> bit & 1 == 1 { value } else { 0 };
    let (na, nb, nc) = (!a, !b, !c);
    pick(0, na & nb & nc)
        | pick(1, na & nb & c)
        | pick(2, na & b & nc)
        | pick(3, na & b & c)
        | pick(4, a & nb & nc)
        | pick(5, a & nb & c)
        | pick(6, a & b & nc)
        | pick(7, a & b & c)
}
