// Log-mel pictures of waveforms. CPU twin: src/backend/cpu/mel.rs (src/log_mel.rs).
//
// x: [batch, samples], y: [batch, mels, frames] (`=`), frames = 1 + samples / hop. A frame is n_fft samples around position
// frame * hop, mirrored at the ends, weighted by a window, transformed; y = log(sum over a band of weight * |X|^2 + 1e-6) * scale
// + shift.
//
// The n = n_fft real samples of a frame are the m = n / 2 complex ones (x[2i], x[2i + 1]), whose transform gives that of the real
// ones. It is Stockham's: a pass over shared memory for each factor of m (4, 2, 3, 5, then any other prime), from one buffer into
// the other, in the right order at the end.
//
// Blocks of (256 / frames a block, frames a block) threads, frames a block 1, 2, 4 or 8, so that small windows fill a block and
// neighbouring frames are written together. Grid: batch * ceil(frames / frames a block). Dynamic shared memory: two buffers of n
// floats a frame, and 16 bytes between frames, which puts their bands' sums into different banks.
//
// Bytes: x once (n / hop times from the caches), y once; tables of 12 n bytes, 16 a band and 4 a weight from the caches. About
// 2.5 n log2(n) operations a frame for the transform, 5 n for window and powers, 2 for each weight of a band.
#include "common.cuh"

struct alignas(8) Complex { float re, im; };

// Where a band's weights lie: bins first .. first + count, weights begin .. begin + count.
struct alignas(16) Band { int first, begin, count, unused; };

// Sizes; `radices` are the factors of n_fft / 2 in the order of the passes.
struct MelShape {
    int samples, frames, hop, n_fft, mels, tiles, passes, unused;
    u16 radices[16];
};
static_assert(sizeof(MelShape) == 64 && sizeof(Band) == 16, "as the host's");

__device__ __forceinline__ Complex operator+(Complex a, Complex b) { return Complex{a.re + b.re, a.im + b.im}; }
__device__ __forceinline__ Complex operator-(Complex a, Complex b) { return Complex{a.re - b.re, a.im - b.im}; }
__device__ __forceinline__ Complex operator*(Complex a, Complex b) {
    return Complex{fmaf(a.re, b.re, -(a.im * b.im)), fmaf(a.re, b.im, a.im * b.re)};
}
// c + f * a.
__device__ __forceinline__ Complex plus(Complex c, float f, Complex a) {
    return Complex{fmaf(f, a.re, c.re), fmaf(f, a.im, c.im)};
}
// -i * a.
__device__ __forceinline__ Complex turned(Complex a) { return Complex{a.im, -a.re}; }

// Transforms of P values in place.
__device__ __forceinline__ void transform(Complex (&v)[2]) {
    const Complex a = v[0] + v[1], b = v[0] - v[1];
    v[0] = a;
    v[1] = b;
}
__device__ __forceinline__ void transform(Complex (&v)[3]) {
    const Complex sum = v[1] + v[2], difference = turned(v[1] - v[2]);
    const Complex middle = plus(v[0], -0.5f, sum);
    v[0] = v[0] + sum;
    v[1] = plus(middle, 0.866025404f, difference);  // sin(tau / 3)
    v[2] = plus(middle, -0.866025404f, difference);
}
__device__ __forceinline__ void transform(Complex (&v)[4]) {
    const Complex a = v[0] + v[2], b = v[0] - v[2], c = v[1] + v[3], d = turned(v[1] - v[3]);
    v[0] = a + c;
    v[1] = b + d;
    v[2] = a - c;
    v[3] = b - d;
}
__device__ __forceinline__ void transform(Complex (&v)[5]) {
    constexpr float C1 = 0.309016994f, C2 = -0.809016994f;  // cos(tau / 5), cos(2 tau / 5)
    constexpr float S1 = 0.951056516f, S2 = 0.587785252f;   // sin(tau / 5), sin(2 tau / 5)
    const Complex a = v[1] + v[4], b = v[2] + v[3], c = turned(v[1] - v[4]), d = turned(v[2] - v[3]);
    const Complex p = plus(plus(v[0], C1, a), C2, b), q = plus(plus(v[0], C2, a), C1, b);
    const Complex s = plus(Complex{S1 * c.re, S1 * c.im}, S2, d), t = plus(Complex{S2 * c.re, S2 * c.im}, -S1, d);
    v[0] = v[0] + a + b;
    v[1] = p + s;
    v[2] = q + t;
    v[3] = q - t;
    v[4] = p - s;
}

