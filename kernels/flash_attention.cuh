// What the flash form of attention is built of: products of a warp on tensor cores, tiles in shared memory, copies to them that
// run beside the arithmetic.
//
// A tile is [rows][D] values of 16 bits in shared memory, in pieces of 16 bytes: piece c of row r lies at place c ^ (r % 8) of
// its row, so that eight rows of one piece, as well as one row's eight pieces, touch all banks once.
//
// Fragments of mma.m16n8k16, for lane l with g = l / 4 and c = 2 (l % 4): a factor on the left holds rows g and g + 8, columns
// c, c + 1, c + 8, c + 9; sums hold rows g and g + 8, columns c and c + 1: two tiles of sums, rounded, are a factor on the
// left.
#pragma once
#include "attention.cuh"

extern __shared__ __align__(1024) u8 shared_memory[];

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Which rows of which head a block takes, of `blocks` a head. Heads come in groups, small enough for their keys and values to stay
// in the L2 cache; within a group the first blocks of all heads, which are the longest where causal, then the second ones, so that
// what runs last is short.
struct Share {
    int block;
    i64 head;
    __device__ __forceinline__ explicit Share(int blocks) {
        constexpr u32 GROUP = 64;
        const u32 heads = gridDim.x / static_cast<u32>(blocks), each = GROUP * static_cast<u32>(blocks);
        const u32 first = blockIdx.x / each * GROUP, within = blockIdx.x % each, size = min(GROUP, heads - first);
        block = static_cast<int>(within / size);
        head = first + within % size;
    }
};

// Two values as one register of a fragment.
template <typename T> __device__ __forceinline__ u32 pack(float low, float high);
template <> __device__ __forceinline__ u32 pack<bf16>(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
template <> __device__ __forceinline__ u32 pack<f16>(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// sums[16][8] += left[16][16] * right[16][8].
template <typename T> __device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&left)[4], u32 right0, u32 right1);
template <> __device__ __forceinline__ void multiply<bf16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void multiply<f16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two tiles of sums side by side, rounded, as a left factor.
template <typename T>
__device__ __forceinline__ void round_left(u32 (&left)[4], const float (&first)[4], const float (&second)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        left[i] = pack<T>(first[2 * i], first[2 * i + 1]);
        left[2 + i] = pack<T>(second[2 * i], second[2 * i + 1]);
    }
}

__device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

// Where this lane's rows of four 8 by 8 matrices lie in a tile: the step from one 16 rows or columns to the next is a constant.
template <int D> struct TileReader {
    u32 across, along;   // of the row, for reading by rows (`factor`) and by columns
    u32 across_piece, along_piece;

    __device__ __forceinline__ TileReader() {
        const u32 lane = threadIdx.x % 32, r = lane % 8, low = lane / 8 % 2, high = lane / 16;
        across = (high * 8 + r) * D * 2;
        across_piece = (low ^ r) * 16;
        along = (low * 8 + r) * D * 2;
        along_piece = (high ^ r) * 16;
    }

    // Right factors of two products whose columns are rows 16 n .. 16 n + 15 of the tile, for its columns 16 k .. 16 k + 15.
    __device__ __forceinline__ void right_of_rows(u32 (&x)[4], u32 tile, int n, int k) const {
        load_matrices(x, tile + across + n * (16 * D * 2) + (across_piece ^ (k * 32)));
    }
    // Right factors of two products whose columns are columns 16 n .. 16 n + 15 of the tile, for its rows 16 k .. 16 k + 15.
    __device__ __forceinline__ void right_of_columns(u32 (&x)[4], u32 tile, int n, int k) const {
        load_matrices_transposed(x, tile + along + k * (16 * D * 2) + (along_piece ^ (n * 32)));
    }
    // The left factor of rows `row` .. row + 15 (a multiple of 16) and columns 16 k .. 16 k + 15.
    __device__ __forceinline__ void left(u32 (&x)[4], u32 tile, int row, int k) const {
        load_matrices(x, tile + along + row * (D * 2) + (along_piece ^ (k * 32)));
    }
};

// The left factors of 16 rows of D values, straight from memory; rows from `rows` on are 0.
template <typename T, int D>
__device__ __forceinline__ void load_left(u32 (&x)[D / 16][4], const T* from, i64 stride, int rows) {
    const int row = threadIdx.x % 32 / 4, at = threadIdx.x % 4 * 2;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = row + 8 * (i % 2);
            x[k][i] = r < rows ? *reinterpret_cast<const u32*>(from + r * stride + 16 * k + 8 * (i / 2) + at) : 0u;
        }
    }
}

