// Statistics in CUDA. A block takes 64 rows of one seed's chunk through shared memory, 32 features at a time, and reduces each
// feature in two passes; blocks are joined in a fixed order by Chan's formula in float64, so there is one result.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "stats_cuda.h"

namespace esper::stats {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockRows = 64;
constexpr int kTile = 32;    // features in shared memory at once; a warp adds their shifts
constexpr int kFanIn = 64;   // blocks that one thread of reduce_kernel joins
constexpr unsigned kAll = 0xFFFFFFFFu;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void narrow(float x, float* p) { *p = x; }
__device__ __forceinline__ void narrow(double x, double* p) { *p = x; }
__device__ __forceinline__ void narrow(float x, __half* p) { *p = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* p) { *p = __float2bfloat16_rn(x); }

template <typename A>
__device__ __forceinline__ A activate(int activation, A x) {
    switch (activation) {
        case kRelu: return x <= A(0) ? A(0) : x;  // a NaN stays
        case kGelu: return x * (A(0.5) * erfc(-x * A(0.7071067811865476)));
        case kGeluTanh: return x / (A(1) + exp(A(-1.5957691216057308) * (x + A(0.044715) * x * x * x)));
        case kTanh: return tanh(x);
        case kSigmoid: return A(1) / (A(1) + exp(-x));
        default: return x / (A(1) + exp(-x));
    }
}

template <typename A>
__device__ __forceinline__ A sum_over(A x, int width) {
    for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
    return x;
}
template <typename A>
__device__ __forceinline__ A max_over(A x, int width) {
    for (int offset = width / 2; offset > 0; offset /= 2) {
        const A other = __shfl_xor_sync(kAll, x, offset);
        x = other > x ? other : x;
    }
    return x;
}

__device__ __forceinline__ void put_column(double* at, int64_t stride, Moments m, double absmax, double bad, bool direct) {
    if (direct) {
        merge_column(at, stride, m, absmax, bad);
    } else {
        at[kCount * stride] = m.n;
        at[kMean * stride] = m.mean;
        at[kM2 * stride] = m.m2;
        at[kAbsMax * stride] = absmax;
        at[kNonFinite * stride] = bad;
    }
}

__device__ __forceinline__ void put_chunk(double* at, int64_t stride, Moments m, double skipped, bool direct) {
    if (direct) {
        merge_chunk(at, stride, m, skipped);
    } else {
        at[kRows * stride] = m.n;
        at[kRowMean * stride] = m.mean;
        at[kRowM2 * stride] = m.m2;
        at[kSkipped * stride] = skipped;
    }
}

template <typename T, typename A>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(const T* in, T* out, int activation, View x, View y, int64_t seeds, double* features, double* chunks,
                      bool direct) {
    __shared__ A tile[kTile][kBlockRows + 1];
    __shared__ A shift[kTile];
    __shared__ double row_sum[kBlockRows];
    __shared__ int row_bad[kBlockRows];
    __shared__ int64_t row_in[kBlockRows], row_out[kBlockRows];  // where each row begins
    const int t = static_cast<int>(threadIdx.x);
    const int64_t block = blockIdx.x / seeds, seed = blockIdx.x % seeds;
    const int64_t channels = x.channels, total = x.outer * x.inner;
    const int64_t begin = chunk_begin(seed, channels, seeds), end = chunk_begin(seed + 1, channels, seeds);
    const int64_t first_row = block * kBlockRows;
    const int count = static_cast<int>(total - first_row < kBlockRows ? total - first_row : kBlockRows);
    double* const column = features + block * kFields * channels;
    double* const chunk = chunks + block * kChunkFields * seeds + seed;
    if (begin == end) {
        if (t == 0 && !direct) put_chunk(chunk, seeds, {0.0, 0.0, 0.0}, 0.0, false);
        return;
    }
    if (t < kBlockRows) {
        row_sum[t] = 0.0;
        row_bad[t] = 0;
        row_in[t] = row_offset(x, first_row + t);
        if (activation != kIdentity) row_out[t] = row_offset(y, first_row + t);
    }
    const bool rows_adjacent = x.channel_stride != 1 && x.inner_stride == 1;
    double offset = 0.0;  // the first warp: the sum of the chunk's shifts

    for (int64_t c0 = begin; c0 < end; c0 += kTile) {
        const int width = static_cast<int>(end - c0 < kTile ? end - c0 : kTile);
        __syncthreads();
        for (int i = t; i < kTile * kBlockRows; i += kThreads) {
            // Neighbouring threads read neighbouring addresses, whichever way the tensor lies.
            const int f = rows_adjacent ? i / kBlockRows : i % kTile, r = rows_adjacent ? i % kBlockRows : i / kTile;
            if (f < width && r < count) {
                A value = widen(in[row_in[r] + (c0 + f) * x.channel_stride]);
                if (activation != kIdentity) {
                    T* const to = out + row_out[r] + (c0 + f) * y.channel_stride;
                    narrow(activate(activation, value), to);
                    value = widen(*to);
                }
                tile[f][r] = value;
            }
        }
        __syncthreads();
        {
            // Eight threads a feature. Their sums are scaled by 2^-6, so that 64 finite values cannot overflow.
            const int f = t / 8, g = t % 8;
            int n = 0;
            A sum = 0, peak = 0;
            if (f < width)
                for (int r = g; r < count; r += 8)
                    if (isfinite(tile[f][r])) {
                        ++n;
                        sum += tile[f][r] * A(0.015625);
                        peak = fabs(tile[f][r]) > peak ? fabs(tile[f][r]) : peak;
                    }
            n = sum_over(n, 8);
            peak = max_over(peak, 8);
            const A k = sum_over(sum, 8) / A(n > 0 ? n : 1) * A(64);
            A rest = 0, squares = 0;
            if (f < width)
                for (int r = g; r < count; r += 8)
                    if (isfinite(tile[f][r])) {
                        const A d = tile[f][r] - k;
                        rest += d;
                        squares += d * d;
                    }
            rest = sum_over(rest, 8);
            squares = sum_over(squares, 8);
            if (g == 0 && f < width) {
                const double some = n > 0 ? n : 1, left = static_cast<double>(rest);
                const double m2 = static_cast<double>(squares) - left * left / some;
                shift[f] = k;
                put_column(column + c0 + f, channels, {static_cast<double>(n), static_cast<double>(k) + left / some, m2 > 0 ? m2 : 0.0},
                           static_cast<double>(peak), static_cast<double>(count - n), direct);
            }
        }
        __syncthreads();
        {
            const int r = t / 4, part = t % 4;
            A sum = 0;
            int bad = 0;
            if (r < count)
                for (int f = part * (kTile / 4); f < (part + 1) * (kTile / 4) && f < width; ++f) {
                    const A value = tile[f][r];
                    if (isfinite(value)) sum += value - shift[f];
                    else bad = 1;
                }
            sum = sum_over(sum, 4);
            bad = max_over(bad, 4);
            if (part == 0 && r < count) {
                row_sum[r] += static_cast<double>(sum);
                row_bad[r] |= bad;
            }
        }
        if (t < 32) offset += sum_over(t < width ? static_cast<double>(shift[t]) : 0.0, 32);
    }
    __syncthreads();
    if (t < 32) {
        double n = 0.0, sum = 0.0, m2 = 0.0;
        for (int r = t; r < count; r += 32) {
            n += row_bad[r] ? 0.0 : 1.0;
            sum += row_bad[r] ? 0.0 : row_sum[r];
        }
        n = sum_over(n, 32);
        sum = sum_over(sum, 32);
        const double mean = n > 0.0 ? sum / n : 0.0;
        for (int r = t; r < count; r += 32) {
            const double d = row_bad[r] ? 0.0 : row_sum[r] - mean;
            m2 += d * d;
        }
        m2 = sum_over(m2, 32);
        if (t == 0) put_chunk(chunk, seeds, {n, n > 0.0 ? offset + mean : 0.0, m2}, count - n, direct);
    }
}

// Joins up to kFanIn blocks, `step` apart, into the first of them, or at the last level into the accumulators.
__global__ void reduce_kernel(double* features, double* chunks, double* into_features, double* into_chunks, int64_t channels,
                              int64_t seeds, int64_t count, int64_t step, bool last) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t columns = channels + seeds, group = i / columns, c = i % columns;
    const int64_t first = group * kFanIn * step;
    if (first >= count) return;
    Moments m{0.0, 0.0, 0.0};
    double peak = 0.0, bad = 0.0;
    if (c < channels) {
        for (int64_t k = 0; k < kFanIn && first + k * step < count; ++k) {
            const double* const at = features + (first + k * step) * kFields * channels + c;
            m = merge(m, {at[kCount * channels], at[kMean * channels], at[kM2 * channels]});
            peak = at[kAbsMax * channels] > peak ? at[kAbsMax * channels] : peak;
            bad += at[kNonFinite * channels];
        }
        put_column(last ? into_features + c : features + first * kFields * channels + c, channels, m, peak, bad, last);
    } else {
        const int64_t s = c - channels;
        for (int64_t k = 0; k < kFanIn && first + k * step < count; ++k) {
            const double* const at = chunks + (first + k * step) * kChunkFields * seeds + s;
            m = merge(m, {at[kRows * seeds], at[kRowMean * seeds], at[kRowM2 * seeds]});
            bad += at[kSkipped * seeds];
        }
        put_chunk(last ? into_chunks + s : chunks + first * kChunkFields * seeds + s, seeds, m, bad, last);
    }
}

