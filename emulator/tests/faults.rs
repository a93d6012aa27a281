//! Faults planted in kernels, each found at the line, block and thread that commits it.

use std::sync::Arc;

use warpstep_emulator::counts::Counts;
use warpstep_emulator::exec::{Checks, Launch, launch};
use warpstep_emulator::fault::{Fault, FaultKind, Space};
use warpstep_emulator::memory::Memory;
use warpstep_emulator::ptx::Module;

/// Bytes of the buffer that kernels are given.
const BYTES: u64 = 1024;

struct Bench {
    memory: Memory,
    buffer: u64,
    freed: u64,
    unwritten: u64,
}

impl Bench {
    fn new() -> Self {
        let memory = Memory::new(1 << 20);
        let buffer = memory.allocate(0, BYTES as usize).unwrap();
        memory.copy_in(buffer, &[0; BYTES as usize]).unwrap();
        let freed = memory.allocate(0, 64).unwrap();
        memory.free(freed).unwrap();
        let unwritten = memory.allocate(0, 64).unwrap();
        Bench { memory, buffer, freed, unwritten }
    }

    /// Runs `body`, whose first line is line 10 of the text: `%rd1` the buffer, `%rd2` freed memory, `%rd3` memory that nothing
    /// wrote, `%r1` the thread, `%r2` the block, `%rd4` the thread's word of the buffer, `%r3` its word of shared memory.
    fn run(&self, body: &str, grid: [u32; 3], block: [u32; 3], checks: Checks) -> Result<Counts, Fault> {
        self.run_as(body, grid, block, checks, false)
    }

    fn run_as(
        &self,
        body: &str,
        grid: [u32; 3],
        block: [u32; 3],
        checks: Checks,
        cooperative: bool,
    ) -> Result<Counts, Fault> {
        let text = format!(
            ".version 9.0\n.target sm_80\n.address_size 64\n.visible .entry planted(.param .u64 a, .param .u64 b, .param .u64 c)\n{{
.reg .pred %p<8>; .reg .b32 %r<16>; .reg .b64 %rd<16>; .reg .f32 %f<8>; .shared .align 16 .b8 tile[1024];
ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; ld.param.u64 %rd3, [c]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x;
mad.wide.u32 %rd4, %r1, 4, %rd1;
mov.u32 %r3, tile; mad.lo.u32 %r3, %r1, 4, %r3;
{body}
ret;\n}}"
        );
        let module = Arc::new(Module::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}")));
        let loaded = module.instantiate(&self.memory, 0).unwrap();
        let params: Vec<u8> = [self.buffer, self.freed, self.unwritten].iter().flat_map(|x| x.to_le_bytes()).collect();
        let launched = Launch { grid, block, dynamic_shared: 0, params: &params, cooperative, checks };
        let mut counts = Counts::default();
        launch(&loaded, "planted", &launched, &self.memory, &mut counts).map(|()| counts)
    }

    /// The fault of 2 blocks of 64 threads.
    fn fault(&self, body: &str) -> Fault {
        self.run(body, [2, 1, 1], [64, 1, 1], Checks::default()).expect_err(body)
    }
}

/// `(kind, PTX line, block, thread)` of what `body` is caught at.
fn caught(body: &str) -> (FaultKind, u32, u32, u32) {
    let fault = Bench::new().fault(body);
    let place = fault.place.as_ref().unwrap_or_else(|| panic!("{fault} has no place"));
    assert_eq!(place.kernel, "planted");
    assert!(fault.to_string().contains("kernel planted, block ("), "{fault}");
    (fault.kind, place.ptx_line, place.block[0], place.thread[0])
}

