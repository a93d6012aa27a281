// Functions of single values and their slopes. CPU twin: src/backend/cpu/activation.rs, whose formulas these are.
#pragma once
#include "common.cuh"

// As `ActivationKind` is numbered in src/backend/cuda/activation.rs.
enum Kind { RELU, GELU_TANH, GELU, SILU, SIGMOID, TANH };

// 2 sqrt(2 / pi) and the cubic's coefficient, of the tanh form of GELU.
constexpr float GELU_SCALE = 1.5957691216057308f;
constexpr float GELU_CUBIC = 1.5957691216057308f * 0.044715f;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// x / 2 (1 + tanh(u)) = x sigmoid(2 u).
__device__ __forceinline__ float gelu_tanh(float x) {
    return x / (1.0f + expf(-(x * fmaf(x * x, GELU_CUBIC, GELU_SCALE))));
}

// s + x s (1 - s) 2 u' with s = sigmoid(2 u); s (1 - s) from e^-|2 u|, where nothing cancels.
__device__ __forceinline__ float gelu_tanh_slope(float x) {
    const float squared = x * x, inner = x * fmaf(squared, GELU_CUBIC, GELU_SCALE);
    const float slope = fmaf(squared, 3.0f * GELU_CUBIC, GELU_SCALE);
    const float e = expf(-fabsf(inner)), r = 1.0f / (1.0f + e);
    return fmaf(x * slope * r, e * r, inner < 0.0f ? e * r : r);
}

constexpr float SQRT_HALF = 0.70710678118654752f;

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * SQRT_HALF)); }

__device__ __forceinline__ float gelu_slope(float x) {
    const float density = 0.3989422804014327f * expf(-0.5f * x * x);
    return fmaf(x, density, 0.5f * (1.0f + erff(x * SQRT_HALF)));
}

__device__ __forceinline__ float silu_slope(float x) {
    const float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

__device__ __forceinline__ float value_of(int kind, float x) {
    switch (kind) {
        case RELU: return x < 0.0f ? 0.0f : x;
        case GELU_TANH: return gelu_tanh(x);
        case GELU: return gelu(x);
        case SILU: return x * sigmoid(x);
        case SIGMOID: return sigmoid(x);
        default: return tanhf(x);
    }
}

// dy f'(x).
__device__ __forceinline__ float slope_of(int kind, float x, float dy) {
    switch (kind) {
        case RELU: return x > 0.0f ? dy : 0.0f;
        case GELU_TANH: return dy * gelu_tanh_slope(x);
        case GELU: return dy * gelu_slope(x);
        case SILU: return dy * silu_slope(x);
        case SIGMOID: {
            const float s = sigmoid(x);
            return dy * s * (1.0f - s);
        }
        default: {
            const float t = tanhf(x);
            return dy * (1.0f - t * t);
        }
    }
}
