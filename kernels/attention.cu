// Attention, the plain form: f32 arithmetic on any head size, any length, any storage type. CPU twin:
// src/backend/cpu/attention.rs. The flash form (flash_attention.cu) takes what tensor cores can; the rest comes here.
//
// A block of 256 threads works on tiles of 64 queries by 64 keys, a thread on 4 by 4 of them (queries or keys 4 ty + i,
// columns by `column`). Scores live in registers and, as one factor of the next product, in shared memory, never in global
// memory. Columns of the result are taken COLUMNS at a time (32, 64 or 128, so that heads up to 128 need one pass); wider
// heads take several blocks, each of which computes the scores anew.
//
// With B = batch heads, T = time, D = head_size, P = T T pairs (half of that where causal), in multiply-adds of 2 operations:
// forward 4 B P D operations, dq 6 B P D, dk and dv 8 B P D. Bytes: each tile of 64 queries reads all keys and values that it
// sees, 2 D sizeof(T) a key, and the other way round; from the cache, mostly. 34 KiB of shared memory; the multiply-adds bound
// it. Two blocks on a multiprocessor, by registers (which is why loops are unrolled no further); one where COLUMNS is 128, and
// for dk and dv from 64 on.
#include "attention.cuh"

constexpr int THREADS = 256;
constexpr int TILE = 64;         // queries, and keys, of a tile
constexpr int DEPTH = 32;        // of a product's part that lies in shared memory
constexpr int LINE = TILE + 4;   // floats from one k to the next: 16-byte aligned, and stores by columns hit all banks
constexpr int PARTS = 2 * DEPTH * LINE;

// Values of a thread's row of COLUMNS columns, and how many of them lie together.
template <int COLUMNS> constexpr int EACH = COLUMNS / 16;
template <int COLUMNS> constexpr int TOGETHER = EACH<COLUMNS> < 4 ? EACH<COLUMNS> : 4;

// The column of a thread's value `c`.
template <int COLUMNS> __device__ __forceinline__ int column(int c) {
    constexpr int V = TOGETHER<COLUMNS>;
    return c / V * 16 * V + static_cast<int>(threadIdx.x % 16) * V + c % V;
}

__device__ __forceinline__ int round_up_8(int x) { return (x + 7) & ~7; }

// tile[k][row] = from[row][k] for DEPTH k; 0 from `rows` and from `width` on. A warp takes 8 k of 4 rows: whole sectors, all
// banks.
template <typename T> __device__ void load_across(float* tile, const T* from, i64 stride, int rows, int width) {
#pragma unroll 1
    for (int row = threadIdx.x / 8; row < TILE; row += THREADS / 8) {
#pragma unroll
        for (int k = threadIdx.x % 8; k < DEPTH; k += 8) {
            tile[k * LINE + row] = row < rows && k < width ? to_f32(from[row * stride + k]) : 0.0f;
        }
    }
}

// tile[k][column] = from[k][column] for DEPTH k; 0 from `rows` and from `width` on.
template <typename T, int COLUMNS>
__device__ void load_along(float* tile, const T* from, i64 stride, int rows, int width) {
#pragma unroll 2
    for (int i = threadIdx.x; i < DEPTH * COLUMNS; i += THREADS) {
        const int k = i / COLUMNS, column = i % COLUMNS;
        tile[i] = k < rows && column < width ? to_f32(from[k * stride + column]) : 0.0f;
    }
}

// sums[i][c] += sum over `depth` k (a multiple of 8) of left[k][4 ty + i] * right[k][column(c)].
template <int COLUMNS>
__device__ __forceinline__ void add_product(float (&sums)[4][EACH<COLUMNS>], const float* left, const float* right, int line,
                                            int depth) {
    constexpr int V = TOGETHER<COLUMNS>;
    left += threadIdx.x / 16 * 4;
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
        const Pack<float, 4> a = load<float, 4>(left + k * LINE);
#pragma unroll
        for (int c = 0; c < EACH<COLUMNS>; c += V) {
            const Pack<float, V> b = load<float, V>(right + k * line + column<COLUMNS>(c));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < V; ++j) sums[i][c + j] = fmaf(a.at[i], b.at[j], sums[i][c + j]);
            }
        }
    }
}

