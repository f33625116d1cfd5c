// Statistics on the CPU. One pass over memory, float64 sums about a shift (each feature's first finite value in the block), and
// Chan's formula from block to block. Blocks are fixed by the shape alone, so a result does not depend on the machine. An
// activation is applied strip by strip, just before the statistics of what it wrote: memory is crossed once, the second look
// is at the cache.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "stats_simd.h"
#ifdef ESPER_WITH_CUDA
#include "stats_cuda.h"
#endif

namespace esper::stats {

constexpr int kBlockRows = 256;  // rows between two merges: their sums stay in the first-level cache
constexpr int kStrip = 256;      // features whose sums are held at once

struct Job {
    View x;  // what goes in, and what the statistics are of: the same unless there is an activation
    View y;
    const void* in;
    void* out;
    Activate activate;  // null: statistics only
    int64_t seeds;
    double* features;
    double* chunks;
};

struct Strip {
    alignas(64) double shift[kStrip], s1[kStrip], s2[kStrip], absmax[kStrip];
    alignas(64) int64_t finite[kStrip];
};

struct Rows {
    alignas(64) double sum[kBlockRows];
    alignas(64) int64_t ok[kBlockRows];  // all ones while every value of the row was finite
    int64_t in[kBlockRows], out[kBlockRows];
};

template <typename T>
ESPER_INLINE double widen1(const T* p) {
    T lanes[kLanes] = {};
    lanes[0] = *p;
    return widen(lanes)[0];
}

template <typename T>
ESPER_INLINE vd gather(const T* p, int64_t step, int lanes) {
    T values[kLanes] = {};
    for (int i = 0; i < lanes; ++i) values[i] = p[i * step];
    return widen(values);
}

// The first finite value of one feature in the block, 0 if there is none.
template <typename T>
ESPER_INLINE double find_shift(const T* p, const int64_t* offsets, int rows) {
    for (int r = 0; r < rows; ++r) {
        const double value = widen1(p + offsets[r]);
        if (std::fabs(value) <= std::numeric_limits<double>::max()) return value;
    }
    return 0.0;
}

// N rows, one register of features at offset j of the strip.
template <typename T, int N, bool FULL>
ESPER_INLINE void step_columns(Strip& s, int j, int lanes, int64_t step, const T* const* p, vd* sums, vl* oks) {
    const vd shift = load(s.shift + j);
    vd s1 = load(s.s1 + j), s2 = load(s.s2 + j), absmax = load(s.absmax + j);
    vl finite = load(s.finite + j);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
        vd x;
        if constexpr (FULL) x = widen(p[n] + j);
        else x = gather(p[n] + j * step, step, lanes);
        const vd magnitude = vabs(x);
        const vl ok = is_finite(magnitude);
        const vd d = (vd)((vl)(x - shift) & ok), kept = (vd)((vl)magnitude & ok);
        s1 += d;
        s2 += d * d;
        absmax = kept > absmax ? kept : absmax;
        finite -= ok;
        sums[n] += d;
        oks[n] &= ok;
    }
    store(s.s1 + j, s1);
    store(s.s2 + j, s2);
    store(s.absmax + j, absmax);
    store(s.finite + j, finite);
}

template <typename T, int N, bool UNIT>
ESPER_INLINE void step_rows(Strip& s, Rows& rows, int r, int width, int64_t step, const T* base) {
    const T* p[N];
    vd sums[N];
    vl oks[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
        p[n] = base + rows.out[r + n];
        sums[n] = splat(0.0);
        oks[n] = ~vl{};
    }
    int j = 0;
    if constexpr (UNIT) {
        for (; j + kLanes <= width; j += kLanes) step_columns<T, N, true>(s, j, kLanes, 1, p, sums, oks);
    }
    for (; j < width; j += kLanes) step_columns<T, N, false>(s, j, std::min(kLanes, width - j), step, p, sums, oks);
    for (int n = 0; n < N; ++n) {
        rows.sum[r + n] += sum_lanes(sums[n]);
        for (int i = 0; i < kLanes; ++i) rows.ok[r + n] &= oks[n][i];
    }
}

// Rows whose sum counts, about `offset` (the chunk's summed shifts): two passes over at most kBlockRows numbers.
static void finish_rows(const Rows& rows, int count, double offset, double* chunk, int64_t seeds) {
    double n = 0.0, total = 0.0, m2 = 0.0, rest = 0.0;
    for (int r = 0; r < count; ++r) {
        n += rows.ok[r] ? 1.0 : 0.0;
        total += rows.ok[r] ? rows.sum[r] : 0.0;
    }
    const double mean = n > 0.0 ? total / n : 0.0;
    for (int r = 0; r < count; ++r) {
        const double d = rows.ok[r] ? rows.sum[r] - mean : 0.0;
        m2 += d * d;
        rest += d;
    }
    m2 -= n > 0.0 ? rest * rest / n : 0.0;
    merge_chunk(chunk, seeds, {n, n > 0.0 ? offset + mean : 0.0, m2 > 0.0 ? m2 : 0.0}, static_cast<double>(count) - n);
}