#[test]
fn an_access_past_the_end_names_the_thread_and_the_distance() {
    // Threads 0 to 63 of stride 20 bytes: the 51st word ends at 1024, the 52nd lies outside.
    let (kind, line, block, thread) = caught("mad.wide.u32 %rd5, %r1, 20, %rd1;\nst.global.u32 [%rd5], %r1;");
    assert!(matches!(kind, FaultKind::OutOfBounds { space: Space::Global, write: true, bytes: 4, .. }), "{kind}");
    assert_eq!((line, block, thread), (11, 0, 52));
    assert!(kind.to_string().contains("lies 16 bytes past the end of the allocation of 1024 bytes"), "{kind}");

    let (kind, line, ..) = caught("ld.global.v2.u32 {%r4, %r5}, [%rd1+1020];");
    assert!(!matches!(kind, FaultKind::OutOfBounds { .. }), "misaligned comes first: {kind}");
    assert_eq!(line, 10);
    let (kind, ..) = caught("ld.global.u32 %r4, [%rd1+-4];");
    assert!(matches!(kind, FaultKind::OutOfBounds { write: false, .. }), "{kind}");
    let (kind, _, _, thread) = caught("mad.lo.u32 %r4, %r1, 20, %r3;\nst.shared.u32 [%r4], %r1;");
    assert!(matches!(kind, FaultKind::OutOfBounds { space: Space::Shared, write: true, .. }), "{kind}");
    assert_eq!(thread, 43, "44 words of stride 24 bytes fit in 1024");
    let (kind, ..) = caught("mov.u64 %rd5, 64;\nld.global.u32 %r4, [%rd5];");
    assert!(kind.to_string().contains("lies in no allocation"), "{kind}");
}

#[test]
fn freed_memory_is_not_read_or_written() {
    let (kind, line, ..) = caught("mov.u32 %r4, 1;\nld.global.u32 %r4, [%rd2+8];");
    assert!(matches!(kind, FaultKind::UseAfterFree { write: false, bytes: 4, .. }), "{kind}");
    assert_eq!(line, 11);
    let (kind, ..) = caught("st.global.u8 [%rd2], %r1;");
    assert!(matches!(kind, FaultKind::UseAfterFree { write: true, bytes: 1, .. }), "{kind}");
}

#[test]
fn vectors_stand_on_multiples_of_their_length() {
    let (kind, _, _, thread) = caught("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd4];");
    assert!(matches!(kind, FaultKind::Misaligned { space: Space::Global, bytes: 16, write: false, .. }), "{kind}");
    assert_eq!(thread, 1);
    let (kind, ..) = caught("st.shared.v2.u32 [%r3], {%r1, %r2};");
    assert!(matches!(kind, FaultKind::Misaligned { space: Space::Shared, bytes: 8, write: true, .. }), "{kind}");
}

#[test]
fn memory_that_nothing_wrote_is_not_read() {
    let (kind, line, ..) = caught("st.global.u32 [%rd3], %r2;\nld.global.u32 %r4, [%rd3+4];");
    assert!(matches!(kind, FaultKind::Unwritten { space: Space::Global, bytes: 4, .. }), "{kind}");
    assert_eq!(line, 11);
    let (kind, ..) = caught("ld.shared.u32 %r4, [%r3];");
    assert!(matches!(kind, FaultKind::Unwritten { space: Space::Shared, .. }), "{kind}");
    // Half of a word is written, the whole is read.
    let (kind, ..) = caught("st.shared.u16 [%r3], %r1;\nld.shared.u32 %r4, [%r3];");
    assert!(matches!(kind, FaultKind::Unwritten { .. }), "{kind}");
}

#[test]
fn warps_that_share_a_word_without_a_barrier_race() {
    // The same word stored by both warps of a block.
    let (kind, _, _, thread) = caught("st.shared.u32 [tile], %r2;");
    let FaultKind::Race { write: true, other_write: true, other_thread, .. } = kind else { panic!("{kind}") };
    assert!(other_thread < 32 && thread >= 32);
    // With a barrier between, neither races.
    let ordered = "st.shared.u32 [%r3], %r1;\nbar.sync 0;\nxor.b32 %r4, %r3, 128;\nld.shared.u32 %r5, [%r4];";
    Bench::new().run(ordered, [2, 1, 1], [64, 1, 1], Checks::default()).unwrap();
    // One barrier too few: a load, and the next turn's store of another warp.
    let ordered = format!("{ordered}\nst.shared.u32 [%r3], %r5;");
    let (kind, line, _, thread) = caught(&ordered);
    assert!(matches!(kind, FaultKind::Race { write: false, other_write: true, other_thread: 0, .. }), "{kind}");
    assert_eq!((line, thread), (13, 32));
}

