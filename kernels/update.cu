// The fused update: gradients unscaled, clipped, decayed, stepped; the low-precision copy written and the gradient set to 0 in
// the same pass. CPU twin: src/backend/cpu/update.rs; every result has its bits (but Muon's, which are products').
//
// Bytes a parameter, f32: 4 for the norm; then 12 (SGD), 20 (momentum) or 28 (Adam); 2 more for a copy of 16 bits, 4 more where
// the gradient is set to 0. The norm is taken in two stages of a fixed order: a warp a piece of a tensor, in f64, each lane
// every 32nd value; then one block over the pieces of each tensor, in order.
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

// What the host says before each replay.
struct UpdateParams {
    double learning_rate;
    double divisor;
};
static_assert(sizeof(UpdateParams) == 16, "as the host's");

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

// The sum of f(i)^2 for i in [0, len) over a warp's 32 lanes, in f64: lane l adds i = l, l + 32, .. in order, lane 0 then adds
// the lanes in order. Valid in lane 0.
template <typename F> __device__ __forceinline__ double warp_squares(u64 len, F f) {
    const u32 lane = threadIdx.x % 32;
    double sum = 0.0;
    u64 i = lane;
    for (; i + 96 < len; i += 128) {
        const float x0 = f(i), x1 = f(i + 32), x2 = f(i + 64), x3 = f(i + 96);
        sum = fma(static_cast<double>(x0), static_cast<double>(x0), sum);
        sum = fma(static_cast<double>(x1), static_cast<double>(x1), sum);
        sum = fma(static_cast<double>(x2), static_cast<double>(x2), sum);
        sum = fma(static_cast<double>(x3), static_cast<double>(x3), sum);
    }
    for (; i < len; i += 32) {
        const double x = static_cast<double>(f(i));
        sum = fma(x, x, sum);
    }
    double total = 0.0;
    for (int from = 0; from < 32; ++from) total += __shfl_sync(0xffffffffu, sum, from);
    return total;
}

__device__ __forceinline__ Scale plain_scale(const UpdateParams* params, const ClipOptions& clip) {
    return Scale{static_cast<float>(1.0 / params->divisor), clip.bound, 1.0f};
}

// Sums of squares of the scaled gradients of each piece, and how many values the value clip changed.
// gradients: [arena]; squares, clamped: [pieces]. Grid: ceil(pieces / 8) blocks of 256 threads, a warp a piece.
// Moves sizeof(G) bytes a parameter.
template <typename G>
__device__ void norm_pieces(const G* gradients, const Piece* pieces, u32 count, const UpdateParams* params, ClipOptions clip,
                            double* squares, u32* clamped) {
    const u32 index = blockIdx.x * 8 + threadIdx.x / 32;
    if (index >= count) return;
    const Piece piece = pieces[index];
    const Scale scale = plain_scale(params, clip);
    const G* own = gradients + piece.offset;
    u32 changed = 0;
    const double sum = warp_squares(piece.len, [&](u64 i) {
        const float g = to_f32(own[i]);
        changed += fabsf(g * scale.divide) > scale.bound;
        return scale.checked(g);
    });
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) changed += __shfl_xor_sync(0xffffffffu, changed, offset);
    if (threadIdx.x % 32 == 0) {
        squares[index] = sum;
        clamped[index] = changed;
    }
}

