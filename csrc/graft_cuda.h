// Launchers of the graft kernels. Streams travel as opaque pointers, so that callers need no CUDA headers. Every launcher returns
// the cudaError_t of its launches as an int; none waits for the device.
#pragma once

#include <cstdint>

#include "graft_core.h"

namespace esper::graft {

// y = blend, or h where a seed is at fault; faults [seats.count] is written in full.
int blend_cuda(int dtype, std::int64_t outer, std::int64_t features, std::int64_t inner, const void* h, void* y,
               const Seats& seats, const float* alpha, std::uint8_t* faults, void* stream);

// Gradients for h and, at each seat's part, for the parts.
int blend_backward_cuda(int dtype, std::int64_t outer, std::int64_t features, std::int64_t inner, const void* gy, void* gh,
                        const Seats& seats, const float* alpha, const std::uint8_t* faults, void* stream);

}  // namespace esper::graft