// scores[i][j] = sum over the head of left[4 ty + i] * right[4 tx + j]. `parts` holds PARTS values, free before and after a
// barrier.
template <typename T>
__device__ void row_products(float (&scores)[4][4], const T* left, i64 left_stride, int left_rows, const T* right,
                             i64 right_stride, int right_rows, int width, float* parts) {
#pragma unroll
    for (int i = 0; i < 16; ++i) scores[i / 4][i % 4] = 0.0f;
    for (int k = 0; k < width; k += DEPTH) {
        __syncthreads();
        load_across(parts, left + k, left_stride, left_rows, width - k);
        load_across(parts + DEPTH * LINE, right + k, right_stride, right_rows, width - k);
        __syncthreads();
        add_product<TILE>(scores, parts, parts + DEPTH * LINE, LINE, round_up_8(min(DEPTH, width - k)));
    }
}

// sums[i][c] += sum over `depth` rows of weights[row][4 ty + i] * from[row][column(c)]; weights: [TILE][LINE], as
// `row_products` for the rest.
template <typename T, int COLUMNS>
__device__ void weigh(float (&sums)[4][EACH<COLUMNS>], const float* weights, const T* from, i64 stride, int depth, int width,
                      float* parts) {
    for (int k = 0; k < depth; k += DEPTH) {
        __syncthreads();
        load_along<T, COLUMNS>(parts, from + k * stride, stride, depth - k, width);
        __syncthreads();
        add_product<COLUMNS>(sums, weights + k * LINE, parts, COLUMNS, round_up_8(min(DEPTH, depth - k)));
    }
}

// Rows of a result, times `factor`, to memory.
template <typename T, int COLUMNS>
__device__ void store_rows(T* to, i64 stride, const float (&sums)[4][EACH<COLUMNS>], const float (&factor)[4], int rows,
                           int width) {
    for (int i = 0; i < 4; ++i) {
        const int row = threadIdx.x / 16 * 4 + i;
        if (row >= rows) break;
#pragma unroll
        for (int c = 0; c < EACH<COLUMNS>; ++c) {
            const int at = column<COLUMNS>(c);
            if (at < width) to[row * stride + at] = from_f32<T>(sums[i][c] * factor[i]);
        }
    }
}

// What block `blockIdx.x` of a grid over [heads of all samples][slices of columns][blocks of 64 positions] works on.
struct Work {
    i64 head;
    int slice, block, blocks;

    __device__ __forceinline__ Work(const AttentionShape& s, int columns) {
        const int slices = (s.head_size + columns - 1) / columns;
        blocks = (s.time + TILE - 1) / TILE;
        block = blockIdx.x % blocks;
        slice = blockIdx.x / blocks % slices * columns;
        head = blockIdx.x / blocks / slices;
    }
};

// Scores of queries from `query` on and keys from `key` on: minus infinity where the key is not seen.
__device__ __forceinline__ void hide(float (&scores)[4][4], const AttentionShape& s, int sample, int query, int key) {
    query += threadIdx.x / 16 * 4;
    key += threadIdx.x % 16 * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        bool seen = key + j < s.time;
        if (seen && s.tokens != nullptr) seen = s.tokens[static_cast<i64>(sample) * s.time + key + j] != s.pad;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (!seen || (s.causal && key + j > query + i)) scores[i][j] = -infinity();
        }
    }
}

