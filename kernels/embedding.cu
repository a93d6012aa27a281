// Tables of vectors: token and position lookups, and the gradient of a table without atomics. CPU twin:
// src/backend/cpu/embedding.rs.
//
// The gradient's rows are sums over the positions that name them, in order. So the positions are sorted by token first, by a
// radix sort that keeps the order of equal ones (8 bits a pass); then warps sum runs of equal tokens. A token out of range gives
// a vector of no numbers, which reaches the loss, and has no row in the gradient.
#include "common.cuh"

// y[row] = weight[tokens[row]] (+ positions[row mod time]), N values an access. tokens: [rows], weight: [vocabulary, width],
// positions: [time or more, width] or null, y: [rows, width], `=`.
template <typename T, int N>
__device__ void look_up(const int* tokens, const T* weight, const T* positions, T* y, i64 rows, i64 time, i64 width,
                        i64 vocabulary) {
    const i64 accesses = width / N;
    for (i64 i = thread_index(); i < rows * accesses; i += thread_count()) {
        const i64 row = i / accesses, column = i % accesses * N;
        const int token = tokens[row];
        Pack<T, N> vector;
        if (token < 0 || token >= vocabulary) {
#pragma unroll
            for (int j = 0; j < N; ++j) vector.at[j] = from_f32<T>(__int_as_float(0x7fc00000));
        } else {
            vector = load<T, N>(weight + token * width + column);
            if (positions != nullptr) {
                const Pack<T, N> position = load<T, N>(positions + row % time * width + column);
#pragma unroll
                for (int j = 0; j < N; ++j) vector.at[j] = from_f32<T>(to_f32(vector.at[j]) + to_f32(position.at[j]));
            }
        }
        store<T, N>(y + row * width + column, vector);
    }
}

// y[i] = x[i] + weight[i mod sample], N values an access. x, y: [len], `=`; weight: [sample or more], sample = time width.
template <typename T, int N>
__device__ void add_positions(const T* x, const T* weight, T* y, i64 len, i64 sample) {
    for (i64 i = thread_index() * N; i < len; i += thread_count() * N) {
        Pack<T, N> sum = load<T, N>(x + i);
        const Pack<T, N> position = load<T, N>(weight + i % sample);
#pragma unroll
        for (int j = 0; j < N; ++j) sum.at[j] = from_f32<T>(to_f32(sum.at[j]) + to_f32(position.at[j]));
        store<T, N>(y + i, sum);
    }
}

// The sort: a block of 256 threads has a tile of 2,048 positions, a warp 256 of them in a row, a digit is 8 bits.
constexpr int TILE = 2048, WARPS = 8, KEYS = TILE / (WARPS * 32), DIGITS = 256;

// A position and its token, the vocabulary's size standing for any token out of range.
struct Place { u32 token, position; };

// The first pass reads tokens, in the order of positions; later ones what the pass before left.
__device__ __forceinline__ Place place_at(const int* tokens, const Place* places, i64 i, u32 vocabulary) {
    if (places != nullptr) return places[i];
    const u32 token = static_cast<u32>(tokens[i]);
    return Place{token < vocabulary ? token : vocabulary, static_cast<u32>(i)};
}

// How many of a tile's positions have each digit. counts: [256, blocks], `=`. Grid: ceil(len / 2048) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    count_digits(const int* tokens, const Place* places, u32* counts, i64 len, u32 vocabulary, u32 shift) {
    __shared__ u32 found[DIGITS];
    found[threadIdx.x] = 0;
    __syncthreads();
    const i64 start = static_cast<i64>(blockIdx.x) * TILE;
    for (int i = threadIdx.x; i < TILE && start + i < len; i += 256) {
        // Whole numbers: any order gives the same sum.
        atomicAdd(&found[place_at(tokens, places, start + i, vocabulary).token >> shift & 255u], 1u);
    }
    __syncthreads();
    counts[static_cast<i64>(threadIdx.x) * gridDim.x + blockIdx.x] = found[threadIdx.x];
}