ESPER_INLINE void finish_column(double* column, int64_t channels, double shift, double finite, double rows, double s1, double s2,
                                double absmax) {
    const double mean = finite > 0.0 ? s1 / finite : 0.0;
    const double m2 = s2 - s1 * mean;
    merge_column(column, channels, {finite, finite > 0.0 ? shift + mean : 0.0, m2 > 0.0 ? m2 : 0.0}, absmax, rows - finite);
}

template <typename T>
ESPER_INLINE void activate_run(const Job& job, int64_t in_offset, int64_t in_step, int64_t out_offset, int64_t out_step, int64_t n) {
    job.activate(static_cast<const T*>(job.in) + in_offset, in_step, static_cast<T*>(job.out) + out_offset, out_step, n);
}

// One strip of at most kStrip features over the block's rows; returns the sum of the shifts.
template <typename T, bool UNIT>
ESPER_INLINE double strip_of_features(const Job& job, Strip& strip, Rows& rows, int count, int64_t c, int width) {
    const View& y = job.y;
    if (job.activate)
        for (int r = 0; r < count; ++r)
            activate_run<T>(job, rows.in[r] + c * job.x.channel_stride, job.x.channel_stride,
                            rows.out[r] + c * y.channel_stride, y.channel_stride, width);
    const T* const base = static_cast<const T*>(job.out) + c * y.channel_stride;
    const int padded = (width + kLanes - 1) / kLanes * kLanes;
    double offset = 0.0;
    for (int j = 0; j < width; ++j) {
        strip.shift[j] = find_shift(base + j * y.channel_stride, rows.out, count);
        offset += strip.shift[j];
    }
    std::fill(strip.shift + width, strip.shift + padded, 0.0);
    std::fill_n(strip.s1, padded, 0.0);
    std::fill_n(strip.s2, padded, 0.0);
    std::fill_n(strip.absmax, padded, 0.0);
    std::fill_n(strip.finite, padded, int64_t{0});
    int r = 0;
    if constexpr (UNIT)
        for (; r + 4 <= count; r += 4) step_rows<T, 4, true>(strip, rows, r, width, 1, base);
    for (; r < count; ++r) step_rows<T, 1, UNIT>(strip, rows, r, width, y.channel_stride, base);
    for (int j = 0; j < width; ++j)
        finish_column(job.features + c + j, y.channels, strip.shift[j], static_cast<double>(strip.finite[j]), count, strip.s1[j],
                      strip.s2[j], strip.absmax[j]);
    return offset;
}

// Lanes are features: for features next to each other in memory, or when nothing is.
template <typename T, bool UNIT>
ESPER_INLINE void by_features(const Job& job) {
    const View &x = job.x, &y = job.y;
    const int64_t total = y.outer * y.inner;
    Strip strip;
    Rows rows;
    for (int64_t first = 0; first < total; first += kBlockRows) {
        const int count = static_cast<int>(std::min<int64_t>(kBlockRows, total - first));
        int64_t a = first / y.inner, b = first % y.inner;
        for (int r = 0; r < count; ++r) {
            rows.in[r] = a * x.outer_stride + b * x.inner_stride;
            rows.out[r] = a * y.outer_stride + b * y.inner_stride;
            if (++b == y.inner) b = 0, ++a;
        }
        for (int64_t seed = 0; seed < job.seeds; ++seed) {
            const int64_t begin = chunk_begin(seed, y.channels, job.seeds), end = chunk_begin(seed + 1, y.channels, job.seeds);
            if (begin == end) continue;
            std::fill_n(rows.sum, count, 0.0);
            std::fill_n(rows.ok, count, int64_t{-1});
            double offset = 0.0;
            for (int64_t c = begin; c < end; c += kStrip)
                offset += strip_of_features<T, UNIT>(job, strip, rows, count, c,
                                                     static_cast<int>(std::min<int64_t>(kStrip, end - c)));
            finish_rows(rows, count, offset, job.chunks + seed, job.seeds);
        }
    }
}

