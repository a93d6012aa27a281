// Batch normalization over [batch, channels, spatial]. CPU twin: src/backend/cpu/batch_norm.rs.
//
// Every launch has the grid (channels, parts) of channel.cuh. A block leaves what it found of its part in scratch; in the next
// launch every block merges the parts of its channel, one a lane and so in the same order everywhere, and writes its own. So x is
// read twice, the second time from L2 where it fits.
#include "channel.cuh"

// What is known of some values: how many, their mean, the sum of squared differences from it.
struct Moments {
    float count, mean, squares;
};

// Chan, Golub and LeVeque (1979): of the values of both.
__device__ __forceinline__ Moments merge(Moments a, Moments b) {
    const float count = a.count + b.count;
    if (count == 0.0f) return a;
    const float delta = b.mean - a.mean, share = b.count / count;
    return Moments{count, fmaf(delta, share, a.mean), a.squares + b.squares + delta * (delta * (a.count * share))};
}

// Merges over a warp, lower lanes first on both sides, so that all lanes get the same bits.
__device__ __forceinline__ Moments merge_warp(Moments own) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        Moments other;
        other.count = __shfl_xor_sync(0xffffffffu, own.count, offset);
        other.mean = __shfl_xor_sync(0xffffffffu, own.mean, offset);
        other.squares = __shfl_xor_sync(0xffffffffu, own.squares, offset);
        own = threadIdx.x & offset ? merge(other, own) : merge(own, other);
    }
    return own;
}

// partial[channel, part] = moments of x over the part. Moves sizeof(T) bytes a value.
template <typename T, int V>
__device__ void statistics(const T* x, Moments* partial, ChannelShape s) {
    __shared__ Moments warps[8];
    Moments own{0.0f, 0.0f, 0.0f};
    for_part<V>(s, [&](i64 at) {
        const Pack<T, V> values = load<T, V>(x + at);
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int j = 0; j < V; ++j) sum += to_f32(values.at[j]);
        const float mean = sum * (1.0f / V);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float difference = to_f32(values.at[j]) - mean;
            squares = fmaf(difference, difference, squares);
        }
        own = merge(own, Moments{static_cast<float>(V), mean, squares});
    });
    own = merge_warp(own);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    own = merge_warp(threadIdx.x < 8 ? warps[threadIdx.x] : Moments{0.0f, 0.0f, 0.0f});
    if (threadIdx.x == 0) partial[static_cast<i64>(blockIdx.x) * gridDim.y + blockIdx.y] = own;
}

// y = (x - mean) * reciprocal_std * weight + bias; mean, reciprocal_std `=`; running statistics moved by `momentum`, the
// variance with count - 1 in its place. Moves 2 sizeof(T) bytes a value.
template <typename T, int V>
__device__ void normalize(const T* x, const Moments* partial, const T* weight, const T* bias, T* y, float* mean,
                          float* reciprocal_std, float* running_mean, float* running_var, ChannelShape s, float epsilon,
                          float momentum) {
    const u32 lane = threadIdx.x % 32, channel = blockIdx.x;
    const Moments* parts = partial + static_cast<i64>(channel) * gridDim.y;
    const Moments whole = merge_warp(lane < gridDim.y ? parts[lane] : Moments{0.0f, 0.0f, 0.0f});
    const float variance = whole.squares / whole.count, rstd = 1.0f / sqrtf(variance + epsilon);
    if (blockIdx.y == 0 && threadIdx.x == 0) {
        mean[channel] = whole.mean;
        reciprocal_std[channel] = rstd;
        const float unbiased = whole.squares / fmaxf(whole.count - 1.0f, 1.0f), kept = 1.0f - momentum;
        running_mean[channel] = running_mean[channel] * kept + momentum * whole.mean;
        running_var[channel] = running_var[channel] * kept + momentum * unbiased;
    }
    const float scale = rstd * to_f32(weight[channel]), shift = to_f32(bias[channel]);
    for_part<V>(s, [&](i64 at) {
        Pack<T, V> values = load<T, V>(x + at);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            values.at[j] = from_f32<T>(fmaf(to_f32(values.at[j]) - whole.mean, scale, shift));
        }
        store<T, V>(y + at, values);
    });
}

// y = (x - running_mean) / sqrt(running_var + epsilon) * weight + bias. Moves 2 sizeof(T) bytes a value.
template <typename T, int V>
__device__ void inference(const T* x, const T* weight, const T* bias, const float* running_mean,
                          const float* running_var, T* y, ChannelShape s, float epsilon) {
    const u32 channel = blockIdx.x;
    const float scale = to_f32(weight[channel]) / sqrtf(running_var[channel] + epsilon);
    const float mean = running_mean[channel], shift = to_f32(bias[channel]);
    for_part<V>(s, [&](i64 at) {
        Pack<T, V> values = load<T, V>(x + at);
#pragma unroll
        for (int j = 0; j < V; ++j) values.at[j] = from_f32<T>(fmaf(to_f32(values.at[j]) - mean, scale, shift));
        store<T, V>(y + at, values);
    });
}

