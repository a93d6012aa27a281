// Affine maps that are too small to fill a device with a library's tiles: a launch takes the whole of a forward or of a backward.
// CPU twin: src/backend/cpu/linear.rs.
//
// A block makes a small tile of the result. Its warps share the inner dimension, each loads its part of both factors from memory as
// `mma` takes them, without shared memory between, and the warps' sums are added in order at the end. So the whole of a small
// factor is under way at once, which is what the time of such a product hangs on.
//
// Storage f32 multiplies in tf32; all sums are f32.
#include "activation.cuh"

// A factor: `rows` of the tile's side, `depth` values of the inner dimension. Along: value (row, k) lies at row * stride + k; across:
// at k * stride + row. `whole`: four neighbours can be had in one access wherever the first one's index is a multiple of 4. What is
// small has fewer values than an int counts.
template <typename T> struct Factor {
    const T* from;
    int stride, rows, depth;
    bool whole;
    __device__ __forceinline__ Factor(const T* from, int stride, int rows, int depth)
        : from(from), stride(stride), rows(rows), depth(depth),
          whole(stride % 4 == 0 && reinterpret_cast<u64>(from) % (4 * sizeof(T)) == 0) {}
};

// A lane's values of a factor: ROWS rows at four places of the inner dimension. Lane l, g = l / 4, c = l % 4, holds of 16 places
// those at 4 c to 4 c + 3, and of 8 ROWS rows g, g + 8, .. (along), or 4 g to 4 g + 3 (across, ROWS being 4): sums over the inner
// dimension may be taken in any order, so long as both factors keep it, and `row_of` tells which rows these were.
template <typename T, int ROWS, bool ALONG> struct Strip {
    static_assert(ALONG || ROWS == 4, "four neighbours across");
    Pack<T, 4> packs[ROWS];

    static __device__ __forceinline__ int row(int first) { return first + (ALONG ? threadIdx.x % 32 / 4 : threadIdx.x % 32 / 4 * 4); }
    static __device__ __forceinline__ int place(int first) { return first + threadIdx.x % 4 * 4; }
    static __device__ __forceinline__ int step(const Factor<T>& of) { return ALONG ? 8 * of.stride : of.stride; }
    static __device__ __forceinline__ const T* start(const Factor<T>& of, int first_row, int first_k) {
        return of.from + (ALONG ? row(first_row) * of.stride + place(first_k) : place(first_k) * of.stride + row(first_row));
    }

    // All of them are there, in accesses of four.
    __device__ __forceinline__ void load_whole(const Factor<T>& of, int first_row, int first_k) {
        const T* p = start(of, first_row, first_k);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) packs[i] = load<T, 4>(p + i * step(of));
    }
    // Zeros where the factor ends.
    __device__ __forceinline__ void load_some(const Factor<T>& of, int first_row, int first_k) {
        const T* p = start(of, first_row, first_k);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const bool is_there = ALONG ? row(first_row) + 8 * i < of.rows && place(first_k) + j < of.depth
                                            : row(first_row) + j < of.rows && place(first_k) + i < of.depth;
                packs[i].at[j] = is_there ? p[i * step(of) + j] : T{};
            }
        }
    }
    __device__ __forceinline__ T value(int row, int k) const { return ALONG ? packs[row].at[k] : packs[k].at[row]; }
};

// Which row of the tile is row `slot` (0 to 7) of the lanes' `index`th ones.
template <bool ALONG> __device__ __forceinline__ int row_of(int index, int slot) { return ALONG ? slot + 8 * index : 4 * slot + index; }

// Four values of a row, as `mma` takes them: pairs of 16 bits, or each rounded to tf32.
template <typename T> struct Four { u32 at[2]; };
template <> struct Four<float> { u32 at[4]; };

template <typename T, int ROWS, bool ALONG>
__device__ __forceinline__ Four<T> four(const Strip<T, ROWS, ALONG>& of, int row) {
    Four<T> out;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int k = 0; k < 4; ++k) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out.at[k]) : "f"(of.value(row, k)));
    } else {
#pragma unroll
        for (int k = 0; k < 2; ++k) out.at[k] = u32(of.value(row, 2 * k).bits) | u32(of.value(row, 2 * k + 1).bits) << 16;
    }
    return out;
}