// y = softmax(q k^T scale) v; y: [batch, time, heads, head_size], log_sum_exp: [batch, heads, time].
// Grid: batch heads ceil(head_size / COLUMNS) ceil(time / 64), the longest rows first.
template <typename T, int COLUMNS>
__device__ void attention_forward(const T* qkv, T* y, float* log_sum_exp, const AttentionShape& s) {
    __shared__ __align__(16) float parts[PARTS];
    __shared__ __align__(16) float weights[TILE * LINE];
    const Work work(s, COLUMNS);
    const HeadPlace place(s, work.head);
    const int first = (work.blocks - 1 - work.block) * TILE, queries = min(TILE, s.time - first);
    const int limit = s.causal ? first + queries : s.time;
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    const T* query = qkv + place.query(s) + first * place.packed;
    const float scale = s.scale * LOG2_E;
    float most[4], total[4], sums[4][EACH<COLUMNS>];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        most[i] = -infinity();
        total[i] = 0.0f;
#pragma unroll
        for (int c = 0; c < EACH<COLUMNS>; ++c) sums[i][c] = 0.0f;
    }
    for (int key = 0; key < limit; key += TILE) {
        const int keys = min(TILE, limit - key);
        float scores[4][4];
        const T* keys_at = qkv + place.key(s) + key * place.packed;
        row_products(scores, query, place.packed, queries, keys_at, place.packed, keys, s.head_size, parts);
        hide(scores, s, place.sample, first, key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float peak = fmaxf(fmaxf(scores[i][0], scores[i][1]), fmaxf(scores[i][2], scores[i][3]));
#pragma unroll
            for (int offset = 8; offset > 0; offset /= 2) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, offset));
            peak = fmaxf(peak, most[i]);
            // A row that has seen nothing yet: its scores are minus infinity, whatever is taken from them.
            const float base = peak == -infinity() ? 0.0f : peak * scale;
            const float shrink = exp2_approx(most[i] * scale - base);
            most[i] = peak;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                scores[i][j] = exp2_approx(fmaf(scores[i][j], scale, -base));
                sum += scores[i][j];
            }
            total[i] = fmaf(total[i], shrink, sum);
#pragma unroll
            for (int c = 0; c < EACH<COLUMNS>; ++c) sums[i][c] *= shrink;
            if (s.step != nullptr) {
                const u32 bits = kept<4>(s, dropout_row(s, place, first + 4 * ty + i) + static_cast<u64>(key + 4 * tx));
#pragma unroll
                for (int j = 0; j < 4; ++j) scores[i][j] = bits >> j & 1u ? scores[i][j] : 0.0f;
            }
        }
        // Before the weights change, the last product must have read them: `row_products` holds barriers since.
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            store<float, 4>(weights + (4 * tx + j) * LINE + 4 * ty,
                            Pack<float, 4>{{scores[0][j], scores[1][j], scores[2][j], scores[3][j]}});
        }
        const T* values = qkv + place.value(s) + key * place.packed + work.slice;
        weigh<T, COLUMNS>(sums, weights, values, place.packed, keys, s.head_size - work.slice, parts);
    }
    float inverse[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // Sums of a row's 16 threads.
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) total[i] += __shfl_xor_sync(0xffffffffu, total[i], offset);
        inverse[i] = total[i] == 0.0f ? 0.0f : s.keep / total[i];
        const int row = 4 * ty + i;
        // A row that sees nothing gets infinity: by that the backward sees nothing either.
        if (work.slice == 0 && tx == 0 && row < queries) {
            log_sum_exp[place.statistic(s) + first + row] =
                total[i] == 0.0f ? infinity() : fmaf(most[i] * scale, LN_2, logf(total[i]));
        }
    }
    T* out = y + place.out(s) + first * place.width + work.slice;
    store_rows<T, COLUMNS>(out, place.width, sums, inverse, queries, s.head_size - work.slice);
}

// deltas[batch, head, time] = sum over the head of y * dy; y, dy: [batch, time, heads, head_size]. 8 threads a row of a head,
// grid: ceil(batch time heads / 32) blocks of 256. Reads 2 sizeof(T) bytes a value.
template <typename T> __device__ void attention_deltas(const T* y, const T* dy, float* deltas, const AttentionShape& s) {
    constexpr int V = per_access<T>();
    const i64 index = thread_index() / 8;
    const int lane = threadIdx.x % 8, width = s.head_size;
    // All lanes stay for the shuffles below.
    const bool inside = index < static_cast<i64>(s.batch) * s.time * s.heads;
    float sum = 0.0f;
    if (inside) {
        const T *a = y + index * width, *b = dy + index * width;
        if (width % V == 0) {
#pragma unroll 2
            for (int d = lane * V; d < width; d += 8 * V) {
                const Pack<T, V> left = load<T, V>(a + d), right = load<T, V>(b + d);
#pragma unroll
                for (int j = 0; j < V; ++j) sum = fmaf(to_f32(left.at[j]), to_f32(right.at[j]), sum);
            }
        } else {
#pragma unroll 2
            for (int d = lane; d < width; d += 8) sum = fmaf(to_f32(a[d]), to_f32(b[d]), sum);
        }
    }
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (inside && lane == 0) {
        const i64 row = index / s.heads, head = index % s.heads;
        deltas[(row / s.time * s.heads + head) * s.time + row % s.time] = sum;
    }
}

