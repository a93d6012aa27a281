//! Instructions against their definitions in NVIDIA's PTX ISA, edge values included.

use std::sync::Arc;

use warpstep_emulator::counts::Counts;
use warpstep_emulator::exec::{Checks, Launch, launch};
use warpstep_emulator::memory::Memory;
use warpstep_emulator::ptx::Module;

/// Where a result stands.
#[derive(Clone, Copy, Debug)]
enum Kind {
    R32,
    R64,
    F32,
    F64,
    H16,
    Pred,
}
use Kind::{F32, F64, H16, Pred, R32, R64};

/// Runs `body` once for each three operands, a lane each. Operands are `%x1`, `%x2`, `%x3`, the result `%x0`, with x one of r (32
/// bits), rd (64), f, d, h (16) and p.
fn run(body: &str, result: Kind, operands: &[[u64; 3]]) -> Vec<u64> {
    let finish = match result {
        R32 => "cvt.u64.u32 %rd0, %r0;",
        R64 => "",
        F32 => "mov.b32 %r0, %f0; cvt.u64.u32 %rd0, %r0;",
        F64 => "mov.b64 %rd0, %d0;",
        H16 => "cvt.u64.u16 %rd0, %h0;",
        Pred => "selp.u64 %rd0, 1, 0, %p0;",
    };
    let operand = |i: usize| {
        format!(
            "ld.global.u64 %rd{i}, [%rd12+{}]; cvt.u32.u64 %r{i}, %rd{i}; mov.b32 %f{i}, %r{i}; mov.b64 %d{i}, %rd{i};
             cvt.u16.u64 %h{i}, %rd{i}; setp.ne.u64 %p{i}, %rd{i}, 0;\n",
            8 * (i - 1)
        )
    };
    let ptx = format!(
        ".version 9.0\n.target sm_80\n.address_size 64\n.visible .entry test(.param .u64 from, .param .u64 to)\n{{
         .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %rd<16>; .reg .f32 %f<8>; .reg .f64 %d<8>;
         .reg .b128 %q<2>;
         ld.param.u64 %rd10, [from]; ld.param.u64 %rd11, [to]; mov.u32 %r10, %tid.x;
         mad.wide.u32 %rd12, %r10, 24, %rd10; mad.wide.u32 %rd11, %r10, 8, %rd11;
         {}{}{}{body}\n{finish}\nst.global.u64 [%rd11], %rd0;\nret;\n}}",
        operand(1),
        operand(2),
        operand(3)
    );
    let module = Arc::new(Module::parse(&ptx).unwrap_or_else(|error| panic!("{error}\n{ptx}")));
    let memory = Memory::new(1 << 20);
    let loaded = module.instantiate(&memory, 0).unwrap();
    let bytes: Vec<u8> = operands.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
    let from = memory.allocate(0, bytes.len()).unwrap();
    let to = memory.allocate(0, operands.len() * 8).unwrap();
    memory.copy_in(from, &bytes).unwrap();
    let params: Vec<u8> = [from, to].iter().flat_map(|x| x.to_le_bytes()).collect();
    let launched = Launch {
        grid: [1, 1, 1],
        block: [operands.len() as u32, 1, 1],
        dynamic_shared: 0,
        params: &params,
        cooperative: false,
        checks: Checks::default(),
    };
    launch(&loaded, "test", &launched, &memory, &mut Counts::default())
        .unwrap_or_else(|fault| panic!("{body}: {fault}"));
    let mut out = vec![0; operands.len() * 8];
    memory.copy_out(to, &mut out).unwrap();
    out.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect()
}

fn check(body: &str, result: Kind, cases: &[([u64; 3], u64)]) {
    let operands: Vec<[u64; 3]> = cases.iter().map(|case| case.0).collect();
    for (found, (operands, expected)) in run(body, result, &operands).into_iter().zip(cases) {
        assert_eq!(found, *expected, "{body} of {operands:x?}: {found:#x} for {expected:#x}");
    }
}

fn f(x: f32) -> u64 {
    u64::from(x.to_bits())
}

fn d(x: f64) -> u64 {
    x.to_bits()
}

const NAN: u64 = 0x7fff_ffff;

#[test]
fn whole_numbers_wrap_and_divide() {
    check("add.s32 %r0, %r1, %r2;", R32, &[([0x7fff_ffff, 1, 0], 0x8000_0000), ([0xffff_ffff, 1, 0], 0)]);
    check("add.sat.s32 %r0, %r1, %r2;", R32, &[([0x7fff_ffff, 1, 0], 0x7fff_ffff)]);
    check("sub.u64 %rd0, %rd1, %rd2;", R64, &[([0, 1, 0], u64::MAX)]);
    check("mul.hi.s32 %r0, %r1, %r2;", R32, &[([0xffff_ffff, 2, 0], 0xffff_ffff), ([1 << 30, 8, 0], 2)]);
    check("mul.hi.u64 %rd0, %rd1, %rd2;", R64, &[([u64::MAX, u64::MAX, 0], u64::MAX - 1)]);
    check("mul.wide.s32 %rd0, %r1, %r2;", R64, &[([0xffff_ffff, 3, 0], -3i64 as u64)]);
    check("mad.lo.s32 %r0, %r1, %r2, %r3;", R32, &[([7, 6, 0xffff_ffff], 41)]);
    check("mad.wide.u32 %rd0, %r1, %r2, %rd3;", R64, &[([0xffff_ffff, 2, 5], 0x2_0000_0003)]);
    check("div.s32 %r0, %r1, %r2;", R32, &[([-7i32 as u32 as u64, 2, 0], -3i32 as u32 as u64)]);
    check("rem.s32 %r0, %r1, %r2;", R32, &[([-7i32 as u32 as u64, 2, 0], -1i32 as u32 as u64)]);
    check("div.u64 %rd0, %rd1, %rd2;", R64, &[([u64::MAX, 10, 0], u64::MAX / 10)]);
    check("min.s32 %r0, %r1, %r2;", R32, &[([0xffff_ffff, 1, 0], 0xffff_ffff)]);
    check("min.u32 %r0, %r1, %r2;", R32, &[([0xffff_ffff, 1, 0], 1)]);
    check("abs.s32 %r0, %r1;", R32, &[([-5i32 as u32 as u64, 0, 0], 5)]);
    check("add.cc.u32 %r0, %r1, %r2; addc.u32 %r0, %r3, 0;", R32, &[([u64::from(u32::MAX), 1, 5], 6), ([1, 1, 5], 5)]);
    check("sub.cc.u32 %r0, %r1, %r2; subc.u32 %r0, %r3, 0;", R32, &[([0, 1, 5], 4), ([1, 1, 5], 5)]);
}

