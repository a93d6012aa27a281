// Attention on tensor cores, backward: 16-bit storage, heads of 64 and 128. CPU twin: src/backend/cpu/attention.rs.
//
// Probabilities p are computed again from queries, keys and log_sum_exp; with dp = dy v^T and delta = the sums over y dy
// (`attention_deltas` of attention.cu), the scores' gradients are ds = p (dp - delta), and dv = p^T dy, dq = ds k scale,
// dk = ds^T q scale. One kernel goes over blocks of keys and gives dk and dv, one over blocks of queries and gives dq: seven
// products rather than five, but each result is summed by one warp in one order, without atomics and without a buffer of
// partial sums. p and ds are rounded to 16 bits where they become factors.
//
// Operations: 8 batch heads time^2 D for the keys' kernel, 6 for the queries' (half of these where causal). Bytes: a block of
// 64 keys reads 4 D bytes of each query that sees it, a block of 64 queries 4 D bytes of each key that it sees, mostly from
// the L2 cache; beside that 2 D bytes a row and tensor once. Both kernels: 4 warps of 16 rows; two blocks on a multiprocessor,
// bound by registers. D = 64: 33 KiB of shared memory for the keys' kernel; 16 KiB for the queries', whose tiles hold 32 keys.
// D = 128: 64.5 KiB and 32 KiB.
#pragma once
#include "flash_attention.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 16 * WARPS;

