// Forms of the backward of layer norm (kernels/layer_norm.cu): rows of 768 in bf16 with a residual, a warp a row, with and without the next
// row brought to the cache, and rows a block. 16 x 1024 rows, as in GPT-2 124M.
#include "layer_norm.cu"

#include "bed.cuh"

#define FORM(NAME, PREFETCH, BLOCKS)                                                                                   \
    __global__ void __launch_bounds__(128, BLOCKS)                                                                     \
        NAME(const bf16* x, const bf16* dy, const bf16* residual, const bf16* weight, const float* means,              \
             const float* scales, bf16* dx, float* dweights, float* dbiases, i64 rows, int width, i64 rows_a_block) {  \
        norm_backward<bf16, Slim<bf16>, PREFETCH>(x, dy, residual, weight, means, scales, dx, dweights, dbiases, rows, \
                                                  width, rows_a_block);                                                \
    }
FORM(taken, false, 4)
FORM(prefetch, true, 4)
FORM(three_blocks, false, 3)
FORM(three_blocks_prefetch, true, 3)

int main() {
    constexpr i64 ROWS = 16 * 1024, WIDTH = 768;
    constexpr size_t LEN = ROWS * WIDTH;
    // Several batches, so that none is found in the cache: 25 MB each.
    constexpr int BATCHES = 4;
    const bf16 *x[BATCHES], *dy[BATCHES], *residual[BATCHES];
    for (int i = 0; i < BATCHES; ++i) {
        x[i] = reinterpret_cast<const bf16*>(random_bf16(LEN, 3 * i + 1));
        dy[i] = reinterpret_cast<const bf16*>(random_bf16(LEN, 3 * i + 2));
        residual[i] = reinterpret_cast<const bf16*>(random_bf16(LEN, 3 * i + 3));
    }
    const auto* weight = reinterpret_cast<const bf16*>(random_bf16(WIDTH, 100));
    const float *means = random_f32(ROWS, 101), *scales = random_f32(ROWS, 102);
    auto *found = room<u16>(LEN), *expected = room<u16>(LEN);
    auto *dweights = room<float>(ROWS * WIDTH / 4), *dbiases = room<float>(ROWS * WIDTH / 4);
    std::printf("%-24s %6s %6s %6s %9s %9s %9s\n", "form", "rows", "regs", "local", "us", "TB/s", "distance");
    const auto time = [&](const char* name, auto kernel, i64 rows_a_block, u16* to) {
        const cudaFuncAttributes of = prepare(kernel, 0);
        int turn = 0;
        const double us = median_us([&] {
            const int i = turn++ % BATCHES;
            kernel<<<(ROWS + rows_a_block - 1) / rows_a_block, 128>>>(x[i], dy[i], residual[i], weight, means, scales,
                                                                     reinterpret_cast<bf16*>(to), dweights, dbiases, ROWS, WIDTH,
                                                                     rows_a_block);
        });
        std::printf("%-24s %6lld %6d %6zu %9.1f %9.2f %9.1e\n", name, rows_a_block, of.numRegs, of.localSizeBytes, us,
                    LEN * 8 / us / 1e6, distance(to, expected, LEN, [](size_t) { return true; }));
    };
    for (const i64 rows_a_block : {16, 8, 32}) {
        time("taken", taken, rows_a_block, rows_a_block == 16 ? expected : found);
        time("prefetch", prefetch, rows_a_block, found);
        time("three_blocks", three_blocks, rows_a_block, found);
        time("three_blocks_prefetch", three_blocks_prefetch, rows_a_block, found);
    }
}