// Of one tile: probabilities p, and ds, the gradients of scores before the scale; with dropout, p is what met the values,
// without its factor `keep`.
template <typename T>
__device__ __forceinline__ void tile_gradients(float (&p)[4][4], float (&ds)[4][4], const T* qkv, const T* dy,
                                               const float* log_sum_exp, const float* deltas, const HeadPlace& place,
                                               const AttentionShape& s, int query, int queries, int key, int keys,
                                               float* parts) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    const i64 packed = place.packed;
    row_products(p, qkv + place.query(s) + query * packed, packed, queries, qkv + place.key(s) + key * packed, packed, keys,
                 s.head_size, parts);
    hide(p, s, place.sample, query, key);
    row_products(ds, dy + place.out(s) + query * place.width, place.width, queries, qkv + place.value(s) + key * packed,
                 packed, keys, s.head_size, parts);
    const float scale = s.scale * LOG2_E;
    const i64 statistics = place.statistic(s) + query;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = 4 * ty + i;
        // Queries beyond the last see nothing.
        const float lse = row < queries ? log_sum_exp[statistics + row] * LOG2_E : infinity();
        const float delta = row < queries ? deltas[statistics + row] : 0.0f;
        const u32 bits = s.step == nullptr
                             ? 15u
                             : kept<4>(s, dropout_row(s, place, query + row) + static_cast<u64>(key + 4 * tx));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float e = exp2_approx(fmaf(p[i][j], scale, -lse));
            const bool stays = bits >> j & 1u;
            p[i][j] = stays ? e : 0.0f;
            ds[i][j] = e * ((stays ? ds[i][j] * s.keep : 0.0f) - delta);
        }
    }
}

// The queries' part of dqkv, `=`. Grid as the forward's.
template <typename T, int COLUMNS>
__device__ void attention_backward_queries(const T* qkv, const T* dy, const float* log_sum_exp, const float* deltas, T* dqkv,
                                           const AttentionShape& s) {
    __shared__ __align__(16) float parts[PARTS];
    __shared__ __align__(16) float weights[TILE * LINE];
    const Work work(s, COLUMNS);
    const HeadPlace place(s, work.head);
    const int first = (work.blocks - 1 - work.block) * TILE, queries = min(TILE, s.time - first);
    const int limit = s.causal ? first + queries : s.time;
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    float sums[4][EACH<COLUMNS>] = {};
    for (int key = 0; key < limit; key += TILE) {
        const int keys = min(TILE, limit - key);
        float p[4][4], ds[4][4];
        tile_gradients(p, ds, qkv, dy, log_sum_exp, deltas, place, s, first, queries, key, keys, parts);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            store<float, 4>(weights + (4 * tx + j) * LINE + 4 * ty,
                            Pack<float, 4>{{ds[0][j], ds[1][j], ds[2][j], ds[3][j]}});
        }
        const T* from = qkv + place.key(s) + key * place.packed + work.slice;
        weigh<T, COLUMNS>(sums, weights, from, place.packed, keys, s.head_size - work.slice, parts);
    }
    const float factor[4] = {s.scale, s.scale, s.scale, s.scale};
    T* out = dqkv + place.query(s) + first * place.packed + work.slice;
    store_rows<T, COLUMNS>(out, place.packed, sums, factor, queries, s.head_size - work.slice);
}

