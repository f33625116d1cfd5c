// A tensor on the CPU as kernels see it, wherever it was found: by handle (torch_shim.h) or as a Python object (torch_view.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace esper {

enum class Kind { other, float32, float64, uint8, int32 };

template <typename T>
inline constexpr Kind kind_of = Kind::other;
template <>
inline constexpr Kind kind_of<float> = Kind::float32;
template <>
inline constexpr Kind kind_of<double> = Kind::float64;
template <>
inline constexpr Kind kind_of<std::uint8_t> = Kind::uint8;
template <>
inline constexpr Kind kind_of<std::int32_t> = Kind::int32;

// Sizes or strides, where they cost no allocation.
constexpr std::int64_t kMaxDim = 16;
class Numbers {
public:
    Numbers() = default;
    Numbers(const std::int64_t* values, std::int64_t count) : count_(static_cast<std::size_t>(count)) {
        if (count > kMaxDim) throw std::runtime_error("a tensor of " + std::to_string(count) + " dimensions is more than is served here");
        for (std::size_t i = 0; i < count_; ++i) values_[i] = values[i];
    }
    std::size_t size() const { return count_; }
    const std::int64_t* begin() const { return values_; }
    const std::int64_t* end() const { return values_ + count_; }
    std::int64_t operator[](std::size_t i) const { return values_[i]; }

private:
    std::size_t count_ = 0;
    std::int64_t values_[kMaxDim];
};

class Array {
public:
    Array(void* data, Kind kind, const Numbers& sizes, const Numbers& strides)
        : data_(data), kind_(kind), sizes_(sizes), strides_(strides) {}

    const Numbers& sizes() const { return sizes_; }
    std::int64_t size(std::size_t i) const { return sizes_[i]; }
    std::int64_t stride(std::size_t i) const { return strides_[i]; }
    std::size_t dim() const { return sizes_.size(); }
    std::int64_t last() const { return sizes_[sizes_.size() - 1]; }
    Kind kind() const { return kind_; }

    std::int64_t count() const {
        std::int64_t count = 1;
        for (const std::int64_t size : sizes_) count *= size;
        return count;
    }

    bool contiguous() const {
        std::int64_t step = 1;
        for (std::size_t i = sizes_.size(); i-- > 0; step *= sizes_[i])
            if (sizes_[i] != 1 && strides_[i] != step) return count() == 0;
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

private:
    void* data_;
    Kind kind_;
    Numbers sizes_, strides_;
};

}  // namespace esper
