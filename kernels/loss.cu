// Losses, each with its gradient in the same launch. CPU twin: src/backend/cpu/loss.rs.
//
// Each leaves what it found by row or by block in scratch; `finish_loss` sums that in order into the metrics: mean loss, sum of
// losses, what the sum is over, right predictions.
#include "common.cuh"

// What a pass over targets finds. `broken`: some target is neither a class nor the one to leave out.
struct Counted { u32 counted, broken; };

// By a block; all its threads get what was found. `sums` holds 32 values.
__device__ __forceinline__ Counted count(const int* targets, i64 rows, i64 classes, int ignore, int* sums) {
    int counted = 0, broken = 0;
    for (i64 row = threadIdx.x; row < rows; row += blockDim.x) {
        const int target = targets[row];
        counted += target != ignore;
        broken += target != ignore && (target < 0 || target >= classes);
    }
    counted = block_sum(counted, sums);
    broken = block_sum(broken, sums);
    return Counted{static_cast<u32>(counted), static_cast<u32>(broken)};
}

// One block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024)
    count_targets(const int* targets, Counted* found, i64 rows, i64 classes, int ignore) {
    __shared__ int sums[32];
    const Counted all = count(targets, rows, classes, ignore, sums);
    if (threadIdx.x == 0) *found = all;
}

// What gradients are multiplied by: losses themselves are not. Null: 1.
__device__ __forceinline__ float scale_of(const LossScale* of) { return of == nullptr ? 1.0f : of->scale; }

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

// Merges over the threads of a row: WARPS warps of the block, all lanes. `shared` holds WARPS values.
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
    int head;   // values before the first whole access
    int packs;  // whole accesses
    __device__ __forceinline__ RowCut(const T* row, int len) {
        const int past = static_cast<int>(reinterpret_cast<u64>(row) % 16 / sizeof(T));
        head = past == 0 ? 0 : per_access<T>() - past;
        head = head < len ? head : len;
        packs = (len - head) / per_access<T>();
    }
    __device__ __forceinline__ int tail() const { return head + packs * per_access<T>(); }
};

// e^(x - most) by the chip's power of 2, whose argument is one multiply-add: `base` is most log2(e), rounded alike for all values
// of a row. Not where `base` is infinite, and then the difference of two infinities is what it is.
struct Exponential {
    float most, base;
    __device__ __forceinline__ explicit Exponential(float most) : most(most), base(most * LOG2_E) {}
    __device__ __forceinline__ bool is_plain() const { return fabsf(base) <= 3.4028234663852886e38f; }
    __device__ __forceinline__ float of(float x) const { return exp2_approx(fmaf(x, LOG2_E, -base)); }
};

// Takes N neighbouring values in: one exponential each, and one more where the largest so far is passed.
template <int N> __device__ __forceinline__ void take(Peak& own, const float (&values)[N], int at) {
    float most = values[0];
#pragma unroll
    for (int j = 1; j < N; ++j) most = fmaxf(most, values[j]);
    if (most > own.most || own.at == NOWHERE) {
        int where = N - 1;
#pragma unroll
        for (int j = N - 2; j >= 0; --j) where = values[j] == most ? j : where;
        own.sum = own.at == NOWHERE ? 0.0f : own.sum * expf(own.most - most);
        own.most = most;
        own.at = at + where;
    }
    const Exponential e(own.most);
    float sum = 0.0f;
    if (e.is_plain()) {
#pragma unroll
        for (int j = 0; j < N; ++j) sum += e.of(values[j]);
    } else {
#pragma unroll
        // Equal ones too, since the difference of two infinities is no number.
        for (int j = 0; j < N; ++j) sum += values[j] == own.most ? 1.0f : expf(values[j] - own.most);
    }
    own.sum += sum;
}

