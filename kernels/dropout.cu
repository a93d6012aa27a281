// Dropout by counter-based random numbers: nothing is stored, the backward draws again. CPU twin: src/backend/cpu/dropout.rs.
#include "philox.cuh"

// y = x / (1 - probability) where the draw is kept, else 0. x, y: [len]. Position i of part p of micro-batch m is m 2^40 + p len + i.
// Grid: any, 256 threads, four values a thread and block of random words; moves 2 sizeof(T) bytes a value.
template <typename T>
__device__ void dropout(const T* x, T* y, u64 seed, u32 stream, float probability, float scale, i64 len, const StepState* step) {
    const u64 first = (step->micro_step << 40) + step->part * static_cast<u64>(len);
    // A part need not begin with a block of random words; where it does not, four values take words of two.
    const int shift = static_cast<int>(first & 3u);
    for (i64 i = thread_index() * 4; i < len; i += thread_count() * 4) {
        const u64 block = (first + static_cast<u64>(i)) / 4;
        PhiloxBlock random = philox(seed, PURPOSE_DROPOUT, stream, block);
        if (shift != 0) random = from_word(random, philox(seed, PURPOSE_DROPOUT, stream, block + 1), shift);
        if (i + 4 <= len) {
            Pack<T, 4> values = load<T, 4>(x + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                values.at[j] = from_f32<T>(to_unit(random.word[j]) < probability ? 0.0f : to_f32(values.at[j]) * scale);
            }
            store<T, 4>(y + i, values);
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (i + j >= len) break;
                y[i + j] = from_f32<T>(to_unit(random.word[j]) < probability ? 0.0f : to_f32(x[i + j]) * scale);
            }
        }
    }
}

#define DEFINE(SUFFIX, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                              \
        dropout_##SUFFIX(const T* x, T* y, u64 seed, u32 stream, float probability, float scale, i64 len,          \
                         const StepState* step) {                                                                  \
        dropout(x, y, seed, stream, probability, scale, len, step);                                                \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