// Finishes the norm, decides whether the step is skipped, and prepares the constants of every group.
// tensor_squares, coefficients: [tensors]; steps: [groups]. Grid: one block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024)
    norm_finish(const Tensor* tensors, u32 tensor_count, const double* squares, const u32* clamped, u32 piece_count,
                const GroupOptions* groups, u32 group_count, const UpdateParams* params, ClipOptions clip,
                double* tensor_squares, float* coefficients, RuleStep* steps, Outcome* outcome) {
    __shared__ u64 changed[32];
    for (u32 t = threadIdx.x; t < tensor_count; t += blockDim.x) {
        double sum = 0.0;
        for (u32 p = 0; p < tensors[t].pieces; ++p) sum += squares[tensors[t].first_piece + p];
        tensor_squares[t] = sum;
    }
    u64 count = 0;
    for (u32 p = threadIdx.x; p < piece_count; p += blockDim.x) count += clamped[p];
    count = block_sum(count, changed);
    __shared__ double norm, least;
    if (threadIdx.x == 0) {
        double sum = 0.0;
        for (u32 t = 0; t < tensor_count; ++t) sum += tensor_squares[t];
        norm = sqrt(sum);
        const bool skipped = !isfinite(norm);
        outcome->grad_norm = norm;
        outcome->skipped = skipped;
        outcome->applied += skipped ? 0 : 1;
        outcome->clamped = count;
        outcome->least = __float_as_uint(1.0f);
        double smallest = 1.0;
        const double global = clip.norm == 1 ? fmin(clip.max_norm / (norm + 1e-6), 1.0) : 1.0;
        if (!skipped) {
            for (u32 t = 0; t < tensor_count; ++t) {
                const double own = clip.norm == 2 ? fmin(clip.max_norm / (sqrt(tensor_squares[t]) + 1e-6), 1.0) : global;
                smallest = fmin(smallest, own);
            }
        }
        least = smallest;
        outcome->clip_coefficient = least;
    }
    __syncthreads();
    if (!isfinite(norm)) return;
    const double global = clip.norm == 1 ? fmin(clip.max_norm / (norm + 1e-6), 1.0) : 1.0;
    for (u32 t = threadIdx.x; t < tensor_count; t += blockDim.x) {
        const double own = clip.norm == 2 ? fmin(clip.max_norm / (sqrt(tensor_squares[t]) + 1e-6), 1.0) : global;
        coefficients[t] = static_cast<float>(own);
    }
    for (u32 g = threadIdx.x; g < group_count; g += blockDim.x) {
        steps[g] = rule_step(groups[g], params->learning_rate, outcome->applied);
    }
}

// The coefficient of each output unit under the adaptive clip, rounded once. unit_coefficients: [units].
// Grid: ceil(units / 8) blocks of 256 threads, a warp a unit. `unit_tensors` names each unit's tensor.
template <typename G>
__device__ void unit_coefficients(const float* parameters, const G* gradients, const Tensor* tensors, const u32* unit_tensors,
                                  u32 count, const UpdateParams* params, ClipOptions clip, float* coefficients,
                                  Outcome* outcome) {
    const u32 index = blockIdx.x * 8 + threadIdx.x / 32;
    if (index >= count || outcome->skipped) return;
    const Tensor tensor = tensors[unit_tensors[index]];
    const u64 start = static_cast<u64>(index - tensor.first_unit) * tensor.unit;
    const u64 len = min(static_cast<u64>(tensor.unit), tensor.len - start);
    const float* theta = parameters + tensor.offset + start;
    const G* gradient = gradients + tensor.offset + start;
    const Scale scale = plain_scale(params, clip);
    const double weights = warp_squares(len, [&](u64 i) { return theta[i]; });
    const double slope = sqrt(warp_squares(len, [&](u64 i) { return scale.of(to_f32(gradient[i])); }));
    if (threadIdx.x % 32 != 0) return;
    const double most = clip.max_norm * fmax(sqrt(weights), clip.epsilon);
    float coefficient = 1.0f;
    if (slope > most) {
        coefficient = static_cast<float>(most / fmax(slope, 1e-6));
        // Coefficients are not negative, so their order is that of their bits.
        atomicMin(&outcome->least, __float_as_uint(coefficient));
    }
    coefficients[index] = coefficient;
}

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
    float bound;
    int zero_gradients;
};
static_assert(sizeof(Pass) == 96, "as the host's");

// Steps 1 to 5 of four elements side by side.
template <int RULE>
__device__ __forceinline__ void four_elements(const RuleStep& r, float rate, const Scale& scale, const float* own, const float* g,
                                              Pack<float, 4>& theta, Pack<float, 4>& first, Pack<float, 4>& second) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        Scale s = scale;
        s.coefficient = own[j];
        rule_element<RULE>(r, rate, s.of(g[j]), theta.at[j], first.at[j], second.at[j]);
    }
}

