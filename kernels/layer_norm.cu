// Layer normalization and RMS normalization, the sum before them and the residual's gradient after them included. CPU twin:
// src/backend/cpu/layer_norm.rs.
//
// RMS normalization is layer normalization without mean and bias: where `means` is null the mean counts as 0.
#include "common.cuh"

// How a row is shared out: WARPS warps of a block take a row, N values an access (16 bytes, or one value where the width does
// not let rows start aligned), and a thread keeps KEPT values of the row in registers. Columns beyond LIMIT are read again
// from the cache instead.
template <int N_, int WARPS_, int KEPT_> struct Shape {
    static constexpr int N = N_, WARPS = WARPS_, KEPT = KEPT_, THREADS = 32 * WARPS_, PACKS = KEPT_ / N_;
    static constexpr int LIMIT = THREADS * KEPT_;
};

// A warp a row, up to 1,024 columns; and up to 768, in fewer registers.
template <typename T> using Narrow = Shape<per_access<T>(), 1, 32>;
template <typename T> using Slim = Shape<per_access<T>(), 1, 24>;
// Blocks of the slim backward on a multiprocessor, as many as need no spilled register.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename T> constexpr int SLIM_BLOCKS = 3;
#else
template <typename T> constexpr int SLIM_BLOCKS = sizeof(T) == 2 ? 4 : 3;
#endif
// A block of 256 threads a row: 4,096 columns in registers, any width at all.
template <int N> using Wide = Shape<N, 8, 16>;

// The sum over the threads of a row, the same bits in each. `shared` holds 32 values.
template <typename S> __device__ __forceinline__ float row_sum(float x, float* shared) {
    return S::WARPS == 1 ? warp_sum(x) : block_sum(x, shared);
}

// Two such sums for the barriers of one. `shared` holds 2 WARPS values.
template <typename S> __device__ __forceinline__ void row_sums(float& a, float& b, float* shared) {
    a = warp_sum(a);
    b = warp_sum(b);
    if constexpr (S::WARPS > 1) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        if (lane == 0) {
            shared[warp] = a;
            shared[S::WARPS + warp] = b;
        }
        __syncthreads();
        a = b = 0.0f;
#pragma unroll
        for (int i = 0; i < S::WARPS; ++i) {
            a += shared[i];
            b += shared[S::WARPS + i];
        }
        __syncthreads();
    }
}

// y = (x - mean) / sqrt(variance + epsilon) * weight + bias, row by row; x is the input, or where `other` is given, the sum
// of both, which is left in `sum` and normalized as it is stored there. The variance is taken around the mean, in a second
// pass over registers. x, other, sum, y: [rows, width] (other and sum may be null together); weight, bias: [width] (bias may
// be null); means, scales: [rows], the scale being 1 / sqrt(variance + epsilon). All but the inputs `=`.
// Grid: ceil(rows / 8) blocks of 256 threads (narrow), or a block of 256 threads a row (wide).
// Moves 2 sizeof(T) bytes a value, 4 with the sum.
template <typename T, typename S>
__device__ void norm_forward(const T* x, const T* other, T* sum, const T* weight, const T* bias, T* y, float* means,
                             float* scales, i64 rows, int width, float epsilon) {
    constexpr int N = S::N, STEP = S::THREADS * N;
    using Access = Pack<T, N>;
    __shared__ float shared[32];
    const i64 row = static_cast<i64>(blockIdx.x) * (8 / S::WARPS) + threadIdx.x / S::THREADS;
    if (row >= rows) return;
    const int first = threadIdx.x % S::THREADS * N;
    x += row * width;
    y += row * width;
    if (other != nullptr) {
        other += row * width;
        sum += row * width;
    }
    // The input at some columns; the first time it is asked for, the sum is taken and left behind.
    auto take = [&](int column) {
        Access own = load<T, N>(x + column);
        if (other != nullptr) {
            const Access more = load<T, N>(other + column);
#pragma unroll
            for (int j = 0; j < N; ++j) own.at[j] = from_f32<T>(to_f32(own.at[j]) + to_f32(more.at[j]));
            store<T, N>(sum + column, own);
        }
        return own;
    };
    auto again = [&](int column) { return load<T, N>((other != nullptr ? sum : x) + column); };

    Access kept[S::PACKS];
    float total = 0.0f;
    auto add = [&](const Access& own) {
#pragma unroll
        for (int j = 0; j < N; ++j) total += to_f32(own.at[j]);
    };
#pragma unroll
    for (int p = 0; p < S::PACKS; ++p) {
        const int column = first + p * STEP;
        if (column < width) kept[p] = take(column);
    }
#pragma unroll
    for (int p = 0; p < S::PACKS; ++p) {
        if (first + p * STEP < width) add(kept[p]);
    }
    if (S::WARPS > 1) {
#pragma unroll 1
        for (int column = first + S::LIMIT; column < width; column += STEP) add(take(column));
    }
    const float inverse = 1.0f / static_cast<float>(width);
    const float mean = means == nullptr ? 0.0f : row_sum<S>(total, shared) * inverse;

    float squares = 0.0f;
    auto square = [&](const Access& own) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float centered = to_f32(own.at[j]) - mean;
            squares = fmaf(centered, centered, squares);
        }
    };
