// Forms of the forward of attention (kernels/flash_attention_forward.cuh): warps a block, 16 queries a warp and tile, keys a tile,
// blocks on a multiprocessor, and products of four warps together. 16 x 1024 tokens, 12 heads of 64, causal, bf16.
#include "flash_attention_forward.cuh"
#include "flash_attention_groups.cuh"

#include "bed.cuh"

#define FORM_BY(PRODUCTS, NAME, WARPS, TILES, KEYS, BLOCKS)                                                            \
    __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                              \
        NAME(const bf16* qkv, bf16* y, float* log_sum_exp, AttentionShape shape) {                                     \
        flash_attention_forward<bf16, 64, WARPS, TILES, KEYS, false, PRODUCTS>(qkv, y, log_sum_exp, shape);            \
    }
typedef WarpProducts<bf16, 64> Alone;
typedef GroupProducts<bf16> Together;
#define FORM(...) FORM_BY(Alone, __VA_ARGS__)
FORM(taken, 4, 1, 64, 3)
FORM(two_tiles, 4, 2, 64, 2)
FORM(narrow_tiles, 4, 2, 32, 2)
FORM(eight_warps, 8, 1, 64, 2)
FORM(eight_warps_narrow_tiles, 8, 1, 32, 2)
FORM(two_blocks, 4, 1, 64, 2)
FORM(four_blocks, 4, 1, 64, 4)
FORM(four_blocks_narrow_tiles, 4, 1, 32, 4)
FORM(large_blocks, 8, 2, 64, 1)
FORM(wide_tiles, 4, 1, 128, 2)
FORM_BY(Together, groups_two_blocks, 4, 1, 64, 2)
FORM_BY(Together, groups, 4, 1, 64, 3)
FORM_BY(Together, groups_four_blocks, 4, 1, 64, 4)

int main() {
    constexpr int BATCH = 16, TIME = 1024, HEADS = 12, D = 64;
    const size_t len = static_cast<size_t>(BATCH) * TIME * HEADS * D;
    const auto* qkv = reinterpret_cast<const bf16*>(random_bf16(3 * len, 1));
    auto *y = room<u16>(len), *expected = room<u16>(len);
    auto* log_sum_exp = room<float>(BATCH * HEADS * TIME);
    AttentionShape shape{};
    shape.batch = BATCH, shape.time = TIME, shape.heads = HEADS, shape.kv_heads = HEADS, shape.head_size = D;
    shape.sharing = 1, shape.causal = 1, shape.keep = 1.0f, shape.scale = 0.125f;
    std::printf("%-26s %6s %6s %9s %9s %9s\n", "form", "regs", "local", "us", "TFLOP/s", "distance");
    const auto time = [&](const char* name, auto kernel, int warps, int tiles, int keys, u16* to) {
        const int rows = 16 * tiles * warps, blocks = BATCH * HEADS * ((TIME + rows - 1) / rows);
        const int shared = std::max(4 * keys * D * 2, rows * D * 2);
        const cudaFuncAttributes of = prepare(kernel, shared);
        const double us = median_us([&] {
            kernel<<<blocks, 32 * warps, shared>>>(qkv, reinterpret_cast<bf16*>(to), log_sum_exp, shape);
        });
        const double away = distance(to, expected, len, [](size_t) { return true; });
        std::printf("%-26s %6d %6zu %9.1f %9.0f %9.1e\n", name, of.numRegs, of.localSizeBytes, us,
                    2.0 * BATCH * HEADS * TIME * TIME * D / us / 1e6, away);
    };
    time("taken", taken, 4, 1, 64, expected);
    time("two_tiles", two_tiles, 4, 2, 64, y);
    time("narrow_tiles", narrow_tiles, 4, 2, 32, y);
    time("eight_warps", eight_warps, 8, 1, 64, y);
    time("eight_warps_narrow_tiles", eight_warps_narrow_tiles, 8, 1, 32, y);
    time("two_blocks", two_blocks, 4, 1, 64, y);
    time("four_blocks", four_blocks, 4, 1, 64, y);
    time("four_blocks_narrow_tiles", four_blocks_narrow_tiles, 4, 1, 32, y);
    time("large_blocks", large_blocks, 8, 2, 64, y);
    time("wide_tiles", wide_tiles, 4, 1, 128, y);
    time("groups_two_blocks", groups_two_blocks, 4, 1, 64, y);
    time("groups", groups, 4, 1, 64, y);
    time("groups_four_blocks", groups_four_blocks, 4, 1, 64, y);
    time("taken", taken, 4, 1, 64, expected);
}
