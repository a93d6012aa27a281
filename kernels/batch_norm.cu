// Batch normalization over [batch, channels, spatial]. CPU twin: src/backend/cpu/batch_norm.rs.
//
// Every launch has the grid (channels, parts) of channel.cuh. A block leaves what it found of its part in scratch; in the next
// launch every block merges the parts of its channel, one a lane and so in the same order everywhere, and writes its own. So x is
// read twice, the second time from L2 where it fits. What follows a normalization is done as it writes: a residual sum, ReLU; and
// as its backward reads, ReLU's slope.
#include "activation.cuh"
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

// What a channel's values become before they are written: (x - mean) * scale + shift, with `residual` added unless it is null, and 0
// in place of what is below it where `relu` says so.
template <typename T, int V> struct Normal {
    const T* residual;
    float mean, scale, shift;
    int relu;

    __device__ __forceinline__ float of(T x) const { return fmaf(to_f32(x) - mean, scale, shift); }

    __device__ __forceinline__ void write(T* y, const T* x, i64 at) const {
        Pack<T, V> values = load<T, V>(x + at), other{};
        if (residual != nullptr) other = load<T, V>(residual + at);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            float value = of(values.at[j]);
            if (residual != nullptr) value += to_f32(other.at[j]);
            values.at[j] = from_f32<T>(relu ? value_of(RELU, value) : value);
        }
        store<T, V>(y + at, values);
    }
};

// y = what (x - mean) * reciprocal_std * weight + bias becomes; mean, reciprocal_std `=`; running statistics moved by `momentum`, the
// variance with count - 1 in its place. Moves 2 sizeof(T) bytes a value, 3 with a residual.
template <typename T, int V>
__device__ void normalize(const T* x, const Moments* partial, const T* weight, const T* bias, const T* residual, T* y,
                          float* mean, float* reciprocal_std, float* running_mean, float* running_var, ChannelShape s,
                          float epsilon, float momentum, int relu) {
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
    const Normal<T, V> normal{residual, whole.mean, rstd * to_f32(weight[channel]), to_f32(bias[channel]), relu};
    for_part<V>(s, [&](i64 at) { normal.write(y, x, at); });
}

// y = what (x - running_mean) / sqrt(running_var + epsilon) * weight + bias becomes. Moves 2 sizeof(T) bytes a value, 3 with a
// residual.
template <typename T, int V>
__device__ void inference(const T* x, const T* weight, const T* bias, const float* running_mean,
                          const float* running_var, const T* residual, T* y, ChannelShape s, float epsilon, int relu) {
    const u32 channel = blockIdx.x;
    const float scale = to_f32(weight[channel]) / sqrtf(running_var[channel] + epsilon);
    const Normal<T, V> normal{residual, running_mean[channel], scale, to_f32(bias[channel]), relu};
    for_part<V>(s, [&](i64 at) { normal.write(y, x, at); });
}

// ReLU behind the normalization, by its number in src/backend/cuda/batch_norm.rs: none; one of what the normalization makes of x,
// which is computed once more; one whose input or output is at hand.
enum Rectified { NONE, OF_NORMALIZED, OF_OUTPUT };

// What ReLU makes of gradients: those of values that it made 0 are 0.
template <typename T, int V> struct Slope {
    Normal<T, V> normal;
    const T* output;
    int rectified;

    __device__ __forceinline__ Slope(const T* output, int rectified, float mean, float reciprocal_std, const T* weight,
                                     const T* bias)
        : normal{nullptr, mean, reciprocal_std * to_f32(weight[blockIdx.x]), to_f32(bias[blockIdx.x]), 0},
          output(output),
          rectified(rectified) {}

    __device__ __forceinline__ void apply(Pack<T, V>& gradients, const Pack<T, V>& values, i64 at) const {
        if (rectified == NONE) return;
        Pack<T, V> given{};
        if (rectified == OF_OUTPUT) given = load<T, V>(output + at);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const T value = rectified == OF_OUTPUT ? given.at[j] : from_f32<T>(normal.of(values.at[j]));
            gradients.at[j] = from_f32<T>(slope_of(RELU, to_f32(value), to_f32(gradients.at[j])));
        }
    }
};

// The sums of dy and of dy * (x - mean) * reciprocal_std over some values.
struct Slopes {
    float bias, weight;
};