#pragma unroll
    for (int p = 0; p < S::PACKS; ++p) {
        if (first + p * STEP < width) square(kept[p]);
    }
    if (S::WARPS > 1) {
#pragma unroll 1
        for (int column = first + S::LIMIT; column < width; column += STEP) square(again(column));
    }
    const float scale = 1.0f / sqrtf(row_sum<S>(squares, shared) * inverse + epsilon);

    auto finish = [&](const Access& own, int column) {
        const Access w = load<T, N>(weight + column);
        Access b = {};
        if (bias != nullptr) b = load<T, N>(bias + column);
        Access out;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float normal = (to_f32(own.at[j]) - mean) * scale;
            out.at[j] = from_f32<T>(fmaf(normal, to_f32(w.at[j]), to_f32(b.at[j])));
        }
        store<T, N>(y + column, out);
    };
#pragma unroll
    for (int p = 0; p < S::PACKS; ++p) {
        const int column = first + p * STEP;
        if (column < width) finish(kept[p], column);
    }
    if (S::WARPS > 1) {
#pragma unroll 1
        for (int column = first + S::LIMIT; column < width; column += STEP) finish(again(column), column);
    }
    if (first == 0) {
        if (means != nullptr) means[row] = mean;
        scales[row] = scale;
    }
}

