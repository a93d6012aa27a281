// What every kernel file shares: storage types, 16-byte accesses, reductions in a fixed order.
// No header of the toolkit is included, so that NVRTC needs none.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

static_assert(sizeof(u64) == 8 && sizeof(u32) == 4, "sizes that the host relies on");

// Storage types of 16 bits. Arithmetic is f32 always.
struct bf16 { u16 bits; };
struct f16 { u16 bits; };

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
__device__ __forceinline__ float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <typename T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> __device__ __forceinline__ f16 from_f32<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// N values in one access of N * sizeof(T) bytes; N * sizeof(T) is 4, 8 or 16 and the address a multiple of it.
template <typename T, int N> struct alignas(N * sizeof(T)) Pack { T at[N]; };

// How many values of T make an access of 16 bytes.
template <typename T> __device__ constexpr int per_access() { return 16 / static_cast<int>(sizeof(T)); }

template <typename T, int N> __device__ __forceinline__ Pack<T, N> load(const T* p) {
    return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <typename T, int N> __device__ __forceinline__ void store(T* p, Pack<T, N> x) {
    *reinterpret_cast<Pack<T, N>*>(p) = x;
}

// Makes the compiler compute anew what it knows of 16 bytes, rather than keep it in registers that it has not got.
template <typename T, int N> __device__ __forceinline__ void forget(Pack<T, N>& x) {
    if constexpr (sizeof(x) == 16) {
        u32(&words)[4] = reinterpret_cast<u32(&)[4]>(x);
        asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
    }
}

constexpr float LOG2_E = 1.4426950408889634f;
// 2^x, within 2^-22 of it; less than the smallest normal value is 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The sum over a warp's 32 lanes, the same bits in every lane.
template <typename T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// The sum over a block, the same bits in every thread, in an order that depends on blockDim.x alone. blockDim.x is a
// multiple of 32, at most 1024; `scratch` holds 32 values and may be used again after the call.
template <typename T> __device__ __forceinline__ T block_sum(T x, T* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    T total = warp_sum(lane < warps ? scratch[lane] : T(0));
    __syncthreads();
    return total;
}
__device__ __forceinline__ float block_max(float x, float* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_max(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    float most = warp_max(lane < warps ? scratch[lane] : scratch[0]);
    __syncthreads();
    return most;
}

// The smallest over a block, the same in all threads. `scratch` holds 32 values and may be used again after the call.
__device__ __forceinline__ double block_min(double x, double* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const auto of_warp = [](double own) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) own = fmin(own, __shfl_xor_sync(0xffffffffu, own, offset));
        return own;
    };
    x = of_warp(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    const double least = of_warp(lane < warps ? scratch[lane] : x);
    __syncthreads();
    return least;
}

// Index of this thread's first element and the stride of a loop over all elements.
__device__ __forceinline__ i64 thread_index() { return static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ i64 thread_count() { return static_cast<i64>(gridDim.x) * blockDim.x; }

// What changes from one replay of a step to the next; the host writes it before each (backend/cuda/step.rs).
struct StepState {
    u64 micro_step;  // micro-batches before this one: positions dropout
    u64 part;        // of the micro-batch, all being as large: positions dropout within it
    double learning_rate;
    double divisor;
};
static_assert(sizeof(StepState) == 32, "as the host's");

// What losses are multiplied by before gradients are made of them, from one step to the next (kernels/loss_scale.cu).
struct LossScale {
    float scale;
    u32 good_steps;  // since it last changed
};
static_assert(sizeof(LossScale) == 8, "as the host's");

// Instantiates a kernel template for the three storage types under C names: name_f32, name_bf16, name_f16.
#define FOR_EACH_STORAGE(DEFINE) DEFINE(f32, float) DEFINE(bf16, bf16) DEFINE(f16, f16)
