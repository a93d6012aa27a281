// Pooling over windows of planes. CPU twin: src/backend/cpu/pool.rs.
//
// Blocks are (threads a plane, planes a block), 256 threads in all; x counts the values of a plane, so that small planes share a
// block and no index needs a division of 64 bits. Grid: ceil(planes / planes a block).
#include "common.cuh"

// Sizes of a pooling; x: [planes, height, width], y: [planes, out_height, out_width].
struct PoolShape {
    int height, width, out_height, out_width;
    int kernel_height, kernel_width, stride_height, stride_width, pad_height, pad_width;
};
static_assert(sizeof(PoolShape) == 40, "as the host's");

// First and past-last position of the input within window `out` of one side.
struct Span { int first, end; };
__device__ __forceinline__ Span window(int out, int stride, int pad, int kernel, int side) {
    const int start = out * stride - pad;
    return Span{max(start, 0), min(start + kernel, side)};
}
// First and past-last window that holds position `at` of one side.
__device__ __forceinline__ Span windows(int at, int stride, int pad, int kernel, int out_side) {
    const int padded = at + pad;
    return Span{padded < kernel ? 0 : (padded - kernel) / stride + 1, min(padded / stride + 1, out_side)};
}

// This thread's plane; past the last one for threads without any.
__device__ __forceinline__ i64 plane_index() { return static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y; }

// y = the largest value of each window, positions = where it stands in its plane: the first of equals; a NaN is the largest.
// Reads x once (overlaps from the caches), writes sizeof(T) + 4 bytes a window.
template <typename T> __device__ void max_pool(const T* x, T* y, int* positions, i64 planes, PoolShape s) {
    const i64 plane = plane_index();
    if (plane >= planes) return;
    const int out = s.out_height * s.out_width;
    x += plane * s.height * s.width;
    for (int i = threadIdx.x; i < out; i += blockDim.x) {
        const int oy = i / s.out_width, ox = i - oy * s.out_width;
        const Span rows = window(oy, s.stride_height, s.pad_height, s.kernel_height, s.height);
        const Span columns = window(ox, s.stride_width, s.pad_width, s.kernel_width, s.width);
        float best = -__int_as_float(0x7f800000);
        int at = rows.first * s.width + columns.first;
        for (int iy = rows.first; iy < rows.end; ++iy) {
            for (int ix = columns.first; ix < columns.end; ++ix) {
                const float value = to_f32(x[iy * s.width + ix]);
                if (value > best || (value != value && best == best)) {
                    best = value;
                    at = iy * s.width + ix;
                }
            }
        }
        y[plane * out + i] = from_f32<T>(best);
        positions[plane * out + i] = at;
    }
}

// dx = the sum of dy over the windows whose largest value stood here, windows in order: a gather, so that no two threads write
// one value. Reads dy and positions once (overlaps from the caches), writes dx.
template <typename T>
__device__ void max_pool_backward(const T* dy, const int* positions, T* dx, i64 planes, PoolShape s) {
    const i64 plane = plane_index();
    if (plane >= planes) return;
    const int in = s.height * s.width, out = s.out_height * s.out_width;
    dy += plane * out;
    positions += plane * out;
    for (int i = threadIdx.x; i < in; i += blockDim.x) {
        const int iy = i / s.width, ix = i - iy * s.width;
        const Span rows = windows(iy, s.stride_height, s.pad_height, s.kernel_height, s.out_height);
        const Span columns = windows(ix, s.stride_width, s.pad_width, s.kernel_width, s.out_width);
        float total = 0.0f;
        for (int oy = rows.first; oy < rows.end; ++oy) {
            for (int ox = columns.first; ox < columns.end; ++ox) {
                const int window = oy * s.out_width + ox;
                if (positions[window] == i) total += to_f32(dy[window]);
            }
        }
        dx[plane * in + i] = from_f32<T>(total);
    }
}

// y = scale * the sum over each window; `scale` is 1 / (values of a whole window). Traffic as max_pool, without positions.
template <typename T> __device__ void average_pool(const T* x, T* y, float scale, i64 planes, PoolShape s) {
    const i64 plane = plane_index();
    if (plane >= planes) return;
    const int out = s.out_height * s.out_width;
    x += plane * s.height * s.width;
    for (int i = threadIdx.x; i < out; i += blockDim.x) {
        const int oy = i / s.out_width, ox = i - oy * s.out_width;
        const Span rows = window(oy, s.stride_height, s.pad_height, s.kernel_height, s.height);
        const Span columns = window(ox, s.stride_width, s.pad_width, s.kernel_width, s.width);
        float total = 0.0f;
        for (int iy = rows.first; iy < rows.end; ++iy) {
            for (int ix = columns.first; ix < columns.end; ++ix) total += to_f32(x[iy * s.width + ix]);
        }
        y[plane * out + i] = from_f32<T>(total * scale);
    }
}

// average_pool where one window is the plane: a warp a plane. x: [planes, len], y: [planes]. Blocks of (32, 8).
template <typename T> __device__ void average_plane(const T* x, T* y, float scale, i64 planes, int len) {
    const i64 plane = plane_index();
    if (plane >= planes) return;
    x += plane * len;
    float total = 0.0f;
    for (int i = threadIdx.x; i < len; i += 32) total += to_f32(x[i]);
    total = warp_sum(total);
    if (threadIdx.x == 0) y[plane] = from_f32<T>(total * scale);
}

// dx = scale * the sum of dy over the windows that hold the position, windows in order.
template <typename T> __device__ void average_pool_backward(const T* dy, T* dx, float scale, i64 planes, PoolShape s) {
    const i64 plane = plane_index();
    if (plane >= planes) return;
    const int in = s.height * s.width;
    dy += plane * s.out_height * s.out_width;
    for (int i = threadIdx.x; i < in; i += blockDim.x) {
        const int iy = i / s.width, ix = i - iy * s.width;
        const Span rows = windows(iy, s.stride_height, s.pad_height, s.kernel_height, s.out_height);
        const Span columns = windows(ix, s.stride_width, s.pad_width, s.kernel_width, s.out_width);
        float total = 0.0f;
        for (int oy = rows.first; oy < rows.end; ++oy) {
            for (int ox = columns.first; ox < columns.end; ++ox) total += to_f32(dy[oy * s.out_width + ox]) * scale;
        }
        dx[plane * in + i] = from_f32<T>(total);
    }
}

#define DEFINE(SUFFIX, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        max_pool_##SUFFIX(const T* x, T* y, int* positions, i64 planes, PoolShape shape) {                             \
        max_pool(x, y, positions, planes, shape);                                                                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        max_pool_backward_##SUFFIX(const T* dy, const int* positions, T* dx, i64 planes, PoolShape shape) {            \
        max_pool_backward(dy, positions, dx, planes, shape);                                                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        average_pool_##SUFFIX(const T* x, T* y, float scale, i64 planes, PoolShape shape) {                            \
        average_pool(x, y, scale, planes, shape);                                                                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        average_plane_##SUFFIX(const T* x, T* y, float scale, i64 planes, int len) {                                   \
        average_plane(x, y, scale, planes, len);                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        average_pool_backward_##SUFFIX(const T* dy, T* dx, float scale, i64 planes, PoolShape shape) {                 \
        average_pool_backward(dy, dx, scale, planes, shape);                                                           \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