#[test]
fn bits_move_as_the_document_says() {
    check("shl.b32 %r0, %r1, %r2;", R32, &[([1, 31, 0], 1 << 31), ([1, 32, 0], 0), ([1, 100, 0], 0)]);
    check("shr.s32 %r0, %r1, %r2;", R32, &[([0x8000_0000, 40, 0], 0xffff_ffff), ([0x4000_0000, 30, 0], 1)]);
    check("shr.u64 %rd0, %rd1, %r2;", R64, &[([u64::MAX, 63, 0], 1), ([u64::MAX, 64, 0], 0)]);
    check("shf.l.wrap.b32 %r0, %r1, %r2, %r3;", R32, &[([0x8000_0000, 1, 1], 3), ([5, 7, 32], 7)]);
    check("shf.r.clamp.b32 %r0, %r1, %r2, %r3;", R32, &[([0x10, 0xf, 4], 0xf000_0001), ([1, 7, 40], 7)]);
    check("bfe.s32 %r0, %r1, %r2, %r3;", R32, &[([0xf0, 4, 4], 0xffff_ffff), ([0x70, 4, 4], 7), ([1, 0, 0], 0)]);
    check("bfe.u32 %r0, %r1, %r2, %r3;", R32, &[([0xabcd, 4, 8], 0xbc), ([0xffff_ffff, 28, 8], 0xf)]);
    check("bfi.b32 %r0, %r1, %r2, 8, 8;", R32, &[([0xab, 0xffff_ffff, 0], 0xffff_abff)]);
    check(
        "prmt.b32 %r0, %r1, %r2, %r3;",
        R32,
        &[([0x3322_1100, 0x7766_5544, 0x5140], 0x5511_4400), ([0x0000_0080, 0, 0x8888], 0xffff_ffff)],
    );
    check("lop3.b32 %r0, %r1, %r2, %r3, 0xe8;", R32, &[([0b1100, 0b1010, 0b1001], 0b1000)]);
    check("popc.b64 %r0, %rd1;", R32, &[([u64::MAX, 0, 0], 64)]);
    check("clz.b32 %r0, %r1;", R32, &[([0, 0, 0], 32), ([1, 0, 0], 31)]);
    check("brev.b32 %r0, %r1;", R32, &[([1, 0, 0], 1 << 31)]);
    check("bfind.u32 %r0, %r1;", R32, &[([0, 0, 0], 0xffff_ffff), ([0x80, 0, 0], 7)]);
    check("bfind.s32 %r0, %r1;", R32, &[([0xffff_ffff, 0, 0], 0xffff_ffff), ([0xffff_ff00, 0, 0], 7)]);
    check("mov.b64 {%r0, _}, %rd1;", R32, &[([0x1234_5678_9abc_def0, 0, 0], 0x9abc_def0)]);
    check("mov.b64 %rd0, {%r1, %r2};", R64, &[([1, 2, 0], 0x2_0000_0001)]);
    check("selp.b32 %r0, %r1, %r2, %p3;", R32, &[([1, 2, 1], 1), ([1, 2, 0], 2)]);
}