#[test]
fn blocks_that_share_a_word_without_a_fence_race() {
    let (kind, _, block, _) = caught("st.global.u32 [%rd4], %r2;");
    assert!(matches!(kind, FaultKind::Race { space: Space::Global, write: true, other_block: 0, .. }), "{kind}");
    assert_eq!(block, 1);
    // A word of its own for each block is none of the other's business, and atomics order themselves.
    for body in [
        "mad.wide.u32 %rd5, %r2, 256, %rd4;\nst.global.u32 [%rd5], %r2;",
        "atom.global.add.u32 %r4, [%rd1], 1;",
        "ld.global.u32 %r4, [%rd4];",
    ] {
        Bench::new().run(body, [2, 1, 1], [64, 1, 1], Checks::default()).unwrap_or_else(|e| panic!("{body}: {e}"));
    }
}

#[test]
fn a_barrier_that_some_threads_miss_is_named() {
    let (kind, line, ..) = caught("setp.ge.u32 %p1, %r1, 32;\n@%p1 bra OUT;\nbar.sync 0;\nOUT:");
    let FaultKind::DivergentBarrier { barrier: 0, arrived: 32, expected: 64, reason } = kind else { panic!("{kind}") };
    assert!(reason.contains("left the kernel"));
    assert_eq!(line, 12);
    let (kind, ..) = caught("setp.ge.u32 %p1, %r1, 32;\n@%p1 bra OTHER;\nbar.sync 0;\nret;\nOTHER:\nbar.sync 1;");
    assert!(matches!(kind, FaultKind::DivergentBarrier { expected: 64, .. }), "{kind}");
    let (kind, ..) = caught("setp.ge.u32 %p1, %r1, 16;\n@%p1 bra OUT;\nbar.sync 0;\nOUT:");
    assert!(matches!(kind, FaultKind::DivergentBarrier { .. }), "half a warp: {kind}");
}

#[test]
fn a_shuffle_reads_only_lanes_that_take_part() {
    let (kind, ..) =
        caught("setp.ge.u32 %p1, %r1, 16;\n@%p1 bra OUT;\nshfl.sync.bfly.b32 %r4, %r1, 16, 31, 0xffff;\nOUT:");
    assert!(matches!(kind, FaultKind::AbsentLane { .. } | FaultKind::DivergentBarrier { .. }), "{kind}");
}

#[test]
fn a_trap_and_a_loop_without_end_are_told() {
    let (kind, line, _, thread) = caught("setp.eq.u32 %p1, %r1, 7;\n@%p1 trap;");
    assert_eq!((kind, line, thread), (FaultKind::Trap, 11, 7));
    let checks = Checks { instructions: 10_000, ..Checks::default() };
    let fault = Bench::new().run("AGAIN: bra AGAIN;", [1, 1, 1], [32, 1, 1], checks).unwrap_err();
    assert!(matches!(fault.kind, FaultKind::Endless { .. }), "{fault}");
}