// One update of the arena, steps 1 to 6. parameters: [arena] f32; gradients: [arena] G; copy: [arena] S, or null; first,
// second: [arena] f32, or null where the rule keeps no such slot. A warp takes a block of 128 elements, which all belong to
// one group, four a lane: 16-byte accesses on f32 arrays. Grid: any, 256 threads.
template <int RULE, typename G, typename S>
__device__ void update(float* parameters, G* gradients, S* copy, float* first, float* second, const Pass& pass) {
    const bool skipped = pass.outcome->skipped;
    if (skipped && !pass.zero_gradients) return;
    const u64 lane = threadIdx.x % 32;
    const u64 blocks = pass.len / 128, stride = thread_count() / 32;
    Pack<G, 4> zeros;
#pragma unroll
    for (int j = 0; j < 4; ++j) zeros.at[j] = from_f32<G>(0.0f);
    const float divide = static_cast<float>(1.0 / pass.params->divisor);
    for (u64 block = thread_index() / 32; block < blocks; block += stride) {
        const u64 at = block * 128 + lane * 4;
        if (skipped) {
            store<G, 4>(gradients + at, zeros);
            continue;
        }
        const u32 group = pass.block_groups[block], index = pass.block_tensors[block];
        const RuleStep r = pass.steps[group];
        const int rule = RULE == MIXED ? pass.groups[group].rule : RULE;
        if (rule == MUON) continue;
        const Pack<G, 4> gradient = load<G, 4>(gradients + at);
        Pack<float, 4> theta = load<float, 4>(parameters + at), m, v;
        if (keeps_first(rule)) m = load<float, 4>(first + at);
        if (rule == ADAM || rule == LAMB) v = load<float, 4>(second + at);
        const Scale scale{divide, pass.bound, pass.coefficients[index]};
        float g[4], own[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            g[j] = to_f32(gradient.at[j]);
            own[j] = scale.coefficient;
        }
        if (pass.unit_coefficients != nullptr) {
            const Tensor tensor = pass.tensors[index];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const u64 within = at + j - tensor.offset;
                // Padding has no unit; its gradient is 0.
                if (within < tensor.len) own[j] = pass.unit_coefficients[tensor.first_unit + within / tensor.unit];
            }
        }
        const float rate = rule == LARS ? pass.rates[index] : 0.0f;
        if (RULE == MIXED) {
            switch (rule) {
                case SGD: four_elements<SGD>(r, rate, scale, own, g, theta, m, v); break;
                case MOMENTUM: four_elements<MOMENTUM>(r, rate, scale, own, g, theta, m, v); break;
                case NESTEROV: four_elements<NESTEROV>(r, rate, scale, own, g, theta, m, v); break;
                case POLYAK: four_elements<POLYAK>(r, rate, scale, own, g, theta, m, v); break;
                case ADAM: four_elements<ADAM>(r, rate, scale, own, g, theta, m, v); break;
                case LION: four_elements<LION>(r, rate, scale, own, g, theta, m, v); break;
                case LARS: four_elements<LARS>(r, rate, scale, own, g, theta, m, v); break;
                default: four_elements<LAMB>(r, rate, scale, own, g, theta, m, v); break;
            }
        } else {
            four_elements<RULE>(r, rate, scale, own, g, theta, m, v);
        }
        if (rule != LAMB) {
            store<float, 4>(parameters + at, theta);
            if (copy != nullptr) {
                Pack<S, 4> low;
#pragma unroll
                for (int j = 0; j < 4; ++j) low.at[j] = from_f32<S>(theta.at[j]);
                store<S, 4>(copy + at, low);
            }
        }
        if (keeps_first(rule)) store<float, 4>(first + at, m);
        if (rule == ADAM || rule == LAMB) store<float, 4>(second + at, v);
        if (pass.zero_gradients) store<G, 4>(gradients + at, zeros);
    }
}