// The sum of what the threads before this one have, and of all, in `total`. blockDim.x is a multiple of 32; `scratch` holds 32.
__device__ __forceinline__ u32 sum_before(u32 own, u32* scratch, u32& total) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    u32 sum = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const u32 before = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += before;
    }
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    u32 start = 0;
    total = 0;
    for (u32 i = 0; i < warps; ++i) {
        if (i < warp) start += scratch[i];
        total += scratch[i];
    }
    __syncthreads();
    return start + sum - own;
}

// counts[i] = sum of what stood before i. counts: [len]. One block of 1,024 threads.
extern "C" __global__ void __launch_bounds__(1024) sum_counts(u32* counts, i64 len) {
    __shared__ u32 scratch[32];
    u32 base = 0;
    for (i64 start = 0; start < len; start += 4096) {
        const i64 first = start + threadIdx.x * 4;
        u32 own[4], sum = 0, total;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            own[j] = first + j < len ? counts[first + j] : 0;
            sum += own[j];
        }
        u32 before = base + sum_before(sum, scratch, total);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (first + j < len) counts[first + j] = before;
            before += own[j];
        }
        base += total;
    }
}

// Where each position of a tile goes among the tile's: a warp takes its positions 32 at a time, and within these a lane counts
// those before it that have its digit. `starts` is [8, 256] in shared memory: afterwards, for each warp and digit, how many of
// the tile come before the warp's own, plus `base`, what thread `digit` says of the digit as a whole from how many there are.
struct Ranked {
    Place places[KEYS];
    u32 ranks[KEYS];
};
template <typename Base>
__device__ __forceinline__ Ranked rank_tile(const int* tokens, const Place* places, u32 (*starts)[DIGITS], i64 start, i64 len,
                                            u32 vocabulary, u32 shift, Base base) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Ranked tile;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) starts[i][threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
        const i64 at = start + (warp * KEYS + i) * 32 + lane;
        const bool real = at < len;
        if (real) tile.places[i] = place_at(tokens, places, at, vocabulary);
        // What lies beyond the end has a digit of its own.
        const u32 digit = real ? tile.places[i].token >> shift & 255u : 256u;
        const u32 alike = __match_any_sync(0xffffffffu, digit);
        const u32 before = __popc(alike & ((1u << lane) - 1));
        if (real) tile.ranks[i] = starts[warp][digit] + before;
        __syncwarp();
        if (real && before == 0) starts[warp][digit] += __popc(alike);
        __syncwarp();
    }
    __syncthreads();
    u32 counts[WARPS], all = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
        counts[i] = starts[i][threadIdx.x];
        all += counts[i];
    }
    u32 next = base(all);
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
        starts[i][threadIdx.x] = next;
        next += counts[i];
    }
    __syncthreads();
    return tile;
}

// Leaves a tile's positions where they go.
__device__ __forceinline__ void place_tile(const Ranked& tile, Place* to, u32 (*starts)[DIGITS], i64 start, i64 len, u32 shift) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
        if (start + (warp * KEYS + i) * 32 + lane < len) {
            to[starts[warp][tile.places[i].token >> shift & 255u] + tile.ranks[i]] = tile.places[i];
        }
    }
}

// A pass over many tiles: `to` is `places` (or the tokens, where it is null) by the digit at `shift`. starts: [256, blocks], what
// `sum_counts` made of the counts. Grid: as `count_digits`. Moves 16 bytes a position.
extern "C" __global__ void __launch_bounds__(256)
    sort_digit(const int* tokens, const Place* places, const u32* starts, Place* to, i64 len, u32 vocabulary, u32 shift) {
    __shared__ u32 own[WARPS][DIGITS];
    const i64 start = static_cast<i64>(blockIdx.x) * TILE;
    const u32 base = starts[static_cast<i64>(threadIdx.x) * gridDim.x + blockIdx.x];
    const Ranked tile = rank_tile(tokens, places, own, start, len, vocabulary, shift, [&](u32) { return base; });
    place_tile(tile, to, own, start, len, shift);
}