// dk and dv, `=`, of 64 keys; the heads that share them are summed in their order. Grid: batch kv_heads ceil(time / 64), the
// keys that most queries see first (`Share`). Scores lie transposed, a warp's 16 keys by a tile's QUERIES, so that no sum leaves a warp.
template <typename T, int D, int QUERIES, bool EXTRAS, typename Products = WarpProducts<T, D>>
__device__ __forceinline__ void flash_attention_backward_keys(const T* qkv, const T* dy, const float* log_sum_exp,
                                                              const float* deltas, T* dqkv, const AttentionShape& s) {
    constexpr int N = QUERIES / 8;
    constexpr u32 TILE_BYTES = QUERIES * D * 2, STATISTICS_BYTES = QUERIES * 4;
    // Wide heads leave no registers for a warp's keys and values: they are read from shared memory for each tile.
    constexpr bool RESIDENT = D == 64;
    static_assert(ROWS * D * 2 <= 4 * TILE_BYTES, "results pass through the tiles' memory");
    const int blocks = (s.time + ROWS - 1) / ROWS;
    const Share share(blocks);
    const int first = share.block * ROWS;
    const HeadPlace place(s, share.head * s.sharing);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = first + warp * 16, key = own + lane / 4;  // of this warp; of this lane, and 8 more
    // Both stages' tiles, both stages' statistics, what is kept.
    const u32 stages = shared_address(shared_memory), kept_tiles = stages + 4 * (TILE_BYTES + STATISTICS_BYTES);
    const int first_tile = s.causal ? first / QUERIES : 0;
    const int tiles = (s.time + QUERIES - 1) / QUERIES - first_tile;  // of each head
    auto start = [&](int member, int tile, u32 stage) {
        const int query = (first_tile + tile) * QUERIES;
        const HeadPlace at = place.sharing(member);
        const u32 to = stages + stage * 2 * TILE_BYTES, statistics = stages + 4 * TILE_BYTES + stage * 2 * STATISTICS_BYTES;
        start_copy<T, D, QUERIES, THREADS>(to, qkv + at.query(s) + query * at.packed, at.packed, s.time - query);
        start_copy<T, D, QUERIES, THREADS>(to + TILE_BYTES, dy + at.out(s) + query * at.width, at.width, s.time - query);
        const i64 row = at.statistic(s) + query;
        start_copy_f32<QUERIES>(statistics, log_sum_exp + row, s.time - query);
        start_copy_f32<QUERIES>(statistics + STATISTICS_BYTES, deltas + row, s.time - query);
        commit_copies();
    };
    const T* keys = qkv + place.key(s) + own * place.packed;
    u32 key_rows[1][D / 16][4], value_rows[1][D / 16][4];
    if constexpr (RESIDENT) {
        load_left<T, D>(key_rows[0], keys, place.packed, s.time - own);
        load_left<T, D>(value_rows[0], keys + s.kv_heads * D, place.packed, s.time - own);
    } else {
        const T* from = qkv + place.key(s) + first * place.packed;
        start_copy<T, D, ROWS, THREADS>(kept_tiles, from, place.packed, s.time - first);
        start_copy<T, D, ROWS, THREADS>(kept_tiles + ROWS * D * 2, from + s.kv_heads * D, place.packed, s.time - first);
    }
    start(0, 0, 0);
    bool hidden[2] = {false, false};
    if (EXTRAS && s.tokens != nullptr) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int at = key + 8 * half;
            hidden[half] = at < s.time && s.tokens[place.row(s) + at] == s.pad;
        }
    }
    const Products products;
    const float scale = s.scale * LOG2_E;
    float dkey[1][D / 8][4], dvalue[1][D / 8][4];
    clear(dkey[0]);
    clear(dvalue[0]);
    u32 stage = 0;
    for (int member = 0, tile = 0; member < s.sharing;) {
        finish_copies();
        Products::publish();
        __syncthreads();
        const int query = (first_tile + tile) * QUERIES, current = member;
        if (++tile == tiles) {
            tile = 0;
            ++member;
        }
        if (member < s.sharing) start(member, tile, stage ^ 1);
        const u32 query_tile = stages + stage * 2 * TILE_BYTES, gradient_tile = query_tile + TILE_BYTES;
        const float* statistics =
            reinterpret_cast<const float*>(shared_memory + 4 * TILE_BYTES + stage * 2 * STATISTICS_BYTES);
        stage ^= 1;
        // Keys that are not there, or that come after all of these queries.
        if (Products::ALONE && (own >= s.time || (s.causal && own >= query + QUERIES))) continue;
        float p[1][N][4], ds[1][N][4];
        if constexpr (RESIDENT) {
            products.times_rows(p, key_rows, query_tile, ds, value_rows, gradient_tile);
        } else {
            products.times_rows_of(p, kept_tiles, warp * 16, query_tile);
            products.times_rows_of(ds, kept_tiles + ROWS * D * 2, warp * 16, gradient_tile);
        }
        const bool whole = !s.causal || query >= own + 15;
        u32 bits[2] = {~0u, ~0u};
        if (EXTRAS && s.step != nullptr) {
            const HeadPlace at = place.sharing(current);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                bits[half] = kept_queries<N>(s, dropout_row(s, at, query + 2 * (lane % 4)) + static_cast<u64>(key + 8 * half));
            }
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int column = 8 * n + 2 * (lane % 4);
            const float2 lse = *reinterpret_cast<const float2*>(statistics + column);
            const float2 delta = *reinterpret_cast<const float2*>(statistics + QUERIES + column);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i / 2, j = i % 2;
                float e = exp2_approx(fmaf(p[0][n][i], scale, -(j == 0 ? lse.x : lse.y) * LOG2_E));
                if (!whole && key + 8 * half > query + column + j) e = 0.0f;
                if (EXTRAS && hidden[half]) e = 0.0f;
                const float drop = j == 0 ? delta.x : delta.y;
                if (EXTRAS) {
                    const bool stays = bits[half] >> (2 * n + j) & 1u;
                    p[0][n][i] = stays ? e : 0.0f;
                    ds[0][n][i] = e * ((stays ? ds[0][n][i] * s.keep : 0.0f) - drop);
                } else {
                    p[0][n][i] = e;
                    ds[0][n][i] = e * (ds[0][n][i] - drop);
                }
            }
        }
        products.times_columns(dvalue, p, gradient_tile, dkey, ds, query_tile);
    }
    // All warps have read the tiles, which now carry results.
    __syncthreads();
    u8* room = shared_memory + warp * (16 * D * 2);
    T* out = dqkv + place.key(s) + own * place.packed;
    store_left<T, D>(out, place.packed, dkey[0], s.scale, s.scale, s.time - own, room);
    store_left<T, D>(out + s.kv_heads * D, place.packed, dvalue[0], s.keep, s.keep, s.time - own, room);
}

