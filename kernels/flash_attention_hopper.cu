// Attention on the tensor cores of compute capability 9.0, where four warps multiply together: the kernels of flash_attention.cu and
// flash_attention_backward.cu for heads of 64, in the same blocks and shared memory, the queries' backward with tiles of 64 keys.
// build.rs compiles this file for that capability alone.
#include "flash_attention_backward.cuh"
#include "flash_attention_forward.cuh"
#include "flash_attention_groups.cuh"

#define DEFINE_FORM(FORM, EXTRAS, QUERIES_BLOCKS, SUFFIX, T)                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                           \
        group_attention_forward_##FORM##64_##SUFFIX(const T* qkv, T* y, float* log_sum_exp, AttentionShape shape) {    \
        flash_attention_forward<T, 64, WARPS, 1, 64, EXTRAS, GroupProducts<T>>(qkv, y, log_sum_exp, shape);            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        group_attention_backward_keys_##FORM##64_##SUFFIX(const T* qkv, const T* dy, const float* log_sum_exp,         \
                                                          const float* deltas, T* dqkv, AttentionShape shape) {        \
        flash_attention_backward_keys<T, 64, 64, EXTRAS, GroupProducts<T>>(qkv, dy, log_sum_exp, deltas, dqkv, shape); \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, QUERIES_BLOCKS)                                              \
        group_attention_backward_queries_##FORM##64_##SUFFIX(const T* qkv, const T* dy, const float* log_sum_exp,      \
                                                             const float* deltas, T* dqkv, AttentionShape shape) {     \
        flash_attention_backward_queries<T, 64, 64, EXTRAS, GroupProducts<T>>(qkv, dy, log_sum_exp, deltas, dqkv,      \
                                                                             shape);                                   \
    }
#define DEFINE(SUFFIX, T) DEFINE_FORM(, false, 3, SUFFIX, T) DEFINE_FORM(extras_, true, 2, SUFFIX, T)
DEFINE(bf16, bf16)
DEFINE(f16, f16)
#undef DEFINE
#undef DEFINE_FORM