#[test]
fn floats_round_once_and_their_roundings_differ() {
    let (third, tiny) = (1.0f32 / 3.0, f32::from_bits(1));
    check(
        "add.rn.f32 %f0, %f1, %f2;",
        F32,
        &[
            ([f(16_777_216.0), f(1.0), 0], f(16_777_216.0)),
            ([f(f32::INFINITY), f(f32::NEG_INFINITY), 0], NAN),
            ([f(tiny), f(tiny), 0], f(f32::from_bits(2))),
        ],
    );
    check("add.rp.f32 %f0, %f1, %f2;", F32, &[([f(16_777_216.0), f(1.0), 0], f(16_777_218.0))]);
    check("add.rm.f32 %f0, %f1, %f2;", F32, &[([f(1.0), f(-tiny), 0], f(1.0f32.next_down()))]);
    check("add.rz.f32 %f0, %f1, %f2;", F32, &[([f(-1.0), f(tiny), 0], f(-(1.0f32.next_down())))]);
    check("mul.rz.f32 %f0, %f1, %f2;", F32, &[([f(f32::MAX), f(2.0), 0], f(f32::MAX))]);
    check("mul.ftz.f32 %f0, %f1, %f2;", F32, &[([f(tiny), f(2.0), 0], 0), ([f(-1e-30), f(1e-15), 0], f(-0.0))]);
    check(
        "fma.rn.f32 %f0, %f1, %f2, %f3;",
        F32,
        &[
            ([f(third), f(3.0), f(-1.0)], f(third.mul_add(3.0, -1.0))),
            ([f(f32::MAX), f(2.0), f(f32::NEG_INFINITY)], f(f32::NEG_INFINITY)),
        ],
    );
    check(
        "fma.rm.f32 %f0, %f1, %f2, %f3;",
        F32,
        &[([f(third), f(3.0), f(1e-20)], f((third * 3.0).next_down().next_up()))],
    );
    check("add.sat.f32 %f0, %f1, %f2;", F32, &[([f(1.0), f(1.0), 0], f(1.0)), ([NAN, f(1.0), 0], 0)]);
    check("div.rn.f32 %f0, %f1, %f2;", F32, &[([f(1.0), f(3.0), 0], f(third)), ([f(0.0), f(0.0), 0], NAN)]);
    check("sqrt.rn.f32 %f0, %f1;", F32, &[([f(2.0), 0, 0], f(2.0f32.sqrt())), ([f(-1.0), 0, 0], NAN)]);
    check("min.f32 %f0, %f1, %f2;", F32, &[([NAN, f(3.0), 0], f(3.0)), ([f(0.0), f(-0.0), 0], f(-0.0))]);
    check("max.NaN.f32 %f0, %f1, %f2;", F32, &[([NAN, f(3.0), 0], NAN)]);
    check("neg.f32 %f0, %f1;", F32, &[([f(0.0), 0, 0], f(-0.0))]);
    check("fma.rn.f64 %d0, %d1, %d2, %d3;", F64, &[([d(0.1), d(10.0), d(-1.0)], d(0.1f64.mul_add(10.0, -1.0)))]);
    check("ex2.approx.f32 %f0, %f1;", F32, &[([f(10.0), 0, 0], f(1024.0)), ([f(f32::NEG_INFINITY), 0, 0], 0)]);
    check("lg2.approx.f32 %f0, %f1;", F32, &[([f(0.125), 0, 0], f(-3.0)), ([f(0.0), 0, 0], f(f32::NEG_INFINITY))]);
    check("rcp.rn.f32 %f0, %f1;", F32, &[([f(-0.0), 0, 0], f(f32::NEG_INFINITY))]);
    check("rsqrt.approx.f32 %f0, %f1;", F32, &[([f(0.25), 0, 0], f(2.0))]);
}

#[test]
fn comparisons_know_what_is_no_number() {
    for (relation, expected) in
        [("eq", 0), ("ne", 0), ("lt", 0), ("equ", 1), ("neu", 1), ("geu", 1), ("nan", 1), ("num", 0)]
    {
        check(&format!("setp.{relation}.f32 %p0, %f1, %f2;"), Pred, &[([NAN, f(1.0), 0], expected)]);
    }
    check("setp.lt.s32 %p0, %r1, %r2;", Pred, &[([0xffff_ffff, 0, 0], 1)]);
    check("setp.lt.u32 %p0, %r1, %r2;", Pred, &[([0xffff_ffff, 0, 0], 0)]);
    check("setp.lt.and.s32 %p0|%p4, %r1, %r2, %p3;", Pred, &[([1, 2, 0], 0), ([1, 2, 1], 1)]);
    check("setp.lt.and.s32 %p4|%p0, %r1, %r2, %p3;", Pred, &[([2, 1, 0], 0), ([2, 1, 1], 1)]);
    check("set.gt.u32.s32 %r0, %r1, %r2;", R32, &[([2, 1, 0], 0xffff_ffff), ([1, 1, 0], 0)]);
    check("xor.pred %p0, %p1, !%p2;", Pred, &[([1, 0, 0], 0), ([1, 1, 0], 1)]);
    let constants = [("xor", [0, 1], [1, 0]), ("and", [0, 0], [0, 1]), ("or", [0, 1], [1, 1])];
    for (name, with_false, with_true) in constants {
        for (constant, expected) in [("0", with_false), ("-1", with_true)] {
            let cases = [([0, 0, 0], expected[0]), ([1, 0, 0], expected[1])];
            check(&format!("{name}.pred %p0, %p1, {constant};"), Pred, &cases);
        }
    }
}