// LARS: sums of squares of each piece's weights and scaled gradients; 0 for tensors of other rules. weights, slopes: [pieces].
// Grid: ceil(pieces / 8) blocks of 256 threads, a warp a piece.
template <typename G>
__device__ void lars_pieces(const float* parameters, const G* gradients, const Piece* pieces, u32 count, const Pass& pass,
                            double* weights, double* slopes) {
    const u32 index = blockIdx.x * 8 + threadIdx.x / 32;
    if (index >= count || pass.outcome->skipped) return;
    const Piece piece = pieces[index];
    const Tensor tensor = pass.tensors[piece.tensor];
    const bool own = pass.groups[tensor.group].rule == LARS;
    const u64 start = piece.offset - tensor.offset;
    const float divide = static_cast<float>(1.0 / pass.params->divisor);
    const float* theta = parameters + piece.offset;
    const G* gradient = gradients + piece.offset;
    double w = 0.0, s = 0.0;
    if (own) {
        w = warp_squares(piece.len, [&](u64 i) { return theta[i]; });
        // The adaptive clip's units one after another, as the CPU adds them up.
        const u64 unit = pass.unit_coefficients == nullptr ? piece.len : tensor.unit;
        for (u64 from = 0; from < piece.len; from += unit) {
            const u64 len = min(unit, static_cast<u64>(piece.len) - from);
            float coefficient = pass.coefficients[piece.tensor];
            if (pass.unit_coefficients != nullptr) {
                coefficient = pass.unit_coefficients[tensor.first_unit + (start + from) / tensor.unit];
            }
            const Scale scale{divide, pass.bound, coefficient};
            s += warp_squares(len, [&](u64 i) { return scale.of(to_f32(gradient[from + i])); });
        }
    }
    if (threadIdx.x % 32 == 0) {
        weights[index] = w;
        slopes[index] = s;
    }
}

// LAMB: sums of squares of each piece's weights and directions, from the new moments; 0 for tensors of other rules.
extern "C" __global__ void __launch_bounds__(256)
    lamb_pieces(const float* parameters, const float* first, const float* second, const Piece* pieces, u32 count, Pass pass,
                double* weights, double* directions) {
    const u32 index = blockIdx.x * 8 + threadIdx.x / 32;
    if (index >= count || pass.outcome->skipped) return;
    const Piece piece = pieces[index];
    const u32 group = pass.tensors[piece.tensor].group;
    double w = 0.0, d = 0.0;
    if (pass.groups[group].rule == LAMB) {
        const RuleStep r = pass.steps[group];
        const float *theta = parameters + piece.offset, *m = first + piece.offset, *v = second + piece.offset;
        w = warp_squares(piece.len, [&](u64 i) { return theta[i]; });
        d = warp_squares(piece.len, [&](u64 i) { return lamb_direction(r, theta[i], m[i], v[i]); });
    }
    if (threadIdx.x % 32 == 0) {
        weights[index] = w;
        directions[index] = d;
    }
}

// The learning rate of each tensor under LARS (`lamb` 0) or LAMB (1). weights, others: [pieces]; rates: [tensors].
// Grid: ceil(tensors / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    tensor_rates(const double* weights, const double* others, u32 tensor_count, Pass pass, int lamb, float* rates) {
    const u32 t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= tensor_count || pass.outcome->skipped) return;
    const Tensor tensor = pass.tensors[t];
    const GroupOptions group = pass.groups[tensor.group];
    double w = 0.0, o = 0.0;
    for (u32 p = 0; p < tensor.pieces; ++p) {
        w += weights[tensor.first_piece + p];
        o += others[tensor.first_piece + p];
    }
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
template <typename S>
__device__ void lamb_apply(float* parameters, S* copy, const float* first, const float* second, const float* rates,
                           const Pass& pass) {
    if (pass.outcome->skipped) return;
    const u64 lane = threadIdx.x % 32;
    for (u64 block = thread_index() / 32; block < pass.len / 128; block += thread_count() / 32) {
        const u32 group = pass.block_groups[block];
        if (pass.groups[group].rule != LAMB) continue;
        const RuleStep r = pass.steps[group];
        const float rate = rates[pass.block_tensors[block]];
        const u64 at = block * 128 + lane * 4;
        Pack<float, 4> theta = load<float, 4>(parameters + at);
        const Pack<float, 4> m = load<float, 4>(first + at), v = load<float, 4>(second + at);
        Pack<S, 4> low;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            theta.at[j] = lamb_step(r, theta.at[j], m.at[j], v.at[j], rate);
            low.at[j] = from_f32<S>(theta.at[j]);
        }
        store<float, 4>(parameters + at, theta);
        if (copy != nullptr) store<S, 4>(copy + at, low);
    }
}

