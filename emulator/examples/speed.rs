//! How many PTX instructions a second the emulated device executes on one core, every check on.
//!
//! `NVCC=.. cargo run --release -p warpstep-emulator --example speed`, from the root of the repository; nvcc compiles the kernels.
//! An instruction is one of one thread: a whole warp's counts as 32.

use std::process::Command;
use std::sync::Arc;

use warpstep_emulator::counts::Counts;
use warpstep_emulator::exec::{Checks, Launch, launch};
use warpstep_emulator::memory::Memory;
use warpstep_emulator::ptx::{Loaded, Module};

/// Products of 16 by 8 by 16 from tiles that were copied to shared memory, 256 a warp.
const MATRIX: &str = "
.version 9.0
.target sm_80
.address_size 64
.visible .entry products(.param .u64 from, .param .u64 to)
{
.reg .pred %p<2>; .reg .b32 %r<24>; .reg .b64 %rd<8>; .reg .f32 %f<8>; .shared .align 16 .b8 tile[8192];
ld.param.u64 %rd1, [from]; ld.param.u64 %rd2, [to]; mov.u32 %r1, %tid.x; mov.u32 %r2, tile; mov.u32 %r3, %ctaid.x;
mad.wide.u32 %rd3, %r1, 16, %rd1; mad.lo.u32 %r4, %r1, 16, %r2;
cp.async.cg.shared.global [%r4], [%rd3], 16; cp.async.cg.shared.global [%r4+4096], [%rd3+4096], 16;
cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
and.b32 %r5, %r1, 31; mad.lo.u32 %r6, %r5, 16, %r2;
mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1; mov.u32 %r7, 0;
AGAIN:
and.b32 %r8, %r7, 7; mad.lo.u32 %r9, %r8, 512, %r6;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r9];
ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r14, %r15}, [%r9+4096];
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f1, %f2, %f3, %f4};
add.u32 %r7, %r7, 1; setp.lt.u32 %p1, %r7, 256; @%p1 bra AGAIN;
mad.lo.u32 %r16, %r3, 256, %r1; mad.wide.u32 %rd4, %r16, 16, %rd2;
st.global.v4.f32 [%rd4], {%f1, %f2, %f3, %f4};
ret;
}";

struct Bench {
    memory: Memory,
}

impl Bench {
    fn filled(&self, bytes: usize, pattern: &[u8]) -> u64 {
        let address = self.memory.allocate(0, bytes).expect("memory");
        self.memory.fill(address, pattern, bytes / pattern.len()).expect("a buffer");
        address
    }

    fn load(&self, text: &str) -> Loaded {
        Arc::new(Module::parse(text).expect("PTX")).instantiate(&self.memory, 0).expect("memory")
    }

    /// Launches until a second of a core has passed and prints the speed.
    fn time(&self, loaded: &Loaded, kernel: &str, grid: u32, block: u32, params: &[u8]) {
        let launched = Launch {
            grid: [grid, 1, 1],
            block: [block, 1, 1],
            dynamic_shared: 0,
            params,
            cooperative: false,
            checks: Checks::default(),
        };
        let mut counts = Counts::default();
        let start = cpu_seconds();
        while cpu_seconds() - start < 1.0 {
            launch(loaded, kernel, &launched, &self.memory, &mut counts).unwrap_or_else(|fault| panic!("{fault}"));
        }
        let seconds = cpu_seconds() - start;
        let speed = counts.total() as f64 / seconds / 1e6;
        println!("{kernel:32} {speed:8.1} million instructions/s, {} launches", counts.launches);
    }
}

fn compile(source: &str) -> String {
    let nvcc = std::env::var("NVCC").unwrap_or_else(|_| "nvcc".to_owned());
    let to = std::env::temp_dir().join(format!("warpstep-speed-{}.ptx", std::process::id()));
    let flags = ["-ptx", "-arch=compute_80", "-std=c++17", "-O3", "-fmad=false", "-o"];
    let done = Command::new(&nvcc).args(flags).arg(&to).arg(source).status();
    assert!(done.is_ok_and(|status| status.success()), "{nvcc} does not compile {source}");
    let text = std::fs::read_to_string(&to).expect("nvcc's PTX");
    std::fs::remove_file(&to).expect("nvcc's PTX");
    text
}

/// Seconds of a core that this thread has had: what else the machine does counts less.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: room for a time.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn main() {
    let bench = Bench { memory: Memory::new(1 << 30) };
    let len = 1usize << 20;
    let one = 1.0f32.to_le_bytes();
    let arrays: Vec<u64> = (0..4).map(|_| bench.filled(4 * len, &one)).collect();
    let zeros = bench.filled(1 << 16, &[0]);
    // Groups and tensors by blocks of 128: all 0. Constants of a step: ones. The divisor, and the learning rate: 1.
    let ones = bench.filled(1 << 12, &one);
    let host = bench.filled(64, &1.0f64.to_le_bytes());
    let update = bench.load(&compile("kernels/update.cu"));
    // `Pass` of kernels/update_plan.cuh.
    let bound = u64::from(f32::INFINITY.to_bits());
    let pass = [zeros, zeros, zeros, ones, 0, ones, zeros, 0, host, zeros, len as u64, 0, bound];
    for rule in ["sgd", "momentum", "adam"] {
        let params: Vec<u64> = [arrays[0], arrays[1], 0, arrays[2], arrays[3]].into_iter().chain(pass).collect();
        bench.time(&update, &format!("update_{rule}_f32_f32_f32"), 64, 256, &words(&params));
    }
    let pieces: Vec<u64> = (0..len as u64 / 4096).flat_map(|piece| [piece * 4096, 4096]).collect();
    let list = bench.filled(8 * pieces.len(), &[0]);
    bench.memory.copy_in(list, &words(&pieces)).expect("pieces");
    let count = (len / 4096) as u64;
    let clip = [bound, 1.0f64.to_bits(), 1.0f64.to_bits()];
    let squares = bench.filled(8 * len / 4096, &[0]);
    let params: Vec<u64> = [arrays[1], list, 0, host].into_iter().chain(clip).chain([squares, zeros]).collect();
    bench.time(&update, "norm_pieces_f32", count as u32, 256, &words(&params));
    let loss = bench.load(&compile("kernels/loss.cu"));
    let (rows, classes) = (512u64, 1000u64);
    let counted = bench.filled(8, &[1, 0, 0, 0, 0, 0, 0, 0]);
    let step = bench.filled(32, &one);
    let ignore = u64::from(u32::MAX) << 32;
    let [losses, rights] = [(); 2].map(|()| bench.filled(4 * rows as usize, &[0]));
    let params = [arrays[0], zeros, arrays[1], counted, losses, rights, rows, classes, ignore, step];
    bench.time(&loss, "cross_entropy_narrow_f32", rows.div_ceil(8) as u32, 256, &words(&params));
    bench.time(&loss, "cross_entropy_wide_f32", rows as u32, 256, &words(&params));
    let halves = bench.filled(8192, &[0x80, 0x3f]);
    let matrix = bench.load(MATRIX);
    bench.time(&matrix, "products", 16, 256, &words(&[halves, arrays[3]]));
}
