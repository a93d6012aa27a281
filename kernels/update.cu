// The fused update: gradients unscaled, clipped, decayed, stepped; the low-precision copy written and the gradient set to 0 in
// the same pass. CPU twin: src/backend/cpu/update.rs; every result has its bits.
//
// Bytes a parameter, f32: 4 for the norm; then 12 (SGD), 20 (momentum) or 28 (Adam); 2 more for a copy of 16 bits, 4 more where
// the gradient is set to 0. Parameters in bf16 alone: 8, 16 or 24. The norm is taken in two stages of a fixed order: a block a
// piece of a tensor, in f64 (update_plan.cuh); then one block over the pieces of each tensor, in order. Small arenas do all of it
// in one launch (update_persistent.cu). LARS and LAMB: update_trust.cu; Muon: update_muon.cu.
#include "update_pass.cuh"

// Sums of squares of the scaled gradients of pieces first .. first + count, and how many values the value clip changed.
// gradients: [arena]; squares, clamped: [pieces]. Grid: count blocks of 256 threads, a block a piece.
// Moves sizeof(G) bytes a parameter, in accesses of 4 values.
template <typename G>
__device__ void norm_pieces(const G* gradients, const Piece* pieces, u32 first, const UpdateParams* params,
                            const ClipOptions& clip, double* squares, u32* clamped) {
    __shared__ double sums[8];
    __shared__ u32 counts[32];
    norm_piece(gradients, pieces, first + blockIdx.x, plain_scale(params, clip), squares, clamped, sums, counts);
}

// Sums that `norm_finish` holds at once.
constexpr u32 TILE = 4096;

// Finishes the norm, decides whether the step is skipped, and prepares the constants of every group.
// tensor_squares, coefficients: [tensors]; steps: [groups]. Grid: one block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024, 1)
    norm_finish(const Tensor* tensors, u32 tensor_count, const double* squares, const u32* clamped, u32 piece_count,
                const GroupOptions* groups, u32 group_count, const UpdateParams* params, ClipOptions clip,
                double* tensor_squares, float* coefficients, RuleStep* steps, Outcome* outcome) {
    __shared__ u64 changed[32];
    __shared__ double tile[TILE];
    const double norm = sqrt(sum_pieces<TILE>(tensors, tensor_count, squares, piece_count, tensor_squares, tile));
    u64 count = 0;
    for (u32 p = threadIdx.x; p < piece_count; p += blockDim.x) count += clamped[p];
    count = block_sum(count, changed);
    const bool skipped = !isfinite(norm);
    const double global = global_coefficient(clip, norm);
    double least = 1.0;
    for (u32 t = threadIdx.x; t < tensor_count && !skipped; t += blockDim.x) {
        least = fmin(least, tensor_coefficient(clip, tensor_squares[t], global));
    }
    least = block_min(least, tile);
    if (threadIdx.x == 0) {
        outcome->grad_norm = norm;
        outcome->skipped = skipped;
        outcome->applied += skipped ? 0 : 1;
        outcome->clamped = count;
        outcome->least = __float_as_uint(1.0f);
        outcome->clip_coefficient = least;
    }
    __syncthreads();
    if (skipped) return;
    for (u32 t = threadIdx.x; t < tensor_count; t += blockDim.x) {
        coefficients[t] = static_cast<float>(tensor_coefficient(clip, tensor_squares[t], global));
    }
    for (u32 g = threadIdx.x; g < group_count; g += blockDim.x) {
        steps[g] = rule_step(groups[g], *params, outcome->applied);
    }
}