// One pass of radix P over m values; `done` is the product of the radices before. roots: [2 m], exp(-i pi k / m).
template <int P>
__device__ __forceinline__ void pass(const Complex* in, Complex* out, const Complex* roots, int m, int done) {
    const int part = m / P, step = 2 * (part / done);
    for (int j = threadIdx.x; j < part; j += blockDim.x) {
        const int group = j / done, k = j - group * done;
        Complex v[P];
#pragma unroll
        for (int r = 0; r < P; ++r) {
            v[r] = in[j + r * part];
            if (r > 0 && done > 1) v[r] = v[r] * roots[k * r * step];
        }
        transform(v);
        Complex* to = out + group * done * P + k;
#pragma unroll
        for (int r = 0; r < P; ++r) to[r * done] = v[r];
    }
}

// As `pass`, for any radix: a thread sums one output by the definition.
__device__ __forceinline__ void pass_of(
    int radix, const Complex* in, Complex* out, const Complex* roots, int m, int done) {
    const int part = m / radix;
    for (int i = threadIdx.x; i < m; i += blockDim.x) {
        const int r = i / part, j = i - r * part, group = j / done, k = j - group * done;
        const int turn = (k + r * done) * (part / done);
        Complex sum = in[j];
        int angle = 0;
        for (int q = 1; q < radix; ++q) {
            angle += turn;
            if (angle >= m) angle -= m;
            sum = sum + in[j + q * part] * roots[2 * angle];
        }
        out[group * done * radix + k + r * done] = sum;
    }
}

template <typename T>
__device__ __forceinline__ void log_mel(const T* x, T* y, const Band* bands, const Complex* roots, const float* window,
                                        const float* weights, const MelShape& s, float scale, float shift) {
    extern __shared__ __align__(16) float shared[];
    const int n = s.n_fft, m = n / 2, room = 2 * n + 4;
    const int sample = blockIdx.x / s.tiles, first = (blockIdx.x - sample * s.tiles) * blockDim.y;
    x += static_cast<i64>(sample) * s.samples;
    y += static_cast<i64>(sample) * s.mels * s.frames;
    // Frames past the last are computed as the last is, and not written: all threads meet at the barriers.
    const int start = min(first + static_cast<int>(threadIdx.y), s.frames - 1) * s.hop - m;
    float* in = shared + threadIdx.y * room;
    float* out = in + n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        int at = abs(start + i);
        if (at >= s.samples) at = 2 * (s.samples - 1) - at;
        in[i] = to_f32(x[at]) * window[i];
    }
    __syncthreads();
    int done = 1;
    for (int p = 0; p < s.passes; ++p) {
        const int radix = s.radices[p];
        const Complex* from = reinterpret_cast<const Complex*>(in);
        Complex* to = reinterpret_cast<Complex*>(out);
        switch (radix) {
            case 2: pass<2>(from, to, roots, m, done); break;
            case 3: pass<3>(from, to, roots, m, done); break;
            case 4: pass<4>(from, to, roots, m, done); break;
            case 5: pass<5>(from, to, roots, m, done); break;
            default: pass_of(radix, from, to, roots, m, done);
        }
        done *= radix;
        float* const next = in;
        in = out;
        out = next;
        __syncthreads();
    }
    // Of the transform Z of (x[2i], x[2i + 1]): X[k] = (Z[k] + conj Z[m - k]) / 2 - i exp(-i pi k / m) (Z[k] - conj Z[m - k]) / 2.
    const Complex* z = reinterpret_cast<const Complex*>(in);
    for (int k = threadIdx.x; k <= m; k += blockDim.x) {
        const Complex a = z[k == m ? 0 : k], b = z[k == 0 ? 0 : m - k];
        const Complex odd = turned(roots[k] * Complex{a.re - b.re, a.im + b.im});
        const float re = 0.5f * (a.re + b.re + odd.re), im = 0.5f * (a.im - b.im + odd.im);
        out[k] = fmaf(re, re, im * im);
    }
    __syncthreads();
    // Threads of one warp: neighbouring frames of a band, so that writes join and weights are read once.
    const float* powers = out - threadIdx.y * room;
    const int threads = blockDim.x * blockDim.y, here = blockDim.y;
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < s.mels * here; i += threads) {
        const int mel = i / here, frame = i - mel * here;
        if (first + frame >= s.frames) continue;
        const Band band = bands[mel];
        const float* power = powers + frame * room + band.first;
        const float* weight = weights + band.begin;
        float sum = 0.0f;
        for (int k = 0; k < band.count; ++k) sum = fmaf(power[k], weight[k], sum);
        y[static_cast<i64>(mel) * s.frames + first + frame] = from_f32<T>(logf(sum + 1e-6f) * scale + shift);
    }
}

// The sizes are read where they were passed: a copy would lie in every thread's local memory, for the radices' sake.
#define DEFINE(SUFFIX, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        log_mel_##SUFFIX(const T* x, T* y, const Band* bands, const Complex* roots, const float* window,               \
                         const float* weights, const __grid_constant__ MelShape shape, float scale, float shift) {     \
        log_mel(x, y, bands, roots, window, weights, shape, scale, shift);                                             \
    }
FOR_EACH_STORAGE(DEFINE)
#undef DEFINE