__global__ void health_kernel(const double* features, const double* chunks, int64_t channels, int64_t seeds, double eps,
                              double* out) {
    const int64_t s = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (s < seeds) seed_health(features, chunks, channels, seeds, s, eps, out);
}

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int reduce(double* features, double* chunks, double* into_features, double* into_chunks, int64_t channels, int64_t seeds,
           int64_t count, cudaStream_t stream) {
    for (int64_t step = 1;; step *= kFanIn) {
        const int64_t groups = div_up(div_up(count, step), kFanIn);
        const auto blocks = static_cast<unsigned>(div_up(groups * (channels + seeds), kThreads));
        reduce_kernel<<<blocks, kThreads, 0, stream>>>(features, chunks, into_features, into_chunks, channels, seeds, count, step,
                                                       groups == 1);
        if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return static_cast<int>(error);
        if (groups == 1) return 0;
    }
}

template <typename T, typename A>
int launch(const void* in, void* out, int activation, const View& x, const View& y, int64_t seeds, double* features,
           double* chunks, double* workspace, cudaStream_t stream) {
    const int64_t blocks = div_up(x.outer * x.inner, kBlockRows);
    const bool direct = blocks == 1;
    double* const part_features = direct ? features : workspace;
    double* const part_chunks = direct ? chunks : workspace + blocks * kFields * x.channels;
    accumulate_kernel<T, A><<<static_cast<unsigned>(blocks * seeds), kThreads, 0, stream>>>(
        static_cast<const T*>(in), static_cast<T*>(out), activation, x, y, seeds, part_features, part_chunks, direct);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return static_cast<int>(error);
    return direct ? 0 : reduce(part_features, part_chunks, features, chunks, x.channels, seeds, blocks, stream);
}

}  // namespace

