// Forms of a pass over the arrays of an update, and of a copy: hints to the caches, blocks of 128 values that a warp has under way,
// grids that loop or that do not. The arithmetic is that of momentum and of Adam without clip and correction: what is looked for
// is how the arrays are best gone through. 130 million values in f32.
#include "bed.cuh"

typedef unsigned long long u64;

enum Hint { NONE, STREAMED, PAST_L1 };

template <Hint H> __device__ __forceinline__ float4 fetch(const float* p) {
    float4 x;
    if (H == STREAMED) {
        asm volatile("ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p));
    } else if (H == PAST_L1) {
        asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                     : "l"(p));
    } else {
        x = *reinterpret_cast<const float4*>(p);
    }
    return x;
}
template <Hint H> __device__ __forceinline__ void put(float* p, float4 x) {
    if (H == STREAMED) {
        asm volatile("st.global.cs.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w));
    } else if (H == PAST_L1) {
        asm volatile("st.global.L1::no_allocate.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w));
    } else {
        *reinterpret_cast<float4*>(p) = x;
    }
}

// Gradient, parameters and slots read, all but the gradient written; AHEAD blocks of 128 values a warp and turn.
template <Hint H, int AHEAD, bool ADAM>
__global__ void __launch_bounds__(256) update(float* theta, const float* gradient, float* first, float* second, u64 len, float rate) {
    const u64 lane = threadIdx.x % 32, warp = (blockIdx.x * static_cast<u64>(256) + threadIdx.x) / 32, warps = gridDim.x * 8ull;
    for (u64 block = warp * AHEAD; block < len / 128; block += warps * AHEAD) {
        float4 g[AHEAD], t[AHEAD], m[AHEAD], v[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const u64 at = (block + k) * 128 + lane * 4;
            g[k] = fetch<H>(gradient + at);
            t[k] = fetch<H>(theta + at);
            m[k] = fetch<H>(first + at);
            if (ADAM) v[k] = fetch<H>(second + at);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const u64 at = (block + k) * 128 + lane * 4;
            const auto one = [&](float g, float& t, float& m, float& v) {
                m = fmaf(0.9f, m, g);
                if (ADAM) v = fmaf(0.99f, v, g * g);
                t -= rate * (ADAM ? m / (sqrtf(v) + 1e-8f) : m);
            };
            one(g[k].x, t[k].x, m[k].x, v[k].x);
            one(g[k].y, t[k].y, m[k].y, v[k].y);
            one(g[k].z, t[k].z, m[k].z, v[k].z);
            one(g[k].w, t[k].w, m[k].w, v[k].w);
            put<H>(theta + at, t[k]);
            put<H>(first + at, m[k]);
            if (ADAM) put<H>(second + at, v[k]);
        }
    }
}

template <Hint H, int AHEAD> __global__ void __launch_bounds__(256) copy(float* to, const float* from, u64 len) {
    const u64 step = gridDim.x * 1024ull * AHEAD;
    for (u64 at = blockIdx.x * 1024ull * AHEAD + threadIdx.x * 4; at < len; at += step) {
        float4 x[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) x[k] = fetch<H>(from + at + k * 1024);
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) put<H>(to + at + k * 1024, x[k]);
    }
}

int main() {
    const u64 len = 124ull << 20;
    float *theta = random_f32(len, 1), *gradient = random_f32(len, 2), *first = random_f32(len, 3), *second = random_f32(len, 4);
    const char* hints[] = {"none", "streamed", "past L1"};
    std::printf("%-10s %-9s %6s %8s %9s %9s\n", "what", "hint", "ahead", "blocks", "us", "TB/s");
    const auto told = [&](const char* what, Hint hint, int ahead, u64 blocks, double bytes, double us) {
        std::printf("%-10s %-9s %6d %8llu %9.1f %9.3f\n", what, hints[hint], ahead, blocks, us, len * bytes / us / 1e6);
    };
#define UPDATE(HINT, AHEAD, ADAM, BLOCKS)                                                                              \
    told(ADAM ? "adam" : "momentum", HINT, AHEAD, BLOCKS, ADAM ? 28 : 20, median_us([&] {                               \
             update<HINT, AHEAD, ADAM><<<BLOCKS, 256>>>(theta, gradient, first, second, len, 1e-9f);                     \
         }));
#define UPDATES(ADAM)                                                                                                  \
    UPDATE(NONE, 1, ADAM, 2112) UPDATE(STREAMED, 1, ADAM, 2112) UPDATE(PAST_L1, 1, ADAM, 2112)                          \
    UPDATE(NONE, 2, ADAM, 2112) UPDATE(STREAMED, 2, ADAM, 2112) UPDATE(NONE, 4, ADAM, 1056)                             \
    UPDATE(NONE, 1, ADAM, len / 1024) UPDATE(STREAMED, 1, ADAM, len / 1024) UPDATE(NONE, 2, ADAM, len / 2048)           \
    UPDATE(STREAMED, 2, ADAM, len / 2048)
    UPDATES(false)
    UPDATES(true)
#define COPY(HINT, AHEAD, BLOCKS)                                                                                      \
    told("copy", HINT, AHEAD, BLOCKS, 8, median_us([&] { copy<HINT, AHEAD><<<BLOCKS, 256>>>(theta, gradient, len); }));
    COPY(NONE, 4, len / 4096) COPY(STREAMED, 4, len / 4096) COPY(NONE, 8, 1056) COPY(NONE, 1, len / 1024)
    COPY(STREAMED, 1, len / 1024)
    told("memcpy", NONE, 0, 0, 8, median_us([&] {
             check(cudaMemcpyAsync(theta, gradient, len * 4, cudaMemcpyDeviceToDevice), "cudaMemcpyAsync");
         }));
}
