// Launchers of the statistics kernels. Streams travel as opaque pointers, so that callers need no CUDA headers. Every launcher
// returns the cudaError_t of its launches as an int; none waits for the device.
#pragma once

#include <cstdint>

#include "stats_core.h"

namespace esper::stats {

// float64 numbers of workspace that accumulate_cuda needs; 0 when one block does it all.
int64_t workspace_cuda(int64_t rows, int64_t channels, int64_t seeds);

// Merges the statistics of x, or with an activation those of y = activation(x), into features and chunks.
int accumulate_cuda(const void* in, void* out, int dtype, int activation, const View& x, const View& y, int64_t seeds,
                    double* features, double* chunks, double* workspace, void* stream);

int merge_cuda(double* features, double* chunks, double* new_features, double* new_chunks, int64_t channels, int64_t seeds,
               void* stream);

int health_cuda(const double* features, const double* chunks, int64_t channels, int64_t seeds, double eps, double* out,
                void* stream);

}  // namespace esper::stats
