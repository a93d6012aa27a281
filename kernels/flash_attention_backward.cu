// Attention on tensor cores, backward, by the instructions of a warp: what flash_attention_backward.cuh says, for heads of 64 and 128.
#include "flash_attention_backward.cuh"

#define DEFINE_SIZE(D, KEYS_TILE, QUERIES_TILE, FORM, EXTRAS, SUFFIX, T)                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        flash_attention_backward_keys_##FORM##D##_##SUFFIX(const T* qkv, const T* dy, const float* log_sum_exp,        \
                                                           const float* deltas, T* dqkv, AttentionShape shape) {       \
        flash_attention_backward_keys<T, D, QUERIES_TILE, EXTRAS>(qkv, dy, log_sum_exp, deltas, dqkv, shape);          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        flash_attention_backward_queries_##FORM##D##_##SUFFIX(const T* qkv, const T* dy, const float* log_sum_exp,     \
                                                              const float* deltas, T* dqkv, AttentionShape shape) {    \
        flash_attention_backward_queries<T, D, KEYS_TILE, EXTRAS>(qkv, dy, log_sum_exp, deltas, dqkv, shape);          \
    }
#define DEFINE_FORM(FORM, EXTRAS, SUFFIX, T)                                                                           \
    DEFINE_SIZE(64, 32, 64, FORM, EXTRAS, SUFFIX, T)                                                                   \
    DEFINE_SIZE(128, 32, 32, FORM, EXTRAS, SUFFIX, T)
#define DEFINE(SUFFIX, T) DEFINE_FORM(, false, SUFFIX, T) DEFINE_FORM(extras_, true, SUFFIX, T)
DEFINE(bf16, bf16)
DEFINE(f16, f16)
#undef DEFINE
#undef DEFINE_FORM
#undef DEFINE_SIZE
