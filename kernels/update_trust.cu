// LARS and LAMB: the learning rate of each tensor by the norms of its weights and of its direction, and LAMB's step. CPU twin:
// src/backend/cpu/update.rs, with the same bits. LARS reads parameters and gradients a second time, LAMB parameters and moments.
#include "update_pass.cuh"

// LARS: sums of squares of each piece's weights and scaled gradients; 0 for tensors of other rules. weights, slopes: [pieces].
// Grid: a block of 256 threads a piece.
template <typename P, typename G>
__device__ void lars_pieces(const P* parameters, const G* gradients, const Piece* pieces, const Pass& pass, double* weights,
                            double* slopes) {
    __shared__ double sums[8];
    if (pass.outcome->skipped) return;
    const u32 index = blockIdx.x, warp = threadIdx.x / 32;
    const Piece piece = pieces[index];
    const Tensor tensor = pass.tensors[piece.tensor];
    double w = 0.0, s = 0.0;
    if (pass.groups[tensor.group].rule == LARS) {
        const float divide = pass.steps[tensor.group].divide;
        auto theta = mapped(parameters + piece.offset, Itself{});
        w = block_squares(piece, theta, sums);
        if (pass.unit_coefficients == nullptr) {
            const Scale scale{divide, pass.bound, pass.coefficients[piece.tensor]};
            const auto scaled = [&](float g) { return scale.of(g); };
            auto slope = mapped(gradients + piece.offset, scaled);
            s = block_squares(piece, slope, sums);
        } else if (warp == 0) {
            // The adaptive clip's units one after another, as the CPU adds them up.
            const u64 begin = piece.offset - tensor.offset;
            for (u64 from = 0; from < piece.len; from += tensor.unit) {
                const u64 len = min(static_cast<u64>(tensor.unit), static_cast<u64>(piece.len) - from);
                const u64 unit = tensor.first_unit + (begin + from) / tensor.unit;
                const Scale scale{divide, pass.bound, pass.unit_coefficients[unit]};
                const auto scaled = [&](float g) { return scale.of(g); };
                s += warp_squares(len, mapped(gradients + piece.offset + from, scaled));
            }
        }
    }
    if (threadIdx.x == 0) {
        weights[index] = w;
        slopes[index] = s;
    }
}

