// The blend on CUDA: one pass that blends and looks for faults, one that does nothing unless there was a fault.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "graft_blend.h"
#include "graft_cuda.h"

namespace esper::graft {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 4096;  // the rest is a loop, so any size fits any grid

template <typename S>
struct Sum {
    using type = float;
};
template <>
struct Sum<double> {
    using type = double;
};

template <typename S>
struct Load {
    __device__ typename Sum<S>::type operator()(const void* base, std::int64_t at) const {
        return static_cast<typename Sum<S>::type>(static_cast<const S*>(base)[at]);
    }
};

template <typename S>
struct Round {
    using T = typename Sum<S>::type;
    __device__ T operator()(T value) const { return static_cast<T>(static_cast<S>(value)); }
};

template <typename S>
__global__ void blend_kernel(std::int64_t outer, std::int64_t features, std::int64_t inner, const S* h, S* y, Seats seats,
                             const float* alpha, std::uint8_t* faults) {
    using T = typename Sum<S>::type;
    const std::int64_t count = outer * features * inner;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        const std::int64_t at = i % inner, c = i / inner % features, o = i / inner / features;
        const T host = static_cast<T>(h[i]);
        const T value = blend_element(seats, alpha, host, o, c, inner, at, Load<S>{}, Round<S>{});
        y[i] = static_cast<S>(value);
        // Every thread that blames a seed writes the same 1, so the order does not matter.
        if (!is_finite(value))
            blame_element(seats, alpha, host, value, o, c, inner, at, Load<S>{}, Round<S>{},
                          [&](int s) { faults[s] = 1; });
    }
}

__device__ bool any_fault(const std::uint8_t* faults, int count) {
    bool found = false;
    for (int s = 0; s < count; ++s) found = found || faults[s] != 0;
    return found;
}

template <typename S>
__global__ void contain_kernel(std::int64_t count, const S* h, S* y, const std::uint8_t* faults, int seeds) {
    if (!any_fault(faults, seeds)) return;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) y[i] = h[i];
}

template <typename S>
__global__ void backward_kernel(std::int64_t outer, std::int64_t features, std::int64_t inner, const S* gy, S* gh,
                                Seats seats, const float* alpha, const std::uint8_t* faults) {
    using T = typename Sum<S>::type;
    const bool fault = any_fault(faults, seats.count);
    const std::int64_t count = outer * features * inner;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        const std::int64_t at = i % inner, c = i / inner % features, o = i / inner / features;
        const T g = static_cast<T>(gy[i]);
        const T replaced = replace_sum<T>(seats, alpha, c);
        gh[i] = fault ? gy[i] : static_cast<S>(host_factor(replaced) * g);
        for (int s = 0; s < seats.count; ++s) {
            const Seat& seat = seats.seat[s];
            if (c < seat.begin || c >= seat.end) continue;
            const T factor = coefficient(seat, alpha, replaced);
            S* out = static_cast<S*>(const_cast<void*>(seat.part));
            const T part = fault || factor == T(0) ? T(0) : factor * g;
            out[part_offset(seat, o, c, inner, at)] = static_cast<S>(part);
        }
    }
}

int blocks(std::int64_t count) {
    return static_cast<int>(std::min(kMaxBlocks, std::max<std::int64_t>(1, (count + kThreads - 1) / kThreads)));
}

template <typename S>
int blend(std::int64_t outer, std::int64_t features, std::int64_t inner, const void* h, void* y, const Seats& seats,
          const float* alpha, std::uint8_t* faults, cudaStream_t stream) {
    const std::int64_t count = outer * features * inner;
    cudaError_t error = cudaMemsetAsync(faults, 0, static_cast<std::size_t>(seats.count), stream);
    if (error != cudaSuccess || count == 0) return error;
    blend_kernel<S><<<blocks(count), kThreads, 0, stream>>>(outer, features, inner, static_cast<const S*>(h),
                                                            static_cast<S*>(y), seats, alpha, faults);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    contain_kernel<S><<<blocks(count), kThreads, 0, stream>>>(count, static_cast<const S*>(h), static_cast<S*>(y), faults,
                                                              seats.count);
    return cudaGetLastError();
}

template <typename S>
int backward(std::int64_t outer, std::int64_t features, std::int64_t inner, const void* gy, void* gh, const Seats& seats,
             const float* alpha, const std::uint8_t* faults, cudaStream_t stream) {
    const std::int64_t count = outer * features * inner;
    if (count == 0) return cudaSuccess;
    backward_kernel<S><<<blocks(count), kThreads, 0, stream>>>(outer, features, inner, static_cast<const S*>(gy),
                                                               static_cast<S*>(gh), seats, alpha, faults);
    return cudaGetLastError();
}

}  // namespace

int blend_cuda(int dtype, std::int64_t outer, std::int64_t features, std::int64_t inner, const void* h, void* y,
               const Seats& seats, const float* alpha, std::uint8_t* faults, void* stream) {
    const auto s = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case 0: return blend<float>(outer, features, inner, h, y, seats, alpha, faults, s);
        case 1: return blend<double>(outer, features, inner, h, y, seats, alpha, faults, s);
        case 2: return blend<__half>(outer, features, inner, h, y, seats, alpha, faults, s);
        case 3: return blend<__nv_bfloat16>(outer, features, inner, h, y, seats, alpha, faults, s);
        default: return cudaErrorInvalidValue;
    }
}

int blend_backward_cuda(int dtype, std::int64_t outer, std::int64_t features, std::int64_t inner, const void* gy, void* gh,
                        const Seats& seats, const float* alpha, const std::uint8_t* faults, void* stream) {
    const auto s = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case 0: return backward<float>(outer, features, inner, gy, gh, seats, alpha, faults, s);
        case 1: return backward<double>(outer, features, inner, gy, gh, seats, alpha, faults, s);
        case 2: return backward<__half>(outer, features, inner, gy, gh, seats, alpha, faults, s);
        case 3: return backward<__nv_bfloat16>(outer, features, inner, gy, gh, seats, alpha, faults, s);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace esper::graft