#[test]
fn conversions_round_saturate_and_extend() {
    check(
        "cvt.rni.s32.f32 %r0, %f1;",
        R32,
        &[([f(2.5), 0, 0], 2), ([f(3.5), 0, 0], 4), ([f(1e20), 0, 0], 0x7fff_ffff), ([NAN, 0, 0], 0)],
    );
    check("cvt.rzi.u32.f32 %r0, %f1;", R32, &[([f(-1.0), 0, 0], 0), ([f(5e9), 0, 0], 0xffff_ffff)]);
    check("cvt.rn.f32.s32 %f0, %r1;", F32, &[([16_777_217, 0, 0], f(16_777_216.0))]);
    check("cvt.rp.f32.s32 %f0, %r1;", F32, &[([16_777_217, 0, 0], f(16_777_218.0))]);
    check("cvt.rn.f32.u64 %f0, %rd1;", F32, &[([u64::MAX, 0, 0], f(18_446_744_073_709_551_615.0))]);
    check(
        "cvt.rn.f16.f32 %h0, %f1;",
        H16,
        &[([f(65520.0), 0, 0], 0x7c00), ([f(1.0 + 2.0f32.powi(-11)), 0, 0], 0x3c00), ([NAN, 0, 0], 0x7fff)],
    );
    check("cvt.rz.f16.f32 %h0, %f1;", H16, &[([f(70000.0), 0, 0], 0x7bff), ([f(-1.0009), 0, 0], 0xbc00)]);
    check("cvt.rn.bf16.f32 %h0, %f1;", H16, &[([0x3f80_8000, 0, 0], 0x3f80), ([0x3f81_8000, 0, 0], 0x3f82)]);
    check("cvt.f32.bf16 %f0, %h1;", F32, &[([0x3f80, 0, 0], f(1.0))]);
    check("cvt.f32.f16 %f0, %h1;", F32, &[([1, 0, 0], f(2.0f32.powi(-24)))]);
    check("cvt.rn.bf16x2.f32 %r0, %f1, %f2;", R32, &[([f(1.0), f(2.0), 0], 0x3f80_4000)]);
    check("cvt.rna.tf32.f32 %r0, %f1;", R32, &[([0x3f80_1000, 0, 0], 0x3f80_2000), ([0x3f80_0fff, 0, 0], 0x3f80_0000)]);
    check("cvt.rn.f32.f64 %f0, %d1;", F32, &[([d(1e300), 0, 0], f(f32::INFINITY)), ([d(0.1), 0, 0], f(0.1))]);
    check("cvt.s32.s8 %r0, %r1;", R32, &[([0x80, 0, 0], 0xffff_ff80)]);
    check("cvt.sat.u8.s32 %r0, %r1;", R32, &[([300, 0, 0], 255), ([0xffff_ffff, 0, 0], 0)]);
    check("cvt.s64.s32 %rd0, %r1;", R64, &[([0x8000_0000, 0, 0], 0xffff_ffff_8000_0000)]);
    check("cvt.sat.f32.f32 %f0, %f1;", F32, &[([f(7.0), 0, 0], f(1.0)), ([f(-7.0), 0, 0], 0)]);
}

#[test]
fn halves_are_rounded_once() {
    let one = 0x3c00;
    check("add.f16 %h0, %h1, %h2;", H16, &[([one, 0x1000, 0], one), ([0x7bff, 0x7bff, 0], 0x7c00)]);
    check("fma.rn.f16 %h0, %h1, %h2, %h3;", H16, &[([0x3555, 0x4200, 0xbc00], 0x8c00)]);
    check("mul.bf16x2 %r0, %r1, %r2;", R32, &[([0x4000_3f80, 0x4040_bf80, 0], 0x40c0_bf80)]);
    check("fma.rn.bf16 %h0, %h1, %h2, %h3;", H16, &[([0x3f80, 0x4000, 0x3f80], 0x4040)]);
}

#[test]
fn warps_exchange_values() {
    let operands: Vec<[u64; 3]> = (0..32).map(|lane| [100 + lane, lane % 2, 0]).collect();
    let found = run("shfl.sync.down.b32 %r0, %r1, 4, 31, 0xffffffff;", R32, &operands);
    assert_eq!((found[0], found[27], found[28], found[31]), (104, 131, 128, 131));
    let found = run("shfl.sync.up.b32 %r0|%p4, %r1, 3, 0, 0xffffffff;", R32, &operands);
    assert_eq!((found[0], found[3], found[31]), (100, 100, 128));
    let found = run("shfl.sync.bfly.b32 %r0, %r1, 16, 31, 0xffffffff;", R32, &operands);
    assert_eq!((found[0], found[31]), (116, 115));
    let found = run("shfl.sync.idx.b32 %r0, %r1, 2, 0x181f, 0xffffffff;", R32, &operands);
    assert_eq!((found[0], found[9], found[31]), (102, 110, 126));
    assert_eq!(run("vote.sync.ballot.b32 %r0, %p2, 0xffffffff;", R32, &operands)[5], 0xaaaa_aaaa);
    assert_eq!(run("vote.sync.any.pred %p0, %p2, 0xffffffff;", Pred, &operands)[0], 1);
    assert_eq!(run("vote.sync.all.pred %p0, %p2, 0xffffffff;", Pred, &operands)[0], 0);
    assert_eq!(run("redux.sync.add.s32 %r0, %r1, 0xffffffff;", R32, &operands)[7], (100..132).sum::<u64>());
    assert_eq!(run("match.any.sync.b32 %r0, %r2, 0xffffffff;", R32, &operands)[1], 0xaaaa_aaaa);
    assert_eq!(run("activemask.b32 %r0;", R32, &operands[..7])[0], 0x7f);
}

#[test]
fn lanes_part_and_meet_again() {
    // Each lane loops as often as its operand says; the sum over the warp afterwards needs all of them back.
    let body = "mov.u32 %r4, 0;
        LOOP: setp.ge.u32 %p4, %r4, %r1; @%p4 bra DONE; add.u32 %r4, %r4, 1; bra LOOP;
        DONE: redux.sync.add.s32 %r0, %r4, 0xffffffff;";
    let operands: Vec<[u64; 3]> = (0..32).map(|lane| [lane, 0, 0]).collect();
    assert_eq!(run(body, R32, &operands), vec![496; 32]);
    let body = "setp.lt.u32 %p4, %r1, 16; @!%p4 bra ELSE; mov.u32 %r0, 1; bra END; ELSE: mov.u32 %r0, 2; END:";
    let found = run(body, R32, &operands);
    assert!(found[..16].iter().all(|&x| x == 1) && found[16..].iter().all(|&x| x == 2));
}

