// Sums, joins, means and conversions. CPU twin: src/backend/cpu/elementwise.rs.
#include "common.cuh"

// y = a + b. a, b, y: [len]. Grid: any, 256 threads, 16 bytes an access; moves 3 sizeof(T) bytes a value.
template <typename T> __device__ void add(const T* a, const T* b, T* y, i64 len) {
    constexpr int N = per_access<T>();
    for (i64 i = thread_index() * N; i < len; i += thread_count() * N) {
        if (i + N <= len) {
            const Pack<T, N> x = load<T, N>(a + i), z = load<T, N>(b + i);
            Pack<T, N> sum;
#pragma unroll
            for (int j = 0; j < N; ++j) sum.at[j] = from_f32<T>(to_f32(x.at[j]) + to_f32(z.at[j]));
            store<T, N>(y + i, sum);
        } else {
            for (i64 j = i; j < len; ++j) y[j] = from_f32<T>(to_f32(a[j]) + to_f32(b[j]));
        }
    }
}

// to[row * to_stride + i] = from[row * from_stride + i] for i < width. Grid: any, 256 threads; moves 2 sizeof(T) bytes a value.
template <typename T>
__device__ void copy_columns(const T* from, T* to, i64 rows, i64 width, i64 from_stride, i64 to_stride) {
    for (i64 i = thread_index(); i < rows * width; i += thread_count()) {
        const i64 row = i / width, column = i % width;
        to[row * to_stride + column] = from[row * from_stride + column];
    }
}

// How many of a sample's positions are not padding. tokens: [time]; null where all count.
__device__ __forceinline__ i64 counted(const int* tokens, int pad, i64 time) {
    if (tokens == nullptr) return time;
    i64 n = 0;
    for (i64 t = 0; t < time; ++t) n += tokens[t] != pad;
    return n;
}

// y[b] = mean over the positions t of x[b, t] that are not padding. x: [batch, time, width], y: [batch, width].
// Grid: batch * ceil(width / 256) blocks of 256 threads, a thread a column, positions in order.
template <typename T>
__device__ void mean_time(const T* x, T* y, const int* tokens, int pad, i64 batch, i64 time, i64 width) {
    const i64 blocks = (width + 255) / 256, sample = blockIdx.x / blocks;
    const i64 column = blockIdx.x % blocks * 256 + threadIdx.x;
    if (sample >= batch || column >= width) return;
    const int* own = tokens == nullptr ? nullptr : tokens + sample * time;
    const i64 n = counted(own, pad, time);
    float sum = 0.0f;
    for (i64 t = 0; t < time; ++t) {
        if (own == nullptr || own[t] != pad) sum += to_f32(x[(sample * time + t) * width + column]);
    }
    y[sample * width + column] = from_f32<T>(sum * static_cast<float>(1.0 / static_cast<double>(n > 0 ? n : 1)));
}

// dx[b, t] = dy[b] / counted where t is not padding, 0 elsewhere. Grid as above.
template <typename T>
__device__ void mean_time_backward(const T* dy, T* dx, const int* tokens, int pad, i64 batch, i64 time, i64 width) {
    const i64 blocks = (width + 255) / 256, sample = blockIdx.x / blocks;
    const i64 column = blockIdx.x % blocks * 256 + threadIdx.x;
    if (sample >= batch || column >= width) return;
    const int* own = tokens == nullptr ? nullptr : tokens + sample * time;
    const i64 n = counted(own, pad, time);
    const float scale = static_cast<float>(1.0 / static_cast<double>(n > 0 ? n : 1));
    const T value = from_f32<T>(to_f32(dy[sample * width + column]) * scale);
    for (i64 t = 0; t < time; ++t) {
        dx[(sample * time + t) * width + column] = own == nullptr || own[t] != pad ? value : from_f32<T>(0.0f);
    }
}

// to = from, rounded to nearest. Grid: any, 256 threads, 4 values at a time.
template <typename T> __device__ void convert(const float* from, T* to, i64 len) {
    for (i64 i = thread_index() * 4; i < len; i += thread_count() * 4) {
        if (i + 4 <= len) {
            const Pack<float, 4> x = load<float, 4>(from + i);
            Pack<T, 4> y;
#pragma unroll
            for (int j = 0; j < 4; ++j) y.at[j] = from_f32<T>(x.at[j]);
            store<T, 4>(to + i, y);
        } else {
            for (i64 j = i; j < len; ++j) to[j] = from_f32<T>(from[j]);
        }
    }
}

// to = from, exactly. Grid: any, 256 threads, 4 values at a time.
template <typename T> __device__ void widen(const T* from, float* to, i64 len) {
    for (i64 i = thread_index() * 4; i < len; i += thread_count() * 4) {
        if (i + 4 <= len) {
            const Pack<T, 4> x = load<T, 4>(from + i);
            Pack<float, 4> y;
#pragma unroll
            for (int j = 0; j < 4; ++j) y.at[j] = to_f32(x.at[j]);
            store<float, 4>(to + i, y);
        } else {
            for (i64 j = i; j < len; ++j) to[j] = to_f32(from[j]);
        }
    }
}

// x = x / divisor, correctly rounded. Grid: any, 256 threads.
extern "C" __global__ void __launch_bounds__(256) divide(float* x, float divisor, i64 len) {
    for (i64 i = thread_index(); i < len; i += thread_count()) x[i] = __fdiv_rn(x[i], divisor);
}

#define DEFINE(SUFFIX, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) add_##SUFFIX(const T* a, const T* b, T* y, i64 len) {            \
        add(a, b, y, len);                                                                                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        copy_columns_##SUFFIX(const T* from, T* to, i64 rows, i64 width, i64 from_stride, i64 to_stride) {             \
        copy_columns(from, to, rows, width, from_stride, to_stride);                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        mean_time_##SUFFIX(const T* x, T* y, const int* tokens, int pad, i64 batch, i64 time, i64 width) {             \
        mean_time(x, y, tokens, pad, batch, time, width);                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        mean_time_backward_##SUFFIX(const T* dy, T* dx, const int* tokens, int pad, i64 batch, i64 time, i64 width) {  \
        mean_time_backward(dy, dx, tokens, pad, batch, time, width);                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) convert_##SUFFIX(const float* from, T* to, i64 len) {            \
        convert(from, to, len);                                                                                        \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) widen_##SUFFIX(const T* from, float* to, i64 len) {              \
        widen(from, to, len);                                                                                          \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
