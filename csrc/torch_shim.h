// Operations of PyTorch's dispatcher without its headers: through the C interface of its shared library that stays the same
// across versions from 2.10 (torch/csrc/stable, torch/csrc/inductor/aoti_torch/c/shim.h), looked up at run time.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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
    int (*empty)(std::int64_t dim, const std::int64_t* sizes, const std::int64_t* strides, std::int32_t dtype,
                 std::int32_t device_type, std::int32_t device_index, Handle*);
    int (*new_list)(std::size_t, Handle*);
    int (*list_size)(Handle, std::size_t*);
    int (*list_get)(Handle, std::size_t, Value*);
    int (*list_push)(Handle, Value);
    int (*delete_list)(Handle);
    int (*parallel_for)(std::int64_t begin, std::int64_t end, std::int64_t grain,
                        void (*)(std::int64_t, std::int64_t, void*), void*);
    int (*num_threads)(std::uint32_t*);
    int (*library)(const char* space, const char* key, const char* file, std::uint32_t line, Handle*);
    int (*implement)(Handle library, const char* name, Kernel, std::uint64_t version);
    std::int32_t float32, float64, uint8, int32, cpu;
};

inline Api api;

inline void check(int error, const char* what) {
    if (error != 0) throw std::runtime_error(std::string("torch could not ") + what);
}

template <typename T>
std::int32_t dtype_of();
template <>
inline std::int32_t dtype_of<float>() { return api.float32; }
template <>
inline std::int32_t dtype_of<double>() { return api.float64; }
template <>
inline std::int32_t dtype_of<std::uint8_t>() { return api.uint8; }
template <>
inline std::int32_t dtype_of<std::int32_t>() { return api.int32; }

template <typename T>
T from_value(Value value) {
    T result;
    std::memcpy(&result, &value, sizeof(T));  // little endian, as everything that torch runs on
    return result;
}

// Sizes or strides, where they cost no allocation.
constexpr std::int64_t kMaxDim = 16;
class Numbers {
public:
    Numbers() = default;
    Numbers(const std::int64_t* values, std::int64_t count) : count_(static_cast<std::size_t>(count)) {
        for (std::size_t i = 0; i < count_; ++i) values_[i] = values[i];
    }
    Numbers(std::initializer_list<std::int64_t> values) : Numbers(values.begin(), static_cast<std::int64_t>(values.size())) {}
    std::size_t size() const { return count_; }
    const std::int64_t* begin() const { return values_; }
    const std::int64_t* end() const { return values_ + count_; }
    std::int64_t operator[](std::size_t i) const { return values_[i]; }
    std::int64_t& operator[](std::size_t i) { return values_[i]; }

private:
    std::size_t count_ = 0;
    std::int64_t values_[kMaxDim];
};

// A tensor on the CPU that lets go of itself.
class Tensor {
public:
    Tensor() = default;
    explicit Tensor(Value owned) : Tensor(reinterpret_cast<Handle>(owned)) {}
    explicit Tensor(Handle owned) : handle_(owned) {
        std::int64_t dim = 0;
        std::int64_t *sizes = nullptr, *strides = nullptr;
        check(api.dim(handle_, &dim) | api.sizes(handle_, &sizes) | api.strides(handle_, &strides) |
                  api.data(handle_, &data_) | api.dtype(handle_, &dtype_),
              "describe a tensor");
        if (dim > kMaxDim) {
            api.delete_tensor(handle_);
            throw std::runtime_error("a tensor of " + std::to_string(dim) + " dimensions is more than is served here");
        }
        sizes_ = Numbers(sizes, dim);
        strides_ = Numbers(strides, dim);
    }
    Tensor(Tensor&& other) noexcept { swap(other); }
    Tensor& operator=(Tensor&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Tensor() {
        if (handle_ != nullptr) api.delete_tensor(handle_);
    }

    template <typename T>
    static Tensor empty(const Numbers& sizes, const Numbers& strides) {
        Handle made = nullptr;
        check(api.empty(static_cast<std::int64_t>(sizes.size()), sizes.begin(), strides.begin(), dtype_of<T>(), api.cpu, 0, &made),
              "allocate a tensor");
        return Tensor(made);
    }
    template <typename T>
    static Tensor empty(const Numbers& sizes) {
        return empty<T>(sizes, contiguous_strides(sizes));
    }

    static Numbers contiguous_strides(const Numbers& sizes) {
        Numbers strides = sizes;
        std::int64_t step = 1;
        for (std::size_t i = sizes.size(); i-- > 0; step *= sizes[i] < 1 ? 1 : sizes[i]) strides[i] = step;
        return strides;
    }

    const Numbers& sizes() const { return sizes_; }
    std::int64_t size(std::size_t i) const { return sizes_[i]; }
    std::int64_t stride(std::size_t i) const { return strides_[i]; }
    std::size_t dim() const { return sizes_.size(); }
    std::int64_t last() const { return sizes_[sizes_.size() - 1]; }
    std::int32_t dtype() const { return dtype_; }

    std::int64_t count() const {
        std::int64_t count = 1;
        for (const std::int64_t size : sizes_) count *= size;
        return count;
    }

    bool contiguous() const {
        std::int64_t step = 1;
        for (std::size_t i = sizes_.size(); i-- > 0; step *= sizes_[i])
            if (sizes_[i] != 1 && strides_[i] != step) return false;
        return true;
    }

    template <typename T>
    T* data() const {
        return static_cast<T*>(data_);
    }

    // Its numbers in a row: where they are, or copied into `store`.
    template <typename T>
    const T* dense(std::vector<T>* store) const {
        if (contiguous()) return data<T>();
        const std::int64_t total = count();
        store->resize(static_cast<std::size_t>(total));
        std::int64_t index[kMaxDim] = {};
        std::int64_t at = 0;
        for (std::int64_t i = 0; i < total; ++i) {
            (*store)[static_cast<std::size_t>(i)] = data<T>()[at];
            for (std::size_t d = sizes_.size(); d-- > 0;) {
                at += strides_[d];
                if (++index[d] < sizes_[d]) break;
                at -= index[d] * strides_[d];
                index[d] = 0;
            }
        }
        return store->data();
    }

    // For the stack, which takes it over.
    Value release() { return reinterpret_cast<Value>(std::exchange(handle_, nullptr)); }

private:
    void swap(Tensor& other) {
        std::swap(handle_, other.handle_);
        std::swap(data_, other.data_);
        std::swap(dtype_, other.dtype_);
        std::swap(sizes_, other.sizes_);
        std::swap(strides_, other.strides_);
    }

    Handle handle_ = nullptr;
    void* data_ = nullptr;
    std::int32_t dtype_ = 0;
    Numbers sizes_, strides_;
};

inline std::vector<Tensor> tensors(Value list_value) {
    const auto list = reinterpret_cast<Handle>(list_value);
    std::size_t size = 0;
    check(api.list_size(list, &size), "read a list");
    std::vector<Tensor> result;
    result.reserve(size);
    for (std::size_t i = 0; i < size; ++i) {
        Value element = 0;
        check(api.list_get(list, i, &element), "read a list");
        result.emplace_back(element);
    }
    check(api.delete_list(list), "free a list");
    return result;
}

inline Value list_of(std::vector<Tensor>& tensors) {
    Handle list = nullptr;
    check(api.new_list(tensors.size(), &list), "make a list");
    for (Tensor& tensor : tensors) check(api.list_push(list, tensor.release()), "fill a list");
    return reinterpret_cast<Value>(list);
}

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