// Calls `pass` with every value of the row that is this thread's share, and where it stands: pass(first value of N, values).
// AHEAD accesses are under way at once.
template <int AHEAD, typename T, typename F>
__device__ __forceinline__ void over_row(const T* x, int len, int first, int step, F pass) {
    constexpr int N = per_access<T>();
    const RowCut<T> cut(x, len);
    for (int i = first; i < cut.head; i += step) {
        const float value[1] = {to_f32(x[i])};
        pass(i, value);
    }
    const auto one = [&](const Pack<T, N>& loaded, int at) {
        float values[N];
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = to_f32(loaded.at[j]);
        pass(at, values);
    };
    int pack = first;
    for (; pack + (AHEAD - 1) * step < cut.packs; pack += AHEAD * step) {
        Pack<T, N> loaded[AHEAD];
        const int at = cut.head + pack * N;
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) loaded[k] = load<T, N>(x + at + k * step * N);
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) one(loaded[k], at + k * step * N);
    }
    for (; pack < cut.packs; pack += step) one(load<T, N>(x + cut.head + pack * N), cut.head + pack * N);
    for (int i = cut.tail() + first; i < len; i += step) {
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

// What softmax and cross-entropy are taken of. logits, dlogits: [rows, classes] (dlogits may be null, or the logits themselves),
// targets: [rows]. logits and dlogits start alike within 16 bytes.
template <typename T> struct Classes {
    const T* logits;
    const int* targets;
    T* dlogits;
    i64 rows, classes;
    float smoothing;
    int ignore;
    const LossScale* scale;
};
static_assert(sizeof(Classes<float>) == 56, "as the host's");

// The loss of a row, and whether its largest logit is the target's.
struct Judged { float loss, right; };

// What a row's gradient is made of: softmax times `inverse`, less `uniform`, and less `certain` at the target.
struct Slopes {
    float inverse, uniform, certain;
    template <typename T> __device__ __forceinline__ Slopes(const Classes<T>& of, const Counted& found, float sum) {
        const float scale = scale_of(of.scale) / static_cast<float>(found.counted);
        inverse = scale / sum;
        uniform = of.smoothing / static_cast<float>(of.classes) * scale;
        certain = (1.0f - of.smoothing) * scale;
    }
};

// The loss of a row from its target's logit and, where labels are smooth, the sum of all logits less the largest.
template <typename T>
__device__ __forceinline__ Judged judge(const Classes<T>& of, const Peak& peak, int target, float target_logit, float total) {
    const float log_sum = logf(peak.sum), picked = target_logit - peak.most - log_sum;
    const float mean = total / static_cast<float>(of.classes) - log_sum;
    const float loss = of.smoothing != 0.0f ? -((1.0f - of.smoothing) * picked + of.smoothing * mean) : -picked;
    return Judged{loss, peak.at == target ? 1.0f : 0.0f};
}

// A row that has no loss: it is left out, or some target is out of range, which not a number tells.
__device__ __forceinline__ Judged unjudged(const Counted& found) {
    return Judged{found.broken ? __int_as_float(0x7fc00000) : 0.0f, 0.0f};
}

// Softmax and cross-entropy of one row by WARPS warps, of which the caller is thread `first`; the result is valid in thread 0.
// Reads the logits twice (the second time from cache, where a row fits) and writes them never; 3 sizeof(T) bytes a value at most.
// `peaks` holds WARPS values, `totals` 32; without a block's barriers where WARPS is 1.
template <typename T, int WARPS>
__device__ __forceinline__ Judged cross_entropy_row(const Classes<T>& of, i64 row, int first, const Counted& found, Peak* peaks,
                                                    float* totals) {
    // Rows that a warp takes are short.
    constexpr int THREADS = 32 * WARPS, AHEAD = WARPS == 1 ? 1 : 4;
    const int classes = static_cast<int>(of.classes);
    const T* x = of.logits + row * of.classes;
    T* d = of.dlogits == nullptr ? nullptr : of.dlogits + row * of.classes;
    const int target = of.targets[row];
    if (target == of.ignore || found.broken) {
        if (d != nullptr) {
            for (int i = first; i < classes; i += THREADS) d[i] = from_f32<T>(0.0f);
        }
        return unjudged(found);
    }
    Peak own{-__int_as_float(0x7f800000), 0.0f, NOWHERE};
    over_row<AHEAD>(x, classes, first, THREADS, [&](int at, const auto& values) { take(own, values, at); });
    const Peak row_peak = merge_row<WARPS>(own, peaks);
    const float picked_logit = to_f32(x[target]);
    // The target's logit was read by all before the gradient takes its place.
    if (WARPS == 1) __syncwarp();
    else __syncthreads();
    const Slopes slope(of, found, row_peak.sum);
    const Exponential e(row_peak.most);
    const bool is_smooth = of.smoothing != 0.0f;
    float total = 0.0f;
    // A loop for each way to take exponentials: within one, each value would be a branch.
    const auto with = [&](auto power) {
        over_row<AHEAD>(x, classes, first, THREADS, [&](int at, const auto& values) {
            constexpr int N = sizeof(values) / sizeof(float);
            if (is_smooth) {
#pragma unroll
                for (int j = 0; j < N; ++j) total += values[j] - row_peak.most;
            }
            if (d == nullptr) return;
            float slopes[N];
#pragma unroll
            for (int j = 0; j < N; ++j) slopes[j] = fmaf(power(values[j]), slope.inverse, -slope.uniform);
            put(d + at, slopes);
        });
        if (d == nullptr) return;
        // The target's own once all are there, rather than a question for each.
        if (WARPS == 1) __syncwarp();
        else __syncthreads();
        if (first == 0) {
            d[target] = from_f32<T>(fmaf(power(picked_logit), slope.inverse, -slope.uniform) - slope.certain);
        }
    };
    const bool is_needed = d != nullptr || is_smooth;
    if (is_needed && e.is_plain()) with([&](float value) { return e.of(value); });
    if (is_needed && !e.is_plain()) with([&](float value) { return expf(value - row_peak.most); });
    if (is_smooth) total = WARPS == 1 ? warp_sum(total) : block_sum(total, totals);
    return judge(of, row_peak, target, picked_logit, total);
}

// Rows of so few classes are taken by a thread each: a warp would spend its time merging what its lanes found.
constexpr int FEW_CLASSES = 32;

// Softmax and cross-entropy of one row of few classes by the calling thread.
template <typename T> __device__ __forceinline__ Judged cross_entropy_few(const Classes<T>& of, i64 row, const Counted& found) {
    constexpr int AHEAD = 8;
    const int classes = static_cast<int>(of.classes);
    const T* x = of.logits + row * classes;
    T* d = of.dlogits == nullptr ? nullptr : of.dlogits + row * classes;
    const int target = of.targets[row];
    if (target == of.ignore || found.broken) {
        for (int i = 0; i < classes && d != nullptr; ++i) d[i] = from_f32<T>(0.0f);
        return unjudged(found);
    }
    // Calls `pass` with each logit and its class, AHEAD of them under way at once.
    const auto each = [&](auto pass) {
#pragma unroll 1
        for (int i = 0; i < classes; i += AHEAD) {
            float values[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) values[j] = i + j < classes ? to_f32(x[i + j]) : 0.0f;
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                if (i + j < classes) pass(values[j], i + j);
            }
        }
    };
    Peak peak{-__int_as_float(0x7f800000), 0.0f, NOWHERE};
    each([&](float value, int at) {
        if (value > peak.most || peak.at == NOWHERE) {
            peak.most = value;
            peak.at = at;
        }
    });
    const Exponential e(peak.most);
    const bool is_plain = e.is_plain();
    float total = 0.0f;
    each([&](float value, int) {
        // Equal ones too, since the difference of two infinities is no number.
        peak.sum += is_plain ? e.of(value) : value == peak.most ? 1.0f : expf(value - peak.most);
        total += value - peak.most;
    });
    const float picked_logit = to_f32(x[target]);
    const Slopes slope(of, found, peak.sum);
    if (d != nullptr) {
        each([&](float value, int at) {
            // An infinite logit has no slope: not a number tells it.
            const float share = is_plain ? e.of(value) : expf(value - peak.most);
            d[at] = from_f32<T>(fmaf(share, slope.inverse, -slope.uniform) - (at == target ? slope.certain : 0.0f));
        });
    }
    return judge(of, peak, target, picked_logit, total);
}

