// What tells the speed of a device's memory, and the latency of a launch. Nothing of a training step runs here.
// CPU twins: src/backend/cpu/profile.rs.
#include "common.cuh"

// Accesses of 16 bytes that the compiler may neither leave out nor hoist, past the caches of the multiprocessor.
__device__ __forceinline__ float4 fetch(const float4* p) {
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ void put(float4* p, float4 x) {
    asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

// All blocks together go through gridDim.x parts of `part` accesses each, `rounds` times. 256 threads.

// Accesses of a thread that are under way at once.
constexpr int AHEAD = 8;

// to = change(from), which may be one: stretches of memory that lie side by side are gone through side by side. All loads of a turn are
// under way before the first store.
template <typename F> __device__ __forceinline__ void pass(float4* to, const float4* from, i64 part, i64 rounds, F change) {
    const i64 len = gridDim.x * part, step = static_cast<i64>(gridDim.x) * (AHEAD * 256);
    for (i64 round = 0; round < rounds; ++round) {
        for (i64 start = static_cast<i64>(blockIdx.x) * (AHEAD * 256); start < len; start += step) {
            const i64 i = start + threadIdx.x;
            if (start + AHEAD * 256 <= len) {
                float4 x[AHEAD];
#pragma unroll
                for (int k = 0; k < AHEAD; ++k) x[k] = fetch(from + i + k * 256);
#pragma unroll
                for (int k = 0; k < AHEAD; ++k) put(to + i + k * 256, change(x[k]));
            } else {
                for (i64 at = i; at < len; at += 256) put(to + at, change(fetch(from + at)));
            }
        }
    }
}

// to = from. 32 bytes an access.
extern "C" __global__ void __launch_bounds__(256) traffic_copy(float4* to, const float4* from, i64 part, i64 rounds) {
    pass(to, from, part, rounds, [](float4 x) { return x; });
}

// to = to + 1: read and written where it is, as an update does. 32 bytes an access.
extern "C" __global__ void __launch_bounds__(256) traffic_in_place(float4* to, i64 part, i64 rounds) {
    pass(to, to, part, rounds, [](float4 x) { return float4{x.x + 1.0f, x.y + 1.0f, x.z + 1.0f, x.w + 1.0f}; });
}

// to = what Traffic::Write leaves. 16 bytes an access.
extern "C" __global__ void __launch_bounds__(256) traffic_write(float4* to, i64 part, i64 rounds) {
    const i64 len = gridDim.x * part, step = static_cast<i64>(gridDim.x) * 256;
    const float value = __uint_as_float(0x3F3F3F3Fu);
    const float4 written = {value, value, value, value};
    for (i64 round = 0; round < rounds; ++round)
#pragma unroll 4
        for (i64 i = static_cast<i64>(blockIdx.x) * 256 + threadIdx.x; i < len; i += step) put(to + i, written);
}

// sums[block] = the sum of the block's part: `part` accesses in a row. 16 bytes an access.
extern "C" __global__ void traffic_read(float* sums, const float4* from, i64 part, i64 rounds) {
    __shared__ float warps[8];
    const i64 first = blockIdx.x * part;
    float sum = 0.0f;
    for (i64 round = 0; round < rounds; ++round) {
        sum = 0.0f;
#pragma unroll 4
        for (i64 i = threadIdx.x; i < part; i += 256) {
            const float4 x = fetch(from + first + i);
            sum += (x.x + x.y) + (x.z + x.w);
        }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float all = 0.0f;
        for (int warp = 0; warp < 8; ++warp) all += warps[warp];
        sums[blockIdx.x] = all;
    }
}

// *count += 1: the least that a launch can do and be seen to have done. One thread.
extern "C" __global__ void count_up(u64* count) { *count += 1; }
