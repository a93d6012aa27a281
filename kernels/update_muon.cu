// Muon: the momentum and its direction, what is done between the products of the iteration, and the step. CPU twin:
// src/backend/cpu/update/muon.rs, whose bits it has but for those of the products.
#include "update_pass.cuh"

// Muon, first: the momentum, and the direction that is then made orthogonal; 0 where the step is skipped.
// direction: [len] of the tensor at `offset`. Grid: any, 256 threads.
template <typename P, typename G>
__device__ void muon_direction(const P* parameters, G* gradients, float* first, float* direction, u32 index, int nesterov,
                               const Pass& pass) {
    const Tensor tensor = pass.tensors[index];
    const bool skipped = pass.outcome->skipped;
    const RuleStep r = pass.steps[tensor.group];
    for (u64 i = thread_index(); i < tensor.len; i += thread_count()) {
        const u64 at = tensor.offset + i;
        float d = 0.0f;
        if (!skipped) {
            Scale scale{r.divide, pass.bound, pass.coefficients[index]};
            if (pass.unit_coefficients != nullptr) {
                scale.coefficient = pass.unit_coefficients[tensor.first_unit + i / tensor.unit];
            }
            const float g = fmaf(r.coupled, to_f32(parameters[at]), scale.of(to_f32(gradients[at])));
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
    const double sum = warp_squares(min(len - start, static_cast<u64>(16384)), mapped(x + start, Itself{}));
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
template <typename P, typename S>
__device__ void muon_apply(P* parameters, S* copy, const float* direction, u32 index, double factor, const Pass& pass) {
    if (pass.outcome->skipped) return;
    const Tensor tensor = pass.tensors[index];
    const RuleStep r = pass.steps[tensor.group];
    const float rate = static_cast<float>(group_rate(pass.groups[tensor.group], pass.params->learning_rate) * factor);
    const Home<P, S> home(parameters, copy, pass.seed, pass.outcome->applied);
    for (u64 i = thread_index(); i < tensor.len; i += thread_count()) {
        const u64 at = tensor.offset + i;
        home.write(at, fmaf(-rate, direction[i], home.read(at) * r.shrink));
    }
}

#define DEFINE(SUFFIX, P, G, S)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                                    \
        muon_direction_##SUFFIX(const P* parameters, G* gradients, float* first, float* direction, u32 index,            \
                                int nesterov, Pass pass) {                                                               \
        muon_direction(parameters, gradients, first, direction, index, nesterov, pass);                                  \
    }                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                    \
        muon_apply_##SUFFIX(P* parameters, S* copy, const float* direction, u32 index, double factor, Pass pass) {       \
        muon_apply(parameters, copy, direction, index, factor, pass);                                                    \
    }
FOR_EACH_FORM(DEFINE)
#undef DEFINE