// All passes over a single tile: the result is in `to`, over the digits below `bits`. One block of 256 threads; len <= 2048.
extern "C" __global__ void __launch_bounds__(256)
    sort_tile(const int* tokens, Place* to, i64 len, u32 vocabulary, u32 bits) {
    __shared__ u32 own[WARPS][DIGITS], scratch[32];
    for (u32 shift = 0; shift < bits; shift += 8) {
        auto base = [&](u32 count) {
            u32 total;
            return sum_before(count, scratch, total);
        };
        // Every position is in a register before the first is left.
        const Ranked tile = rank_tile(tokens, shift == 0 ? nullptr : to, own, 0, len, vocabulary, shift, base);
        place_tile(tile, to, own, 0, len, shift);
        __syncthreads();
    }
}

// A warp has 32 sorted positions in a row and 32 accesses of columns.
constexpr int CHUNK = 32;

// What a warp of the two kernels below works on, of `tiles` parts of a row.
struct Share {
    i64 chunk, column;
    __device__ Share(i64 width, int per_lane) {
        const i64 tiles = (width + 32 * per_lane - 1) / (32 * per_lane), warp = thread_index() / 32;
        chunk = warp / tiles;
        column = (warp % tiles * 32 + threadIdx.x % 32) * per_lane;
    }
};

// to = or += N sums, 16 bytes at a time where N allows.
template <int N> __device__ __forceinline__ void write(float* to, const float* sums, bool add) {
    constexpr int M = N % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < N; i += M) {
        Pack<float, M> values;
        if (add) values = load<float, M>(to + i);
#pragma unroll
        for (int j = 0; j < M; ++j) values.at[j] = add ? values.at[j] + sums[i + j] : sums[i + j];
        store<float, M>(to + i, values);
    }
}

// Sums runs of equal tokens, in order. A run within one chunk is done: dweight[token] = or += its sum. One that goes on from
// the chunk before leaves its sum in parts[chunk, 0], one that starts here and goes on in the next in parts[chunk, 1].
// places: [len], dy: [len, width] by position, dweight: [vocabulary, width] f32, parts: [chunks, 2, width] f32. Grid: 8 warps a
// block, ceil(len / 32) * ceil(width / 32 N) warps. Reads sizeof(T) bytes a value, and moves 4 or 8 a value of a row found.
template <typename T, int N>
__device__ void sum_runs(const Place* places, const T* dy, float* dweight, float* parts, i64 len, i64 width, u32 vocabulary,
                         bool add) {
    const Share own(width, N);
    const i64 start = own.chunk * CHUNK;
    if (start >= len) return;
    const int lane = threadIdx.x % 32, count = static_cast<int>(len - start < CHUNK ? len - start : CHUNK);
    const Place mine = places[start + (lane < count ? lane : count - 1)];
    const u32 before = start > 0 ? places[start - 1].token : 0xffffffffu;
    const u32 after = start + count < len ? places[start + count].token : 0xffffffffu;
    const bool inside = own.column < width;
    float sums[N] = {};
    u32 run = __shfl_sync(0xffffffffu, mine.token, 0);
    bool from_before = run == before;
    for (int first = 0; first < CHUNK; first += 8) {
        Pack<T, N> values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const i64 position = __shfl_sync(0xffffffffu, mine.position, first + i);
            if (inside && first + i < count) values[i] = load<T, N>(dy + position * width + own.column);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const u32 token = __shfl_sync(0xffffffffu, mine.token, first + i);
            if (first + i >= count) break;
            if (token != run) {
                if (inside && run < vocabulary) {
                    if (from_before) {
                        write<N>(parts + own.chunk * 2 * width + own.column, sums, false);
                    } else {
                        write<N>(dweight + run * width + own.column, sums, add);
                    }
                }
                run = token;
                from_before = false;
#pragma unroll
                for (int j = 0; j < N; ++j) sums[j] = 0.0f;
            }
            if (inside) {
#pragma unroll
                for (int j = 0; j < N; ++j) sums[j] += to_f32(values[i].at[j]);
            }
        }
    }
    if (!inside || run >= vocabulary) return;
    if (from_before || run == after) {
        write<N>(parts + (own.chunk * 2 + !from_before) * width + own.column, sums, false);
    } else {
        write<N>(dweight + run * width + own.column, sums, add);
    }
}

