// What the plain and the flash form of attention share: sizes, places in packed rows, who sees whom, dropout.
#pragma once
#include "philox.cuh"

// Sizes and options; laid out as the host's (backend/cuda/attention.rs). A row of qkv holds `heads` queries, `kv_heads` keys
// and `kv_heads` values, each of `head_size`; query head h uses key head h / sharing.
struct AttentionShape {
    const int* tokens;      // [batch, time]; null: no padding
    const StepState* step;  // null: no dropout
    u64 seed;
    int batch, time, heads, kv_heads, head_size;
    int sharing;  // heads / kv_heads
    int causal;
    int pad;             // the token that nothing attends to
    u32 stream;          // of dropout
    u32 threshold;       // a probability is dropped where the upper 24 bits of its word lie below
    float keep;          // 1 / (1 - probability); 1 without dropout
    float scale;         // 1 / sqrt(head_size)
};
static_assert(sizeof(AttentionShape) == 72, "as the host's");

constexpr float LN_2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// One head of one sample: where it starts in qkv and in y, and the steps from one position to the next.
struct HeadPlace {
    int sample, head, group;
    i64 packed, width;  // of a row of qkv and of y

    // `index` counts the heads of all samples.
    __device__ __forceinline__ HeadPlace(const AttentionShape& s, i64 index)
        : sample(static_cast<int>(index / s.heads)), head(static_cast<int>(index % s.heads)), group(head / s.sharing),
          packed(static_cast<i64>(s.heads + 2 * s.kv_heads) * s.head_size),
          width(static_cast<i64>(s.heads) * s.head_size) {}

    // The head that lies `n` on, of the same sample and the same keys.
    __device__ __forceinline__ HeadPlace sharing(int n) const {
        HeadPlace other = *this;
        other.head += n;
        return other;
    }

    __device__ __forceinline__ i64 row(const AttentionShape& s) const { return static_cast<i64>(sample) * s.time; }
    __device__ __forceinline__ i64 query(const AttentionShape& s) const {
        return row(s) * packed + static_cast<i64>(head) * s.head_size;
    }
    __device__ __forceinline__ i64 key(const AttentionShape& s) const {
        return row(s) * packed + static_cast<i64>(s.heads + group) * s.head_size;
    }
    __device__ __forceinline__ i64 value(const AttentionShape& s) const {
        return key(s) + static_cast<i64>(s.kv_heads) * s.head_size;
    }
    __device__ __forceinline__ i64 out(const AttentionShape& s) const {
        return row(s) * width + static_cast<i64>(head) * s.head_size;
    }
    // Of the statistics, [batch, heads, time].
    __device__ __forceinline__ i64 statistic(const AttentionShape& s) const {
        return (static_cast<i64>(sample) * s.heads + head) * s.time;
    }
};

// Where the random words of probabilities of row `query` start: those of keys 0, 1, ... follow.
__device__ __forceinline__ u64 dropout_row(const AttentionShape& s, const HeadPlace& place, int query) {
    const u64 part = static_cast<u64>(s.batch) * s.heads * s.time * s.time;
    return (s.step->micro_step << 40) + s.step->part * part + static_cast<u64>((place.statistic(s) + query) * s.time);
}

// Which of the N probabilities from `position` on are kept: bit i for the i-th. N is at most 4, so that two blocks hold all.
template <int N> __device__ __forceinline__ u32 kept(const AttentionShape& s, u64 position) {
    const u32 first = static_cast<u32>(position) & 3u;
    PhiloxBlock random = philox(s.seed, PURPOSE_DROPOUT, s.stream, position / 4);
    u32 bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= static_cast<u32>(random.word[i] >> 8 >= s.threshold) << i;
    if (first + N > 4) {
        random = philox(s.seed, PURPOSE_DROPOUT, s.stream, position / 4 + 1);
#pragma unroll
        for (int i = 0; i < 3; ++i) bits |= static_cast<u32>(random.word[i] >> 8 >= s.threshold) << (4 + i);
    }
    return bits >> first;
}
