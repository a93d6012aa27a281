// The plan of an update as the host uploads it (src/backend/cuda/update/plan.rs), and sums of squares in their fixed order.
#pragma once
#include "update.cuh"

// A part of a tensor: src/backend/cpu/update/pieces.rs cuts alike.
struct Piece {
    u64 offset;
    u32 len;
    u32 tensor;
};
static_assert(sizeof(Piece) == 16, "as the host's");

// A tensor of the arena.
struct Tensor {
    u64 offset;
    u64 len;
    u32 first_piece;
    u32 pieces;
    u32 unit;         // elements of an output unit
    u32 first_unit;   // number of its first unit among all
    u32 group;
    u32 padding;
};
static_assert(sizeof(Tensor) == 40, "as the host's");

// How gradients are clipped: constants of a run.
struct ClipOptions {
    float bound;        // infinity without a value clip
    int norm;           // 0 off, 1 global, 2 by tensor, 3 adaptive
    double max_norm;    // or the adaptive clip's ratio
    double epsilon;     // the adaptive clip's least weight norm
};
static_assert(sizeof(ClipOptions) == 24, "as the host's");

// What one update found; the host reads it later. `applied` goes on from step to step.
struct Outcome {
    double grad_norm;
    double clip_coefficient;  // the least
    u64 applied;              // updates applied, this one counted unless skipped
    u64 clamped;              // values that the value clip changed
    u32 skipped;
    u32 least;                // the least adaptive coefficient, as f32 bits, while it is being found
};
static_assert(sizeof(Outcome) == 40, "as the host's");

// What the passes over elements read besides the arrays.
struct Pass {
    const u8* block_groups;         // [arena / 128]
    const u32* block_tensors;       // [arena / 128]; the number of tensors for padding
    const Tensor* tensors;
    const float* coefficients;      // [tensors]
    const float* unit_coefficients; // [units], or null
    const RuleStep* steps;          // [groups]
    const GroupOptions* groups;
    const float* rates;             // [tensors]: LARS's, or null
    const UpdateParams* params;
    Outcome* outcome;
    u64 len;                        // elements of the arena, a multiple of 128
    u64 seed;                       // of the stochastic rounding, where parameters are bf16
    float bound;
    int zero_gradients;
};
static_assert(sizeof(Pass) == 104, "as the host's");

// The global clip's coefficient for gradients of norm `norm`; 1 under another clip.
__device__ __forceinline__ double global_coefficient(const ClipOptions& clip, double norm) {
    return clip.norm == 1 ? fmin(clip.max_norm / (norm + 1e-6), 1.0) : 1.0;
}

// The coefficient of a tensor whose gradients' squares sum up to `square`.
__device__ __forceinline__ double tensor_coefficient(const ClipOptions& clip, double square, double global) {
    return clip.norm == 2 ? fmin(clip.max_norm / (sqrt(square) + 1e-6), 1.0) : global;
}

__device__ __forceinline__ Scale plain_scale(const UpdateParams* params, const ClipOptions& clip) {
    return Scale{division(*params), clip.bound, 1.0f};
}

// Values whose squares a warp adds up in 128 sums: sum a takes values a, a + 128, ...
constexpr u32 SPAN = 2048;

// A stored array as values in f32, one at a time or four in one access: what sums of squares are taken over. `map` may count.
template <typename T, typename M> struct Mapped {
    const T* from;
    M map;
    __device__ __forceinline__ float one(u64 i) { return map(to_f32(from[i])); }
    __device__ __forceinline__ void four(u64 i, float (&x)[4]) {
        const Pack<T, 4> pack = load<T, 4>(from + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = map(to_f32(pack.at[j]));
    }
};
template <typename T, typename M> __device__ __forceinline__ Mapped<T, M> mapped(const T* from, M map) { return {from, map}; }

struct Itself {
    __device__ __forceinline__ float operator()(float x) const { return x; }
};

// The sum of f(i)^2 for i in [start, start + len), len <= SPAN, by one warp, in f64; the same bits in every lane. Value i belongs
// to sum (i - start) % 128, each sum takes its values in order, then halves of the sums are added: 64, 32, .. 1. ALIGNED: `start`
// lies on 16 bytes, so that a lane holds sums 4 lane .. 4 lane + 3; else sums lane, lane + 32, ..: the same additions. AHEAD rows of
// 128 values in flight hide the latency of memory.
template <bool ALIGNED, int AHEAD, typename F> __device__ __forceinline__ double span_squares(u64 start, u32 len, F& f) {
    const u32 lane = threadIdx.x % 32, rows = len / 128, rest = len % 128;
    double s[4] = {0.0, 0.0, 0.0, 0.0};
    const auto row = [&](u32 r, float (&x)[4]) {
        const u64 at = start + r * 128;
        if (ALIGNED) {
            f.four(at + 4 * lane, x);
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) x[j] = f.one(at + lane + 32 * j);
        }
    };
    const auto add = [&](const float (&x)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) s[j] = fma(static_cast<double>(x[j]), static_cast<double>(x[j]), s[j]);
    };
    u32 r = 0;
    for (; r + AHEAD <= rows; r += AHEAD) {
        float x[AHEAD][4];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) row(r + k, x[k]);
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) add(x[k]);
    }
    for (; r < rows; ++r) {
        float x[4];
        row(r, x);
        add(x);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const u32 at = ALIGNED ? 4 * lane + j : lane + 32 * j;
        if (at < rest) {
            const double x = static_cast<double>(f.one(start + rows * 128 + at));
            s[j] = fma(x, x, s[j]);
        }
    }
    if (ALIGNED) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
            for (int j = 0; j < 4; ++j) s[j] += __shfl_xor_sync(0xffffffffu, s[j], offset);
        }
    }
    double total = (s[0] + s[2]) + (s[1] + s[3]);
    if (!ALIGNED) total = warp_sum(total);
    return total;
}

