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
        let launched = Launch { grid, block, dynamic_shared: 0, params: &params, cooperative: false, checks };
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
    assert_eq!(run("st.shared.u32 [%r3], %r1;").bank_conflicts, 0);
    // A stride of 8 words: 8 lanes on each of 4 banks.
    let conflicts = run("mov.u32 %r5, tile; mad.lo.u32 %r4, %r1, 32, %r5;\nst.shared.u32 [%r4], %r1;");
    assert_eq!((conflicts.shared_written, conflicts.bank_conflicts), (128, 7));
}