// The keys' and values' part of dqkv, `=`: the heads that share a key are summed in their order.
// Grid: batch kv_heads ceil(head_size / COLUMNS) ceil(time / 64), the keys that most queries see first.
template <typename T, int COLUMNS>
__device__ void attention_backward_keys(const T* qkv, const T* dy, const float* log_sum_exp, const float* deltas, T* dqkv,
                                        const AttentionShape& s) {
    __shared__ __align__(16) float parts[PARTS];
    __shared__ __align__(16) float weights[TILE * LINE];
    const Work work(s, COLUMNS);
    const int key = work.block * TILE, keys = min(TILE, s.time - key);
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    const int width = s.head_size - work.slice;
    float dkey[4][EACH<COLUMNS>] = {}, dvalue[4][EACH<COLUMNS>] = {};
    // `work.head` counts key heads here; the first of the query heads that share one has this number.
    for (int member = 0; member < s.sharing; ++member) {
        const HeadPlace place(s, work.head * s.sharing + member);
        for (int query = s.causal ? key : 0; query < s.time; query += TILE) {
            const int queries = min(TILE, s.time - query);
            float p[4][4], ds[4][4];
            tile_gradients(p, ds, qkv, dy, log_sum_exp, deltas, place, s, query, queries, key, keys, parts);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                store<float, 4>(weights + (4 * ty + i) * LINE + 4 * tx, Pack<float, 4>{{p[i][0], p[i][1], p[i][2], p[i][3]}});
            }
            const T* gradients = dy + place.out(s) + query * place.width + work.slice;
            weigh<T, COLUMNS>(dvalue, weights, gradients, place.width, queries, width, parts);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                store<float, 4>(weights + (4 * ty + i) * LINE + 4 * tx,
                                Pack<float, 4>{{ds[i][0], ds[i][1], ds[i][2], ds[i][3]}});
            }
            const T* rows = qkv + place.query(s) + query * place.packed + work.slice;
            weigh<T, COLUMNS>(dkey, weights, rows, place.packed, queries, width, parts);
        }
    }
    const HeadPlace place(s, work.head * s.sharing);
    const i64 offset = key * place.packed + work.slice;
    const float scale[4] = {s.scale, s.scale, s.scale, s.scale}, keep[4] = {s.keep, s.keep, s.keep, s.keep};
    store_rows<T, COLUMNS>(dqkv + place.key(s) + offset, place.packed, dkey, scale, keys, width);
    store_rows<T, COLUMNS>(dqkv + place.value(s) + offset, place.packed, dvalue, keep, keys, width);
}

#define DEFINE_COLUMNS(SUFFIX, T, COLUMNS)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, COLUMNS == 128 ? 1 : 2)                                      \
        attention_forward_##COLUMNS##_##SUFFIX(const T* qkv, T* y, float* log_sum_exp, AttentionShape shape) {         \
        attention_forward<T, COLUMNS>(qkv, y, log_sum_exp, shape);                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, COLUMNS == 128 ? 1 : 2)                                      \
        attention_backward_queries_##COLUMNS##_##SUFFIX(const T* qkv, const T* dy, const float* log_sum_exp,           \
                                                        const float* deltas, T* dqkv, AttentionShape shape) {          \
        attention_backward_queries<T, COLUMNS>(qkv, dy, log_sum_exp, deltas, dqkv, shape);                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, COLUMNS == 32 ? 2 : 1)                                       \
        attention_backward_keys_##COLUMNS##_##SUFFIX(const T* qkv, const T* dy, const float* log_sum_exp,              \
                                                     const float* deltas, T* dqkv, AttentionShape shape) {             \
        attention_backward_keys<T, COLUMNS>(qkv, dy, log_sum_exp, deltas, dqkv, shape);                                \
    }
#define DEFINE(SUFFIX, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        attention_deltas_##SUFFIX(const T* y, const T* dy, float* deltas, AttentionShape shape) {                      \
        attention_deltas(y, dy, deltas, shape);                                                                        \
    }                                                                                                                  \
    DEFINE_COLUMNS(SUFFIX, T, 32)                                                                                      \
    DEFINE_COLUMNS(SUFFIX, T, 64)                                                                                      \
    DEFINE_COLUMNS(SUFFIX, T, 128)
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
#undef DEFINE_COLUMNS