// Gradients of the above. With g = dy weight and n = (x - mean) scale: dx = scale (g - mean of g - n mean of (g n)), the mean
// of g counting as 0 where `means` is null, plus `residual` where it is given. Each block leaves the sums of dy n and of dy
// over its own rows in `dweights` and `dbiases`, which `finish_norm_gradients` adds up. PREFETCH: a warp has its next row brought to
// the cache while it works on one (narrow).
// x, dy, residual, dx: [rows, width] (residual may be null; dx too, where no input needs it); dweights, dbiases: [blocks,
// width] (dbiases may be null), `=`. Grid: ceil(rows / rows_a_block) blocks of 128 threads, a warp a row at a time (narrow), or
// of 256 threads, all a row at a time (wide). Moves 3 sizeof(T) bytes a value, 4 with the residual.
template <typename T, typename S, bool PREFETCH = false>
__device__ void norm_backward(const T* x, const T* dy, const T* residual, const T* weight, const float* means,
                              const float* scales, T* dx, float* dweights, float* dbiases, i64 rows, int width,
                              i64 rows_a_block) {
    constexpr int N = S::N, STEP = S::THREADS * N, ROWS = S::WARPS == 1 ? 4 : 1;
    // The residual is under way while the sums are taken, where there are registers for it.
    constexpr bool EARLY = sizeof(T) == 2 && N > 1;
    using Access = Pack<T, N>;
    __shared__ float shared[S::WARPS == 1 ? ROWS * S::LIMIT : 32];
    const int first = threadIdx.x % S::THREADS * N, slot = threadIdx.x / S::THREADS;
    const i64 start = static_cast<i64>(blockIdx.x) * rows_a_block;
    const i64 end = start + rows_a_block < rows ? start + rows_a_block : rows;
    const float inverse = 1.0f / static_cast<float>(width);
    float* own_dweights = dweights + static_cast<i64>(blockIdx.x) * width;
    float* own_dbiases = dbiases == nullptr ? nullptr : dbiases + static_cast<i64>(blockIdx.x) * width;
    float dweight[S::KEPT] = {}, dbias[S::KEPT] = {};

    for (i64 row = start + slot; row < end; row += ROWS) {
        const T* own_x = x + row * width;
        const T* own_dy = dy + row * width;
        const float mean = means == nullptr ? 0.0f : means[row], scale = scales[row];
        auto later = [&](int column) { return residual == nullptr ? Access{} : load<T, N>(residual + row * width + column); };
        Access kept_x[S::PACKS], kept_dy[S::PACKS], kept_more[S::PACKS];
#pragma unroll
        for (int p = 0; p < S::PACKS; ++p) {
            const int column = first + p * STEP;
            if (column < width) {
                kept_x[p] = load<T, N>(own_x + column);
                kept_dy[p] = load<T, N>(own_dy + column);
                if (EARLY) kept_more[p] = later(column);
            }
        }
        if (PREFETCH && row + ROWS < end) {
            // A line is 128 bytes, eight accesses.
            constexpr int LINE = 128 / static_cast<int>(sizeof(T));
            const i64 next = (row + ROWS) * width;
            for (int column = first / N * LINE; column < width; column += 32 * LINE) {
                asm volatile("prefetch.global.L2 [%0];" ::"l"(x + next + column));
                asm volatile("prefetch.global.L2 [%0];" ::"l"(dy + next + column));
                if (residual != nullptr) asm volatile("prefetch.global.L2 [%0];" ::"l"(residual + next + column));
            }
        }
        float plain = 0.0f, with_normal = 0.0f;
        auto add = [&](const Access& x_at, const Access& dy_at, int column, float* dweight_at, float* dbias_at) {
            const Access w = load<T, N>(weight + column);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float d = to_f32(dy_at.at[j]), normal = (to_f32(x_at.at[j]) - mean) * scale;
                const float g = d * to_f32(w.at[j]);
                plain += g;
                with_normal = fmaf(g, normal, with_normal);
                dweight_at[j] = fmaf(d, normal, dweight_at[j]);
                dbias_at[j] += d;
            }
        };
#pragma unroll
        for (int p = 0; p < S::PACKS; ++p) {
            const int column = first + p * STEP;
            if (column < width) add(kept_x[p], kept_dy[p], column, dweight + p * N, dbias + p * N);
        }
        if (S::WARPS > 1) {
            // Sums of columns that no register holds stay where the block leaves its sums in the end.
#pragma unroll 1
            for (int column = first + S::LIMIT; column < width; column += STEP) {
                float more[N] = {}, more_bias[N] = {};
                if (row > start) {
#pragma unroll
                    for (int j = 0; j < N; ++j) {
                        more[j] = own_dweights[column + j];
                        if (dbiases != nullptr) more_bias[j] = own_dbiases[column + j];
                    }
                }
                add(load<T, N>(own_x + column), load<T, N>(own_dy + column), column, more, more_bias);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    own_dweights[column + j] = more[j];
                    if (dbiases != nullptr) own_dbiases[column + j] = more_bias[j];
                }
            }
        }
        if (dx == nullptr) continue;
        row_sums<S>(plain, with_normal, shared);
        const float a = means == nullptr ? 0.0f : plain * inverse, b = with_normal * inverse;
        auto finish = [&](const Access& x_at, const Access& dy_at, const Access& more, int column) {
            const Access w = load<T, N>(weight + column);
            Access out;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float normal = (to_f32(x_at.at[j]) - mean) * scale;
                // g is rounded as it is in the sums: of a row of one value nothing is left.
                const float g = to_f32(dy_at.at[j]) * to_f32(w.at[j]), slope = fmaf(normal, -b, g - a);
                out.at[j] = from_f32<T>(fmaf(slope, scale, to_f32(more.at[j])));
            }
            store<T, N>(dx + row * width + column, out);
        };
#pragma unroll
        for (int p = 0; p < S::PACKS; ++p) {
            const int column = first + p * STEP;
            forget(kept_x[p]);
            forget(kept_dy[p]);
            if (column < width) finish(kept_x[p], kept_dy[p], EARLY ? kept_more[p] : later(column), column);
        }
        if (S::WARPS > 1) {
#pragma unroll 1
            for (int column = first + S::LIMIT; column < width; column += STEP) {
                finish(load<T, N>(own_x + column), load<T, N>(own_dy + column), later(column), column);
            }
        }
    }

    // The block's sums: of its warps one after the other, or a thread's own where all share the row.
    auto leave = [&](const float* sums, float* to) {
        float* own = S::WARPS == 1 ? shared + slot * S::LIMIT : to;
#pragma unroll
        for (int i = 0; i < S::KEPT; ++i) {
            const int column = first + i / N * STEP + i % N;
            if (column < width) own[column] = sums[i];
        }
        if constexpr (S::WARPS == 1) {
            __syncthreads();
            for (int column = threadIdx.x; column < width; column += ROWS * 32) {
                float total = shared[column];
#pragma unroll
                for (int i = 1; i < ROWS; ++i) total += shared[i * S::LIMIT + column];
                to[column] = total;
            }
            __syncthreads();
        }
    };
    leave(dweight, own_dweights);
    if (dbiases != nullptr) leave(dbias, own_dbiases);
}

