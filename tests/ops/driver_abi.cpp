// Compiled, never run: what csrc/driver.h says of the driver's interface is what CUDA's own header says.
#include <cuda.h>

#include <type_traits>

#include "driver.h"

using esper::driver::Api;

// Parameters pass alike: as many, each as large, and pointers where pointers are.
template <typename A, typename B>
constexpr bool alike_one = sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
template <>
constexpr bool alike_one<CUdeviceptr, void*> = true;

template <typename Theirs, typename Ours>
struct Alike : std::false_type {};
template <typename RA, typename... A, typename RB, typename... B>
struct Alike<RA (*)(A...), RB (*)(B...)> {
    static constexpr bool value = [] {
        if constexpr (sizeof...(A) == sizeof...(B)) {
            return sizeof(RA) == sizeof(RB) && (alike_one<A, B> && ...);
        } else {
            return false;
        }
    }();
};

#define CHECK(function, member) static_assert(Alike<decltype(&function), decltype(Api::member)>::value, #function)
CHECK(cuInit, init);
CHECK(cuGetErrorName, error_name);
CHECK(cuGetErrorString, error_string);
CHECK(cuDriverGetVersion, driver_version);
CHECK(cuDeviceGetCount, device_count);
CHECK(cuDeviceGet, device_get);
CHECK(cuDeviceGetAttribute, device_attribute);
CHECK(cuDevicePrimaryCtxRetain, primary_retain);
CHECK(cuDevicePrimaryCtxRelease, primary_release);
CHECK(cuCtxGetCurrent, context_current);
CHECK(cuCtxPushCurrent, context_push);
CHECK(cuCtxPopCurrent, context_pop);
CHECK(cuThreadExchangeStreamCaptureMode, capture_mode);
CHECK(cuModuleLoadDataEx, module_load);
CHECK(cuModuleUnload, module_unload);
CHECK(cuModuleGetFunction, module_function);
CHECK(cuFuncGetAttribute, function_get);
CHECK(cuFuncSetAttribute, function_set);
CHECK(cuLaunchKernel, launch);

// The numbers that csrc/driver.cpp and the tests use.
static_assert(CUDA_SUCCESS == 0);
static_assert(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == 75 && CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == 76);
static_assert(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8);
static_assert(CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES == 3 && CU_FUNC_ATTRIBUTE_NUM_REGS == 4);
static_assert(CU_STREAM_CAPTURE_MODE_GLOBAL == 0 && CU_STREAM_CAPTURE_MODE_THREAD_LOCAL == 1);
static_assert(CU_JIT_INFO_LOG_BUFFER == 3 && CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES == 4);
static_assert(CU_JIT_ERROR_LOG_BUFFER == 5 && CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES == 6);

// The names behind the header's own names, for tests/ops/test_driver.py to compare with those looked up.
#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
const char* const names[] = {
    TEXT(cuInit), TEXT(cuGetErrorName), TEXT(cuGetErrorString), TEXT(cuDriverGetVersion), TEXT(cuDeviceGetCount), TEXT(cuDeviceGet),
    TEXT(cuDeviceGetAttribute), TEXT(cuDevicePrimaryCtxRetain), TEXT(cuDevicePrimaryCtxRelease), TEXT(cuCtxGetCurrent),
    TEXT(cuCtxPushCurrent), TEXT(cuCtxPopCurrent), TEXT(cuModuleLoadDataEx), TEXT(cuModuleUnload), TEXT(cuModuleGetFunction),
    TEXT(cuFuncGetAttribute), TEXT(cuFuncSetAttribute), TEXT(cuLaunchKernel),
    TEXT(cuThreadExchangeStreamCaptureMode),
};
