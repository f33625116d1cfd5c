// Operations of PyTorch's dispatcher without its headers: through the C interface of its shared library that stays the same
// across versions from 2.10 (torch/csrc/stable, torch/csrc/inductor/aoti_torch/c/shim.h), looked up at run time.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "array.h"

namespace esper::shim {

using Value = std::uint64_t;  // an argument or a result: a number, or a handle that its receiver owns
using Handle = void*;
using Kernel = void (*)(Value* stack, std::uint64_t inputs, std::uint64_t outputs);

// torch's functions; each gives 0 where it succeeds.
struct Api {
    int (*delete_tensor)(Handle);
    int (*data)(Handle, void**);
    int (*dim)(Handle, std::int64_t*);
    int (*sizes)(Handle, std::int64_t**);
    int (*strides)(Handle, std::int64_t**);
    int (*dtype)(Handle, std::int32_t*);
    int (*list_size)(Handle, std::size_t*);
    int (*list_get)(Handle, std::size_t, Value*);
    int (*delete_list)(Handle);
    int (*parallel_for)(std::int64_t begin, std::int64_t end, std::int64_t grain,
                        void (*)(std::int64_t, std::int64_t, void*), void*);
    int (*num_threads)(std::uint32_t*);
    int (*library)(const char* space, const char* key, const char* file, std::uint32_t line, Handle*);
    int (*implement)(Handle library, const char* name, Kernel, std::uint64_t version);
    std::int32_t float32, float64, uint8, int32;
};

inline Api api;

inline void check(int error, const char* what) {
    if (error != 0) throw std::runtime_error(std::string("torch could not ") + what);
}

template <typename T>
T from_value(Value value) {
    T result;
    std::memcpy(&result, &value, sizeof(T));  // little endian, as everything that torch runs on
    return result;
}

// The arguments of a call, which belong to it: they are let go of at its end.
class Arguments {
public:
    Arguments() = default;
    Arguments(const Arguments&) = delete;
    Arguments& operator=(const Arguments&) = delete;
    ~Arguments() {
        for (const Handle handle : handles_) api.delete_tensor(handle);
    }

    Array tensor(Value value) {
        const auto handle = reinterpret_cast<Handle>(value);
        handles_.push_back(handle);
        std::int64_t dim = 0;
        std::int64_t *sizes = nullptr, *strides = nullptr;
        std::int32_t dtype = 0;
        void* data = nullptr;
        check(api.dim(handle, &dim) | api.sizes(handle, &sizes) | api.strides(handle, &strides) | api.data(handle, &data) |
                  api.dtype(handle, &dtype),
              "describe a tensor");
        return Array(data, kind(dtype), Numbers(sizes, dim), Numbers(strides, dim));
    }

    std::vector<Array> tensors(Value value) {
        const auto list = reinterpret_cast<Handle>(value);
        std::size_t size = 0;
        check(api.list_size(list, &size), "read a list");
        std::vector<Array> result;
        result.reserve(size);
        for (std::size_t i = 0; i < size; ++i) {
            Value element = 0;
            check(api.list_get(list, i, &element), "read a list");
            result.push_back(tensor(element));
        }
        check(api.delete_list(list), "free a list");
        return result;
    }

private:
    static Kind kind(std::int32_t dtype) {
        if (dtype == api.float32) return Kind::float32;
        if (dtype == api.float64) return Kind::float64;
        if (dtype == api.uint8) return Kind::uint8;
        return dtype == api.int32 ? Kind::int32 : Kind::other;
    }

    std::vector<Handle> handles_;
};

// f(begin, end) for the parts of [0, count), on torch's threads; f must not throw.
template <typename F>
void parallel_for(std::int64_t count, std::int64_t grain, const F& f) {
    check(api.parallel_for(
              0, count, grain,
              [](std::int64_t begin, std::int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
              const_cast<void*>(static_cast<const void*>(&f))),
          "run in parallel");
}

}  // namespace esper::shim
