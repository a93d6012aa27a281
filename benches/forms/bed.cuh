// What programs that time other forms of a kernel share: random inputs, medians, comparison. For those who tune kernels: each form
// runs beside the one that is taken, on the sizes of GPT-2 124M, and says how far its result is from that one's.
// scripts/gpu-bundle builds them for Hopper, `gpu-check forms` runs them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
#include <vector>

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
}

// Device memory that is never given back: these programs are short.
template <typename T> T* room(size_t len) {
    void* at = nullptr;
    check(cudaMalloc(&at, len * sizeof(T)), "cudaMalloc");
    check(cudaMemset(at, 0xff, len * sizeof(T)), "cudaMemset");
    return static_cast<T*>(at);
}

inline unsigned hashed(size_t i, unsigned seed) {
    unsigned h = static_cast<unsigned>(i) * 2654435761u + seed;
    h = (h ^ (h >> 15)) * 2246822519u;
    return h ^ (h >> 13);
}

// Values in bf16 between -1.5 and 1.5.
inline unsigned short* random_bf16(size_t len, unsigned seed) {
    std::vector<unsigned short> values(len);
    for (size_t i = 0; i < len; ++i) {
        const float value = (hashed(i, seed) % 65536 / 65536.0f - 0.5f) * 3.0f;
        unsigned bits;
        std::copy_n(reinterpret_cast<const char*>(&value), 4, reinterpret_cast<char*>(&bits));
        values[i] = static_cast<unsigned short>((bits + 0x8000u) >> 16);
    }
    auto* to = room<unsigned short>(len);
    check(cudaMemcpy(to, values.data(), len * 2, cudaMemcpyHostToDevice), "cudaMemcpy");
    return to;
}

// Values in f32 between 0 and 1.
inline float* random_f32(size_t len, unsigned seed) {
    std::vector<float> values(len);
    for (size_t i = 0; i < len; ++i) values[i] = hashed(i, seed) % 65536 / 65536.0f;
    auto* to = room<float>(len);
    check(cudaMemcpy(to, values.data(), len * 4, cudaMemcpyHostToDevice), "cudaMemcpy");
    return to;
}

// Microseconds, the median of 21 after 5 that warm up.
template <typename F> double median_us(F work) {
    cudaEvent_t from, to;
    check(cudaEventCreate(&from), "cudaEventCreate");
    check(cudaEventCreate(&to), "cudaEventCreate");
    std::vector<float> times;
    for (int i = 0; i < 26; ++i) {
        check(cudaEventRecord(from), "cudaEventRecord");
        work();
        check(cudaGetLastError(), "a launch");
        check(cudaEventRecord(to), "cudaEventRecord");
        check(cudaEventSynchronize(to), "a kernel");
        float ms;
        check(cudaEventElapsedTime(&ms, from, to), "cudaEventElapsedTime");
        if (i >= 5) times.push_back(ms);
    }
    std::nth_element(times.begin(), times.begin() + 10, times.end());
    return times[10] * 1000.0;
}

// |found - expected| / |expected| over values in bf16, of those that `counts` names by their place.
template <typename F> double distance(const unsigned short* found, const unsigned short* expected, size_t len, F counts) {
    std::vector<unsigned short> a(len), b(len);
    check(cudaMemcpy(a.data(), found, len * 2, cudaMemcpyDeviceToHost), "cudaMemcpy");
    check(cudaMemcpy(b.data(), expected, len * 2, cudaMemcpyDeviceToHost), "cudaMemcpy");
    const auto wide = [](unsigned short bits) {
        const unsigned word = static_cast<unsigned>(bits) << 16;
        float value;
        std::copy_n(reinterpret_cast<const char*>(&word), 4, reinterpret_cast<char*>(&value));
        return static_cast<double>(value);
    };
    double off = 0.0, all = 0.0;
    for (size_t i = 0; i < len; ++i) {
        if (!counts(i)) continue;
        const double difference = wide(a[i]) - wide(b[i]);
        off += difference * difference;
        all += wide(b[i]) * wide(b[i]);
    }
    return std::sqrt(off / all);
}

// Registers of a thread and bytes of local memory, of a kernel allowed `shared` bytes.
template <typename K> cudaFuncAttributes prepare(K kernel, int shared) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory");
    cudaFuncAttributes found;
    check(cudaFuncGetAttributes(&found, kernel), "cudaFuncGetAttributes");
    return found;
}