#[test]
fn launches_out_of_range_are_refused() {
    let bench = Bench::new();
    for (grid, block, words) in [
        ([1, 1, 1], [1025, 1, 1], "a block has 1 to 1024"),
        ([1, 1, 1], [0, 1, 1], "a block has 1 to 1024"),
        ([1, 1, 1], [1, 1, 65], "at most 64 deep"),
        ([1, 65536, 1], [1, 1, 1], "the limits are (2147483647, 65535, 65535)"),
        ([0, 1, 1], [1, 1, 1], "a grid of [0, 1, 1]"),
    ] {
        let fault = bench.run("", grid, block, Checks::default()).unwrap_err();
        assert!(matches!(&fault.kind, FaultKind::Launch(text) if text.contains(words)), "{fault}");
    }
    let text = ".visible .entry big()\n{\n.shared .align 4 .b8 tile[65536];\nret;\n}";
    let loaded = Arc::new(Module::parse(text).unwrap()).instantiate(&bench.memory, 0).unwrap();
    let mut launched = Launch {
        grid: [1; 3],
        block: [1; 3],
        dynamic_shared: 0,
        params: &[],
        cooperative: false,
        checks: Checks::default(),
    };
    let fault = launch(&loaded, "big", &launched, &bench.memory, &mut Counts::default()).unwrap_err();
    assert_eq!(fault.kind, FaultKind::SharedMemory { asked: 65536, limit: 163 << 10 });
    let text = ".visible .entry wide()\n{\nret;\n}";
    let loaded = Arc::new(Module::parse(text).unwrap()).instantiate(&bench.memory, 0).unwrap();
    launched.dynamic_shared = 164 << 10;
    let fault = launch(&loaded, "wide", &launched, &bench.memory, &mut Counts::default()).unwrap_err();
    assert!(matches!(fault.kind, FaultKind::SharedMemory { .. }), "{fault}");
}

#[test]
fn counts_tell_scattered_accesses_and_bank_conflicts() {
    let bench = Bench::new();
    let run = |body: &str| bench.run(body, [1, 1, 1], [32, 1, 1], Checks::default()).unwrap();
    let together = run("ld.global.u32 %r4, [%rd4];");
    assert_eq!((together.global_read, together.sectors, together.ideal_sectors), (128, 4, 4));
    let apart = run("mad.wide.u32 %rd5, %r1, 32, %rd1;\nld.global.u32 %r4, [%rd5];");
    assert_eq!((apart.global_read, apart.sectors, apart.ideal_sectors), (128, 32, 4));
    assert_eq!((together.accesses, together.uncoalesced, together.touched_read), (1, 0, 128));
    assert_eq!((apart.accesses, apart.uncoalesced, apart.touched_read), (1, 1, 128));
    // All lanes read one word, twice: two accesses of one sector, and 4 bytes from memory.
    let same = run("ld.global.u32 %r4, [%rd1];\nld.global.u32 %r5, [%rd1];");
    assert_eq!((same.sectors, same.ideal_sectors, same.uncoalesced, same.touched_read), (2, 2, 0, 4));
    // Beside a sector's edge.
    let shifted = run("ld.global.u32 %r4, [%rd4+4];");
    assert_eq!((shifted.sectors, shifted.ideal_sectors, shifted.uncoalesced), (5, 4, 1));
    let written = run("st.global.u32 [%rd4], %r1;\nld.global.u32 %r4, [%rd4];");
    assert_eq!((written.touched_written, written.touched_read), (128, 128));
    assert_eq!(run("st.shared.u32 [%r3], %r1;").bank_conflicts, 0);
    // A stride of 8 words: 8 lanes on each of 4 banks.
    let conflicts = run("mov.u32 %r5, tile; mad.lo.u32 %r4, %r1, 32, %r5;\nst.shared.u32 [%r4], %r1;");
    assert_eq!((conflicts.shared_written, conflicts.bank_conflicts), (128, 7));
}