// Every row of few classes, by a thread each. losses, rights: [rows]. Grid: ceil(rows / 256) blocks of 256 threads.
template <typename T>
__device__ __forceinline__ void cross_entropy_few(const Classes<T>& of, const Counted* found, float* losses, float* rights) {
    const i64 row = thread_index();
    if (row >= of.rows) return;
    const Judged judged = cross_entropy_few(of, row, *found);
    losses[row] = judged.loss;
    rights[row] = judged.right;
}

// Every row, by WARPS warps each. losses, rights: [rows]. Grid: a block of 32 WARPS threads a row; where a warp takes a row, blocks
// of 256 threads for 8 rows each.
template <typename T, int WARPS>
__device__ __forceinline__ void cross_entropy(const Classes<T>& of, const Counted* found, float* losses, float* rights) {
    constexpr int ROWS = WARPS == 1 ? 8 : 1;
    __shared__ Peak peaks[WARPS];
    __shared__ float totals[32];
    const i64 row = static_cast<i64>(blockIdx.x) * ROWS + threadIdx.x / (32 * WARPS);
    const int first = threadIdx.x % (32 * WARPS);
    if (row >= of.rows) return;
    const Judged judged = cross_entropy_row<T, WARPS>(of, row, first, *found, peaks, totals);
    if (first == 0) {
        losses[row] = judged.loss;
        rights[row] = judged.right;
    }
}

