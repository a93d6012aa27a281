// What cuDNN leaves of a convolution: the bias, its gradient, and the weights' gradient in f32.
// CPU twin: src/backend/cpu/conv.rs.
#include "channel.cuh"

// y[sample, filter, position] += bias[filter]. Grid (filters, parts) of channel.cuh. Moves 2 sizeof(T) bytes a value.
template <typename T, int V> __device__ void add_bias(T* y, const T* bias, ChannelShape s) {
    const float b = to_f32(bias[blockIdx.x]);
    for_part<V>(s, [&](i64 at) {
        Pack<T, V> values = load<T, V>(y + at);
#pragma unroll
        for (int j = 0; j < V; ++j) values.at[j] = from_f32<T>(to_f32(values.at[j]) + b);
        store<T, V>(y + at, values);
    });
}

// partial[part, filter] = sum of dy over the part; `sum_rows_finish` (linear.cu) adds the parts in order. partial: [parts,
// filters]. Grid (filters, parts) of channel.cuh. Moves sizeof(T) bytes a value.
template <typename T, int V> __device__ void sum_filters_partial(const T* dy, float* partial, ChannelShape s) {
    __shared__ float scratch[32];
    float sum = 0.0f;
    for_part<V>(s, [&](i64 at) {
        const Pack<T, V> values = load<T, V>(dy + at);
#pragma unroll
        for (int j = 0; j < V; ++j) sum += to_f32(values.at[j]);
    });
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) partial[static_cast<i64>(blockIdx.y) * s.channels + blockIdx.x] = sum;
}

// gradient (+)= dw, in f32. dw, gradient: [len], both aligned to 16 bytes. Grid: any, 256 threads. Moves sizeof(T) + 4 bytes a
// value, 4 more where it adds.
template <typename T> __device__ void widen_gradient(const T* dw, float* gradient, i64 len, int add) {
    for (i64 i = thread_index() * 4; i < len; i += thread_count() * 4) {
        if (i + 4 <= len) {
            const Pack<T, 4> values = load<T, 4>(dw + i);
            Pack<float, 4> sums = add ? load<float, 4>(gradient + i) : Pack<float, 4>{};
#pragma unroll
            for (int j = 0; j < 4; ++j) sums.at[j] += to_f32(values.at[j]);
            store<float, 4>(gradient + i, sums);
        } else {
            for (i64 j = i; j < len; ++j) gradient[j] = add ? gradient[j] + to_f32(dw[j]) : to_f32(dw[j]);
        }
    }
}

#define DEFINE_WIDTH(WIDTH, V, SUFFIX, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        conv_add_bias_##WIDTH##_##SUFFIX(T* y, const T* bias, ChannelShape shape) {                                    \
        add_bias<T, V>(y, bias, shape);                                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        conv_sum_filters_partial_##WIDTH##_##SUFFIX(const T* dy, float* partial, ChannelShape shape) {                 \
        sum_filters_partial<T, V>(dy, partial, shape);                                                                 \
    }
FOR_EACH_STORAGE(FOR_EACH_WIDTH)
#undef DEFINE_WIDTH

// For the types that cuDNN leaves the gradient in; in f32 it writes the gradient itself.
#define DEFINE(SUFFIX, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        conv_widen_gradient_##SUFFIX(const T* dw, float* gradient, i64 len, int add) {                                 \
        widen_gradient(dw, gradient, len, add);                                                                        \
    }
DEFINE(bf16, bf16)
DEFINE(f16, f16)
#undef DEFINE
