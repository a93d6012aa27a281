// A tensor [batch, channels, spatial] cut by channel.
//
// A channel's values, batch * spatial of them, are cut into at most 32 parts, as the shape alone says; a block of 256 threads
// takes a (channel, part), so that the grid is (channels, parts). Accesses have three widths: 16 bytes (wide), 8 (half) or one
// value (narrow), as `spatial` divides.
#pragma once
#include "common.cuh"

// `part` values each, a multiple of every width.
struct ChannelShape {
    u32 channels, spatial, count, part;
};
static_assert(sizeof(ChannelShape) == 16, "as the host's");

// Visits this block's part of its channel, `V` values at a time: `f(offset)` of the first of them in the tensor.
template <int V, typename F> __device__ __forceinline__ void for_part(ChannelShape s, F f) {
    const u32 first = blockIdx.y * s.part, end = min(first + s.part, s.count);
    for (u32 i = first + threadIdx.x * V; i < end; i += 256 * V) {
        const u32 sample = i / s.spatial, at = i - sample * s.spatial;
        f((static_cast<i64>(sample) * s.channels + blockIdx.x) * s.spatial + at);
    }
}

// Defines kernels of a template <typename T, int V> in all types and widths: DEFINE_WIDTH(width, V, suffix, T).
#define FOR_EACH_WIDTH(SUFFIX, T)                                                                                      \
    DEFINE_WIDTH(wide, per_access<T>(), SUFFIX, T)                                                                     \
    DEFINE_WIDTH(half, per_access<T>() / 2, SUFFIX, T)                                                                 \
    DEFINE_WIDTH(narrow, 1, SUFFIX, T)