/// A fragment's register of two bf16 values.
fn pair(low: f32, high: f32) -> u64 {
    u64::from(high.to_bits() >> 16 << 16 | low.to_bits() >> 16)
}

#[test]
fn warps_multiply_matrices() {
    // A holds row + column / 4 (exact in bf16 below 20), B is 1 where row = column: D's columns are A's first eight, plus C.
    let a = |row: u64, column: u64| row as f32 + column as f32 / 4.0;
    let b = |row: u64, column: u64| if row == column { 1.0 } else { 0.0 };
    let lanes: Vec<[u64; 3]> = (0..32)
        .map(|lane: u64| {
            let (g, t) = (lane / 4, lane % 4);
            let low = pair(a(g, 2 * t), a(g, 2 * t + 1)) | pair(a(g + 8, 2 * t), a(g + 8, 2 * t + 1)) << 32;
            let high = pair(a(g, 2 * t + 8), a(g, 2 * t + 9)) | pair(a(g + 8, 2 * t + 8), a(g + 8, 2 * t + 9)) << 32;
            let right = pair(b(2 * t, g), b(2 * t + 1, g)) | pair(b(2 * t + 8, g), b(2 * t + 9, g)) << 32;
            [low, high, right]
        })
        .collect();
    for (index, register) in ["%f0", "%f4", "%f5", "%f6"].iter().enumerate() {
        let body = format!(
            "mov.b64 {{%r4, %r5}}, %rd1; mov.b64 {{%r6, %r7}}, %rd2; mov.b64 {{%r8, %r9}}, %rd3; mov.f32 %f7, 0f3F800000;
             mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f0, %f4, %f5, %f6}}, {{%r4, %r5, %r6, %r7}}, {{%r8, %r9}},
             {{%f7, %f7, %f7, %f7}}; mov.f32 %f0, {register};"
        );
        for (lane, found) in (0..).zip(run(&body, F32, &lanes)) {
            let (row, column) = (lane / 4 + 8 * (index as u64 / 2), 2 * (lane % 4) + index as u64 % 2);
            assert_eq!(f32::from_bits(found as u32), a(row, column) + 1.0, "D[{row}, {column}]");
        }
    }
}

/// Sums of four columns' tiles that a warp's part of `wgmma` leaves, by row and column. The left factor is 1 where row = column; the
/// right one lies in 16 rows of 64 values, (64 + column) 2^row, in the order of the 128-byte swizzle.
fn group_product(along: bool) -> Vec<Vec<f32>> {
    let one = |row: u64, column: u64| if row == column { 1.0 } else { 0.0 };
    let lanes: Vec<[u64; 3]> = (0..32)
        .map(|lane: u64| {
            let (g, t) = (lane / 4, lane % 4);
            let left = |row: u64, column: u64| pair(one(row, column), one(row, column + 1));
            let low = left(g, 2 * t) | left(g + 8, 2 * t) << 32;
            let high = left(g, 2 * t + 8) | left(g + 8, 2 * t + 8) << 32;
            [low, high, pair(64.0 + 2.0 * lane as f32, 65.0 + 2.0 * lane as f32)]
        })
        .collect();
    // Four warps, each with the same rows.
    let threads = lanes.repeat(4);
    // A lane of the first writes its two columns of every row: the exponent of a value in bf16 starts at bit 7.
    let rows: String = (0..16)
        .map(|row| {
            format!(
                "xor.b32 %r8, %r7, {}; add.u32 %r9, %r3, {}; mad.lo.u32 %r9, %r8, 16, %r9; add.u32 %r8, %r2, {};
                 st.shared.u32 [%r9], %r8;\n",
                row % 8,
                row * 128,
                row << 7 | row << 23
            )
        })
        .collect();
    let sums = 32;
    let mut found = vec![vec![0.0; 8 * sums / 4]; 16];
    for index in 0..sums {
        // All but the one that is looked at are registers of their own.
        let list: Vec<String> = (0..sums).map(|i| format!("%s{i}")).collect();
        let body = format!(
            ".shared .align 1024 .b8 tile[2048]; .reg .f32 %s<{sums}>; .reg .b32 %a<4>;
             mov.b64 {{%a0, %a1}}, %rd1; mov.b64 {{%a2, %a3}}, %rd2; cvt.u32.u64 %r2, %rd3;
             mov.u32 %r1, %tid.x; shr.u32 %r7, %r1, 2; and.b32 %r4, %r1, 3;
             mov.u32 %r5, tile; mad.lo.u32 %r3, %r4, 4, %r5;
             setp.gt.u32 %p5, %r1, 31; @%p5 bra PAST;
             {rows}
             PAST: shr.u32 %r5, %r5, 4; cvt.u64.u32 %rd4, %r5; or.b64 %rd4, %rd4, 0x4000004000010000;
             fence.proxy.async.shared::cta; bar.sync 0; setp.ne.b32 %p4, 0, 0; wgmma.fence.sync.aligned;
             wgmma.mma_async.sync.aligned.m64n{width}k16.f32.bf16.bf16 {{{}}}, {{%a0, %a1, %a2, %a3}}, %rd4, %p4, 1, 1, {};
             wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; mov.f32 %f0, %s{index};",
            list[..if along { sums } else { 8 }].join(", "),
            u8::from(along),
            width = if along { 64 } else { 16 },
        );
        if !along && index >= 8 {
            break;
        }
        for (thread, bits) in run(&body, F32, &threads).into_iter().enumerate() {
            let lane = thread % 32;
            let (row, column) = (lane / 4 + 8 * (index % 4 / 2), 8 * (index / 4) + 2 * (lane % 4) + index % 2);
            let value = f32::from_bits(bits as u32);
            assert!(thread < 32 || found[row][column] == value, "another value in warp {}", thread / 32);
            found[row][column] = value;
        }
    }
    found
}