// Starts to copy ROWS rows of D values to a tile; rows from `rows` on become 0.
template <typename T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void start_copy(u32 tile, const T* from, i64 stride, int rows) {
    constexpr int PIECES = D / 8, AT_ONCE = THREADS / PIECES;
    static_assert(ROWS % AT_ONCE == 0 && AT_ONCE % 8 == 0, "each thread copies as many pieces, all to the same place of a row");
    const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const T* source = from + row * stride + piece * 8;
    tile += row * (D * 2) + ((piece ^ (row % 8)) * 16);
#pragma unroll
    for (int i = 0; i < ROWS; i += AT_ONCE) {
        const bool there = row + i < rows;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(tile + i * (D * 2)),
                     "l"(there ? source + i * stride : from), "r"(there ? 16u : 0u)
                     : "memory");
    }
}
// Starts to copy N f32, at most as many as a block has threads; from `count` on they become 0.
template <int N> __device__ __forceinline__ void start_copy_f32(u32 to, const float* from, int count) {
    const int i = threadIdx.x;
    if (i < N) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to + i * 4), "l"(i < count ? from + i : from),
                     "r"(i < count ? 4u : 0u)
                     : "memory");
    }
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Starts to copy KEYS keys of a head from `key` on, and then their values, to stage 0 or 1 of `tiles`. `keys` is the head's first.
template <typename T, int D, int KEYS, int THREADS>
__device__ __forceinline__ void start_keys(u32 tiles, u32 stage, const T* keys, const HeadPlace& place, const AttentionShape& s, int key) {
    constexpr u32 TILE_BYTES = KEYS * D * 2;
    const u32 to = tiles + stage * 2 * TILE_BYTES;
    const T* from = keys + key * place.packed;
    start_copy<T, D, KEYS, THREADS>(to, from, place.packed, s.time - key);
    start_copy<T, D, KEYS, THREADS>(to + TILE_BYTES, from + s.kv_heads * D, place.packed, s.time - key);
    commit_copies();
}
// Waits for what this thread started; a barrier makes it everybody's.
__device__ __forceinline__ void finish_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// A warp's 16 rows of D sums, each row times its factor, to memory: by way of `tile` (the warp's own 16 rows), for whole
// sectors.
template <typename T, int D>
__device__ __forceinline__ void store_left(T* to, i64 stride, const float (&sums)[D / 8][4], float factor0, float factor1,
                                           int rows, u8* tile) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = g + 8 * half;
            const float factor = half == 0 ? factor0 : factor1;
            *reinterpret_cast<u32*>(tile + row * (D * 2) + ((n ^ (row % 8)) * 16) + c * 4) =
                pack<T>(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
        }
    }
    __syncwarp();
    constexpr int PIECES = D / 8;
#pragma unroll
    for (int i = 0; i < 16 * PIECES / 32; ++i) {
        const int row = (i * 32 + lane) / PIECES, piece = (i * 32 + lane) % PIECES;
        if (row < rows) {
            const uint4 values = *reinterpret_cast<const uint4*>(tile + row * (D * 2) + ((piece ^ (row % 8)) * 16));
            *reinterpret_cast<uint4*>(to + row * stride + piece * 8) = values;
        }
    }
    // The tile is free again for the warp's next rows.
    __syncwarp();
}

template <int N> __device__ __forceinline__ void clear(float (&sums)[N][4]) {
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) sums[i / 4][i % 4] = 0.0f;
}