// partial[channel, part] = the slopes over the part; gradient = dy behind ReLU's slope, unless it is null. Moves 2 sizeof(T) bytes a
// value, another where ReLU's output is read, and another where the gradient is written.
template <typename T, int V>
__device__ void slopes(const T* x, const T* dy, const T* output, const float* mean, const float* reciprocal_std,
                       const T* weight, const T* bias, T* gradient, Slopes* partial, ChannelShape s, int rectified) {
    __shared__ float scratch[32];
    const float m = mean[blockIdx.x], rstd = reciprocal_std[blockIdx.x];
    const Slope<T, V> slope(output, rectified, m, rstd, weight, bias);
    Slopes own{0.0f, 0.0f};
    for_part<V>(s, [&](i64 at) {
        const Pack<T, V> values = load<T, V>(x + at);
        Pack<T, V> gradients = load<T, V>(dy + at);
        slope.apply(gradients, values, at);
        if (gradient != nullptr) store<T, V>(gradient + at, gradients);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float d = to_f32(gradients.at[j]);
            own.bias += d;
            own.weight = fmaf(d, (to_f32(values.at[j]) - m) * rstd, own.weight);
        }
    });
    own.bias = block_sum(own.bias, scratch);
    own.weight = block_sum(own.weight, scratch);
    if (threadIdx.x == 0) partial[static_cast<i64>(blockIdx.x) * gridDim.y + blockIdx.y] = own;
}

// dweight, dbias (+)= the channel's slopes over all `parts`; dx = weight * reciprocal_std * (dy - mean of dy -
// (x - mean) * reciprocal_std * mean of slopes), where it is not null, with dy behind ReLU's slope. Moves 3 sizeof(T) bytes a value,
// another where ReLU's output is read. Without dx, the grid is (channels, 1).
template <typename T, int V>
__device__ void backward(const T* x, const T* dy, const T* output, const float* mean, const float* reciprocal_std,
                         const Slopes* partial, const T* weight, const T* bias, T* dx, float* dweight, float* dbias,
                         ChannelShape s, u32 parts, int rectified, int add_weight, int add_bias) {
    const u32 lane = threadIdx.x % 32, channel = blockIdx.x;
    const Slopes own = lane < parts ? partial[static_cast<i64>(channel) * parts + lane] : Slopes{0.0f, 0.0f};
    const Slopes whole{warp_sum(own.bias), warp_sum(own.weight)};
    if (blockIdx.y == 0 && threadIdx.x == 0) {
        dweight[channel] = add_weight ? dweight[channel] + whole.weight : whole.weight;
        dbias[channel] = add_bias ? dbias[channel] + whole.bias : whole.bias;
    }
    if (dx == nullptr) return;
    const float inverse = 1.0f / static_cast<float>(s.count), m = mean[channel], rstd = reciprocal_std[channel];
    const float scale = to_f32(weight[channel]) * rstd, level = whole.bias * inverse, tilt = whole.weight * inverse * rstd;
    const Slope<T, V> slope(output, rectified, m, rstd, weight, bias);
    for_part<V>(s, [&](i64 at) {
        const Pack<T, V> values = load<T, V>(x + at);
        Pack<T, V> gradients = load<T, V>(dy + at);
        slope.apply(gradients, values, at);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float centered = to_f32(values.at[j]) - m;
            gradients.at[j] = from_f32<T>(scale * fmaf(-centered, tilt, to_f32(gradients.at[j]) - level));
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
        const T* x, const Moments* partial, const T* weight, const T* bias, const T* residual, T* y, float* mean,      \
        float* reciprocal_std, float* running_mean, float* running_var, ChannelShape shape, float epsilon,               \
        float momentum, int relu) {                                                                                    \
        normalize<T, V>(x, partial, weight, bias, residual, y, mean, reciprocal_std, running_mean, running_var, shape, \
                        epsilon, momentum, relu);                                                                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) batch_norm_inference_##WIDTH##_##SUFFIX(                         \
        const T* x, const T* weight, const T* bias, const float* running_mean, const float* running_var,               \
        const T* residual, T* y, ChannelShape shape, float epsilon, int relu) {                                          \
        inference<T, V>(x, weight, bias, running_mean, running_var, residual, y, shape, epsilon, relu);                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) batch_norm_slopes_##WIDTH##_##SUFFIX(                            \
        const T* x, const T* dy, const T* output, const float* mean, const float* reciprocal_std, const T* weight,     \
        const T* bias, T* gradient, Slopes* partial, ChannelShape shape, int rectified) {                                \
        slopes<T, V>(x, dy, output, mean, reciprocal_std, weight, bias, gradient, partial, shape, rectified);          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) batch_norm_backward_##WIDTH##_##SUFFIX(                          \
        const T* x, const T* dy, const T* output, const float* mean, const float* reciprocal_std,                      \
        const Slopes* partial, const T* weight, const T* bias, T* dx, float* dweight, float* dbias,                    \
        ChannelShape shape, u32 parts, int rectified, int add_weight, int add_bias) {                                    \
        backward<T, V>(x, dy, output, mean, reciprocal_std, partial, weight, bias, dx, dweight, dbias, shape, parts,   \
                       rectified, add_weight, add_bias);                                                               \
    }
FOR_EACH_STORAGE(FOR_EACH_WIDTH)
#undef DEFINE_WIDTH
