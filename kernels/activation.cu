// Functions of single values, and SwiGLU. CPU twin: src/backend/cpu/activation.rs.
#include "activation.cuh"

// y = f(x). x, y: [len], y may be x. Grid: any, 256 threads, 16 bytes an access; moves 2 sizeof(T) bytes a value.
template <typename T> __device__ void activation(const T* x, T* y, int kind, i64 len) {
    constexpr int N = per_access<T>();
    for (i64 i = thread_index() * N; i < len; i += thread_count() * N) {
        if (i + N <= len) {
            Pack<T, N> values = load<T, N>(x + i);
#pragma unroll
            for (int j = 0; j < N; ++j) values.at[j] = from_f32<T>(value_of(kind, to_f32(values.at[j])));
            store<T, N>(y + i, values);
        } else {
            for (i64 j = i; j < len; ++j) y[j] = from_f32<T>(value_of(kind, to_f32(x[j])));
        }
    }
}

// dx = dy f'(x). x, dy, dx: [len], dx may be dy. Grid: any, 256 threads, 16 bytes an access; moves 3 sizeof(T) bytes a value.
template <typename T> __device__ void activation_backward(const T* x, const T* dy, T* dx, int kind, i64 len) {
    constexpr int N = per_access<T>();
    for (i64 i = thread_index() * N; i < len; i += thread_count() * N) {
        if (i + N <= len) {
            const Pack<T, N> values = load<T, N>(x + i);
            Pack<T, N> slopes = load<T, N>(dy + i);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                slopes.at[j] = from_f32<T>(slope_of(kind, to_f32(values.at[j]), to_f32(slopes.at[j])));
            }
            store<T, N>(dx + i, slopes);
        } else {
            for (i64 j = i; j < len; ++j) dx[j] = from_f32<T>(slope_of(kind, to_f32(x[j]), to_f32(dy[j])));
        }
    }
}

// y = silu(first half of x) * second half, row by row. x: [rows, 2 width], y: [rows, width]. Grid: any, 256 threads.
template <typename T> __device__ void swiglu(const T* x, T* y, i64 rows, i64 width) {
    for (i64 i = thread_index(); i < rows * width; i += thread_count()) {
        const i64 at = i / width * 2 * width + i % width;
        const float gate = to_f32(x[at]);
        y[i] = from_f32<T>(gate * sigmoid(gate) * to_f32(x[at + width]));
    }
}

// Its gradient. x, dx: [rows, 2 width], dy: [rows, width]. Grid: any, 256 threads.
template <typename T> __device__ void swiglu_backward(const T* x, const T* dy, T* dx, i64 rows, i64 width) {
    for (i64 i = thread_index(); i < rows * width; i += thread_count()) {
        const i64 at = i / width * 2 * width + i % width;
        const float gate = to_f32(x[at]), up = to_f32(x[at + width]), d = to_f32(dy[i]);
        dx[at] = from_f32<T>(d * up * silu_slope(gate));
        dx[at + width] = from_f32<T>(d * gate * sigmoid(gate));
    }
}

#define DEFINE(SUFFIX, T)                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                      \
        activation_##SUFFIX(const T* x, T* y, int kind, i64 len) {                                         \
        activation(x, y, kind, len);                                                                       \
    }                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                      \
        activation_backward_##SUFFIX(const T* x, const T* dy, T* dx, int kind, i64 len) {                  \
        activation_backward(x, dy, dx, kind, len);                                                         \
    }                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                      \
        swiglu_##SUFFIX(const T* x, T* y, i64 rows, i64 width) {                                           \
        swiglu(x, y, rows, width);                                                                         \
    }                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                      \
        swiglu_backward_##SUFFIX(const T* x, const T* dy, T* dx, i64 rows, i64 width) {                    \
        swiglu_backward(x, dy, dx, rows, width);                                                           \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
