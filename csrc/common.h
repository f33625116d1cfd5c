// What every kernel family shares: the marker that lets one function serve the C++ and the CUDA backend.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ESPER_HD __host__ __device__ __forceinline__
#else
#define ESPER_HD inline __attribute__((always_inline))
#endif

namespace esper {

// Raw addresses travel through pybind11 as integers; this gives them their type back.
template <typename T>
T* as(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace esper
