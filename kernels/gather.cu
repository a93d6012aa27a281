// Batches gathered from a data set that lies on the device. CPU twin: src/backend/cpu/gather.rs.
#include "common.cuh"

// to[sample] = from[rows[sample]]: `width` values of T a sample, rows `stride` apart in `from`.
template <typename T>
__device__ void copy_row(const T* from, T* to, i64 sample, i64 row, i64 stride, i64 width) {
    from += row * stride;
    to += sample * width;
    const i64 step = static_cast<i64>(gridDim.y) * blockDim.x;
    for (i64 i = static_cast<i64>(blockIdx.y) * blockDim.x + threadIdx.x; i < width; i += step) to[i] = from[i];
}

// The inputs and the targets of gridDim.x samples. rows: [samples]; strides and widths count accesses, of A bytes for
// inputs and of B bytes for targets; every address is a multiple of them. Grid: a row of blocks a sample, any threads.
// Moves 2 bytes a byte of the batch.
template <typename A, typename B>
__device__ void gather(const u32* rows, const A* input_from, A* input_to, i64 input_stride, i64 input_width,
                       const B* target_from, B* target_to, i64 target_stride, i64 target_width) {
    const i64 sample = blockIdx.x, row = rows[sample];
    copy_row(input_from, input_to, sample, row, input_stride, input_width);
    copy_row(target_from, target_to, sample, row, target_stride, target_width);
}

typedef Pack<u32, 4> u128;

#define DEFINE(NAME, A, B)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        NAME(const u32* rows, const A* input_from, A* input_to, i64 input_stride, i64 input_width,                     \
             const B* target_from, B* target_to, i64 target_stride, i64 target_width) {                                \
        gather<A, B>(rows, input_from, input_to, input_stride, input_width, target_from, target_to, target_stride,     \
                     target_width);                                                                                    \
    }
DEFINE(gather_16_16, u128, u128)
DEFINE(gather_16_4, u128, u32)
DEFINE(gather_16_2, u128, u16)
DEFINE(gather_4_16, u32, u128)
DEFINE(gather_4_4, u32, u32)
DEFINE(gather_4_2, u32, u16)
DEFINE(gather_2_16, u16, u128)
DEFINE(gather_2_4, u16, u32)
DEFINE(gather_2_2, u16, u16)
#undef DEFINE