// Means over single values: squared differences (`binary` 0), or binary cross-entropy of logits. Each block leaves its sums.
// x, target, dx: [len] (dx may be null), losses and rights: [blocks]. Grid: any, 256 threads; the grid follows from len alone.
template <typename T>
__device__ void pointwise(const T* x, const T* target, T* dx, float* losses, float* rights, i64 len, int binary,
                          const LossScale* loss_scale) {
    __shared__ float sums[32];
    const float scale = scale_of(loss_scale) / static_cast<float>(len);
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

// metrics = mean, sum, count, right; by a block. losses, rights: [parts]. `sums` holds 32 values.
__device__ __forceinline__ void finish(const float* losses, const float* rights, double counted, float* metrics, i64 parts,
                                       double* sums) {
    double loss = 0.0, right = 0.0;
    for (i64 i = threadIdx.x; i < parts; i += blockDim.x) {
        loss += losses[i];
        right += rights[i];
    }
    loss = block_sum(loss, sums);
    right = block_sum(right, sums);
    if (threadIdx.x == 0) {
        metrics[0] = static_cast<float>(counted == 0.0 ? 0.0 : loss / counted);
        metrics[1] = static_cast<float>(loss);
        metrics[2] = static_cast<float>(counted);
        metrics[3] = static_cast<float>(right);
    }
}

// `found` null: the count is `len`. One block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024)
    finish_loss(const float* losses, const float* rights, const Counted* found, float* metrics, i64 parts, i64 len) {
    __shared__ double sums[32];
    const double counted = found == nullptr ? static_cast<double>(len) : static_cast<double>(found->counted);
    finish(losses, rights, counted, metrics, parts, sums);
}

// A small batch, whose launches take longer than its work: count, losses and their sum in one launch, the same bits. At most
// FEW_ROWS rows. One block of 512 threads, a warp a row, or a thread where classes are few.
constexpr int FEW_ROWS = 512;
template <typename T> __device__ __forceinline__ void cross_entropy_small(const Classes<T>& of, float* metrics) {
    __shared__ float losses[FEW_ROWS], rights[FEW_ROWS];
    __shared__ int counts[32];
    __shared__ double sums[32];
    const Counted found = count(of.targets, of.rows, of.classes, of.ignore, counts);
    const bool is_few = of.classes <= FEW_CLASSES;
    for (i64 row = threadIdx.x; is_few && row < of.rows; row += blockDim.x) {
        const Judged judged = cross_entropy_few(of, row, found);
        losses[row] = judged.loss;
        rights[row] = judged.right;
    }
    for (i64 row = threadIdx.x / 32; !is_few && row < of.rows; row += blockDim.x / 32) {
        const int first = threadIdx.x % 32;
        const Judged judged = cross_entropy_row<T, 1>(of, row, first, found, nullptr, nullptr);
        if (first == 0) {
            losses[row] = judged.loss;
            rights[row] = judged.right;
        }
    }
    __syncthreads();
    finish(losses, rights, static_cast<double>(found.counted), metrics, of.rows, sums);
}

#define CROSS_ENTROPY(NAME, WARPS, THREADS, BLOCKS, SUFFIX, T)                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        cross_entropy_##NAME##_##SUFFIX(Classes<T> of, const Counted* found, float* losses, float* rights) {           \
        cross_entropy<T, WARPS>(of, found, losses, rights);                                                            \
    }
#define DEFINE(SUFFIX, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        cross_entropy_few_##SUFFIX(Classes<T> of, const Counted* found, float* losses, float* rights) {                \
        cross_entropy_few(of, found, losses, rights);                                                                  \
    }                                                                                                                  \
    CROSS_ENTROPY(narrow, 1, 256, 4, SUFFIX, T)                                                                        \
    CROSS_ENTROPY(wide, 16, 512, 2, SUFFIX, T)                                                                         \
    extern "C" __global__ void __launch_bounds__(512, 1)                                                               \
        cross_entropy_small_##SUFFIX(Classes<T> of, float* metrics) {                                                  \
        cross_entropy_small(of, metrics);                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        pointwise_loss_##SUFFIX(const T* x, const T* target, T* dx, float* losses, float* rights, i64 len,             \
                                int binary, const LossScale* loss_scale) {                                             \
        pointwise(x, target, dx, losses, rights, len, binary, loss_scale);                                             \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
#undef CROSS_ENTROPY