// Adds up the runs of several chunks, from the chunk where each starts. Grid as above, with N = 4 or 1 columns a lane.
template <int N>
__device__ void sum_parts(const Place* places, const float* parts, float* dweight, i64 len, i64 width, u32 vocabulary, bool add) {
    const Share own(width, N);
    const i64 next = (own.chunk + 1) * CHUNK;
    if (next >= len || own.column >= width) return;
    const u32 run = places[next - 1].token;
    const bool starts_here = own.chunk == 0 || places[next - CHUNK - 1].token != run;
    if (run >= vocabulary || !starts_here || places[next].token != run) return;
    // The first position of another token.
    i64 end = len;
    for (i64 low = next; low < end;) {
        const i64 middle = (low + end) / 2;
        if (places[middle].token == run) {
            low = middle + 1;
        } else {
            end = middle;
        }
    }
    Pack<float, N> sums = load<float, N>(parts + (own.chunk * 2 + 1) * width + own.column);
#pragma unroll 4
    for (i64 chunk = own.chunk + 1; chunk * CHUNK < end; ++chunk) {
        const Pack<float, N> more = load<float, N>(parts + chunk * 2 * width + own.column);
#pragma unroll
        for (int j = 0; j < N; ++j) sums.at[j] += more.at[j];
    }
    write<N>(dweight + run * width + own.column, sums.at, add);
}

extern "C" __global__ void __launch_bounds__(256)
    sum_parts(const Place* places, const float* parts, float* dweight, i64 len, i64 width, u32 vocabulary, int add) {
    if (width % 4 == 0) {
        sum_parts<4>(places, parts, dweight, len, width, vocabulary, add != 0);
    } else {
        sum_parts<1>(places, parts, dweight, len, width, vocabulary, add != 0);
    }
}

// Grids: `embedding` and `positions` any, of 256 threads.
#define DEFINE(SUFFIX, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        embedding_##SUFFIX(const int* tokens, const T* weight, const T* positions, T* y, i64 rows, i64 time,           \
                           i64 width, i64 vocabulary) {                                                                \
        constexpr int N = per_access<T>();                                                                             \
        if (width % N == 0) {                                                                                          \
            look_up<T, N>(tokens, weight, positions, y, rows, time, width, vocabulary);                                \
        } else {                                                                                                       \
            look_up<T, 1>(tokens, weight, positions, y, rows, time, width, vocabulary);                                \
        }                                                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        positions_##SUFFIX(const T* x, const T* weight, T* y, i64 len, i64 sample) {                                   \
        constexpr int N = per_access<T>();                                                                             \
        if (sample % N == 0) {                                                                                         \
            add_positions<T, N>(x, weight, y, len, sample);                                                            \
        } else {                                                                                                       \
            add_positions<T, 1>(x, weight, y, len, sample);                                                            \
        }                                                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        sum_runs_##SUFFIX(const Place* places, const T* dy, float* dweight, float* parts, i64 len, i64 width,          \
                          u32 vocabulary, int add) {                                                                   \
        sum_runs<T, per_access<T>()>(places, dy, dweight, parts, len, width, vocabulary, add != 0);                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 4)                                                               \
        sum_runs_odd_##SUFFIX(const Place* places, const T* dy, float* dweight, float* parts, i64 len, i64 width,      \
                              u32 vocabulary, int add) {                                                               \
        sum_runs<T, 1>(places, dy, dweight, parts, len, width, vocabulary, add != 0);                                  \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
