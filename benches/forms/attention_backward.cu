// Forms of the backward of attention (kernels/flash_attention_backward.cuh): queries or keys a tile, blocks on a multiprocessor, and
// products of four warps together. 16 x 1024 tokens, 12 heads of 64, causal, bf16.
#include "flash_attention_backward.cuh"
#include "flash_attention_groups.cuh"

#include "bed.cuh"

#define FORM_BY(PRODUCTS, PART, NAME, TILE, BLOCKS)                                                                    \
    __global__ void __launch_bounds__(THREADS, BLOCKS)                                                                 \
        PART##_##NAME(const bf16* qkv, const bf16* dy, const float* log_sum_exp, const float* deltas, bf16* dqkv,      \
                      AttentionShape shape) {                                                                          \
        flash_attention_backward_##PART<bf16, 64, TILE, false, PRODUCTS>(qkv, dy, log_sum_exp, deltas, dqkv, shape);   \
    }
typedef WarpProducts<bf16, 64> Alone;
typedef GroupProducts<bf16> Together;
#define FORM(...) FORM_BY(Alone, __VA_ARGS__)
FORM(keys, taken, 64, 2)
FORM(keys, narrow, 32, 2)
FORM(keys, narrow_three_blocks, 32, 3)
FORM(keys, narrowest_three_blocks, 16, 3)
FORM(queries, taken, 32, 2)
FORM(queries, wide, 64, 2)
FORM(queries, three_blocks, 64, 3)
FORM(queries, narrow_three_blocks, 32, 3)
FORM(queries, narrow_four_blocks, 32, 4)
FORM(queries, narrowest_four_blocks, 16, 4)
FORM_BY(Together, keys, groups, 64, 2)
FORM_BY(Together, keys, groups_narrow, 32, 2)
FORM_BY(Together, keys, groups_narrow_three_blocks, 32, 3)
FORM_BY(Together, queries, groups, 64, 2)
FORM_BY(Together, queries, groups_three_blocks, 64, 3)
FORM_BY(Together, queries, groups_narrow_three_blocks, 32, 3)
FORM_BY(Together, queries, groups_narrow_four_blocks, 32, 4)

int main() {
    constexpr int BATCH = 16, TIME = 1024, HEADS = 12, D = 64;
    const size_t len = static_cast<size_t>(BATCH) * TIME * HEADS * D;
    const auto* qkv = reinterpret_cast<const bf16*>(random_bf16(3 * len, 1));
    const auto* dy = reinterpret_cast<const bf16*>(random_bf16(len, 2));
    auto *found = room<u16>(3 * len), *expected = room<u16>(3 * len);
    // Statistics of the size that such inputs have; every form is given the same.
    const size_t rows = BATCH * HEADS * TIME;
    std::vector<float> statistics(rows, 6.5f);
    auto* log_sum_exp = room<float>(rows);
    check(cudaMemcpy(log_sum_exp, statistics.data(), rows * 4, cudaMemcpyHostToDevice), "cudaMemcpy");
    const float* deltas = random_f32(rows, 3);
    AttentionShape shape{};
    shape.batch = BATCH, shape.time = TIME, shape.heads = HEADS, shape.kv_heads = HEADS, shape.head_size = D;
    shape.sharing = 1, shape.causal = 1, shape.keep = 1.0f, shape.scale = 0.125f;
    std::printf("%-32s %6s %6s %9s %9s\n", "form", "regs", "local", "us", "distance");
    const auto time = [&](const char* name, auto kernel, int tile, bool keys, u16* to) {
        const int blocks = BATCH * HEADS * ((TIME + ROWS - 1) / ROWS);
        const int shared = std::max(2 * 2 * tile * D * 2 + (keys ? 2 * 2 * tile * 4 : 0), ROWS * D * 2);
        const cudaFuncAttributes of = prepare(kernel, shared);
        const double us = median_us([&] {
            kernel<<<blocks, THREADS, shared>>>(qkv, dy, log_sum_exp, deltas, reinterpret_cast<bf16*>(to), shape);
        });
        // A row holds gradients of queries, then those of keys and values.
        const auto counts = [&](size_t i) { return (i % (3 * HEADS * D) >= HEADS * D) == keys; };
        std::printf("%-32s %6d %6zu %9.1f %9.1e\n", name, of.numRegs, of.localSizeBytes, us,
                    distance(to, expected, 3 * len, counts));
    };
    time("keys_taken", keys_taken, 64, true, expected);
    time("keys_narrow", keys_narrow, 32, true, found);
    time("keys_narrow_three_blocks", keys_narrow_three_blocks, 32, true, found);
    time("keys_narrowest_three_blocks", keys_narrowest_three_blocks, 16, true, found);
    time("queries_taken", queries_taken, 32, false, expected);
    time("queries_wide", queries_wide, 64, false, found);
    time("queries_three_blocks", queries_three_blocks, 64, false, found);
    time("queries_narrow_three_blocks", queries_narrow_three_blocks, 32, false, found);
    time("queries_narrow_four_blocks", queries_narrow_four_blocks, 32, false, found);
    time("queries_narrowest_four_blocks", queries_narrowest_four_blocks, 16, false, found);
    time("keys_groups", keys_groups, 64, true, found);
    time("keys_groups_narrow", keys_groups_narrow, 32, true, found);
    time("keys_groups_narrow_three_blocks", keys_groups_narrow_three_blocks, 32, true, found);
    time("queries_groups", queries_groups, 64, false, found);
    time("queries_groups_three_blocks", queries_groups_three_blocks, 64, false, found);
    time("queries_groups_narrow_three_blocks", queries_groups_narrow_three_blocks, 32, false, found);
    time("queries_groups_narrow_four_blocks", queries_groups_narrow_four_blocks, 32, false, found);
}