// gradient (+)= sum over the parts, for the weight (blockIdx.y 0) and the bias (1). dweights, dbiases: [parts, width]; weight,
// bias: [width]. 32 rows of threads take every 32nd part each, in order, and are added up in order.
// Grid: (ceil(width / 32), 1 or 2) blocks of 1,024 threads. Reads 4 bytes a value and part.
extern "C" __global__ void __launch_bounds__(1024)
    finish_norm_gradients(const float* dweights, const float* dbiases, float* weight, float* bias, i64 parts, i64 width,
                int add_weight, int add_bias) {
    __shared__ float sums[32][33];
    const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
    const i64 column = static_cast<i64>(blockIdx.x) * 32 + lane;
    const float* from = blockIdx.y == 0 ? dweights : dbiases;
    float* to = blockIdx.y == 0 ? weight : bias;
    const int add = blockIdx.y == 0 ? add_weight : add_bias;
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 4
        for (i64 part = slice; part < parts; part += 32) sum += from[part * width + column];
    }
    sums[slice][lane] = sum;
    __syncthreads();
    if (slice == 0 && column < width) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; ++i) total += sums[i][lane];
        to[column] = add ? to[column] + total : total;
    }
}

#define DEFINE(SUFFIX, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        norm_forward_narrow_##SUFFIX(const T* x, const T* other, T* sum, const T* weight, const T* bias, T* y,         \
                                     float* means, float* scales, i64 rows, int width, float epsilon) {                \
        norm_forward<T, Narrow<T>>(x, other, sum, weight, bias, y, means, scales, rows, width, epsilon);               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        norm_forward_wide_##SUFFIX(const T* x, const T* other, T* sum, const T* weight, const T* bias, T* y,           \
                                   float* means, float* scales, i64 rows, int width, float epsilon) {                  \
        norm_forward<T, Wide<per_access<T>()>>(x, other, sum, weight, bias, y, means, scales, rows, width, epsilon);   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        norm_forward_odd_##SUFFIX(const T* x, const T* other, T* sum, const T* weight, const T* bias, T* y,            \
                                  float* means, float* scales, i64 rows, int width, float epsilon) {                   \
        norm_forward<T, Wide<1>>(x, other, sum, weight, bias, y, means, scales, rows, width, epsilon);                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, 3)                                                               \
        norm_backward_narrow_##SUFFIX(const T* x, const T* dy, const T* residual, const T* weight, const float* means, \
                                      const float* scales, T* dx, float* dweights, float* dbiases, i64 rows,           \
                                      int width, i64 rows_a_block) {                                                   \
        norm_backward<T, Narrow<T>>(x, dy, residual, weight, means, scales, dx, dweights, dbiases, rows, width,        \
                                    rows_a_block);                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, SLIM_BLOCKS<T>)                                                  \
        norm_backward_slim_##SUFFIX(const T* x, const T* dy, const T* residual, const T* weight, const float* means,   \
                                      const float* scales, T* dx, float* dweights, float* dbiases, i64 rows,           \
                                      int width, i64 rows_a_block) {                                                   \
        norm_backward<T, Slim<T>>(x, dy, residual, weight, means, scales, dx, dweights, dbiases, rows, width,          \
                                    rows_a_block);                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        norm_backward_wide_##SUFFIX(const T* x, const T* dy, const T* residual, const T* weight, const float* means,   \
                                    const float* scales, T* dx, float* dweights, float* dbiases, i64 rows, int width,  \
                                    i64 rows_a_block) {                                                                \
        norm_backward<T, Wide<per_access<T>()>>(x, dy, residual, weight, means, scales, dx, dweights, dbiases, rows,   \
                                                width, rows_a_block);                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        norm_backward_odd_##SUFFIX(const T* x, const T* dy, const T* residual, const T* weight, const float* means,    \
                                   const float* scales, T* dx, float* dweights, float* dbiases, i64 rows, int width,   \
                                   i64 rows_a_block) {                                                                 \
        norm_backward<T, Wide<1>>(x, dy, residual, weight, means, scales, dx, dweights, dbiases, rows, width,          \
                                  rows_a_block);                                                                       \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
