// What a step found, for the host: one launch rather than a copy a piece, each of which would hold the stream up.
#include "common.cuh"

constexpr int MOST_PIECES = 4;

// Words of 4 bytes, from where they stand on the device to where they go.
struct Report {
    const u32* from[MOST_PIECES];
    u32* to[MOST_PIECES];
    u32 words[MOST_PIECES];
    u64 pieces;
};
static_assert(sizeof(Report) == 88, "as the host's");

// to = from, piece by piece. `to` lies in page-locked host memory. One block of 256 threads.
extern "C" __global__ void __launch_bounds__(256) report(Report of) {
#pragma unroll
    for (u32 piece = 0; piece < MOST_PIECES; ++piece) {
        if (piece >= of.pieces) return;
        for (u32 i = threadIdx.x; i < of.words[piece]; i += blockDim.x) of.to[piece][i] = of.from[piece][i];
    }
}