#[test]
fn lanes_of_a_warp_that_do_not_synchronize_race() {
    // One instruction, one address, two values.
    let (kind, line, _, thread) = caught("mov.u32 %r4, %r1;\nst.shared.u32 [tile], %r4;");
    let FaultKind::Race { write: true, other_write: true, other_thread: 0, .. } = kind else { panic!("{kind}") };
    assert_eq!((line, thread), (11, 1));
    // A neighbour's word, read without a meeting; then one lane overwrites what others have read.
    let turn = "st.shared.u32 [%r3], %r1;\nMEETING\nxor.b32 %r4, %r3, 4;\nld.shared.u32 %r5, [%r4];";
    let meetings = [
        "bar.warp.sync 0xffffffff;",
        "shfl.sync.bfly.b32 %r6, %r1, 1, 31, 0xffffffff;",
        "vote.sync.any.pred %p2, %p2, 0xffffffff;",
        "bar.sync 0;",
    ];
    let (kind, line, ..) = caught(&turn.replace("MEETING", "mov.u32 %r6, 0;"));
    assert!(matches!(kind, FaultKind::Race { write: false, other_write: true, .. }), "{kind}");
    assert_eq!(line, 13);
    for meeting in meetings {
        let turn = turn.replace("MEETING", meeting);
        let run = |body: &str| Bench::new().run(body, [2, 1, 1], [64, 1, 1], Checks::default());
        run(&turn).unwrap_or_else(|fault| panic!("{meeting}: {fault}"));
        let fault = run(&format!("{turn}\nst.shared.u32 [%r3], %r5;")).unwrap_err();
        assert!(matches!(fault.kind, FaultKind::Race { write: true, other_write: false, .. }), "{meeting}: {fault}");
        run(&format!("{turn}\n{meeting}\nst.shared.u32 [%r3], %r5;")).unwrap_or_else(|f| panic!("{meeting}: {f}"));
    }
    // Lanes that meet half a warp at a time are strangers to the other half.
    let halves = turn.replace("MEETING", "and.b32 %r6, %r1, 16; setp.ne.u32 %p1, %r6, 0; selp.b32 %r6, 0xffff0000, 0xffff, %p1; @%p1 bra UP; bar.warp.sync %r6; bra OVER; UP: bar.warp.sync %r6; OVER:");
    Bench::new().run(&halves, [1, 1, 1], [32, 1, 1], Checks::default()).unwrap();
}

#[test]
fn lanes_may_store_the_same_and_share_words_by_parts() {
    for body in [
        // The same value by all lanes at once.
        "st.shared.u32 [tile], %r2;",
        // Half a word each, read back by its own lane, changed, and stored again.
        "shr.u32 %r4, %r3, 0; mov.u32 %r5, tile; mad.lo.u32 %r4, %r1, 2, %r5;
         st.shared.u16 [%r4], %r1; ld.shared.u16 %r6, [%r4]; add.u32 %r6, %r6, 1; st.shared.u16 [%r4], %r6;",
        // All read a word, one changes it after a meeting.
        "setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [tile], %r1; bar.sync 0; ld.shared.u32 %r4, [tile]; bar.sync 0;
         @%p1 st.shared.u32 [tile], %r4;",
    ] {
        Bench::new().run(body, [1, 1, 1], [32, 1, 1], Checks::default()).unwrap_or_else(|f| panic!("{body}: {f}"));
    }
}

#[test]
fn copies_in_flight_are_not_read() {
    let copy = "shl.b32 %r4, %r1, 4; mov.u32 %r5, tile; add.u32 %r4, %r4, %r5; mad.wide.u32 %rd5, %r1, 16, %rd1;
        st.shared.v4.u32 [%r4], {%r1, %r1, %r1, %r1}; cp.async.cg.shared.global [%r4], [%rd5], 16; cp.async.commit_group;";
    let run = |body: String| Bench::new().run(&body, [1, 1, 1], [64, 1, 1], Checks::default());
    let fault = run(format!("{copy}\nld.shared.u32 %r6, [%r4];")).unwrap_err();
    assert!(matches!(fault.kind, FaultKind::Unwritten { space: Space::Shared, .. }), "{fault}");
    run(format!("{copy}\ncp.async.wait_group 0;\nld.shared.u32 %r6, [%r4];")).unwrap();
    // Waited for, but not by the lane that reads.
    let other = "xor.b32 %r7, %r4, 16;\nld.shared.u32 %r6, [%r7];";
    let fault = run(format!("{copy}\ncp.async.wait_group 0;\n{other}")).unwrap_err();
    assert!(matches!(fault.kind, FaultKind::Race { .. }), "{fault}");
    run(format!("{copy}\ncp.async.wait_group 0;\nbar.sync 0;\n{other}")).unwrap();
}

/// A product of four warps with a tile of 8 rows of 128 bytes, in parts that a test may leave out or put elsewhere.
struct GroupProduct<'t> {
    publish: &'t str,
    meet: &'t str,
    fence: &'t str,
    between: &'t str,
    wait: &'t str,
    after: &'t str,
}

