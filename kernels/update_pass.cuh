// Steps 1 to 6 of the update over the whole arena, one pass: shared by kernels/update.cu and kernels/update_persistent.cu.
#pragma once
#include "philox.cuh"
#include "update_plan.cuh"

// `Purpose::Rounding` of src/random.rs.
constexpr u32 PURPOSE_ROUNDING = 7;

// Rounds to bf16, up with the probability of the way there: `word` has 16 random bits at its upper end. What is not finite is
// rounded to nearest, and a value that bf16 holds stays. src/optim/rounding.rs has the same.
__device__ __forceinline__ bf16 round_stochastically(float x, u32 word) {
    const u32 bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return from_f32<bf16>(x);
    bf16 y;
    y.bits = static_cast<u16>((bits + (word >> 16)) >> 16);
    return y;
}

// Where new parameters go: f32 parameters and their rounded copy, or bf16 parameters alone, rounded stochastically by the words of
// the elements' positions in the stream of this update.
template <typename P, typename S> struct Home;

template <typename S> struct Home<float, S> {
    float* parameters;
    S* copy;
    __device__ __forceinline__ Home(float* parameters, S* copy, u64, u64) : parameters(parameters), copy(copy) {}
    __device__ __forceinline__ float read(u64 at) const { return parameters[at]; }
    __device__ __forceinline__ Pack<float, 4> read_four(u64 at) const { return load<float, 4>(parameters + at); }
    __device__ __forceinline__ void write(u64 at, float theta) const {
        parameters[at] = theta;
        if (copy != nullptr) copy[at] = from_f32<S>(theta);
    }
    __device__ __forceinline__ void write_four(u64 at, const Pack<float, 4>& theta) const {
        store<float, 4>(parameters + at, theta);
        if (copy == nullptr) return;
        Pack<S, 4> low;
#pragma unroll
        for (int j = 0; j < 4; ++j) low.at[j] = from_f32<S>(theta.at[j]);
        store<S, 4>(copy + at, low);
    }
};

template <> struct Home<bf16, bf16> {
    bf16* parameters;
    u64 seed;
    u32 stream;
    __device__ __forceinline__ Home(bf16* parameters, bf16*, u64 seed, u64 applied)
        : parameters(parameters), seed(seed), stream(static_cast<u32>(applied)) {}
    __device__ __forceinline__ float read(u64 at) const { return to_f32(parameters[at]); }
    __device__ __forceinline__ Pack<float, 4> read_four(u64 at) const {
        const Pack<bf16, 4> low = load<bf16, 4>(parameters + at);
        Pack<float, 4> theta;
#pragma unroll
        for (int j = 0; j < 4; ++j) theta.at[j] = to_f32(low.at[j]);
        return theta;
    }
    __device__ __forceinline__ void write(u64 at, float theta) const {
        parameters[at] = round_stochastically(theta, philox_word(seed, PURPOSE_ROUNDING, stream, at));
    }
    // `at` is a multiple of 4: one block of random words serves four elements.
    __device__ __forceinline__ void write_four(u64 at, const Pack<float, 4>& theta) const {
        const PhiloxBlock words = philox(seed, PURPOSE_ROUNDING, stream, at / 4);
        Pack<bf16, 4> low;
#pragma unroll
        for (int j = 0; j < 4; ++j) low.at[j] = round_stochastically(theta.at[j], words.word[j]);
        store<bf16, 4>(parameters + at, low);
    }
};

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

// Whether the step is skipped, as the norm's last kernel left it. What was read before is not put off until this is known.
struct Skipped {
    const Outcome* outcome;
    __device__ __forceinline__ bool operator()() const {
        u32 skipped;
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(skipped) : "l"(&outcome->skipped) : "memory");
        return skipped != 0;
    }
};

// One update of the arena, steps 1 to 6; `applied` is its number, `skipped()` tells whether there is none. parameters: [arena] P;
// gradients: [arena] G; copy: [arena] S, or null; first, second: [arena] f32, or null where the rule keeps no such slot. A warp takes
// a block of 128 elements, which all belong to one group, four a lane: 16-byte accesses on f32 arrays. Grid: any, 256 threads.
template <int RULE, typename P, typename G, typename S, typename Skip>
__device__ __forceinline__ void update(P* parameters, G* gradients, S* copy, float* first, float* second, const Pass& pass,
                                       Skip skipped, u64 applied) {
    const u64 lane = threadIdx.x % 32;
    const u64 blocks = pass.len / 128, stride = thread_count() / 32;
    Pack<G, 4> zeros;
#pragma unroll
    for (int j = 0; j < 4; ++j) zeros.at[j] = from_f32<G>(0.0f);
    const Home<P, S> home(parameters, copy, pass.seed, applied);
    for (u64 block = thread_index() / 32; block < blocks; block += stride) {
        const u64 at = block * 128 + lane * 4;
        const u32 group = pass.block_groups[block], index = pass.block_tensors[block];
        const int rule = RULE == MIXED ? pass.groups[group].rule : RULE;
        // Muon's gradients are set to 0 here where the step is skipped, and nothing else of it.
        if (rule == MUON && !skipped()) continue;
        // Under way before anything else is waited for: most warps take one block, and would have each wait behind the other.
        const Pack<G, 4> gradient = load<G, 4>(gradients + at);
        Pack<float, 4> theta{}, m, v;
        // LAMB's pass moves the moments alone.
        if (rule != LAMB) theta = home.read_four(at);
        if (keeps_first(rule)) m = load<float, 4>(first + at);
        if (rule == ADAM || rule == LAMB) v = load<float, 4>(second + at);
        if (skipped()) {
            if (pass.zero_gradients) store<G, 4>(gradients + at, zeros);
            continue;
        }
        float g[4], own[4];
        const float coefficient = pass.coefficients[index];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            g[j] = to_f32(gradient.at[j]);
            own[j] = coefficient;
        }
        if (pass.unit_coefficients != nullptr) {
            const Tensor tensor = pass.tensors[index];
            const u64 within = at - tensor.offset;
            u64 unit = within / tensor.unit;
            u32 of_unit = static_cast<u32>(within - unit * tensor.unit);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                // Padding has no unit; its gradient is 0.
                if (within + j < tensor.len) own[j] = pass.unit_coefficients[tensor.first_unit + unit];
                if (++of_unit == tensor.unit) {
                    of_unit = 0;
                    ++unit;
                }
            }
        }
        const RuleStep r = pass.steps[group];
        const Scale scale{r.divide, pass.bound, 1.0f};
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
        if (rule != LAMB) home.write_four(at, theta);
        if (keeps_first(rule)) store<float, 4>(first + at, m);
        if (rule == ADAM || rule == LAMB) store<float, 4>(second + at, v);
        if (pass.zero_gradients) store<G, 4>(gradients + at, zeros);
    }
}
