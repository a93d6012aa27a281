// Losses, each with its gradient in the same launch. CPU twin: src/backend/cpu/loss.rs.
//
// Each leaves what it found by row or by block in scratch; `finish_loss` sums that in order into the metrics: mean loss, sum of
// losses, what the sum is over, right predictions.
#include "common.cuh"

// What a pass over targets finds. `broken`: some target is neither a class nor the one to leave out.
struct Counted { u32 counted, broken; };

// One block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024)
    count_targets(const int* targets, Counted* found, i64 rows, i64 classes, int ignore) {
    __shared__ int sums[32];
    int counted = 0, broken = 0;
    for (i64 row = threadIdx.x; row < rows; row += blockDim.x) {
        const int target = targets[row];
        counted += target != ignore;
        broken += target != ignore && (target < 0 || target >= classes);
    }
    counted = block_sum(counted, sums);
    broken = block_sum(broken, sums);
    if (threadIdx.x == 0) *found = Counted{static_cast<u32>(counted), static_cast<u32>(broken)};
}

// What gradients are multiplied by: losses themselves are not. Null: 1.
__device__ __forceinline__ float loss_scale(const StepState* step) { return step == nullptr ? 1.0f : step->loss_scale; }

// Where the largest of no values stands.
constexpr int NOWHERE = 0x7fffffff;

// The largest value so far, the sum of e^(x - largest), and where the largest first stands.
struct Peak {
    float most, sum;
    int at;
};

__device__ __forceinline__ Peak merge(Peak a, Peak b) {
    const float most = fmaxf(a.most, b.most);
    // Equal ones too, since the difference of two infinities is no number.
    const float left = a.most == most ? a.sum : a.sum * expf(a.most - most);
    const float right = b.most == most ? b.sum : b.sum * expf(b.most - most);
    const bool second = b.most > a.most || (b.most == a.most && b.at < a.at);
    return Peak{most, left + right, second ? b.at : a.at};
}

// Merges over the threads of a row: WARPS warps of the block, all lanes. `shared` holds 8 values.
template <int WARPS> __device__ Peak merge_row(Peak own, Peak* shared) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        Peak other;
        other.most = __shfl_xor_sync(0xffffffffu, own.most, offset);
        other.sum = __shfl_xor_sync(0xffffffffu, own.sum, offset);
        other.at = __shfl_xor_sync(0xffffffffu, own.at, offset);
        // Lower lanes first on both sides, so that all get the same bits.
        own = threadIdx.x & offset ? merge(other, own) : merge(own, other);
    }
    if (WARPS == 1) return own;
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
    __syncthreads();
    Peak whole = shared[0];
    for (int warp = 1; warp < WARPS; ++warp) whole = merge(whole, shared[warp]);
    return whole;
}

// A row, cut where accesses of 16 bytes begin and end: rows of odd width start anywhere.
template <typename T> struct RowCut {
    i64 head;   // values before the first whole access
    i64 packs;  // whole accesses
    __device__ __forceinline__ RowCut(const T* row, i64 len) {
        const i64 past = static_cast<i64>(reinterpret_cast<u64>(row) % 16 / sizeof(T));
        head = past == 0 ? 0 : per_access<T>() - past;
        head = head < len ? head : len;
        packs = (len - head) / per_access<T>();
    }
    __device__ __forceinline__ i64 tail() const { return head + packs * per_access<T>(); }
};

// Takes N neighbouring values in: one exponential each, and one more where the largest so far is passed.
template <int N> __device__ __forceinline__ void take(Peak& own, const float (&values)[N], i64 at) {
    float most = values[0];
    int where = 0;
#pragma unroll
    for (int j = 1; j < N; ++j) {
        where = values[j] > most ? j : where;
        most = fmaxf(most, values[j]);
    }
    if (most > own.most || own.at == NOWHERE) {
        own.sum = own.at == NOWHERE ? 0.0f : own.sum * expf(own.most - most);
        own.most = most;
        own.at = static_cast<int>(at) + where;
    }
#pragma unroll
    // Equal ones too, since the difference of two infinities is no number.
    for (int j = 0; j < N; ++j) own.sum += values[j] == own.most ? 1.0f : expf(values[j] - own.most);
}