// One feature over a run of positions next to each other in memory; returns its shift.
template <typename T>
ESPER_INLINE double run_of_positions(const T* p, Rows& rows, int count, double* column, int64_t channels) {
    const double shift = find_shift(p, rows.out, count);
    vd s1 = splat(0.0), s2 = s1, absmax = s1;
    vl finite = {};
    for (int r = 0; r < count; r += kLanes) {
        const int lanes = std::min(kLanes, count - r);
        const vd x = lanes == kLanes ? widen(p + r) : gather(p + r, 1, lanes);
        const vd magnitude = vabs(x);
        vl ok = is_finite(magnitude);
        const vl row_ok = load(rows.ok + r) & ok;
        if (lanes < kLanes)
            for (int i = 0; i < kLanes; ++i) ok[i] = i < lanes ? ok[i] : 0;
        const vd d = (vd)((vl)(x - shift) & ok), kept = (vd)((vl)magnitude & ok);
        s1 += d;
        s2 += d * d;
        absmax = kept > absmax ? kept : absmax;
        finite -= ok;
        store(rows.ok + r, row_ok);
        store(rows.sum + r, load(rows.sum + r) + d);
    }
    double peak = 0.0, seen = 0.0;
    for (int i = 0; i < kLanes; ++i) {
        peak = std::max(peak, absmax[i]);
        seen += static_cast<double>(finite[i]);
    }
    finish_column(column, channels, shift, seen, count, sum_lanes(s1), sum_lanes(s2), peak);
    return shift;
}

// Lanes are positions (NCHW): a block is a run inside one image.
template <typename T>
ESPER_INLINE void by_positions(const Job& job) {
    const View &x = job.x, &y = job.y;
    Rows rows;
    for (int r = 0; r < kBlockRows; ++r) rows.out[r] = r;
    for (int64_t a = 0; a < y.outer; ++a) {
        for (int64_t first = 0; first < y.inner; first += kBlockRows) {
            const int count = static_cast<int>(std::min<int64_t>(kBlockRows, y.inner - first));
            for (int64_t seed = 0; seed < job.seeds; ++seed) {
                const int64_t begin = chunk_begin(seed, y.channels, job.seeds), end = chunk_begin(seed + 1, y.channels, job.seeds);
                if (begin == end) continue;
                std::fill_n(rows.sum, kBlockRows, 0.0);
                std::fill_n(rows.ok, kBlockRows, int64_t{-1});
                double offset = 0.0;
                for (int64_t c = begin; c < end; ++c) {
                    const int64_t at = a * y.outer_stride + c * y.channel_stride + first;
                    if (job.activate)
                        activate_run<T>(job, a * x.outer_stride + c * x.channel_stride + first * x.inner_stride, x.inner_stride, at,
                                        1, count);
                    offset += run_of_positions(static_cast<const T*>(job.out) + at, rows, count, job.features + c, y.channels);
                }
                finish_rows(rows, count, offset, job.chunks + seed, job.seeds);
            }
        }
    }
}

template <typename T>
ESPER_INLINE void by_layout(const Job& job) {
    if (job.y.channel_stride == 1) by_features<T, true>(job);
    else if (job.y.inner_stride == 1) by_positions<T>(job);
    else by_features<T, false>(job);
}

ESPER_CLONES void gather_f32(const Job& job) { by_layout<float>(job); }
ESPER_CLONES void gather_f64(const Job& job) { by_layout<double>(job); }
ESPER_CLONES void gather_bf16(const Job& job) { by_layout<bf16>(job); }
ESPER_CLONES void gather_f16(const Job& job) { by_layout<f16>(job); }

static void run(const Job& job, int dtype) {
    switch (dtype) {
        case kFloat32: return gather_f32(job);
        case kFloat64: return gather_f64(job);
        case kBFloat16: return gather_bf16(job);
        case kFloat16: return gather_f16(job);
        default: throw std::invalid_argument("esper._native: unknown dtype code");
    }
}

}  // namespace esper::stats

namespace py = pybind11;
using namespace esper::stats;

// Elements whose statistics outlast a thread switch.
constexpr int64_t kReleaseAbove = 1 << 15;

static void run_job(const Job& job, int dtype) {
    const int64_t elements = job.y.outer * job.y.channels * job.y.inner;
    if (elements > 0) without_python(elements > kReleaseAbove, [&] { run(job, dtype); });
}

static void stats_observe(std::uintptr_t x, int dtype, int64_t outer, int64_t channels, int64_t inner, int64_t outer_stride,
                          int64_t channel_stride, int64_t inner_stride, int64_t seeds, std::uintptr_t features,
                          std::uintptr_t chunks) {
    const View view{outer, channels, inner, outer_stride, channel_stride, inner_stride};
    run_job({view, view, esper::as<void>(x), esper::as<void>(x), nullptr, seeds, esper::as<double>(features),
             esper::as<double>(chunks)},
            dtype);
}

