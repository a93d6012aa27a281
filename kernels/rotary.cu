// Rotary positions (Su et al. 2021), in place. CPU twin: `rotary` of src/backend/cpu/attention.rs.
#include "common.cuh"

// Turns pair i of each of the first `heads` heads of a row of position t by t base^(-2 i / head_size) (back, where `direction`
// is -1). A pair is (i, i + head_size / 2), or (2 i, 2 i + 1) when interleaved. x: [batch, time, row_width].
//
// Grid: time blocks of 256 threads (x), by any number of them (y) that share the batch. A block works out the turns of its
// position once, in shared memory (head_size / 2 pairs of f32): angles in f64, since f32 keeps no fraction of a large one,
// reduced to half a turn before the f32 sine, within 1e-6 of the twin's. V pairs a thread at a time; moves 2 sizeof(T) bytes a
// value.
template <typename T, int V, bool INTERLEAVED>
__device__ __forceinline__ void rotary(T* x, i64 batch, i64 time, i64 row_width, i64 heads, i64 head_size, double log2_base,
                                       float direction) {
    extern __shared__ __align__(16) float2 turns[];
    const i64 half = head_size / 2, position = blockIdx.x;
    for (i64 i = threadIdx.x; i < half; i += blockDim.x) {
        const double frequency = exp2(-2.0 * static_cast<double>(i) / static_cast<double>(head_size) * log2_base);
        // In half turns, so that nothing is lost to the remainder by pi.
        const double halves = static_cast<double>(position) * frequency * 0.31830988618379067154;
        float sine, cosine;
        sincospif(static_cast<float>(halves - 2.0 * rint(halves * 0.5)), &sine, &cosine);
        turns[i] = make_float2(cosine, direction * sine);
    }
    __syncthreads();
    const i64 units = half / V, work = heads * units;
    for (i64 sample = blockIdx.y; sample < batch; sample += gridDim.y) {
        T* row = x + (sample * time + position) * row_width;
        for (i64 i = threadIdx.x; i < work; i += blockDim.x) {
            const i64 pair = i % units * V;
            T* head = row + i / units * head_size;
            T* first = head + (INTERLEAVED ? 2 * pair : pair);
            T* second = first + (INTERLEAVED ? static_cast<i64>(V) : half);
            Pack<T, V> a = load<T, V>(first), b = load<T, V>(second);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                // Where the two of pair `pair + j` lie among the 2 V values.
                const int at = INTERLEAVED ? 2 * j : j, other = INTERLEAVED ? 2 * j + 1 : V + j;
                T& left = at < V ? a.at[at] : b.at[at - V];
                T& right = other < V ? a.at[other] : b.at[other - V];
                const float2 turn = turns[pair + j];
                const float u = to_f32(left), v = to_f32(right);
                left = from_f32<T>(u * turn.x - v * turn.y);
                right = from_f32<T>(v * turn.x + u * turn.y);
            }
            store<T, V>(first, a);
            store<T, V>(second, b);
        }
    }
}

// `wide`: half a head and a row are multiples of 16 bytes.
#define DEFINE_FORM(NAME, V, INTERLEAVED, SUFFIX, T)                                                                   \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        NAME##_##SUFFIX(T* x, i64 batch, i64 time, i64 row_width, i64 heads, i64 head_size, double log2_base,          \
                        float direction) {                                                                             \
        rotary<T, V, INTERLEAVED>(x, batch, time, row_width, heads, head_size, log2_base, direction);                  \
    }
#define DEFINE(SUFFIX, T)                                                                                              \
    DEFINE_FORM(rotary_halves, 1, false, SUFFIX, T)                                                                    \
    DEFINE_FORM(rotary_interleaved, 1, true, SUFFIX, T)                                                                \
    DEFINE_FORM(rotary_halves_wide, per_access<T>(), false, SUFFIX, T)                                                 \
    DEFINE_FORM(rotary_interleaved_wide, per_access<T>(), true, SUFFIX, T)
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
#undef DEFINE_FORM
