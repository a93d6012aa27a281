// Attention on tensor cores, forward: 16-bit storage, heads of 64 and 128 (Dao 2023, FlashAttention-2). CPU twin:
// src/backend/cpu/attention.rs; the plain form is attention.cu, the backward flash_attention_backward.cu.
//
// y = softmax(q k^T scale) v; y: [batch, time, heads, D], log_sum_exp: [batch, heads, time]. Grid: batch heads
// ceil(time / rows) blocks, the longest rows first (`Share`); `rows` is 16 TILES WARPS.
//
// A warp keeps its 16 TILES queries in registers and goes over the keys, KEYS at a time: two tiles of keys and values in
// shared memory, one being copied while the other is used, one barrier a tile. Scores are f32, exponentials powers of 2 with
// the scale folded in; probabilities are rounded to 16 bits for the second product, their sum is not. Tiles that no query of
// the warp sees are left out; those on the diagonal or the end are masked, the others not. With EXTRAS, padding and dropout
// besides.
//
// 4 batch heads time^2 D operations (half of that where causal). Bytes: 2 (heads D) a position read and as many written, and
// every block reads the keys and values that it sees, 4 D bytes a key, mostly from the L2 cache: time / rows times over.
// 64 queries, 4 warps of 16, 64 keys. D = 64: 32 KiB; three blocks on a multiprocessor, bound by registers. D = 128: 64 KiB; two.
#pragma once
#include "flash_attention.cuh"

template <typename T, int D, int WARPS, int TILES, int KEYS, bool EXTRAS, typename Products = WarpProducts<T, D>>
__device__ __forceinline__ void flash_attention_forward(const T* qkv, T* y, float* log_sum_exp, const AttentionShape& s) {
    constexpr int THREADS = 32 * WARPS, ROWS = 16 * TILES * WARPS, N = KEYS / 8;
    constexpr u32 TILE_BYTES = KEYS * D * 2;
    static_assert(ROWS * D * 2 <= 4 * TILE_BYTES, "results pass through the tiles' memory");
    const int blocks = (s.time + ROWS - 1) / ROWS;
    const Share share(blocks);
    const int first = (blocks - 1 - share.block) * ROWS;
    const HeadPlace place(s, share.head);
    const int limit = s.causal ? min(s.time, first + ROWS) : s.time;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own = first + warp * 16 * TILES;  // the warp's first query
    const T* keys = qkv + place.key(s);
    const u32 tiles = shared_address(shared_memory);
    auto start = [&](int key, u32 stage) { start_keys<T, D, KEYS, THREADS>(tiles, stage, keys, place, s, key); };
    start(0, 0);
    u32 query[TILES][D / 16][4];
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
        const int row = own + 16 * m;
        load_left<T, D>(query[m], qkv + place.query(s) + row * place.packed, place.packed, s.time - row);
    }
    const Products products;
    const float scale = s.scale * LOG2_E;
    float most[TILES][2], total[TILES][2], sums[TILES][D / 8][4];
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
        most[m][0] = most[m][1] = -infinity();
        total[m][0] = total[m][1] = 0.0f;
        clear(sums[m]);
    }
    u32 stage = 0;
    for (int key = 0; key < limit; key += KEYS) {
        finish_copies();
        Products::publish();
        __syncthreads();
        if (key + KEYS < limit) start(key + KEYS, stage ^ 1);
        const u32 key_tile = tiles + stage * 2 * TILE_BYTES, value_tile = key_tile + TILE_BYTES;
        stage ^= 1;
        // Queries that are not there, or that come before all of these keys.
        if (Products::ALONE && (own >= s.time || (s.causal && key >= own + 16 * TILES))) continue;
        const bool whole = key + KEYS <= s.time && (!s.causal || key + KEYS - 1 <= own);
        float scores[TILES][N][4];
        products.times_rows(scores, query, key_tile);
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
            const int row = own + 16 * m + lane / 4;
            if (!whole || (EXTRAS && s.tokens != nullptr)) {
                hide_keys<N, EXTRAS>(scores[m], s, place.sample, row, key + 2 * (lane % 4));
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float peak = most[m][half];
#pragma unroll
                for (int n = 0; n < N; ++n) peak = fmaxf(peak, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                // A row's four lanes.
                peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
                peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
                // A row that has seen nothing yet: its scores are minus infinity, whatever is taken from them.
                const float base = peak == -infinity() ? 0.0f : peak * scale;
                // What came before stands against its own rounded base: where that stays, this is 1 to the bit.
                const float shrink = exp2_approx(most[m][half] * scale - base);
                most[m][half] = peak;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int j = 2 * half; j < 2 * half + 2; ++j) {
                        scores[m][n][j] = exp2_approx(fmaf(scores[m][n][j], scale, -base));
                        sum += scores[m][n][j];
                    }
                }
                total[m][half] = fmaf(total[m][half], shrink, sum);
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    sums[m][n][2 * half] *= shrink;
                    sums[m][n][2 * half + 1] *= shrink;
                }
                if (EXTRAS && s.step != nullptr) {
                    const u32 bits =
                        kept_keys<N>(s, dropout_row(s, place, row + 8 * half) + static_cast<u64>(key + 2 * (lane % 4)));
#pragma unroll
                    for (int n = 0; n < N; ++n) {
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            float& weight = scores[m][n][2 * half + j];
                            weight = bits >> (2 * n + j) & 1u ? weight : 0.0f;
                        }
                    }
                }
            }
        }
        products.times_columns(sums, scores, value_tile);
    }
    // All warps have read the tiles, which now carry results.
    __syncthreads();
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = total[m][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            inverse[half] = sum == 0.0f ? 0.0f : s.keep / sum;
            const int row = own + 16 * m + lane / 4 + 8 * half;
            // A row that sees nothing gets infinity: by that the backward sees nothing either.
            if (lane % 4 == 0 && row < s.time) {
                log_sum_exp[place.statistic(s) + row] =
                    sum == 0.0f ? infinity() : fmaf(most[m][half] * scale, LN_2, logf(sum));
            }
        }
        const int row = own + 16 * m;
        u8* room = shared_memory + warp * (16 * D * 2);
        store_left<T, D>(y + place.out(s) + row * place.width, place.width, sums[m], inverse[0], inverse[1], s.time - row, room);
    }
}