// sums[16][8] += left[16][16] right[16][8]; rows g and g + 8 of the left factor are `low` and `high`.
__device__ __forceinline__ void multiply(float (&d)[4], const Four<float>& low, const Four<float>& high, const Four<float>& right) {
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(low.at[k]), "r"(high.at[k]), "r"(low.at[k + 1]), "r"(high.at[k + 1]), "r"(right.at[k]), "r"(right.at[k + 1]));
    }
}
#define MULTIPLY(T)                                                                                                               \
    __device__ __forceinline__ void multiply(float (&d)[4], const Four<T>& low, const Four<T>& high, const Four<T>& right) {      \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." #T "." #T ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "              \
            "{%0, %1, %2, %3};"                                                                                                   \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                      \
            : "r"(low.at[0]), "r"(high.at[0]), "r"(low.at[1]), "r"(high.at[1]), "r"(right.at[0]), "r"(right.at[1]));              \
    }
MULTIPLY(bf16)
MULTIPLY(f16)
#undef MULTIPLY

// Columns of a tile, and how its rows lie in shared memory.
constexpr int COLUMNS = 32, PITCH = COLUMNS + 1;
// Floats of shared memory: a tile a warp, 16 rows by 16 warps or 32 by 8.
constexpr int ROOM = 16 * 16 * PITCH;
// Steps of 16 places of the inner dimension that a warp has under way at once.
constexpr int AHEAD = 2;

// sums += left right' over 16 places of the inner dimension.
template <typename T, int ROWS, bool LEFT, bool RIGHT>
__device__ __forceinline__ void multiply_strips(float (&sums)[ROWS / 2][4][4], const Strip<T, ROWS, LEFT>& left,
                                                const Strip<T, 4, RIGHT>& right) {
    Four<T> rows[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row) rows[row] = four(left, row);
#pragma unroll
    for (int column = 0; column < 4; ++column) {
        const Four<T> of_right = four(right, column);
#pragma unroll
        for (int tile = 0; tile < ROWS / 2; ++tile) multiply(sums[tile][column], rows[2 * tile], rows[2 * tile + 1], of_right);
    }
}

// The tile of 8 ROWS by 32 values at `first_row`, `first_column` of left right'; `finish(row, column, value)` gets each that is part
// of the result, once. `see(strip)` is shown what a warp takes of the left factor. blockDim.x / 32 warps; `room` holds a tile each.
template <int ROWS, bool LEFT, bool RIGHT, typename T, typename See, typename Finish>
__device__ __forceinline__ void multiply_tile(const Factor<T>& left, const Factor<T>& right, int first_row, int first_column,
                                              float* room, See see, Finish finish) {
    constexpr int TILES = ROWS / 2, TILE = 8 * ROWS * PITCH;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4, turn = 16 * warps;
    float sums[TILES][4][4] = {};
    const bool is_whole = left.whole && right.whole && first_row + 8 * ROWS <= left.rows && first_column + COLUMNS <= right.rows;
    int k = 16 * warp;
    // The loads of AHEAD steps are under way before one is waited for.
    for (; is_whole && k + (AHEAD - 1) * turn + 16 <= left.depth; k += AHEAD * turn) {
        Strip<T, ROWS, LEFT> a[AHEAD];
        Strip<T, 4, RIGHT> b[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            a[i].load_whole(left, first_row, k + i * turn);
            b[i].load_whole(right, first_column, k + i * turn);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            see(a[i]);
            multiply_strips(sums, a[i], b[i]);
        }
    }
#pragma unroll 1
    for (; k < left.depth; k += turn) {
        Strip<T, ROWS, LEFT> a;
        Strip<T, 4, RIGHT> b;
        if (is_whole && k + 16 <= left.depth) {
            a.load_whole(left, first_row, k);
            b.load_whole(right, first_column, k);
        } else {
            a.load_some(left, first_row, k);
            b.load_some(right, first_column, k);
        }
        see(a);
        multiply_strips(sums, a, b);
    }
    float* own = room + warp * TILE;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int column = 0; column < 4; ++column) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                own[row_of<LEFT>(2 * tile + i / 2, g) * PITCH + row_of<RIGHT>(column, 2 * c + i % 2)] = sums[tile][column][i];
            }
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < 8 * ROWS * COLUMNS; i += blockDim.x) {
        const int row = i / COLUMNS, column = i % COLUMNS;
        if (first_row + row >= left.rows || first_column + column >= right.rows) continue;
        float total = 0.0f;
#pragma unroll 4
        for (int of = 0; of < warps; ++of) total += room[of * TILE + row * PITCH + column];
        finish(first_row + row, first_column + column, total);
    }
}

__device__ __forceinline__ int tiles(int len, int side) { return (len + side - 1) / side; }

// x: [rows, inputs], weight: [outputs, inputs], bias: [outputs] or null, y: [rows, outputs]; kept: as y, what goes into the function,
// or null. kind: of the function, or -1.
template <typename T> struct Forward {
    const T *x, *weight, *bias;
    T *y, *kept;
    int rows, inputs, outputs, kind;
};
static_assert(sizeof(Forward<float>) == 56, "as the host's");

