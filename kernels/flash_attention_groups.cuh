// Products of flash attention by four warps together (wgmma), for compute capability 9.0 alone: the right factor stays in shared
// memory, where the tensor cores read it themselves. PTX ISA, "Asynchronous warpgroup level matrix multiply-accumulate
// instructions"; a tile of 64 columns of 16 bits lies as its 128-byte swizzle has it, from a multiple of 1024 bytes on.
//
// All four warps work on every tile, each on its own 16 rows; fragments are those of flash_attention.cuh.
#pragma once
#include "flash_attention.cuh"

#define SUMS(x) "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
#define SUMS_4(x) SUMS(x[0]), SUMS(x[1]), SUMS(x[2]), SUMS(x[3])
#define SUMS_8(x) SUMS_4(x), SUMS(x[4]), SUMS(x[5]), SUMS(x[6]), SUMS(x[7])
#define LIST_4 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST_8 LIST_4 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FACTORS_4 "{%16, %17, %18, %19}, %20, add, 1, 1, %21"
#define FACTORS_8 "{%32, %33, %34, %35}, %36, add, 1, 1, %37"
#define ADDS_4 "%22"
#define ADDS_8 "%38"

// sums = left[64][16] right[16][8 N], or `+=` where ADD; `right` describes the right factor in shared memory, whose columns lie along
// the tile's rows, or (ACROSS) are them.
template <typename T, int N, bool ACROSS, bool ADD> struct GroupMultiply;
#define GROUP_MULTIPLY(T, N, WIDTH)                                                                                    \
    template <bool ACROSS, bool ADD> struct GroupMultiply<T, N, ACROSS, ADD> {                                         \
        static __device__ __forceinline__ void run(float (&sums)[N][4], const u32 (&left)[4], u64 right) {             \
            asm volatile("{.reg .pred add; setp.ne.b32 add, " ADDS_##N ", 0; wgmma.mma_async.sync.aligned.m64n" WIDTH  \
                         "k16.f32." #T "." #T " {" LIST_##N "}, " FACTORS_##N ";}"                                     \
                         : SUMS_##N(sums)                                                                              \
                         : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "n"(ACROSS ? 0 : 1),    \
                           "n"(ADD));                                                                                  \
        }                                                                                                              \
    };
GROUP_MULTIPLY(bf16, 4, "32")
GROUP_MULTIPLY(bf16, 8, "64")
GROUP_MULTIPLY(f16, 4, "32")
GROUP_MULTIPLY(f16, 8, "64")
#undef GROUP_MULTIPLY
#undef SUMS_4
#undef SUMS_8
#undef LIST_4
#undef LIST_8
#undef FACTORS_4
#undef FACTORS_8
#undef ADDS_4
#undef ADDS_8

// The instructions to come see what the registers hold now.
__device__ __forceinline__ void begin_group() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The sums of the instructions before are there. They ran beside the program, which the compiler has to know.
template <int N> __device__ __forceinline__ void settle(float (&sums)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : SUMS(sums[n])::"memory");
}
#undef SUMS
__device__ __forceinline__ void end_group() {
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// As `WarpProducts`, for heads of 64.
template <typename T> struct GroupProducts {
    static constexpr bool ALONE = false;
    static constexpr int D = 64;

    // What threads copied goes another way than what the tensor cores read.
    static __device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

    // Rows of 128 bytes, eight of them 1024 bytes from the next eight, swizzled over all 128; addresses count 16 bytes.
    static __device__ __forceinline__ u64 described(u32 tile) {
        return u64(1) << 62 | u64(1024 / 16) << 32 | u64(1) << 16 | (tile & 0x3ffff) / 16;
    }

    template <int N>
    static __device__ __forceinline__ void start_rows(float (&sums)[N][4], const u32 (&left)[D / 16][4], u32 tile) {
        const u64 right = described(tile);
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            if (k == 0) {
                GroupMultiply<T, N, true, false>::run(sums, left[k], right);
            } else {
                GroupMultiply<T, N, true, true>::run(sums, left[k], right + k * (16 * 2 / 16));
            }
        }
    }
    template <int N>
    static __device__ __forceinline__ void start_columns(float (&sums)[D / 8][4], const u32 (&left)[N][4], u32 tile) {
        const u64 right = described(tile);
#pragma unroll
        for (int k = 0; k < N; ++k) GroupMultiply<T, D / 8, false, true>::run(sums, left[k], right + k * (16 * D * 2 / 16));
    }
    template <int N> static __device__ __forceinline__ void round(u32 (&left)[N / 2][4], const float (&weights)[N][4]) {
#pragma unroll
        for (int k = 0; k < N / 2; ++k) round_left<T>(left[k], weights[2 * k], weights[2 * k + 1]);
    }

    template <int N>
    __device__ __forceinline__ void times_rows(float (&sums)[1][N][4], const u32 (&left)[1][D / 16][4], u32 tile) const {
        begin_group();
        start_rows(sums[0], left[0], tile);
        end_group();
        settle(sums[0]);
    }
    template <int N>
    __device__ __forceinline__ void times_rows(float (&sums)[1][N][4], const u32 (&left)[1][D / 16][4], u32 tile,
                                               float (&others)[1][N][4], const u32 (&other_left)[1][D / 16][4],
                                               u32 other_tile) const {
        begin_group();
        start_rows(sums[0], left[0], tile);
        start_rows(others[0], other_left[0], other_tile);
        end_group();
        settle(sums[0]);
        settle(others[0]);
    }

    template <int N>
    __device__ __forceinline__ void times_columns(float (&sums)[1][D / 8][4], const float (&weights)[1][N][4], u32 tile) const {
        u32 left[N / 2][4];
        round(left, weights[0]);
        begin_group();
        start_columns(sums[0], left, tile);
        end_group();
        settle(sums[0]);
    }
    template <int N>
    __device__ __forceinline__ void times_columns(float (&sums)[1][D / 8][4], const float (&weights)[1][N][4], u32 tile,
                                                  float (&others)[1][D / 8][4], const float (&other_weights)[1][N][4],
                                                  u32 other_tile) const {
        u32 left[N / 2][4], other_left[N / 2][4];
        round(left, weights[0]);
        round(other_left, other_weights[0]);
        begin_group();
        start_columns(sums[0], left, tile);
        start_columns(others[0], other_left, other_tile);
        end_group();
        settle(sums[0]);
        settle(others[0]);
    }
};