// dq, `=`, of 64 queries, a warp 16. Grid: batch heads ceil(time / 64), the longest rows first (`Share`).
template <typename T, int D, int KEYS, bool EXTRAS, typename Products = WarpProducts<T, D>>
__device__ __forceinline__ void flash_attention_backward_queries(const T* qkv, const T* dy, const float* log_sum_exp,
                                                                 const float* deltas, T* dqkv, const AttentionShape& s) {
    constexpr int N = KEYS / 8;
    constexpr u32 TILE_BYTES = KEYS * D * 2;
    static_assert(ROWS * D * 2 <= 4 * TILE_BYTES, "results pass through the tiles' memory");
    const int blocks = (s.time + ROWS - 1) / ROWS;
    const Share share(blocks);
    const int first = (blocks - 1 - share.block) * ROWS;
    const HeadPlace place(s, share.head);
    const int limit = s.causal ? min(s.time, first + ROWS) : s.time;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = first + warp * 16, row = own + lane / 4;  // of this warp; of this lane, and 8 more
    const T* keys = qkv + place.key(s);
    const u32 tiles = shared_address(shared_memory);
    auto start = [&](int key, u32 stage) { start_keys<T, D, KEYS, THREADS>(tiles, stage, keys, place, s, key); };
    start(0, 0);
    u32 query_rows[1][D / 16][4], gradient_rows[1][D / 16][4];
    load_left<T, D>(query_rows[0], qkv + place.query(s) + own * place.packed, place.packed, s.time - own);
    load_left<T, D>(gradient_rows[0], dy + place.out(s) + own * place.width, place.width, s.time - own);
    float lse[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool there = row + 8 * half < s.time;
        const i64 at = place.statistic(s) + row + 8 * half;
        lse[half] = there ? log_sum_exp[at] * LOG2_E : infinity();
        delta[half] = there ? deltas[at] : 0.0f;
    }
    const Products products;
    const float scale = s.scale * LOG2_E;
    float dquery[1][D / 8][4];
    clear(dquery[0]);
    u32 stage = 0;
    for (int key = 0; key < limit; key += KEYS) {
        finish_copies();
        Products::publish();
        __syncthreads();
        if (key + KEYS < limit) start(key + KEYS, stage ^ 1);
        const u32 key_tile = tiles + stage * 2 * TILE_BYTES, value_tile = key_tile + TILE_BYTES;
        stage ^= 1;
        // Queries that are not there, or that come before all of these keys.
        if (Products::ALONE && (own >= s.time || (s.causal && key >= own + 16))) continue;
        float p[1][N][4], ds[1][N][4];
        products.times_rows(p, query_rows, key_tile, ds, gradient_rows, value_tile);
        const bool whole = key + KEYS <= s.time && (!s.causal || key + KEYS - 1 <= own);
        if (!whole || (EXTRAS && s.tokens != nullptr)) {
            hide_keys<N, EXTRAS>(p[0], s, place.sample, row, key + 2 * (lane % 4));
        }
        u32 bits[2] = {~0u, ~0u};
        if (EXTRAS && s.step != nullptr) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u64 at = dropout_row(s, place, row + 8 * half) + static_cast<u64>(key + 2 * (lane % 4));
                bits[half] = kept_keys<N>(s, at);
            }
        }
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i / 2;
                const float e = exp2_approx(fmaf(p[0][n][i], scale, -lse[half]));
                float slope = ds[0][n][i];
                if (EXTRAS) slope = bits[half] >> (2 * n + i % 2) & 1u ? slope * s.keep : 0.0f;
                ds[0][n][i] = e * (slope - delta[half]);
            }
        }
        products.times_columns(dquery, ds, key_tile);
    }
    // All warps have read the tiles, which now carry results.
    __syncthreads();
    u8* room = shared_memory + warp * (16 * D * 2);
    T* out = dqkv + place.query(s) + own * place.packed;
    store_left<T, D>(out, place.packed, dquery[0], s.scale, s.scale, s.time - own, room);
}