// y = f(x weight' + bias), `=`: 16 x 32 values of y by a block, 32 to 512 threads. Reads x once for 32 outputs and weight once for 16
// rows. `room` holds ROOM floats of shared memory.
template <typename T> __device__ __forceinline__ void forward(const Forward<T>& of, int tile, float* room) {
    const int across = tiles(of.outputs, COLUMNS), row = tile / across * 16, column = tile % across * COLUMNS;
    const Factor<T> x(of.x, of.inputs, of.rows, of.inputs), weight(of.weight, of.inputs, of.outputs, of.inputs);
    multiply_tile<2, true, true>(x, weight, row, column, room, [](const auto&) {}, [&](int r, int o, float value) {
        if (of.bias != nullptr) value += to_f32(of.bias[o]);
        const int at = r * of.outputs + o;
        if (of.kept != nullptr) of.kept[at] = from_f32<T>(value);
        of.y[at] = from_f32<T>(of.kind < 0 ? value : value_of(of.kind, value));
    });
}

// x: [rows, inputs], weight: [outputs, inputs], dy: [rows, outputs]; dx: as x, or null; slope_of: as x, what the slope of function
// `kind` is taken of, or null; dweight: as weight, dbias: [outputs] or null, both f32.
template <typename T> struct Backward {
    const T *x, *weight, *dy, *slope_of;
    T* dx;
    float *dweight, *dbias;
    int rows, inputs, outputs, kind, add_weight, add_bias;
};
static_assert(sizeof(Backward<float>) == 80, "as the host's");

// dx = dy weight f'(slope_of), `=`; dweight (+)= dy' x; dbias (+)= sums of dy over rows: `+=` where the flags say so. First a tile for
// 16 x 32 values of dx, where it is asked for, then one for 32 x 32 values of dweight, each by a block of 32 to 256 threads. `room`
// holds ROOM floats of shared memory, `bias` those of a block's warps.
template <typename T> __device__ __forceinline__ void backward(const Backward<T>& of, int tile, float* room, float (*bias)[32]) {
    const int across = tiles(of.inputs, COLUMNS), of_dx = of.dx == nullptr ? 0 : tiles(of.rows, 16) * across;
    if (tile < of_dx) {
        const int row = tile / across * 16, column = tile % across * COLUMNS;
        const Factor<T> dy(of.dy, of.outputs, of.rows, of.outputs), weight(of.weight, of.inputs, of.inputs, of.outputs);
        multiply_tile<2, true, false>(dy, weight, row, column, room, [](const auto&) {}, [&](int r, int i, float value) {
            const int at = r * of.inputs + i;
            if (of.slope_of != nullptr) value = slope_of(of.kind, to_f32(of.slope_of[at]), value);
            of.dx[at] = from_f32<T>(value);
        });
        return;
    }
    tile -= of_dx;
    const int row = tile / across * 32, column = tile % across * COLUMNS;
    const Factor<T> dy(of.dy, of.outputs, of.outputs, of.rows), x(of.x, of.inputs, of.inputs, of.rows);
    // One block of a row of tiles sums what all of them read.
    const bool sums_bias = of.dbias != nullptr && column == 0;
    float sums[4] = {};
    const auto see = [&](const Strip<T, 4, false>& strip) {
        if (!sums_bias) return;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[r] += to_f32(strip.value(r, k));
        }
    };
    multiply_tile<4, false, false>(dy, x, row, column, room, see, [&](int o, int i, float value) {
        float* to = of.dweight + o * of.inputs + i;
        *to = of.add_weight ? *to + value : value;
    });
    if (!sums_bias) return;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], 1);
        sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], 2);
        if (threadIdx.x % 4 == 0) bias[warp][threadIdx.x % 32 / 4 * 4 + r] = sums[r];
    }
    __syncthreads();
    const int output = row + static_cast<int>(threadIdx.x);
    if (threadIdx.x < 32 && output < of.outputs) {
        float total = 0.0f;
        for (int i = 0; i < warps; ++i) total += bias[i][threadIdx.x];
        of.dbias[output] = of.add_bias ? of.dbias[output] + total : total;
    }
}

// A block a tile.
#define DEFINE(SUFFIX, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(512) linear_small_##SUFFIX(Forward<T> of) {                           \
        __shared__ float room[ROOM];                                                                                   \
        forward(of, blockIdx.x, room);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) linear_small_backward_##SUFFIX(Backward<T> of) {                 \
        __shared__ float room[ROOM], bias[8][32];                                                                      \
        backward(of, blockIdx.x, room, bias);                                                                          \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
