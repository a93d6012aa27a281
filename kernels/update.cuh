// The update rules, each an element function: the same operations in the same order as src/optim/rule.rs, so the same bits.
// Fused multiply-adds are explicit; nothing else is fused (build.rs compiles with -fmad=false).
#pragma once
#include "common.cuh"

// src/optim/rule.rs: Rule and MomentumForm, numbered as backend/cuda/update/plan.rs numbers them.
enum RuleKind : int { SGD = 0, MOMENTUM = 1, NESTEROV = 2, POLYAK = 3, ADAM = 4, LION = 5, LARS = 6, LAMB = 7, MUON = 8, MIXED = 9 };

// A group of parameters as the run file sets it.
struct GroupOptions {
    double learning_rate_scale;
    double weight_decay;
    double a;          // momentum, beta1
    double b;          // beta2
    double epsilon;
    double dampening;  // PyTorch's momentum
    double gamma;      // Polyak's momentum
    double trust;      // LARS
    int rule;          // RuleKind
    int decoupled;
};
static_assert(sizeof(GroupOptions) == 72, "as the host's");

// What the host says before each replay.
struct UpdateParams {
    double learning_rate;
    double divisor;
};
static_assert(sizeof(UpdateParams) == 16, "as the host's");

__device__ __forceinline__ float division(const UpdateParams& params) { return static_cast<float>(1.0 / params.divisor); }

// A group's constants for one step, computed in f64, which is slow on most devices, once a group, and rounded once.
struct RuleStep {
    float learning_rate, coupled, shrink, a, b, feed, feed_b, epsilon, corrected_rate, correction, root_correction, gamma, divide;
};
static_assert(sizeof(RuleStep) == 52, "as the host's");

// base^exponent by squaring.
__device__ __forceinline__ double power(double base, u64 exponent) {
    double result = 1.0;
    while (exponent > 0) {
        if (exponent & 1) result *= base;
        base *= base;
        exponent >>= 1;
    }
    return result;
}

// The learning rate of a group.
__device__ __forceinline__ double group_rate(const GroupOptions& group, double learning_rate) {
    return learning_rate * group.learning_rate_scale;
}

// The constants of applied update number `step` (1 the first time).
__device__ __forceinline__ RuleStep rule_step(const GroupOptions& group, const UpdateParams& params, u64 step) {
    const double rate = group_rate(group, params.learning_rate);
    double feed = 1.0;
    switch (group.rule) {
        case MOMENTUM:
        case NESTEROV: feed = step <= 1 ? 1.0 : 1.0 - group.dampening; break;
        case POLYAK: feed = rate; break;
        case ADAM:
        case LAMB:
        case LION:
        case MUON: feed = 1.0 - group.a; break;
        default: break;
    }
    const double correction = 1.0 / (1.0 - power(group.a, step));
    RuleStep r;
    r.learning_rate = static_cast<float>(rate);
    r.coupled = static_cast<float>(group.decoupled ? 0.0 : group.weight_decay);
    r.shrink = static_cast<float>(group.decoupled ? 1.0 - rate * group.weight_decay : 1.0);
    r.a = static_cast<float>(group.a);
    r.b = static_cast<float>(group.b);
    r.feed = static_cast<float>(feed);
    r.feed_b = static_cast<float>(1.0 - group.b);
    r.epsilon = static_cast<float>(group.epsilon);
    r.corrected_rate = static_cast<float>(rate * correction);
    r.correction = static_cast<float>(correction);
    r.root_correction = static_cast<float>(1.0 / sqrt(1.0 - power(group.b, step)));
    r.gamma = static_cast<float>(group.gamma);
    r.divide = division(params);
    return r;
}

// Steps 1 to 3 of the update (src/optim/mod.rs).
struct Scale {
    float divide, bound, coefficient;

    __device__ __forceinline__ float clamped(float g) const {
        g *= divide;
        g = g > bound ? bound : g;
        return g < -bound ? -bound : g;
    }
    __device__ __forceinline__ float of(float g) const { return clamped(g) * coefficient; }
    // As `of`, but not finite where a gradient is not, which the value clip would hide.
    __device__ __forceinline__ float checked(float g) const { return fmaf(g * divide, 0.0f, of(g)); }
};

__device__ __forceinline__ float adam_denominator(const RuleStep& r, float v) {
    return fmaf(sqrtf(v), r.root_correction, r.epsilon);
}
__device__ __forceinline__ float lamb_direction(const RuleStep& r, float theta, float m, float v) {
    return fmaf(r.coupled, theta, r.correction * m / adam_denominator(r, v));
}
__device__ __forceinline__ float lamb_step(const RuleStep& r, float theta, float m, float v, float rate) {
    return fmaf(-rate, lamb_direction(r, theta, m, v), theta * r.shrink);
}

// Steps 4 and 5 of one element. `first` and `second` are the rule's slots, `rate` is LARS's learning rate of the tensor.
template <int RULE>
__device__ __forceinline__ void rule_element(const RuleStep& r, float rate, float g, float& theta, float& first, float& second) {
    const float undecayed = g;
    const float shrunk = theta * r.shrink;
    g = fmaf(r.coupled, theta, g);
    if (RULE == SGD) {
        theta = fmaf(-r.learning_rate, g, shrunk);
    } else if (RULE == MOMENTUM) {
        first = fmaf(r.a, first, r.feed * g);
        theta = fmaf(-r.learning_rate, first, shrunk);
    } else if (RULE == NESTEROV) {
        first = fmaf(r.a, first, r.feed * g);
        theta = fmaf(-r.learning_rate, fmaf(r.a, first, g), shrunk);
    } else if (RULE == POLYAK) {
        first = fmaf(r.a, first, -(r.feed * g));
        theta = fmaf(r.gamma, first, shrunk);
    } else if (RULE == ADAM) {
        first = fmaf(r.a, first, r.feed * g);
        second = fmaf(r.b, second, r.feed_b * g * g);
        theta = fmaf(-r.corrected_rate, first / adam_denominator(r, second), shrunk);
    } else if (RULE == LION) {
        const float direction = fmaf(r.a, first, r.feed * g);
        const float sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : 0.0f;
        theta = fmaf(-r.learning_rate, sign, shrunk);
        first = fmaf(r.b, first, r.feed_b * g);
    } else if (RULE == LARS) {
        first = fmaf(r.a, first, rate * g);
        theta = shrunk - first;
    } else if (RULE == LAMB) {
        // The moments alone: decay is part of the direction, and the step waits for the norms.
        first = fmaf(r.a, first, r.feed * undecayed);
        second = fmaf(r.b, second, r.feed_b * undecayed * undecayed);
    }
}

// Which slots a rule reads and writes.
__device__ constexpr bool keeps_first(int rule) { return rule != SGD; }
__device__ constexpr bool keeps_second(int rule) { return rule == ADAM || rule == LAMB || rule == MIXED; }
