// The whole update in one cooperative launch, for arenas whose gradients stay in the second-level cache between the norm and
// the update: small models wait for launches, not for memory. The same bits as kernels/update.cu: the same pieces are summed in
// the same order, whatever the number of blocks. Rules that look at elements alone; no adaptive clip. CPU twin:
// src/backend/cpu/update.rs.
//
// Grid: at most as many blocks of 256 threads as are resident at once. All blocks take the pieces of the norm in turn, meet at a
// barrier, then each finishes the norm for itself (a few KiB of sums, from cache), which saves a second barrier, and goes on with
// its part of the arena. Bytes a parameter: as update.cu, the second reading of the gradient from cache.
#include "update_pass.cuh"

// The most tensors and groups that a block keeps the constants of.
constexpr u32 TENSORS = 512, GROUPS = 16;
// Sums of pieces that it reads at once.
constexpr u32 TILE = 1024;

// What the norm needs besides the pass.
struct Norm {
    const Piece* pieces;
    double* squares;         // [pieces]
    u32* clamped;            // [pieces]
    double* tensor_squares;  // [tensors]
    u32* barrier;            // one word, 0 before the first launch
    ClipOptions clip;
    u32 piece_count, tensor_count, group_count, padding;
};
static_assert(sizeof(Norm) == 80, "as the host's");

// Rows of the norm that a warp has in flight: half of what it has of a piece, since few blocks have one.
constexpr int ROWS_AHEAD = 8;

// All threads of the grid wait for each other, and see what each wrote before; in between a block may do what others do not wait
// for. The word's upper bit turns over once all blocks have come: block 0 adds what is left of 2^31, so that the next barrier finds
// it ready whatever the number of blocks. What `arrive` gives is `wait`'s.
__device__ __forceinline__ u32 arrive(u32* word) {
    u32 before = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        const u32 share = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
        asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(share) : "memory");
    }
    return before;
}
__device__ __forceinline__ void wait(const u32* word, u32 before) {
    if (threadIdx.x == 0) {
        u32 now;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
        } while (((before ^ now) & 0x80000000u) == 0);
    }
    __syncthreads();
}

template <int RULE, typename P, typename G, typename S>
__device__ __forceinline__ void persistent(P* parameters, G* gradients, S* copy, float* first, float* second, const Pass& pass,
                                           const Norm& norm) {
    __shared__ double tensor_squares[TENSORS];
    __shared__ float coefficients[TENSORS];
    __shared__ RuleStep steps[GROUPS];
    __shared__ double sums[8];
    __shared__ u32 counts[32];
    __shared__ u64 changed[32];
    __shared__ double tile[TILE];
    // Before the barrier, after which block 0 writes it.
    const u64 applied_before = pass.outcome->applied;
    const Scale scale = plain_scale(pass.params, norm.clip);
    for (u32 index = blockIdx.x; index < norm.piece_count; index += gridDim.x) {
        norm_piece<ROWS_AHEAD>(gradients, norm.pieces, index, scale, norm.squares, norm.clamped, sums, counts);
    }
    const u32 before = arrive(norm.barrier);
    // The constants of a step that is not skipped; one that is needs none.
    for (u32 g = threadIdx.x; g < norm.group_count; g += blockDim.x) {
        steps[g] = rule_step(pass.groups[g], *pass.params, applied_before + 1);
    }
    wait(norm.barrier, before);
    const double total_norm =
        sqrt(sum_pieces<TILE>(pass.tensors, norm.tensor_count, norm.squares, norm.piece_count, tensor_squares, tile));
    const bool skipped = !isfinite(total_norm);
    const u64 applied = applied_before + (skipped ? 0 : 1);
    const double global = global_coefficient(norm.clip, total_norm);
    if (blockIdx.x == 0) {
        u64 count = 0;
        for (u32 p = threadIdx.x; p < norm.piece_count; p += blockDim.x) count += norm.clamped[p];
        count = block_sum(count, changed);
        for (u32 t = threadIdx.x; t < norm.tensor_count; t += blockDim.x) norm.tensor_squares[t] = tensor_squares[t];
        double least = 1.0;
        for (u32 t = threadIdx.x; t < norm.tensor_count && !skipped; t += blockDim.x) {
            least = fmin(least, tensor_coefficient(norm.clip, tensor_squares[t], global));
        }
        least = block_min(least, tile);
        if (threadIdx.x == 0) {
            pass.outcome->grad_norm = total_norm;
            pass.outcome->clip_coefficient = least;
            pass.outcome->applied = applied;
            pass.outcome->clamped = count;
            pass.outcome->skipped = skipped;
            pass.outcome->least = __float_as_uint(1.0f);
        }
    }
    if (skipped && !pass.zero_gradients) return;
    for (u32 t = threadIdx.x; t < norm.tensor_count; t += blockDim.x) {
        coefficients[t] = static_cast<float>(tensor_coefficient(norm.clip, tensor_squares[t], global));
    }
    __syncthreads();
    Pass own = pass;
    own.coefficients = coefficients;
    own.steps = steps;
    update<RULE, P, G, S>(parameters, gradients, copy, first, second, own, [=] { return skipped; }, applied);
}

#define DEFINE_RULE(NAME, RULE, SUFFIX, P, G, S)                                                                         \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                                 \
        persistent_##NAME##_##SUFFIX(P* parameters, G* gradients, S* copy, float* first, float* second, Pass pass,       \
                                     Norm norm) {                                                                        \
        persistent<RULE, P, G, S>(parameters, gradients, copy, first, second, pass, norm);                               \
    }
#define DEFINE_RULES(SUFFIX, P, G, S)                 \
    DEFINE_RULE(sgd, SGD, SUFFIX, P, G, S)            \
    DEFINE_RULE(momentum, MOMENTUM, SUFFIX, P, G, S)  \
    DEFINE_RULE(nesterov, NESTEROV, SUFFIX, P, G, S)  \
    DEFINE_RULE(polyak, POLYAK, SUFFIX, P, G, S)      \
    DEFINE_RULE(adam, ADAM, SUFFIX, P, G, S)          \
    DEFINE_RULE(lion, LION, SUFFIX, P, G, S)          \
    DEFINE_RULE(mixed, MIXED, SUFFIX, P, G, S)
FOR_EACH_FORM(DEFINE_RULES)
