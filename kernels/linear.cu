// The gradient of a bias: sums over rows in a fixed order. CPU twin: src/backend/cpu/linear.rs.
#include "common.cuh"

// partial[part, column] = sum of x over the rows of part `blockIdx.y`: rows part, part + parts, .. in eights that 8 warps take
// in turn. x: [rows, width], partial: [gridDim.y, width]. Grid: (ceil(width / 32), parts), 256 threads: 32 columns by 8 rows.
// Moves sizeof(T) bytes a value.
template <typename T> __device__ void sum_rows_partial(const T* x, float* partial, i64 rows, i64 width) {
    __shared__ float sums[8][33];
    const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
    const i64 column = static_cast<i64>(blockIdx.x) * 32 + lane;
    const i64 stride = static_cast<i64>(gridDim.y) * 8;
    float sum = 0.0f;
    if (column < width) {
        for (i64 row = static_cast<i64>(blockIdx.y) * 8 + slice; row < rows; row += stride) {
            sum += to_f32(x[row * width + column]);
        }
    }
    sums[slice][lane] = sum;
    __syncthreads();
    if (slice == 0 && column < width) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) total += sums[i][lane];
        partial[static_cast<i64>(blockIdx.y) * width + column] = total;
    }
}

// sums[column] (+)= sum over the parts, in order. partial: [parts, width], sums: [width]. Grid: ceil(width / 256) blocks of 256.
extern "C" __global__ void __launch_bounds__(256)
    sum_rows_finish(const float* partial, float* sums, i64 parts, i64 width, int add) {
    const i64 column = thread_index();
    if (column >= width) return;
    float total = 0.0f;
    for (i64 part = 0; part < parts; ++part) total += partial[part * width + column];
    sums[column] = add ? sums[column] + total : total;
}

#define DEFINE(SUFFIX, T)                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                              \
        sum_rows_partial_##SUFFIX(const T* x, float* partial, i64 rows, i64 width) {               \
        sum_rows_partial(x, partial, rows, width);                                                 \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