impl GroupProduct<'_> {
    const RIGHT: GroupProduct<'static> = GroupProduct {
        publish: "fence.proxy.async.shared::cta;",
        meet: "bar.sync 0;",
        fence: "wgmma.fence.sync.aligned;",
        between: "",
        wait: "wgmma.wait_group.sync.aligned 0;",
        after: "mov.f32 %f0, %s0;",
    };

    fn body(&self) -> String {
        let GroupProduct { publish, meet, fence, between, wait, after } = self;
        let product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%s0, %s1, %s2, %s3}, {%a0, %a1, %a2, %a3}, %rd5, %p1, 1, 1, 0;";
        format!(
            ".reg .f32 %s<4>; .reg .b32 %a<4>; mov.f32 %s0, 0f00000000; mov.f32 %s1, %s0; mov.f32 %s2, %s0; mov.f32 %s3, %s0;
             mov.b32 %a0, 0; mov.b32 %a1, 0; mov.b32 %a2, 0; mov.b32 %a3, 0; setp.eq.u32 %p1, %a0, 0; mov.u32 %r7, 0;
             st.shared.u32 [%r3], %r7; st.shared.u32 [%r3+512], %r7;
             {publish} {meet}
             mov.u32 %r5, tile; shr.u32 %r5, %r5, 4; cvt.u64.u32 %rd5, %r5; or.b64 %rd5, %rd5, 0x4000004000010000;
             {fence} {product} {product} wgmma.commit_group.sync.aligned; {between}
             {wait} {after}"
        )
    }
}

#[test]
fn products_of_warpgroups_run_beside_the_program() {
    const RIGHT: GroupProduct<'static> = GroupProduct::RIGHT;
    let run = |product: GroupProduct<'_>| Bench::new().run(&product.body(), [2, 1, 1], [128, 1, 1], Checks::default());
    let fault = |product: GroupProduct<'_>| run(product).unwrap_err().kind;
    run(RIGHT).unwrap();
    // Half a warpgroup.
    let half = Bench::new().run(&RIGHT.body(), [1, 1, 1], [64, 1, 1], Checks::default()).unwrap_err();
    assert!(matches!(half.kind, FaultKind::Launch(_)), "{half}");
    // A warp that is not there, whose descriptor is another, or whose predicate is: for all its lanes, or for some.
    let past = "setp.eq.u32 %p2, %r5, 2; @%p2 bra PAST;";
    let leaves = format!("shr.u32 %r5, %r1, 5; {past} {}", RIGHT.fence);
    let absent = GroupProduct { fence: &leaves, after: "PAST: mov.u32 %r5, 0;", ..RIGHT };
    assert_eq!(fault(absent), FaultKind::ApartInGroup { warp: 2 });
    for (operand, warp) in [
        ("shr.u32 %r5, %r1, 5; cvt.u64.u32 %rd6, %r5; shl.b64 %rd6, %rd6, 1; add.u64 %rd5, %rd5, %rd6;", 1),
        ("setp.lt.u32 %p1, %r1, 96;", 3),
        ("setp.lt.u32 %p1, %r1, 80;", 2),
    ] {
        let fence = format!("{operand} {}", RIGHT.fence);
        assert_eq!(fault(GroupProduct { fence: &fence, ..RIGHT }), FaultKind::ApartInGroup { warp }, "{operand}");
    }
    // Sums that are read, and a left factor that is written, before they are waited for.
    assert_eq!(fault(GroupProduct { between: "mov.f32 %f0, %s3;", ..RIGHT }), FaultKind::InFlight);
    assert_eq!(fault(GroupProduct { between: "add.u32 %a1, %r1, 1;", ..RIGHT }), FaultKind::InFlight);
    assert_eq!(fault(GroupProduct { wait: "wgmma.wait_group.sync.aligned 1;", ..RIGHT }), FaultKind::InFlight);
    run(GroupProduct { between: "add.u32 %r4, %r1, 1;", ..RIGHT }).unwrap();
    // Sums as the left factor of a product that runs beside theirs.
    let sums_as_factor = "mov.b32 %a0, %s0;";
    assert_eq!(fault(GroupProduct { between: sums_as_factor, ..RIGHT }), FaultKind::InFlight);
    // Registers that were written after the fence, or with none.
    assert_eq!(fault(GroupProduct { fence: "", ..RIGHT }), FaultKind::Unfenced);
    assert_eq!(
        fault(GroupProduct { fence: "wgmma.fence.sync.aligned; mov.b32 %a2, %r1;", ..RIGHT }),
        FaultKind::Unfenced
    );
    let again = "wgmma.fence.sync.aligned; mov.f32 %s0, %f0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%s0, %s1, %s2, %s3}, \
                 {%a0, %a1, %a2, %a3}, %rd5, %p1, 1, 1, 0;";
    assert_eq!(fault(GroupProduct { after: again, ..RIGHT }), FaultKind::Unfenced);
    // What threads wrote and did not publish, or published before they wrote.
    assert!(matches!(fault(GroupProduct { publish: "", ..RIGHT }), FaultKind::Unpublished { .. }));
    let late = "st.shared.u32 [%r3], %r7; bar.sync 0;";
    assert!(matches!(fault(GroupProduct { meet: late, ..RIGHT }), FaultKind::Unpublished { .. }));
    // Another warp's words, with no barrier.
    assert!(matches!(fault(GroupProduct { meet: "", ..RIGHT }), FaultKind::Unwritten { .. } | FaultKind::Race { .. }));
    // Stores to what is being read: with nothing that orders them, and between barriers that a warp passes before it waits.
    let beside = "st.shared.u32 [%r3], %r1;";
    assert!(matches!(fault(GroupProduct { between: beside, ..RIGHT }), FaultKind::Race { .. }));
    let others = "bar.sync 0; xor.b32 %r4, %r3, 128; st.shared.u32 [%r4], %r1; bar.sync 0;";
    assert!(matches!(fault(GroupProduct { between: others, ..RIGHT }), FaultKind::ChangedInFlight { .. }));
    run(GroupProduct { after: "bar.sync 0; st.shared.u32 [%r3], %r1;", ..RIGHT }).unwrap();
}