// The sum of f(i)^2 for i in [0, len) by one warp: spans in order. f may begin anywhere.
template <typename F> __device__ __forceinline__ double warp_squares(u64 len, F f) {
    double total = 0.0;
    for (u64 start = 0; start < len; start += SPAN) {
        total += span_squares<false, 4>(start, static_cast<u32>(min(len - start, static_cast<u64>(SPAN))), f);
    }
    return total;
}

// Whether a piece begins where four values make an access: arrays begin on 16 bytes, and pieces of whole units of the adaptive clip
// anywhere in them.
__device__ __forceinline__ bool begins_access(const Piece& piece) { return piece.offset % 4 == 0; }

// The same sum over a piece, which f begins with, by a block of 256 threads, eight spans at a time; valid in thread 0. `scratch`
// holds 8 values and may be used again after the call. All threads call it.
template <int AHEAD = 4, typename F>
__device__ __forceinline__ double block_squares(const Piece& piece, F& f, double* scratch) {
    const u32 warp = threadIdx.x / 32;
    const u64 len = piece.len;
    const bool aligned = begins_access(piece);
    double total = 0.0;
    for (u64 start = 0; start < len; start += 8 * SPAN) {
        const u64 own = start + warp * SPAN;
        double sum = 0.0;
        if (own < len) {
            const u32 part = static_cast<u32>(min(len - own, static_cast<u64>(SPAN)));
            sum = aligned ? span_squares<true, AHEAD>(own, part, f) : span_squares<false, AHEAD>(own, part, f);
        }
        if (threadIdx.x % 32 == 0) scratch[warp] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int w = 0; w < 8; ++w) total += scratch[w];
        }
        __syncthreads();
    }
    return total;
}

// Counts, as it maps, the values that the value clip changes.
struct Checked {
    Scale scale;
    u32 changed;
    __device__ __forceinline__ float operator()(float g) {
        changed += fabsf(g * scale.divide) > scale.bound;
        return scale.checked(g);
    }
};

// One piece of the norm by a block of 256 threads: the sum of squares of its scaled gradients, and how many values the value clip
// changed. `sums` and `counts` hold 8 values.
template <int AHEAD = 4, typename G>
__device__ __forceinline__ void norm_piece(const G* gradients, const Piece* pieces, u32 index, const Scale& scale,
                                           double* squares, u32* clamped, double* sums, u32* counts) {
    const Piece piece = pieces[index];
    auto own = mapped(gradients + piece.offset, Checked{scale, 0});
    const double sum = block_squares<AHEAD>(piece, own, sums);
    const u32 changed = block_sum(own.map.changed, counts);
    if (threadIdx.x == 0) {
        squares[index] = sum;
        clamped[index] = changed;
    }
}

// sums[tensor] = the sum over its pieces, in order; then their total, in order, which all threads get. By a whole block. `tile`
// holds TILE values: read from memory one after the other, each addend would wait for the one before.
template <u32 TILE>
__device__ __forceinline__ double sum_pieces(const Tensor* tensors, u32 tensor_count, const double* squares, u32 piece_count,
                                             double* sums, double* tile) {
    for (u32 t = threadIdx.x; t < tensor_count; t += blockDim.x) sums[t] = 0.0;
    for (u32 start = 0; start < piece_count; start += TILE) {
        const u32 end = min(start + TILE, piece_count);
        for (u32 p = start + threadIdx.x; p < end; p += blockDim.x) tile[p - start] = squares[p];
        __syncthreads();
        for (u32 t = threadIdx.x; t < tensor_count; t += blockDim.x) {
            const u32 first = tensors[t].first_piece;
            const u32 from = max(first, start), to = min(first + tensors[t].pieces, end);
            if (from >= to) continue;
            double sum = sums[t];
#pragma unroll 8
            for (u32 p = from; p < to; ++p) sum += tile[p - start];
            sums[t] = sum;
        }
        __syncthreads();
    }
    __shared__ double total;
    double sum = 0.0;
    for (u32 start = 0; start < tensor_count; start += TILE) {
        const u32 end = min(start + TILE, tensor_count);
        // Each thread's own sums, or those that the barrier above has made everybody's.
        for (u32 t = start + threadIdx.x; t < end; t += blockDim.x) tile[t - start] = sums[t];
        __syncthreads();
        if (threadIdx.x == 0) {
#pragma unroll 8
            for (u32 t = start; t < end; ++t) sum += tile[t - start];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) total = sum;
    __syncthreads();
    return total;
}

// Parameters, gradients and copy types of every form: f32 parameters with a copy of 16 bits or none, then bf16 parameters alone.
#define FOR_EACH_FORM(DEFINE)                    \
    DEFINE(f32_f32_f32, float, float, float)     \
    DEFINE(f32_f32_bf16, float, float, bf16)     \
    DEFINE(f32_f32_f16, float, float, f16)       \
    DEFINE(f32_bf16_bf16, float, bf16, bf16)     \
    DEFINE(f32_f16_f16, float, f16, f16)         \
    DEFINE(bf16_f32_bf16, bf16, float, bf16)     \
    DEFINE(bf16_bf16_bf16, bf16, bf16, bf16)
