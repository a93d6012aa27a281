// Attention on tensor cores, forward, by the instructions of a warp: what flash_attention_forward.cuh says, for heads of 64 and 128.
#include "flash_attention_forward.cuh"

#define DEFINE_FORM(FORM, EXTRAS, SUFFIX, T)                                                                           \
    extern "C" __global__ void __launch_bounds__(128, 3)                                                               \
        flash_attention_forward_##FORM##64_##SUFFIX(const T* qkv, T* y, float* log_sum_exp, AttentionShape shape) {    \
        flash_attention_forward<T, 64, 4, 1, 64, EXTRAS>(qkv, y, log_sum_exp, shape);                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                               \
        flash_attention_forward_##FORM##128_##SUFFIX(const T* qkv, T* y, float* log_sum_exp, AttentionShape shape) {   \
        flash_attention_forward<T, 128, 4, 1, 64, EXTRAS>(qkv, y, log_sum_exp, shape);                                 \
    }
#define DEFINE(SUFFIX, T) DEFINE_FORM(, false, SUFFIX, T) DEFINE_FORM(extras_, true, SUFFIX, T)
DEFINE(bf16, bf16)
DEFINE(f16, f16)
#undef DEFINE
#undef DEFINE_FORM