// LAMB's directions, from the new moments.
template <typename P> struct Directions {
    RuleStep r;
    const P* theta;
    const float *m, *v;
    __device__ __forceinline__ float one(u64 i) const { return lamb_direction(r, to_f32(theta[i]), m[i], v[i]); }
    __device__ __forceinline__ void four(u64 i, float (&x)[4]) const {
        const Pack<P, 4> t = load<P, 4>(theta + i);
        const Pack<float, 4> a = load<float, 4>(m + i), b = load<float, 4>(v + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = lamb_direction(r, to_f32(t.at[j]), a.at[j], b.at[j]);
    }
};

// LAMB: sums of squares of each piece's weights and directions; 0 for tensors of other rules. Grid: a block of 256 threads a piece.
template <typename P>
__device__ void lamb_pieces(const P* parameters, const float* first, const float* second, const Piece* pieces, const Pass& pass,
                            double* weights, double* directions) {
    __shared__ double sums[8];
    if (pass.outcome->skipped) return;
    const u32 index = blockIdx.x;
    const Piece piece = pieces[index];
    const u32 group = pass.tensors[piece.tensor].group;
    double w = 0.0, d = 0.0;
    if (pass.groups[group].rule == LAMB) {
        auto theta = mapped(parameters + piece.offset, Itself{});
        w = block_squares(piece, theta, sums);
        Directions<P> direction{pass.steps[group], parameters + piece.offset, first + piece.offset, second + piece.offset};
        d = block_squares(piece, direction, sums);
    }
    if (threadIdx.x == 0) {
        weights[index] = w;
        directions[index] = d;
    }
}

// The learning rate of each tensor under LARS (`lamb` 0) or LAMB (1). weights, others: [pieces]; rates: [tensors].
// Grid: a block of 256 threads a tensor. Pieces are added in order, out of shared memory: read from memory one after the other, each
// would wait for the one before.
extern "C" __global__ void __launch_bounds__(256)
    tensor_rates(const double* weights, const double* others, u32 tensor_count, Pass pass, int lamb, float* rates) {
    constexpr u32 TILE = 256;
    __shared__ double tiles[2][TILE];
    const u32 t = blockIdx.x;
    // A grid has a block at least.
    if (t >= tensor_count || pass.outcome->skipped) return;
    const Tensor tensor = pass.tensors[t];
    const GroupOptions group = pass.groups[tensor.group];
    double w = 0.0, o = 0.0;
    for (u32 start = 0; start < tensor.pieces; start += TILE) {
        const u32 count = min(TILE, tensor.pieces - start), at = tensor.first_piece + start + threadIdx.x;
        if (threadIdx.x < count) {
            tiles[0][threadIdx.x] = weights[at];
            tiles[1][threadIdx.x] = others[at];
        }
        __syncthreads();
        if (threadIdx.x == 0) {
#pragma unroll 8
            for (u32 p = 0; p < count; ++p) {
                w += tiles[0][p];
                o += tiles[1][p];
            }
        }
        __syncthreads();
    }
    if (threadIdx.x != 0) return;
    w = sqrt(w);
    o = sqrt(o);
    double rate = 0.0;
    if (lamb && group.rule == LAMB) {
        rate = group_rate(group, pass.params->learning_rate) * (w > 0.0 && o > 0.0 ? w / o : 1.0);
    } else if (!lamb && group.rule == LARS) {
        const double decay = group.decoupled ? 0.0 : group.weight_decay;
        const double ratio = w > 0.0 && o > 0.0 ? group.trust * w / (o + decay * w) : 1.0;
        rate = group_rate(group, pass.params->learning_rate) * ratio;
    }
    rates[t] = static_cast<float>(rate);
}

// LAMB's step along the directions. Grid: any, 256 threads, a warp a block of 128 elements.
template <typename P, typename S>
__device__ void lamb_apply(P* parameters, S* copy, const float* first, const float* second, const float* rates,
                           const Pass& pass) {
    if (pass.outcome->skipped) return;
    const u64 lane = threadIdx.x % 32;
    const Home<P, S> home(parameters, copy, pass.seed, pass.outcome->applied);
    for (u64 block = thread_index() / 32; block < pass.len / 128; block += thread_count() / 32) {
        const u32 group = pass.block_groups[block];
        if (pass.groups[group].rule != LAMB) continue;
        const RuleStep r = pass.steps[group];
        const float rate = rates[pass.block_tensors[block]];
        const u64 at = block * 128 + lane * 4;
        Pack<float, 4> theta = home.read_four(at);
        const Pack<float, 4> m = load<float, 4>(first + at), v = load<float, 4>(second + at);
#pragma unroll
        for (int j = 0; j < 4; ++j) theta.at[j] = lamb_step(r, theta.at[j], m.at[j], v.at[j], rate);
        home.write_four(at, theta);
    }
}

#define DEFINE(SUFFIX, P, G, S)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                                 \
        lars_pieces_##SUFFIX(const P* parameters, const G* gradients, const Piece* pieces, Pass pass, double* weights,   \
                             double* slopes) {                                                                           \
        lars_pieces(parameters, gradients, pieces, pass, weights, slopes);                                               \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                                 \
        lamb_pieces_##SUFFIX(const P* parameters, const float* first, const float* second, const Piece* pieces,          \
                             Pass pass, double* weights, double* directions) {                                           \
        lamb_pieces(parameters, first, second, pieces, pass, weights, directions);                                       \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                    \
        lamb_apply_##SUFFIX(P* parameters, S* copy, const float* first, const float* second, const float* rates,         \
                            Pass pass) {                                                                                 \
        lamb_apply(parameters, copy, first, second, rates, pass);                                                        \
    }
FOR_EACH_FORM(DEFINE)
#undef DEFINE