// The sums of dy and of dy * (x - mean) * reciprocal_std over some values.
struct Slopes {
    float bias, weight;
};

// partial[channel, part] = the slopes over the part. Moves 2 sizeof(T) bytes a value.
template <typename T, int V>
__device__ void slopes(const T* x, const T* dy, const float* mean, const float* reciprocal_std, Slopes* partial,
                       ChannelShape s) {
    __shared__ float scratch[32];
    const float m = mean[blockIdx.x], rstd = reciprocal_std[blockIdx.x];
    float bias = 0.0f, weight = 0.0f;
    for_part<V>(s, [&](i64 at) {
        const Pack<T, V> values = load<T, V>(x + at), gradients = load<T, V>(dy + at);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float d = to_f32(gradients.at[j]);
            bias += d;
            weight = fmaf(d, (to_f32(values.at[j]) - m) * rstd, weight);
        }
    });
    bias = block_sum(bias, scratch);
    weight = block_sum(weight, scratch);
    if (threadIdx.x == 0) partial[static_cast<i64>(blockIdx.x) * gridDim.y + blockIdx.y] = Slopes{bias, weight};
}

// dweight, dbias (+)= the channel's slopes over all `parts`; dx = weight * reciprocal_std * (dy - mean of dy -
// (x - mean) * reciprocal_std * mean of slopes), where it is not null. Moves 3 sizeof(T) bytes a value. Without dx, the grid is
// (channels, 1).
template <typename T, int V>
__device__ void backward(const T* x, const T* dy, const float* mean, const float* reciprocal_std,
                         const Slopes* partial, const T* weight, T* dx, float* dweight, float* dbias, ChannelShape s,
                         u32 parts, int add_weight, int add_bias) {
    const u32 lane = threadIdx.x % 32, channel = blockIdx.x;
    const Slopes own = lane < parts ? partial[static_cast<i64>(channel) * parts + lane] : Slopes{0.0f, 0.0f};
    const Slopes whole{warp_sum(own.bias), warp_sum(own.weight)};
    if (blockIdx.y == 0 && threadIdx.x == 0) {
        dweight[channel] = add_weight ? dweight[channel] + whole.weight : whole.weight;
        dbias[channel] = add_bias ? dbias[channel] + whole.bias : whole.bias;
    }
    if (dx == nullptr) return;
    const float inverse = 1.0f / static_cast<float>(s.count), m = mean[channel], rstd = reciprocal_std[channel];
    const float scale = to_f32(weight[channel]) * rstd, level = whole.bias * inverse, slope = whole.weight * inverse * rstd;
    for_part<V>(s, [&](i64 at) {
        const Pack<T, V> values = load<T, V>(x + at);
        Pack<T, V> gradients = load<T, V>(dy + at);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float centered = to_f32(values.at[j]) - m;
            gradients.at[j] = from_f32<T>(scale * fmaf(-centered, slope, to_f32(gradients.at[j]) - level));
        }
        store<T, V>(dx + at, gradients);
    });
}

#define DEFINE_WIDTH(WIDTH, V, SUFFIX, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        batch_norm_statistics_##WIDTH##_##SUFFIX(const T* x, Moments* partial, ChannelShape shape) {                     \
        statistics<T, V>(x, partial, shape);                                                                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) batch_norm_normalize_##WIDTH##_##SUFFIX(                         \
        const T* x, const Moments* partial, const T* weight, const T* bias, T* y, float* mean,                         \
        float* reciprocal_std, float* running_mean, float* running_var, ChannelShape shape, float epsilon,               \
        float momentum) {                                                                                              \
        normalize<T, V>(x, partial, weight, bias, y, mean, reciprocal_std, running_mean, running_var, shape, epsilon,  \
                        momentum);                                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) batch_norm_inference_##WIDTH##_##SUFFIX(                         \
        const T* x, const T* weight, const T* bias, const float* running_mean, const float* running_var, T* y,         \
        ChannelShape shape, float epsilon) {                                                                             \
        inference<T, V>(x, weight, bias, running_mean, running_var, y, shape, epsilon);                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) batch_norm_slopes_##WIDTH##_##SUFFIX(                            \
        const T* x, const T* dy, const float* mean, const float* reciprocal_std, Slopes* partial, ChannelShape shape) {  \
        slopes<T, V>(x, dy, mean, reciprocal_std, partial, shape);                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) batch_norm_backward_##WIDTH##_##SUFFIX(                          \
        const T* x, const T* dy, const float* mean, const float* reciprocal_std, const Slopes* partial,                \
        const T* weight, T* dx, float* dweight, float* dbias, ChannelShape shape, u32 parts, int add_weight,             \
        int add_bias) {                                                                                                \
        backward<T, V>(x, dy, mean, reciprocal_std, partial, weight, dx, dweight, dbias, shape, parts, add_weight,     \
                       add_bias);                                                                                      \
    }
FOR_EACH_STORAGE(FOR_EACH_WIDTH)
#undef DEFINE_WIDTH