#[test]
fn warps_multiply_together_what_lies_swizzled_in_shared_memory() {
    for (row, found) in group_product(true).iter().enumerate() {
        for (column, &found) in found.iter().enumerate() {
            assert_eq!(found, (64 + column) as f32 * (1u32 << row) as f32, "rows of the tile: D[{row}, {column}]");
        }
    }
    for (row, found) in group_product(false).iter().enumerate() {
        for (column, &found) in found[..16].iter().enumerate() {
            assert_eq!(found, (64 + row) as f32 * (1u32 << column) as f32, "columns of the tile: D[{row}, {column}]");
        }
    }
}

#[test]
fn bytes_and_fields_are_picked() {
    let operands = [0x3322_1100u64, 0x7766_5544];
    for (mode, expected) in [
        ("f4e", [0x3322_1100u64, 0x4433_2211, 0x5544_3322, 0x6655_4433]),
        ("b4e", [0x5566_7700, 0x6677_0011, 0x7700_1122, 0x0011_2233]),
        ("rc8", [0, 0x1111_1111, 0x2222_2222, 0x3333_3333]),
        ("ecl", [0x3322_1100, 0x3322_1111, 0x3322_2222, 0x3333_3333]),
        ("ecr", [0, 0x1111_1100, 0x2222_1100, 0x3322_1100]),
        ("rc16", [0x1100_1100, 0x3322_3322, 0x1100_1100, 0x3322_3322]),
    ] {
        let cases: Vec<_> = (0..4).map(|c: usize| ([operands[0], operands[1], c as u64], expected[c])).collect();
        check(&format!("prmt.b32.{mode} %r0, %r1, %r2, %r3;"), R32, &cases);
    }
    check("bmsk.clamp.b32 %r0, %r1, %r2;", R32, &[([4, 8, 0], 0xff0), ([30, 8, 0], 0xc000_0000), ([40, 1, 0], 0)]);
    check("bmsk.wrap.b32 %r0, %r1, %r2;", R32, &[([36, 4, 0], 0xf0), ([0, 32, 0], 0)]);
    check("szext.clamp.s32 %r0, %r1, %r2;", R32, &[([0x80, 8, 0], 0xffff_ff80), ([0x80, 40, 0], 0x80), ([7, 0, 0], 0)]);
    check("szext.wrap.u32 %r0, %r1, %r2;", R32, &[([0x1ff, 8, 0], 0xff), ([0x1ff, 40, 0], 0xff)]);
    check("dp4a.u32.u32 %r0, %r1, %r2, %r3;", R32, &[([0xff01_0203, 0x0101_0101, 10], 271)]);
    check("dp4a.s32.u32 %r0, %r1, %r2, %r3;", R32, &[([0xff01_0203, 0xff01_0101, 10], u64::from(-239i32 as u32))]);
    check("dp2a.lo.u32.u32 %r0, %r1, %r2, %r3;", R32, &[([0x0002_0003, 0x0708_0504, 1], 1 + 3 * 4 + 2 * 5)]);
    check("dp2a.hi.s32.s32 %r0, %r1, %r2, %r3;", R32, &[([0xffff_0003, 0x0708_0504, 1], 1 + 3 * 8 - 7)]);
    check(
        "mov.b128 %q0, {%rd1, %rd2}; mov.b128 {%rd4, %rd0}, %q0; add.u64 %rd0, %rd0, %rd4;",
        R64,
        &[([3, 40, 0], 43)],
    );
    check("mov.b128 %q0, {%rd1, %rd2}; mov.b128 %q1, %q0; mov.b128 {_, %rd0}, %q1;", R64, &[([3, 40, 0], 40)]);
}

#[test]
fn floats_are_tested_and_pairs_compared() {
    let tiny = 1u64;
    check("testp.finite.f32 %p0, %f1;", Pred, &[([f(1.0), 0, 0], 1), ([f(f32::INFINITY), 0, 0], 0), ([NAN, 0, 0], 0)]);
    check("testp.infinite.f32 %p0, %f1;", Pred, &[([f(f32::NEG_INFINITY), 0, 0], 1), ([NAN, 0, 0], 0)]);
    check("testp.notanumber.f64 %p0, %d1;", Pred, &[([d(f64::NAN), 0, 0], 1), ([d(1.0), 0, 0], 0)]);
    check("testp.subnormal.f32 %p0, %f1;", Pred, &[([tiny, 0, 0], 1), ([0, 0, 0], 0)]);
    check("testp.normal.f32 %p0, %f1;", Pred, &[([tiny, 0, 0], 0), ([f(2.0), 0, 0], 1)]);
    // 1 and 2 against 2 and 1: the lower half of the pair decides the first predicate.
    let pairs = [0x4000_3c00u64, 0x3c00_4000, 0];
    check("setp.lt.f16x2 %p0|%p4, %r1, %r2;", Pred, &[(pairs, 1)]);
    check("setp.lt.f16x2 %p4|%p0, %r1, %r2;", Pred, &[(pairs, 0)]);
    check(
        "setp.gt.and.bf16x2 %p4|%p0, %r1, %r2, %p3;",
        Pred,
        &[([0x4000_3f80, 0x3f80_4000, 1], 1), ([0x4000_3f80, 0x3f80_4000, 0], 0)],
    );
    check("add.sat.f16x2 %r0, %r1, %r2;", R32, &[([0x3c00_bc00, 0x3c00_3800, 0], 0x3c00_0000)]);
    check(
        "fma.rn.sat.f16 %h0, %h1, %h2, %h3;",
        H16,
        &[([0x3800, 0x3800, 0x3800], 0x3a00), ([0x4000, 0x4000, 0], 0x3c00)],
    );
    check("fma.rn.bf16x2 %r0, %r1, %r2, %r3;", R32, &[([0x4000_3f80, 0x4040_4000, 0x3f80_3f80], 0x40e0_4040)]);
    check("ex2.approx.ftz.bf16x2 %r0, %r1;", R32, &[([0x4000_0000, 0, 0], 0x4080_3f80)]);
    check("tanh.approx.f32 %f0, %f1;", F32, &[([f(0.0), 0, 0], 0), ([f(20.0), 0, 0], f(1.0))]);
}

