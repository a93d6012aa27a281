//! An operand of cuDNN that nothing wrote. Alone in its program: a fault breaks the device for the process.

#[path = "common/cudnn.rs"]
mod cudnn;

use cudnn::*;
use warpstep_emulator::driver::last_fault;
use warpstep_emulator::memory::Memory;

#[test]
fn an_operand_that_nothing_wrote_is_found() {
    let sizes = Sizes {
        batch: 1,
        channels: 1,
        input: [4, 4],
        filters: 1,
        kernel: [3, 3],
        stride: [1, 1],
        padding: [1, 1],
        groups: 1,
    };
    let described = Described::new(&sizes, FLOAT, FMA_MATH);
    let [x, w, y] = [allocate(64), allocate(36), allocate(64)];
    Memory::global().fill(x, &[0], 64).unwrap();
    // All but the last weight.
    Memory::global().fill(w, &[0], 32).unwrap();
    assert_eq!(described.run(0, 0, (0, 0), [x, w, y], [1.0, 0.0]), EXECUTION_FAILED);
    let fault = last_fault().expect("a fault that is told");
    assert!(fault.contains("36"), "{fault}");
}