static void stats_activate(std::uintptr_t x, std::uintptr_t y, int dtype, int activation, int64_t outer, int64_t channels,
                           int64_t inner, int64_t outer_stride, int64_t channel_stride, int64_t inner_stride,
                           int64_t y_outer_stride, int64_t y_channel_stride, int64_t y_inner_stride, int64_t seeds,
                           std::uintptr_t features, std::uintptr_t chunks) {
    run_job({{outer, channels, inner, outer_stride, channel_stride, inner_stride},
             {outer, channels, inner, y_outer_stride, y_channel_stride, y_inner_stride},
             esper::as<void>(x), esper::as<void>(y), find_activation(activation, dtype), seeds, esper::as<double>(features),
             esper::as<double>(chunks)},
            dtype);
}

static void stats_merge(std::uintptr_t features, std::uintptr_t chunks, std::uintptr_t new_features, std::uintptr_t new_chunks,
                        int64_t channels, int64_t seeds) {
    double* const into = esper::as<double>(features);
    const double* const from = esper::as<double>(new_features);
    for (int64_t c = 0; c < channels; ++c)
        merge_column(into + c, channels,
                     {from[kCount * channels + c], from[kMean * channels + c], from[kM2 * channels + c]},
                     from[kAbsMax * channels + c], from[kNonFinite * channels + c]);
    double* const chunk = esper::as<double>(chunks);
    const double* const added = esper::as<double>(new_chunks);
    for (int64_t s = 0; s < seeds; ++s)
        merge_chunk(chunk + s, seeds, {added[kRows * seeds + s], added[kRowMean * seeds + s], added[kRowM2 * seeds + s]},
                    added[kSkipped * seeds + s]);
}

static void stats_health(std::uintptr_t features, std::uintptr_t chunks, int64_t channels, int64_t seeds, double eps,
                         std::uintptr_t out) {
    for (int64_t s = 0; s < seeds; ++s)
        seed_health(esper::as<double>(features), esper::as<double>(chunks), channels, seeds, s, eps, esper::as<double>(out));
}

#ifdef ESPER_WITH_CUDA
static void check(int error, const char* what) {
    if (error != 0) throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(error));
}

static void stats_accumulate_cuda(std::uintptr_t x, std::uintptr_t y, int dtype, int activation, int64_t outer, int64_t channels,
                                  int64_t inner, int64_t outer_stride, int64_t channel_stride, int64_t inner_stride,
                                  int64_t y_outer_stride, int64_t y_channel_stride, int64_t y_inner_stride, int64_t seeds,
                                  std::uintptr_t features, std::uintptr_t chunks, std::uintptr_t workspace,
                                  std::uintptr_t stream) {
    check(accumulate_cuda(esper::as<void>(x), esper::as<void>(y), dtype, activation,
                          {outer, channels, inner, outer_stride, channel_stride, inner_stride},
                          {outer, channels, inner, y_outer_stride, y_channel_stride, y_inner_stride}, seeds,
                          esper::as<double>(features), esper::as<double>(chunks), esper::as<double>(workspace),
                          esper::as<void>(stream)),
          "stats_accumulate");
}

static void bind_stats_cuda(py::module_& m) {
    m.def("stats_workspace_cuda", &workspace_cuda, "float64 numbers of workspace that stats_accumulate_cuda needs.");
    m.def("stats_accumulate_cuda", &stats_accumulate_cuda, "stats_observe and stats_activate on a stream.");
    m.def(
        "stats_merge_cuda",
        [](std::uintptr_t features, std::uintptr_t chunks, std::uintptr_t new_features, std::uintptr_t new_chunks,
           int64_t channels, int64_t seeds, std::uintptr_t stream) {
            check(merge_cuda(esper::as<double>(features), esper::as<double>(chunks), esper::as<double>(new_features),
                             esper::as<double>(new_chunks), channels, seeds, esper::as<void>(stream)),
                  "stats_merge");
        },
        "stats_merge on a stream.");
    m.def(
        "stats_health_cuda",
        [](std::uintptr_t features, std::uintptr_t chunks, int64_t channels, int64_t seeds, double eps, std::uintptr_t out,
           std::uintptr_t stream) {
            check(health_cuda(esper::as<double>(features), esper::as<double>(chunks), channels, seeds, eps,
                              esper::as<double>(out), esper::as<void>(stream)),
                  "stats_health");
        },
        "stats_health on a stream.");
}
#endif

void bind_stats(py::module_& m) {
    m.def("stats_observe", &stats_observe, "Merge the statistics of x, seen as [outer, channels, inner], into features and chunks.");
    m.def("stats_activate", &stats_activate, "y = activation(x), and the statistics of y merged into features and chunks.");
    m.def("stats_merge", &stats_merge, "Merge one window's statistics into another's, in place.");
    m.def("stats_health", &stats_health, "Derive every seed's health from a window's statistics.");
#ifdef ESPER_WITH_CUDA
    bind_stats_cuda(m);
#endif
}