int64_t workspace_cuda(int64_t rows, int64_t channels, int64_t seeds) {
    const int64_t blocks = div_up(rows, kBlockRows);
    return blocks <= 1 ? 0 : blocks * (kFields * channels + kChunkFields * seeds);
}

int accumulate_cuda(const void* in, void* out, int dtype, int activation, const View& x, const View& y, int64_t seeds,
                    double* features, double* chunks, double* workspace, void* stream) {
    if (x.outer * x.inner == 0 || x.channels == 0) return 0;
    const auto s = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case kFloat32: return launch<float, float>(in, out, activation, x, y, seeds, features, chunks, workspace, s);
        case kFloat64: return launch<double, double>(in, out, activation, x, y, seeds, features, chunks, workspace, s);
        case kBFloat16: return launch<__nv_bfloat16, float>(in, out, activation, x, y, seeds, features, chunks, workspace, s);
        case kFloat16: return launch<__half, float>(in, out, activation, x, y, seeds, features, chunks, workspace, s);
        default: return static_cast<int>(cudaErrorInvalidValue);
    }
}

int merge_cuda(double* features, double* chunks, double* new_features, double* new_chunks, int64_t channels, int64_t seeds,
               void* stream) {
    return reduce(new_features, new_chunks, features, chunks, channels, seeds, 1, static_cast<cudaStream_t>(stream));
}

int health_cuda(const double* features, const double* chunks, int64_t channels, int64_t seeds, double eps, double* out,
                void* stream) {
    const auto blocks = static_cast<unsigned>(div_up(seeds, kThreads));
    health_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(features, chunks, channels, seeds, eps, out);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace esper::stats