// Calls `each` with every value of the row that is this thread's share, and where it stands: pass(first value of N, values).
template <typename T, typename F> __device__ __forceinline__ void over_row(const T* x, i64 len, int first, int step, F pass) {
    constexpr int N = per_access<T>();
    const RowCut<T> cut(x, len);
    for (i64 i = first; i < cut.head; i += step) {
        const float value[1] = {to_f32(x[i])};
        pass(i, value);
    }
    for (i64 pack = first; pack < cut.packs; pack += step) {
        const i64 at = cut.head + pack * N;
        const Pack<T, N> loaded = load<T, N>(x + at);
        float values[N];
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = to_f32(loaded.at[j]);
        pass(at, values);
    }
    for (i64 i = cut.tail() + first; i < len; i += step) {
        const float value[1] = {to_f32(x[i])};
        pass(i, value);
    }
}

template <typename T, int N> __device__ __forceinline__ void put(T* to, const float (&values)[N]) {
    Pack<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.at[j] = from_f32<T>(values[j]);
    store<T, N>(to, out);
}

// Softmax and cross-entropy of one row by WARPS warps. logits, dlogits: [rows, classes] (dlogits may be null), losses and
// rights: [rows]. logits and dlogits start alike within 16 bytes. Grid: ceil(rows / (8 / WARPS)) blocks of 256 threads. Reads the
// logits twice (the second time from cache, where a row fits) and writes them never; 3 sizeof(T) bytes a value at most.
template <typename T, int WARPS>
__device__ void cross_entropy(const T* logits, const int* targets, T* dlogits, const Counted* found, float* losses,
                              float* rights, i64 rows, i64 classes, float smoothing, int ignore, const StepState* step) {
    __shared__ Peak peaks[8];
    __shared__ float totals[32];
    constexpr int THREADS = 32 * WARPS;
    const i64 row = static_cast<i64>(blockIdx.x) * (8 / WARPS) + threadIdx.x / THREADS;
    const int first = threadIdx.x % THREADS;
    if (row >= rows) return;
    const T* x = logits + row * classes;
    T* d = dlogits == nullptr ? nullptr : dlogits + row * classes;
    const int target = targets[row];
    if (target == ignore || found->broken) {
        // A target out of range has no loss: not a number tells it.
        if (first == 0) {
            losses[row] = found->broken ? __int_as_float(0x7fc00000) : 0.0f;
            rights[row] = 0.0f;
        }
        if (d != nullptr) {
            for (i64 i = first; i < classes; i += THREADS) d[i] = from_f32<T>(0.0f);
        }
        return;
    }
    Peak own{-__int_as_float(0x7f800000), 0.0f, NOWHERE};
    over_row(x, classes, first, THREADS, [&](i64 at, const auto& values) { take(own, values, at); });
    const Peak row_peak = merge_row<WARPS>(own, peaks);
    const float scale = loss_scale(step) / static_cast<float>(found->counted);
    const float inverse = scale / row_peak.sum, uniform = smoothing / static_cast<float>(classes) * scale;
    float total = 0.0f;
    if (d != nullptr || smoothing != 0.0f) {
        over_row(x, classes, first, THREADS, [&](i64 at, const auto& values) {
            constexpr int N = sizeof(values) / sizeof(float);
            float slopes[N];
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float centered = values[j] - row_peak.most;
                total += centered;
                slopes[j] = expf(centered) * inverse - uniform;
                if (at + j == target) slopes[j] -= (1.0f - smoothing) * scale;
            }
            if (d != nullptr) put(d + at, slopes);
        });
    }
    if (smoothing != 0.0f) total = WARPS == 1 ? warp_sum(total) : block_sum(total, totals);
    if (first == 0) {
        const float log_sum = logf(row_peak.sum), picked = to_f32(x[target]) - row_peak.most - log_sum;
        losses[row] = smoothing == 0.0f ? -picked
                                        : -((1.0f - smoothing) * picked +
                                            smoothing * (total / static_cast<float>(classes) - log_sum));
        rights[row] = row_peak.at == target ? 1.0f : 0.0f;
    }
}