#[test]
fn atomics_change_memory_once_for_each_lane() {
    // Lane i adds, takes or compares at the word that the first lane's operands lie in; the last lane reads what is left.
    let run = |operation: &str, ty: &str, register: &str, values: &[u64]| {
        let bytes = if ty.ends_with("64") {
            8
        } else if ty.contains("16") && !ty.contains("x2") {
            2
        } else {
            4
        };
        let word = if bytes == 2 {
            "u16"
        } else if bytes == 8 {
            "u64"
        } else {
            "u32"
        };
        let body = format!(
            "atom.global.{operation}.{ty} {register}4, [%rd10+16], {register}1; bar.sync 0;
             ld.global.{word} %rd0, [%rd10+16];"
        );
        let operands: Vec<[u64; 3]> = values.iter().map(|&value| [value, 0, values[0]]).collect();
        self::run(&body, R64, &operands)[0]
    };
    let f16 = |x: f32| u64::from(half::f16::from_f32(x).to_bits());
    let bf16 = |x: f32| u64::from(half::bf16::from_f32(x).to_bits());
    assert_eq!(run("add", "u32", "%r", &[1, 2, 3]), 1 + 6);
    assert_eq!(run("add", "u64", "%rd", &[1 << 40, 2, 3]), (2 << 40) + 5);
    assert_eq!(run("add", "f32", "%f", &[f(0.5), f(2.0)]), f(3.0));
    assert_eq!(run("add", "f32", "%f", &[1, 1]), 0, "subnormals are flushed in global memory");
    assert_eq!(run("add", "f64", "%d", &[d(0.5), d(2.0)]), d(3.0));
    assert_eq!(run("add.noftz", "f16", "%h", &[f16(0.5), f16(2.0)]), f16(3.0));
    assert_eq!(run("add.noftz", "bf16", "%h", &[bf16(0.5), bf16(2.0)]), bf16(3.0));
    assert_eq!(
        run("add.noftz", "f16x2", "%r", &[f16(1.0) << 16 | f16(0.5), f16(3.0) << 16]),
        f16(5.0) << 16 | f16(1.0)
    );
    assert_eq!(
        run("add.noftz", "bf16x2", "%r", &[bf16(1.0) << 16, bf16(3.0) << 16 | bf16(1.0)]),
        bf16(5.0) << 16 | bf16(1.0)
    );
    assert_eq!(run("min", "s32", "%r", &[5, 0xffff_ffff]), 0xffff_ffff);
    assert_eq!(run("max", "u64", "%rd", &[5, u64::MAX]), u64::MAX);
    assert_eq!(run("min", "s64", "%rd", &[5, u64::MAX]), u64::MAX);
    assert_eq!(run("and", "b32", "%r", &[0b111, 0b101, 0b110]), 0b100);
    assert_eq!(run("xor", "b64", "%rd", &[0b111, 0b101]), 0b101);
    assert_eq!(run("exch", "b32", "%r", &[1, 2, 9]), 9);
    assert_eq!(run("inc", "u32", "%r", &[2, 2, 2]), 2, "2, then 0, 1, 2");
    assert_eq!(run("dec", "u32", "%r", &[1, 5]), 5, "1, then 0, then the limit");
    let swap =
        "atom.global.cas.b32 %r0, [%rd10], %r1, 77; bar.sync 0; ld.global.u32 %r5, [%rd10]; add.u32 %r0, %r0, %r5;";
    assert_eq!(self::run(swap, R32, &[[5, 0, 0], [9, 0, 0]]), [5 + 77, 77 + 77]);
    let short = "atom.global.cas.b16 %h0, [%rd10], %h1, 7;";
    assert_eq!(self::run(short, H16, &[[5, 0, 0], [9, 0, 0]]), [5, 7]);
    let red = "red.global.add.u32 [%rd10+8], %r1; bar.sync 0; ld.global.u32 %r0, [%rd10+8];";
    assert_eq!(self::run(red, R32, &[[5, 1, 0], [9, 0, 0]]), [15, 15]);
}

#[test]
fn a_matrix_is_transposed_across_lanes() {
    // Row r, column c holds 8 r + c.
    let operands: Vec<[u64; 3]> = (0..32u64).map(|lane| [(2 * lane) | ((2 * lane + 1) << 16), 0, 0]).collect();
    let found = run("movmatrix.sync.aligned.m8n8.trans.b16 %r0, %r1;", R32, &operands);
    for (lane, found) in (0..).zip(found) {
        let (row, column) = (lane / 4, 2 * (lane % 4));
        assert_eq!(found, (8 * column + row) | ((8 * (column + 1) + row) << 16), "lane {lane}");
    }
}

