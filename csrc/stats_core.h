// Statistics of activations: what one sample window holds, how two windows merge, and what a seed's health is.
// Shared by the C++ and the CUDA backend; esper/ops/stats/reference.py is the oracle.
//
// features: float64 [5, C], rows in the order of Field.   chunks: float64 [4, S], rows in the order of ChunkField.
#pragma once

#include <cmath>
#include <cstdint>

#include "common.h"

namespace esper::stats {

enum Field { kCount = 0, kMean = 1, kM2 = 2, kAbsMax = 3, kNonFinite = 4, kFields = 5 };
// Statistics of the row sums over one seed's chunk; kSkipped counts rows left out for holding a non-finite value.
enum ChunkField { kRows = 0, kRowMean = 1, kRowM2 = 2, kSkipped = 3, kChunkFields = 4 };
enum HealthField { kSamples, kActMean, kActVariance, kDead, kCorrelation, kBad, kScore, kHealthFields };
enum Dtype { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
enum Activation { kIdentity = 0, kRelu, kGelu, kGeluTanh, kTanh, kSigmoid, kSilu };

// A tensor seen as [outer, channels, inner] with strides in elements; a row is one (outer, inner) position.
struct View {
    int64_t outer, channels, inner;
    int64_t outer_stride, channel_stride, inner_stride;
};

// Elements from a view's first row to another; dividing 64-bit integers is slow, and most views need not.
ESPER_HD int64_t row_offset(const View& view, int64_t row) {
    if (view.inner == 1) return row * view.outer_stride;
    const int64_t outer = row / view.inner;
    return outer * view.outer_stride + (row - outer * view.inner) * view.inner_stride;
}

struct Moments {
    double n, mean, m2;
};

// Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".
ESPER_HD Moments merge(Moments a, Moments b) {
    const double n = a.n + b.n;
    const double weight = n > 0.0 ? b.n / n : 0.0;
    const double delta = b.mean - a.mean;
    return {n, a.mean + delta * weight, a.m2 + b.m2 + delta * delta * (a.n * weight)};
}

ESPER_HD void merge_column(double* into, int64_t stride, Moments m, double absmax, double nonfinite) {
    const Moments r = merge({into[kCount * stride], into[kMean * stride], into[kM2 * stride]}, m);
    into[kCount * stride] = r.n;
    into[kMean * stride] = r.mean;
    into[kM2 * stride] = r.m2;
    into[kAbsMax * stride] = absmax > into[kAbsMax * stride] ? absmax : into[kAbsMax * stride];
    into[kNonFinite * stride] += nonfinite;
}

ESPER_HD void merge_chunk(double* into, int64_t stride, Moments m, double skipped) {
    const Moments r = merge({into[kRows * stride], into[kRowMean * stride], into[kRowM2 * stride]}, m);
    into[kRows * stride] = r.n;
    into[kRowMean * stride] = r.mean;
    into[kRowM2 * stride] = r.m2;
    into[kSkipped * stride] += skipped;
}

// Seed s of `seeds` watches the features [chunk_begin(s), chunk_begin(s + 1)).
ESPER_HD int64_t chunk_begin(int64_t s, int64_t channels, int64_t seeds) { return s * channels / seeds; }

// The health of seed s; formulas in docs/monitoring.md. `out` and `chunks` have row stride `seeds`.
ESPER_HD void seed_health(const double* features, const double* chunks, int64_t channels, int64_t seeds, int64_t s,
                          double eps, double* out) {
    const int64_t begin = chunk_begin(s, channels, seeds), end = chunk_begin(s + 1, channels, seeds);
    double n = 0.0, mean = 0.0, within = 0.0, sum_variance = 0.0, bad = 0.0, dead = 0.0;
    for (int64_t c = begin; c < end; ++c) {
        const double count = features[kCount * channels + c], m2 = features[kM2 * channels + c];
        n += count;
        mean += n > 0.0 ? (features[kMean * channels + c] - mean) * (count / n) : 0.0;
        within += m2;
        sum_variance += count > 0.0 ? m2 / count : 0.0;
        bad += features[kNonFinite * channels + c];
        dead += count > 0.0 && features[kAbsMax * channels + c] <= eps ? 1.0 : 0.0;
    }
    double between = 0.0;
    for (int64_t c = begin; c < end; ++c) {
        const double delta = features[kMean * channels + c] - mean;
        between += features[kCount * channels + c] * (delta * delta);
    }
    const double width = static_cast<double>(end - begin);
    const double variance = n > 0.0 ? (within + between) / n : 0.0;
    const double rows = chunks[kRows * seeds + s];
    double correlation = 0.0;
    if (width > 1.0 && rows > 0.0 && sum_variance > 0.0) {
        correlation = (chunks[kRowM2 * seeds + s] / rows - sum_variance) / ((width - 1.0) * sum_variance);
        const double low = -1.0 / (width - 1.0);
        correlation = correlation < low ? low : (correlation > 1.0 ? 1.0 : correlation);
    }
    const double dead_ratio = width > 0.0 ? dead / width : 0.0;
    double score;
    if (n == 0.0 && bad == 0.0) {
        score = static_cast<double>(NAN);  // nothing was seen: no opinion
    } else if (bad > 0.0) {
        score = 0.0;
    } else {
        const double w = within / n, level = variance + mean * mean;
        const double moving = w > 0.0 ? w / (w + 1e-4 * level) : 0.0;
        score = (1.0 - dead_ratio) * (1.0 - (correlation > 0.0 ? correlation : 0.0)) * moving;
    }
    out[kSamples * seeds + s] = n;
    out[kActMean * seeds + s] = mean;
    out[kActVariance * seeds + s] = variance;
    out[kDead * seeds + s] = dead_ratio;
    out[kCorrelation * seeds + s] = correlation;
    out[kBad * seeds + s] = bad;
    out[kScore * seeds + s] = score;
}

}  // namespace esper::stats