/// A barrier of the whole grid: a counter at the buffer's end. `order` is how it is counted, `fence` what stands around.
fn grid_barrier(order: &str, load: &str, fence: &str) -> String {
    format!(
        "bar.sync 0; setp.ne.u32 %p1, %r1, 0; @%p1 bra PAST;
         {fence} {order}.u32 %r8, [%rd1+1020], 1;
         SPIN: {load}.u32 %r9, [%rd1+1020]; setp.lt.u32 %p2, %r9, 4; @%p2 bra SPIN; {fence}
         PAST: bar.sync 0;"
    )
}

#[test]
fn a_barrier_of_the_grid_orders_what_it_should() {
    let run = |barrier: &str, cooperative: bool| {
        let bench = Bench::new();
        // Each block stores a word of its own and reads the next block's after the barrier.
        let body = format!(
            "setp.eq.u32 %p3, %r1, 33; mad.wide.u32 %rd5, %r2, 4, %rd1; @%p3 st.global.u32 [%rd5], %r2;
             {barrier}
             add.u32 %r4, %r2, 1; and.b32 %r4, %r4, 3; mad.wide.u32 %rd6, %r4, 4, %rd1; @%p3 ld.global.u32 %r5, [%rd6];
             @%p3 st.global.u32 [%rd5+512], %r5;"
        );
        let checks = Checks { instructions: 3_000_000, ..Checks::default() };
        bench.run_as(&body, [4, 1, 1], [64, 1, 1], checks, cooperative).map(|_| {
            let mut found = [0; 16];
            bench.memory.copy_out(bench.buffer + 512, &mut found).unwrap();
            assert_eq!(found.map(u32::from), [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        })
    };
    let released = grid_barrier("atom.add.release.gpu.global", "ld.acquire.gpu.global", "");
    run(&released, true).unwrap();
    // Blocks one after another never get past it.
    assert!(matches!(run(&released, false).unwrap_err().kind, FaultKind::Endless { .. }));
    run(&grid_barrier("atom.add.global", "ld.volatile.global", "membar.gl;"), true).unwrap();
    run(&grid_barrier("atom.add.relaxed.gpu.global", "ld.relaxed.gpu.global", "fence.acq_rel.gpu;"), true).unwrap();
    for weak in [
        grid_barrier("atom.add.relaxed.gpu.global", "ld.relaxed.gpu.global", ""),
        grid_barrier("atom.add.release.cta.global", "ld.acquire.cta.global", ""),
        grid_barrier("atom.add.global", "ld.volatile.global", "membar.cta;"),
        // Thread 0 waits, but the others do not wait for it.
        released.replace("PAST: bar.sync 0;", "PAST:"),
    ] {
        let fault = run(&weak, true).unwrap_err();
        assert!(matches!(fault.kind, FaultKind::Race { space: Space::Global, .. }), "{weak}: {fault}");
    }
}

#[test]
fn named_barriers_order_those_who_take_part() {
    // Warp 0 fills, warp 1 waits for it at barrier 1, and warp 2 has no part in it.
    let body = "and.b32 %r4, %r1, 31; mov.u32 %r5, tile; mad.lo.u32 %r5, %r4, 4, %r5; shr.u32 %r6, %r1, 5;
        setp.eq.u32 %p1, %r6, 0; setp.eq.u32 %p2, %r6, 1; @%p2 bra WAITS; @!%p1 bra OTHER;
        st.shared.u32 [%r5], %r1; bar.arrive 1, 64; ret;
        WAITS: bar.sync 1, 64; ld.shared.u32 %r7, [%r5]; ret;
        OTHER: ";
    let run = |body: &str| Bench::new().run(body, [2, 1, 1], [96, 1, 1], Checks::default());
    run(body).unwrap();
    let fault = run(&format!("{body} ld.shared.u32 %r7, [%r5];")).unwrap_err();
    assert!(matches!(fault.kind, FaultKind::Race { write: false, other_write: true, .. }), "{fault}");
}

#[test]
fn warps_may_wait_for_what_others_write() {
    let body = "mov.u32 %r5, tile; setp.eq.u32 %p1, %r1, 0; @%p1 st.volatile.shared.u32 [%r5], 0; bar.sync 0;
        setp.ne.u32 %p1, %r1, 32; setp.ne.u32 %p2, %r1, 0; @!%p2 bra WAITS; @%p1 bra OUT;
        st.shared.u32 [%r5+64], 7; membar.cta; st.volatile.shared.u32 [%r5], 1; bra OUT;
        WAITS: ld.volatile.shared.u32 %r6, [%r5]; setp.eq.u32 %p3, %r6, 0; @%p3 bra WAITS; FENCE ld.shared.u32 %r7, [%r5+64];
        OUT:";
    let run = |fence: &str| Bench::new().run(&body.replace("FENCE", fence), [1, 1, 1], [64, 1, 1], Checks::default());
    run("membar.cta;").unwrap();
    let fault = run("").unwrap_err();
    assert!(matches!(fault.kind, FaultKind::Race { .. }), "{fault}");
}

#[test]
fn memory_of_another_device_needs_peer_access() {
    let bench = Bench::new();
    let other = bench.memory.allocate(1, 64).unwrap();
    bench.memory.fill(other, &[0], 64).unwrap();
    let body = format!("mov.u64 %rd5, {other};\nld.global.u32 %r4, [%rd5];");
    let run = || bench.run(&body, [1, 1, 1], [32, 1, 1], Checks::default());
    let fault = run().unwrap_err();
    assert!(matches!(fault.kind, FaultKind::OtherDevice { write: false, owner: 1, by: 0, .. }), "{fault}");
    assert!(bench.memory.set_peer(0, 1, true) && !bench.memory.set_peer(0, 1, true));
    run().unwrap();
    assert!(bench.memory.set_peer(0, 1, false));
    assert!(run().is_err());
}