/// Runs a whole text whose kernel `test` takes an address of 32 words that hold their number, a lane each; gives the words.
fn run_text(text: &str, lanes: u32) -> Vec<u32> {
    let module = Arc::new(Module::parse(text).unwrap_or_else(|error| panic!("{error}\n{text}")));
    let memory = Memory::new(1 << 20);
    let loaded = module.instantiate(&memory, 0).unwrap();
    let at = memory.allocate(0, 128).unwrap();
    let bytes: Vec<u8> = (0..32u32).flat_map(u32::to_le_bytes).collect();
    memory.copy_in(at, &bytes).unwrap();
    let params = at.to_le_bytes();
    let launched = Launch {
        grid: [1; 3],
        block: [lanes, 1, 1],
        dynamic_shared: 0,
        params: &params,
        cooperative: false,
        checks: Checks::default(),
    };
    launch(&loaded, "test", &launched, &memory, &mut Counts::default()).unwrap_or_else(|fault| panic!("{fault}"));
    let mut out = vec![0; 128];
    memory.copy_out(at, &mut out).unwrap();
    out.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn functions_are_called_with_arguments_and_results() {
    // `half` halves even numbers and returns early for odd ones; `twice` calls it and takes a structure.
    let text = "
        .version 9.0 .target sm_80 .address_size 64
        .func (.param .b32 result) twice(.param .align 4 .b8 pair[8]);
        .func (.param .b32 result) half(.param .b32 x)
        { .reg .pred %p<2>; .reg .b32 %r<4>;
          ld.param.u32 %r1, [x]; and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 0; @%p1 bra $EVEN;
          st.param.b32 [result+0], %r1; ret;
          $EVEN: shr.u32 %r3, %r1, 1; st.param.b32 [result+0], %r3; ret; }
        .visible .entry test(.param .u64 at)
        { .reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %rd<4>;
          ld.param.u64 %rd1, [at]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1; ld.global.u32 %r2, [%rd2];
          setp.ne.u32 %p1, %r1, 6;
          { .param .align 4 .b8 param0[8]; st.param.b32 [param0+0], %r2; st.param.b32 [param0+4], 100;
            .param .b32 retval0;
            st.param.b32 [retval0+0], 5;
            @%p1 call.uni (retval0), twice, (param0);
            ld.param.b32 %r3, [retval0+0]; }
          st.global.u32 [%rd2], %r3; ret; }
        .func (.param .b32 result) twice(.param .align 4 .b8 pair[8])
        { .reg .b32 %r<6>; ld.param.u32 %r1, [pair]; ld.param.u32 %r2, [pair+4];
          { .param .b32 param0; st.param.b32 [param0+0], %r1; .param .b32 retval0;
            call (retval0), half, (param0); ld.param.b32 %r3, [retval0]; }
          { .param .b32 param0; st.param.b32 [param0+0], %r3; .param .b32 retval0;
            call (retval0), half, (param0); ld.param.b32 %r4, [retval0]; }
          add.u32 %r5, %r4, %r2; st.param.b32 [result], %r5; ret; }";
    let half = |x: u32| if x.is_multiple_of(2) { x / 2 } else { x };
    let found = run_text(text, 16);
    for (lane, found) in (0..16).zip(found) {
        assert_eq!(found, if lane == 6 { 5 } else { half(half(lane)) + 100 }, "lane {lane}");
    }
    for (call, words) in [
        ("call half, (param0);", "call of half"),
        ("call (param0), test2, (param0);", "calls itself"),
        ("call (param0), %r1, (param0), proto;", "by its address"),
    ] {
        let text = format!(
            ".func (.param .b32 r) test2(.param .b32 x) {{ .param .b32 p; call (r), test2, (x); ret; }}
             .visible .entry test() {{ .reg .b32 %r<4>; .param .b32 param0; {call} ret; }}"
        );
        let error = Module::parse(&text).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn jumps_by_a_table_part_the_lanes() {
    let text = "
        .visible .entry test(.param .u64 at)
        { .reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %rd<4>;
          ld.param.u64 %rd1, [at]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1; and.b32 %r2, %r1, 3;
          $TABLE: .branchtargets $A, $B, $C, $B;
          brx.idx %r2, $TABLE;
          $A: mov.u32 %r3, 10; bra $END;
          $B: mov.u32 %r3, 20; bra $END;
          $C: mov.u32 %r3, 30;
          $END: activemask.b32 %r4; setp.ne.u32 %p1, %r4, 0xffffffff;
          @%p1 trap; st.global.u32 [%rd2], %r3; ret; }";
    let expected = [10, 20, 30, 20];
    assert!(run_text(text, 32).iter().enumerate().all(|(lane, &found)| found == expected[lane % 4]));
}

#[test]
fn what_is_not_known_is_an_error_that_names_it() {
    for body in
        ["frobnicate.b32 %r0, %r1;", "add.rn.frob.f32 %f0, %f1, %f2;", "ld.frob.u32 %r0, [%rd1];", "tex.1d %r0;"]
    {
        let text = format!(".visible .entry k()\n{{\n.reg .b32 %r<4>; .reg .f32 %f<4>; .reg .b64 %rd<4>;\n{body}\n}}");
        let error = Module::parse(&text).unwrap_err();
        assert_eq!(error.line, 4, "{error}");
        assert!(error.to_string().contains("not known to the emulated device"), "{error}");
    }
}