// Means over single values: squared differences (`binary` 0), or binary cross-entropy of logits. Each block leaves its sums.
// x, target, dx: [len] (dx may be null), losses and rights: [blocks]. Grid: any, 256 threads; the grid follows from len alone.
template <typename T>
__device__ void pointwise(const T* x, const T* target, T* dx, float* losses, float* rights, i64 len, int binary,
                          const StepState* step) {
    __shared__ float sums[32];
    const float scale = loss_scale(step) / static_cast<float>(len);
    float loss = 0.0f, right = 0.0f;
    for (i64 i = thread_index(); i < len; i += thread_count()) {
        const float value = to_f32(x[i]), t = to_f32(target[i]);
        float slope;
        if (binary) {
            // log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), which overflows for no x.
            const float e = expf(-fabsf(value));
            loss += fmaxf(value, 0.0f) - value * t + log1pf(e);
            slope = (value >= 0.0f ? 1.0f / (1.0f + e) : e / (1.0f + e)) - t;
            right += (value > 0.0f) == (t > 0.5f) ? 1.0f : 0.0f;
        } else {
            const float difference = value - t;
            loss += difference * difference;
            slope = difference + difference;
        }
        if (dx != nullptr) dx[i] = from_f32<T>(slope * scale);
    }
    loss = block_sum(loss, sums);
    right = block_sum(right, sums);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = loss;
        rights[blockIdx.x] = right;
    }
}

// metrics = mean, sum, count, right. losses, rights: [parts]. `found` null: the count is `len`. One block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024)
    finish_loss(const float* losses, const float* rights, const Counted* found, float* metrics, i64 parts, i64 len) {
    __shared__ double sums[32];
    double loss = 0.0, right = 0.0;
    for (i64 i = threadIdx.x; i < parts; i += blockDim.x) {
        loss += losses[i];
        right += rights[i];
    }
    loss = block_sum(loss, sums);
    right = block_sum(right, sums);
    if (threadIdx.x == 0) {
        const double counted = found == nullptr ? static_cast<double>(len) : static_cast<double>(found->counted);
        metrics[0] = static_cast<float>(counted == 0.0 ? 0.0 : loss / counted);
        metrics[1] = static_cast<float>(loss);
        metrics[2] = static_cast<float>(counted);
        metrics[3] = static_cast<float>(right);
    }
}

#define DEFINE(SUFFIX, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 4)                                                               \
        cross_entropy_narrow_##SUFFIX(const T* logits, const int* targets, T* dlogits, const Counted* found,           \
                                      float* losses, float* rights, i64 rows, i64 classes, float smoothing,            \
                                      int ignore, const StepState* step) {                                             \
        cross_entropy<T, 1>(logits, targets, dlogits, found, losses, rights, rows, classes, smoothing, ignore, step);  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 4)                                                               \
        cross_entropy_wide_##SUFFIX(const T* logits, const int* targets, T* dlogits, const Counted* found,             \
                                    float* losses, float* rights, i64 rows, i64 classes, float smoothing,              \
                                    int ignore, const StepState* step) {                                               \
        cross_entropy<T, 8>(logits, targets, dlogits, found, losses, rights, rows, classes, smoothing, ignore, step);  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        pointwise_loss_##SUFFIX(const T* x, const T* target, T* dx, float* losses, float* rights, i64 len,             \
                                int binary, const StepState* step) {                                                   \
        pointwise(x, target, dx, losses, rights, len, binary, step);                                                   \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