// The coefficients of output units first .. first + count under the adaptive clip, rounded once. unit_coefficients: [units].
// Grid: ceil(count / 8) blocks of 256 threads, a warp a unit. `unit_tensors` names each unit's tensor.
template <typename P, typename G>
__device__ void unit_coefficients(const P* parameters, const G* gradients, const Tensor* tensors, const u32* unit_tensors,
                                  u32 first, u32 count, const UpdateParams* params, const ClipOptions& clip,
                                  float* coefficients, Outcome* outcome) {
    const u32 number = blockIdx.x * 8 + threadIdx.x / 32;
    if (number >= count || outcome->skipped) return;
    const u32 index = first + number;
    const Tensor tensor = tensors[unit_tensors[index]];
    const u64 start = static_cast<u64>(index - tensor.first_unit) * tensor.unit;
    const u64 len = min(static_cast<u64>(tensor.unit), tensor.len - start);
    const u64 at = tensor.offset + start;
    const Scale scale = plain_scale(params, clip);
    const double weights = warp_squares(len, mapped(parameters + at, Itself{}));
    const auto scaled = [&](float g) { return scale.of(g); };
    const double slope = sqrt(warp_squares(len, mapped(gradients + at, scaled)));
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

// The least adaptive coefficient of all processes, where each found those of its own units. leasts: [count], as f32 bits.
// Grid: one thread.
extern "C" __global__ void least_of_all(const u32* leasts, u32 count, Outcome* outcome) {
    for (u32 process = 0; process < count; ++process) outcome->least = min(outcome->least, leasts[process]);
}

// average += share (parameters - average), unless the step was skipped (`outcome` may be null). [len]
extern "C" __global__ void __launch_bounds__(256)
    average(float* averages, const float* parameters, float share, i64 len, const Outcome* outcome) {
    if (outcome != nullptr && outcome->skipped) return;
    for (i64 i = thread_index(); i < len; i += thread_count()) {
        averages[i] = fmaf(share, parameters[i] - averages[i], averages[i]);
    }
}

#define DEFINE_RULE(BOUNDS, NAME, RULE, SUFFIX, P, G, S)                                                               \
    extern "C" __global__ void BOUNDS                                                                                    \
        update_##NAME##_##SUFFIX(P* parameters, G* gradients, S* copy, float* first, float* second, Pass pass) {         \
        update<RULE, P, G, S>(parameters, gradients, copy, first, second, pass, Skipped{pass.outcome},                   \
                              pass.outcome->applied);                                                                    \
    }
// The types of parameters, gradients and copy. Of the mixed form three blocks at least are asked for: to have five on a
// multiprocessor, the compiler spills.
#define DEFINE_RULES(SUFFIX, P, G, S)                                           \
    DEFINE_RULE(__launch_bounds__(256), sgd, SGD, SUFFIX, P, G, S)              \
    DEFINE_RULE(__launch_bounds__(256), momentum, MOMENTUM, SUFFIX, P, G, S)    \
    DEFINE_RULE(__launch_bounds__(256), nesterov, NESTEROV, SUFFIX, P, G, S)    \
    DEFINE_RULE(__launch_bounds__(256), polyak, POLYAK, SUFFIX, P, G, S)        \
    DEFINE_RULE(__launch_bounds__(256), adam, ADAM, SUFFIX, P, G, S)            \
    DEFINE_RULE(__launch_bounds__(256), lion, LION, SUFFIX, P, G, S)            \
    DEFINE_RULE(__launch_bounds__(256, 3), mixed, MIXED, SUFFIX, P, G, S)
FOR_EACH_FORM(DEFINE_RULES)

#define DEFINE(SUFFIX, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(256, 4)                                                                 \
        norm_pieces_##SUFFIX(const T* gradients, const Piece* pieces, u32 first, const UpdateParams* params,             \
                             ClipOptions clip, double* squares, u32* clamped) {                                          \
        norm_pieces(gradients, pieces, first, params, clip, squares, clamped);                                           \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE

#define DEFINE(SUFFIX, P, G, S)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                                    \
        unit_coefficients_##SUFFIX(const P* parameters, const G* gradients, const Tensor* tensors,                       \
                                   const u32* unit_tensors, u32 first, u32 count, const UpdateParams* params,            \
                                   ClipOptions clip, float* coefficients, Outcome* outcome) {                            \
        unit_coefficients(parameters, gradients, tensors, unit_tensors, first, count, params, clip, coefficients,        \
                          outcome);                                                                                      \
    }
FOR_EACH_FORM(DEFINE)
#undef DEFINE