// average += share (parameters - average), unless the step was skipped (`outcome` may be null). [len]
extern "C" __global__ void __launch_bounds__(256)
    average(float* averages, const float* parameters, float share, i64 len, const Outcome* outcome) {
    if (outcome != nullptr && outcome->skipped) return;
    for (i64 i = thread_index(); i < len; i += thread_count()) {
        averages[i] = fmaf(share, parameters[i] - averages[i], averages[i]);
    }
}

#define DEFINE_RULE(NAME, RULE, SUFFIX, G, S)                                                                             \
    extern "C" __global__ void __launch_bounds__(256) update_##NAME##_##SUFFIX(float* parameters, G* gradients, S* copy,  \
                                                                               float* first, float* second, Pass pass) { \
        update<RULE, G, S>(parameters, gradients, copy, first, second, pass);                                             \
    }
// The gradients' type, then the copy's.
#define DEFINE_RULES(SUFFIX, G, S)                 \
    DEFINE_RULE(sgd, SGD, SUFFIX, G, S)            \
    DEFINE_RULE(momentum, MOMENTUM, SUFFIX, G, S)  \
    DEFINE_RULE(nesterov, NESTEROV, SUFFIX, G, S)  \
    DEFINE_RULE(polyak, POLYAK, SUFFIX, G, S)      \
    DEFINE_RULE(adam, ADAM, SUFFIX, G, S)          \
    DEFINE_RULE(lion, LION, SUFFIX, G, S)          \
    DEFINE_RULE(mixed, MIXED, SUFFIX, G, S)
DEFINE_RULES(f32_f32, float, float)
DEFINE_RULES(f32_bf16, float, bf16)
DEFINE_RULES(f32_f16, float, f16)
DEFINE_RULES(bf16_bf16, bf16, bf16)
DEFINE_RULES(f16_f16, f16, f16)

