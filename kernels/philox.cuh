// Counter-based random numbers: Philox4x32 with 10 rounds (Salmon et al., SC 2011), as src/random.rs has them.
#pragma once
#include "common.cuh"

struct PhiloxBlock { u32 word[4]; };

// Block `block` of stream `stream` of `purpose` under `seed`: positions 4 block .. 4 block + 3.
__device__ __forceinline__ PhiloxBlock philox(u64 seed, u32 purpose, u32 stream, u64 block) {
    u32 c0 = static_cast<u32>(block), c1 = static_cast<u32>(block >> 32), c2 = stream, c3 = purpose;
    u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        if (round > 0) {
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        const u32 low0 = 0xD2511F53u * c0, high0 = __umulhi(0xD2511F53u, c0);
        const u32 low1 = 0xCD9E8D57u * c2, high1 = __umulhi(0xCD9E8D57u, c2);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
    }
    return PhiloxBlock{{c0, c1, c2, c3}};
}

// The word at one position.
__device__ __forceinline__ u32 philox_word(u64 seed, u32 purpose, u32 stream, u64 position) {
    const PhiloxBlock block = philox(seed, purpose, stream, position / 4);
    const u32 j = static_cast<u32>(position) & 3u;
    return j == 0 ? block.word[0] : j == 1 ? block.word[1] : j == 2 ? block.word[2] : block.word[3];
}

// Four words from word `shift`, 1 to 3, of a block on, the last of them the next block's.
__device__ __forceinline__ PhiloxBlock from_word(const PhiloxBlock& a, const PhiloxBlock& b, int shift) {
    return shift == 1   ? PhiloxBlock{{a.word[1], a.word[2], a.word[3], b.word[0]}}
           : shift == 2 ? PhiloxBlock{{a.word[2], a.word[3], b.word[0], b.word[1]}}
                        : PhiloxBlock{{a.word[3], b.word[0], b.word[1], b.word[2]}};
}

// The upper 24 bits of a word as a value in [0, 1).
__device__ __forceinline__ float to_unit(u32 word) { return static_cast<float>(word >> 8) * (1.0f / 16777216.0f); }

// `Purpose::Dropout` of src/random.rs.
constexpr u32 PURPOSE_DROPOUT = 4;