// Products by the tensor cores' instructions of a warp, which reads the right factors into registers. flash_attention_groups.cuh has
// those of four warps together.
template <typename T, int D> struct WarpProducts {
    // Whether a warp may leave a tile out that others work on.
    static constexpr bool ALONE = true;
    TileReader<D> reader;

    // Before the barrier that makes what this thread copied everybody's.
    static __device__ __forceinline__ void publish() {}

    // Scores: sums[m][n] = left[m] (16 rows of D) times the rows of `tile`, [8 N][D]. What is read serves all M.
    template <int M, int N>
    __device__ __forceinline__ void times_rows(float (&sums)[M][N][4], const u32 (&left)[M][D / 16][4], u32 tile) const {
#pragma unroll
        for (int m = 0; m < M; ++m) clear(sums[m]);
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
#pragma unroll
            for (int n = 0; n < N / 2; ++n) {
                u32 right[4];
                reader.right_of_rows(right, tile, n, k);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply<T>(sums[m][2 * n], left[m][k], right[0], right[1]);
                    multiply<T>(sums[m][2 * n + 1], left[m][k], right[2], right[3]);
                }
            }
        }
    }

    // Two of these that do not depend on each other.
    template <int M, int N>
    __device__ __forceinline__ void times_rows(float (&sums)[M][N][4], const u32 (&left)[M][D / 16][4], u32 tile,
                                               float (&others)[M][N][4], const u32 (&other_left)[M][D / 16][4],
                                               u32 other_tile) const {
        times_rows(sums, left, tile);
        times_rows(others, other_left, other_tile);
    }

    // `times_rows` with a left factor of 16 rows, from `row` on, of another tile.
    template <int N>
    __device__ __forceinline__ void times_rows_of(float (&sums)[1][N][4], u32 left_tile, int row, u32 tile) const {
        clear(sums[0]);
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            u32 left[4];
            reader.left(left, left_tile, row, k);
#pragma unroll
            for (int n = 0; n < N / 2; ++n) {
                u32 right[4];
                reader.right_of_rows(right, tile, n, k);
                multiply<T>(sums[0][2 * n], left, right[0], right[1]);
                multiply<T>(sums[0][2 * n + 1], left, right[2], right[3]);
            }
        }
    }

    // sums[m] += weights[m], rounded to T, times `tile`: weights of 16 rows and 8 N columns, the tile [8 N][D].
    template <int M, int N>
    __device__ __forceinline__ void times_columns(float (&sums)[M][D / 8][4], const float (&weights)[M][N][4], u32 tile) const {
#pragma unroll
        for (int k = 0; k < N / 2; ++k) {
            u32 left[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) round_left<T>(left[m], weights[m][2 * k], weights[m][2 * k + 1]);
#pragma unroll
            for (int n = 0; n < D / 16; ++n) {
                u32 right[4];
                reader.right_of_columns(right, tile, n, k);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply<T>(sums[m][2 * n], left[m], right[0], right[1]);
                    multiply<T>(sums[m][2 * n + 1], left[m], right[2], right[3]);
                }
            }
        }
    }

    // Two of these that do not depend on each other.
    template <int M, int N>
    __device__ __forceinline__ void times_columns(float (&sums)[M][D / 8][4], const float (&weights)[M][N][4], u32 tile,
                                                  float (&others)[M][D / 8][4], const float (&other_weights)[M][N][4],
                                                  u32 other_tile) const {
        times_columns(sums, weights, tile);
        times_columns(others, other_weights, other_tile);
    }
};

// Scores of rows `query` and `query + 8` with keys `key + 8 n` and `key + 8 n + 1` (all of this lane): minus infinity where
// the key is not seen.
template <int N, bool EXTRAS>
__device__ __forceinline__ void hide_keys(float (&scores)[N][4], const AttentionShape& s, int sample, int query, int key) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int at = key + 8 * n + j;
            bool seen = at < s.time;
            if (EXTRAS && seen && s.tokens != nullptr) seen = s.tokens[static_cast<i64>(sample) * s.time + at] != s.pad;
            if (!seen || (s.causal && at > query)) scores[n][j] = -infinity();
            if (!seen || (s.causal && at > query + 8)) scores[n][2 + j] = -infinity();
        }
    }
}

// Which of the probabilities with keys 8 n and 8 n + 1 from `position` on are kept: bits 2 n and 2 n + 1. Not unrolled: each
// of the random blocks is some hundred instructions.
template <int N> __device__ __forceinline__ u32 kept_keys(const AttentionShape& s, u64 position) {
    static_assert(2 * N <= 32, "as many bits");
    u32 bits = 0;
#pragma unroll 1
    for (int n = 0; n < N; ++n) bits |= (kept<2>(s, position + 8 * n) & 3u) << (2 * n);
    return bits;
}

// As `kept_keys`, for one key and queries 8 n and 8 n + 1; `position` is that of the first query.
template <int N> __device__ __forceinline__ u32 kept_queries(const AttentionShape& s, u64 position) {
    static_assert(2 * N <= 32, "as many bits");
    u32 bits = 0;
#pragma unroll 1
    for (int i = 0; i < 2 * N; ++i) {
        const u64 query = static_cast<u64>(i / 2 * 8 + i % 2);
        bits |= (kept<1>(s, position + query * s.time) & 1u) << i;
    }
    return bits;
}