#define DEFINE(SUFFIX, T)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                        \
        norm_pieces_##SUFFIX(const T* gradients, const Piece* pieces, u32 count, const UpdateParams* params,                 \
                             ClipOptions clip, double* squares, u32* clamped) {                                              \
        norm_pieces(gradients, pieces, count, params, clip, squares, clamped);                                               \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                                                        \
        unit_coefficients_##SUFFIX(const float* parameters, const T* gradients, const Tensor* tensors,                       \
                                   const u32* unit_tensors, u32 count, const UpdateParams* params, ClipOptions clip,         \
                                   float* coefficients, Outcome* outcome) {                                                  \
        unit_coefficients(parameters, gradients, tensors, unit_tensors, count, params, clip, coefficients, outcome);         \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                                                        \
        lars_pieces_##SUFFIX(const float* parameters, const T* gradients, const Piece* pieces, u32 count, Pass pass,         \
                             double* weights, double* slopes) {                                                              \
        lars_pieces(parameters, gradients, pieces, count, pass, weights, slopes);                                            \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) lamb_apply_##SUFFIX(float* parameters, T* copy, const float* first,    \
                                                                          const float* second, const float* rates,           \
                                                                          Pass pass) {                                       \
        lamb_apply(parameters, copy, first, second, rates, pass);                                                            \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE

// Muon, first: the momentum, and the direction that is then made orthogonal; 0 where the step is skipped.
// direction: [len] of the tensor at `offset`. Grid: any, 256 threads.
template <typename G>
__device__ void muon_direction(const float* parameters, G* gradients, float* first, float* direction, u32 index, int nesterov,
                               const Pass& pass) {
    const Tensor tensor = pass.tensors[index];
    const bool skipped = pass.outcome->skipped;
    const RuleStep r = pass.steps[tensor.group];
    const float divide = static_cast<float>(1.0 / pass.params->divisor);
    for (u64 i = thread_index(); i < tensor.len; i += thread_count()) {
        const u64 at = tensor.offset + i;
        float d = 0.0f;
        if (!skipped) {
            Scale scale{divide, pass.bound, pass.coefficients[index]};
            if (pass.unit_coefficients != nullptr) {
                scale.coefficient = pass.unit_coefficients[tensor.first_unit + i / tensor.unit];
            }
            const float g = fmaf(r.coupled, parameters[at], scale.of(to_f32(gradients[at])));
            const float m = fmaf(r.feed, g - first[at], first[at]);
            first[at] = m;
            d = nesterov ? fmaf(r.a, m - g, g) : m;
        }
        direction[i] = d;
        if (pass.zero_gradients) gradients[at] = from_f32<G>(0.0f);
    }
}

// Sums of squares of pieces of 16,384 values. x: [len], squares: [pieces]. Grid: ceil(pieces / 8) blocks of 256, a warp a piece.
extern "C" __global__ void __launch_bounds__(256) squares_f32(const float* x, u64 len, double* squares) {
    const u64 index = blockIdx.x * 8 + threadIdx.x / 32, start = index * 16384;
    if (start >= len) return;
    const double sum = warp_squares(min(len - start, static_cast<u64>(16384)), [&](u64 i) { return x[start + i]; });
    if (threadIdx.x % 32 == 0) squares[index] = sum;
}

// x /= max(norm of x, 1e-7), in place. squares: [pieces]. Grid: any, 256 threads.
extern "C" __global__ void __launch_bounds__(256) muon_normalize(float* x, u64 len, const double* squares, u32 pieces) {
    double sum = 0.0;
    for (u32 p = 0; p < pieces; ++p) sum += squares[p];
    const float norm = static_cast<float>(fmax(sqrt(sum), 1e-7));
    for (u64 i = thread_index(); i < len; i += thread_count()) x[i] /= norm;
}

// x = a x + b y. x, y: [len]. Grid: any, 256 threads.
extern "C" __global__ void __launch_bounds__(256) combine(float* x, const float* y, float a, float b, u64 len) {
    for (u64 i = thread_index(); i < len; i += thread_count()) x[i] = fmaf(a, x[i], b * y[i]);
}

// Muon, last: theta -= rate direction, after decay. factor: of the learning rate, by the matrix's shape. Grid: any, 256 threads.
template <typename S>
__device__ void muon_apply(float* parameters, S* copy, const float* direction, u32 index, double factor, const Pass& pass) {
    if (pass.outcome->skipped) return;
    const Tensor tensor = pass.tensors[index];
    const RuleStep r = pass.steps[tensor.group];
    const float rate = static_cast<float>(group_rate(pass.groups[tensor.group], pass.params->learning_rate) * factor);
    for (u64 i = thread_index(); i < tensor.len; i += thread_count()) {
        const u64 at = tensor.offset + i;
        const float theta = fmaf(-rate, direction[i], parameters[at] * r.shrink);
        parameters[at] = theta;
        if (copy != nullptr) copy[at] = from_f32<S>(theta);
    }
}

#define DEFINE(SUFFIX, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                                     \
        muon_direction_##SUFFIX(const float* parameters, T* gradients, float* first, float* direction, u32 index,         \
                                int nesterov, Pass pass) {                                                                \
        muon_direction(parameters, gradients, first, direction, index, nesterov, pass);                                   \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) muon_apply_##SUFFIX(float* parameters, T* copy, const float* direction, \
                                                                          u32 index, double factor, Pass pass) {          \
        muon_apply(parameters, copy, direction, index, factor, pass);                                                     \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
