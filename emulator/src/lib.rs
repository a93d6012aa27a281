//! An emulated CUDA device: executes PTX, instruction by instruction, where there is no GPU.
