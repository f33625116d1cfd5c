#pragma GCC optimize("fp-contract=fast")  // no other backend has to agree bit for bit, so products may fuse
#pragma GCC diagnostic ignored "-Wpsabi"  // every function with a vector is inlined: there is no ABI to speak of

#include "graft_bank.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <stdexcept>
#include <string>

#include "graft_core.h"
#include "graft_simd.h"

namespace esper::graft {
namespace {

template <typename T>
T* scratch(int which, std::size_t size) {
    thread_local std::vector<T> buffers[4];
    auto& buffer = buffers[which];
    if (buffer.size() < size) buffer.resize(size);
    return buffer.data();
}

// The products of graft_simd.h as one instruction set has them.
template <typename T>
struct Products {
    void (*nt)(const T* a, std::int64_t lda, const T* b, std::int64_t ldb, const std::int32_t* rows, std::int64_t ni,
               std::int64_t nj, std::int64_t k0, std::int64_t k1, T* out, std::int64_t ldo);
    bool (*nn)(const Nn<T>& p, std::int64_t ni, std::int64_t c0, std::int64_t c1);
    bool (*scan)(const T* values, std::int64_t count);
};

#define ESPER_PRODUCTS(name, attributes, bytes)                                                                       \
    struct name {                                                                                                     \
        template <typename T>                                                                                         \
        attributes static void nt(const T* a, std::int64_t lda, const T* b, std::int64_t ldb,                         \
                                  const std::int32_t* rows, std::int64_t ni, std::int64_t nj, std::int64_t k0,        \
                                  std::int64_t k1, T* out, std::int64_t ldo) {                                        \
            product_nt<T, bytes>(a, lda, b, ldb, rows, ni, nj, k0, k1, out, ldo);                                     \
        }                                                                                                             \
        template <typename T>                                                                                         \
        attributes static bool nn(const Nn<T>& p, std::int64_t ni, std::int64_t c0, std::int64_t c1) {                \
            return product_nn<T, bytes>(p, ni, c0, c1);                                                               \
        }                                                                                                             \
        template <typename T>                                                                                         \
        attributes static bool scan(const T* values, std::int64_t count) {                                            \
            return scan_finite<T, bytes>(values, count);                                                              \
        }                                                                                                             \
        template <typename T>                                                                                         \
        static constexpr Products<T> all() {                                                                          \
            return {nt<T>, nn<T>, scan<T>};                                                                           \
        }                                                                                                             \
    };

ESPER_PRODUCTS(Baseline, , 16)
#if defined(__x86_64__)
#define ESPER_HAS_X86_PRODUCTS 1
ESPER_PRODUCTS(Avx2, __attribute__((target("avx2,fma"), flatten)), 32)
ESPER_PRODUCTS(Avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"), flatten)), 64)
#endif
#undef ESPER_PRODUCTS

std::vector<std::string> supported() {
    std::vector<std::string> names{"baseline"};
#ifdef ESPER_HAS_X86_PRODUCTS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        names.push_back("avx2");
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw"))
            names.push_back("avx512");
    }
#endif
    return names;
}

template <typename T>
Products<T> products_named(const std::string& name) {
#ifdef ESPER_HAS_X86_PRODUCTS
    if (name == "avx2") return Avx2::all<T>();
    if (name == "avx512") return Avx512::all<T>();
#endif
    return Baseline::all<T>();
}

// What this processor has, found out once.
template <typename T>
Products<T>& products() {
    static Products<T> chosen = products_named<T>(supported().back());
    return chosen;
}

template <typename T>
void nt(const T* a, std::int64_t lda, const T* b, std::int64_t ldb, const std::int32_t* rows, std::int64_t ni,
        std::int64_t nj, std::int64_t k0, std::int64_t k1, T* out, std::int64_t ldo) {
    products<T>().nt(a, lda, b, ldb, rows, ni, nj, k0, k1, out, ldo);
}

template <typename T>
bool nn(const T* a, std::int64_t si, std::int64_t sj, const T* b, std::int64_t ldb, const std::int32_t* rows,
        std::int64_t ni, std::int64_t nj, std::int64_t c0, std::int64_t c1, T* out, std::int64_t ldo, const T* start,
        T factor) {
    return products<T>().nn({a, si, sj, b, ldb, rows, nj, out, ldo, start, factor}, ni, c0, c1);
}

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kCubic = 0.044715;

template <typename T>
T sigmoid(T v) {
    // Written so that exp never overflows.
    const T e = std::exp(-std::abs(v));
    return v >= T(0) ? T(1) / (T(1) + e) : e / (T(1) + e);
}

template <typename T>
T activate_one(Act act, T v) {
    switch (act) {
        case Act::none: return v;
        case Act::relu: return v < T(0) ? T(0) : v;  // NaN stays NaN
        case Act::gelu: return T(0.5) * v * (T(1) + std::erf(v * T(kSqrtHalf)));
        case Act::gelu_tanh: return T(0.5) * v * (T(1) + std::tanh(T(kSqrt2OverPi) * (v + T(kCubic) * v * v * v)));
        case Act::tanh: return std::tanh(v);
        case Act::sigmoid: return sigmoid(v);
        case Act::silu: return v * sigmoid(v);
    }
    return v;
}

template <typename T>
T slope(Act act, T v) {
    switch (act) {
        case Act::none: return T(1);
        case Act::relu: return v > T(0) ? T(1) : T(0);
        case Act::gelu:
            return T(0.5) * (T(1) + std::erf(v * T(kSqrtHalf))) + v * T(kInvSqrt2Pi) * std::exp(T(-0.5) * v * v);
        case Act::gelu_tanh: {
            const T t = std::tanh(T(kSqrt2OverPi) * (v + T(kCubic) * v * v * v));
            return T(0.5) * (T(1) + t) +
                   T(0.5) * v * (T(1) - t * t) * T(kSqrt2OverPi) * (T(1) + T(3 * kCubic) * v * v);
        }
        case Act::tanh: {
            const T t = std::tanh(v);
            return T(1) - t * t;
        }
        case Act::sigmoid: {
            const T s = sigmoid(v);
            return s * (T(1) - s);
        }
        case Act::silu: {
            const T s = sigmoid(v);
            return s * (T(1) + v * (T(1) - s));
        }
    }
    return T(1);
}

}  // namespace

template <typename T>
bool all_finite(const T* values, std::int64_t count) {
    return products<T>().scan(values, count);
}

std::vector<std::string> instruction_sets() { return supported(); }

void use_instruction_set(const std::string& name) {
    const std::vector<std::string> names = supported();
    if (std::find(names.begin(), names.end(), name) == names.end())
        throw std::invalid_argument("this processor has no instruction set named " + name);
    products<float>() = products_named<float>(name);
    products<double>() = products_named<double>(name);
}

Bank::Bank(std::vector<BankSeed> seeds, std::int64_t d_in, std::int64_t d_out, std::int64_t rows)
    : seeds_(std::move(seeds)), row_seed_(static_cast<std::size_t>(rows)), d_in_(d_in), d_out_(d_out), rows_(rows),
      linear_(true) {
    std::set<std::int64_t> borders{0, d_out};
    for (std::size_t s = 0; s < seeds_.size(); ++s) {
        const BankSeed& seed = seeds_[s];
        borders.insert(seed.col0);
        borders.insert(seed.col1);
        linear_ = linear_ && seed.act == Act::none;
        for (std::int64_t r = seed.row0; r < seed.row1; ++r) row_seed_[static_cast<std::size_t>(r)] = static_cast<std::uint32_t>(s);
    }
    for (auto border = borders.begin(); std::next(border) != borders.end(); ++border)
        groups_.push_back({*border, *std::next(border)});
}

template <typename T>
void Bank::coefficients(const float* alpha, T* table) const {
    const std::size_t stride = seeds_.size() + 1;
    for (std::size_t g = 0; g < groups_.size(); ++g) {
        T sum = 0;
        for (const BankSeed& seed : seeds_)
            if (seed.replace && seed.col0 <= groups_[g].begin && groups_[g].end <= seed.col1) sum += T(alpha[seed.index]);
        const T scale = replace_scale(sum);
        for (std::size_t s = 0; s < seeds_.size(); ++s) {
            const BankSeed& seed = seeds_[s];
            const bool overlaps = seed.col0 < groups_[g].end && groups_[g].begin < seed.col1;
            table[g * stride + s] = !overlaps ? T(0) : T(alpha[seed.index]) * (seed.replace ? scale : T(1));
        }
        table[g * stride + seeds_.size()] = host_factor(sum);
    }
}

template <typename T>
bool Bank::counts(const T* table, std::size_t seed) const {
    for (std::size_t g = 0; g < groups_.size(); ++g)
        if (table[g * (seeds_.size() + 1) + seed] != T(0)) return true;
    return false;
}

template <typename T>
std::vector<std::int32_t> Bank::live_rows(const T* table) const {
    std::vector<std::int32_t> rows;
    rows.reserve(static_cast<std::size_t>(rows_));
    for (std::size_t s = 0; s < seeds_.size(); ++s)
        if (counts(table, s))
            for (std::int64_t r = seeds_[s].row0; r < seeds_[s].row1; ++r) rows.push_back(static_cast<std::int32_t>(r));
    return rows;
}

// So much of x is worked on at a time: it stays in the second-level cache while all of down passes over it.
constexpr std::int64_t kBlockBytes = 256 << 10;
constexpr std::int64_t kLeastRows = 12;  // some of every tile, whatever the width

template <typename T>
bool Bank::forward(const T* x, const T* h, T* y, const T* down, const T* up, const T* bias, const T* table,
                   std::int64_t n) const {
    const std::int64_t row_bytes = static_cast<std::int64_t>(sizeof(T)) * std::max<std::int64_t>(d_in_, 1);
    const std::int64_t block = std::max(kLeastRows, kBlockBytes / row_bytes);
    bool finite = true;
    for (std::int64_t i = 0; i < n; i += block)
        finite &= forward_rows(x + i * d_in_, h + i * d_out_, y + i * d_out_, down, up, bias, table, std::min(block, n - i));
    return finite;
}

template <typename T>
bool Bank::forward_rows(const T* x, const T* h, T* y, const T* down, const T* up, const T* bias, const T* table,
                        std::int64_t n) const {
    if (groups_.size() == 1 && linear_ && !bias) {
        // The usual case, kept free of index lists: at small sizes they cost as much as the products.
        bool all = true;
        for (std::size_t s = 0; s < seeds_.size(); ++s) all = all && table[s] != T(0);
        if (all) {
            T* z = scratch<T>(0, static_cast<std::size_t>(n * rows_));
            nt(x, d_in_, down, d_in_, nullptr, n, rows_, 0, d_in_, z, rows_);
            for (std::int64_t i = 0; i < n; ++i)
                for (std::size_t s = 0; s < seeds_.size(); ++s)
                    for (std::int64_t r = seeds_[s].row0; r < seeds_[s].row1; ++r) z[i * rows_ + r] *= table[s];
            const T host = table[seeds_.size()];
            return nn(z, rows_, 1, up, d_out_, nullptr, n, rows_, 0, d_out_, y, d_out_, host == T(0) ? nullptr : h, host);
        }
    }
    const std::vector<std::int32_t> rows = live_rows(table);
    const auto live = static_cast<std::int64_t>(rows.size());
    const std::int32_t* row = rows.data();
    const std::int32_t* listed = live == rows_ ? nullptr : row;  // products are faster without a list
    const std::uint32_t* owner = row_seed_.data();
    T* z = scratch<T>(0, static_cast<std::size_t>(n * live));
    nt(x, d_in_, down, d_in_, listed, n, live, 0, d_in_, z, live);
    if (bias || !linear_)
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t j = 0; j < live; ++j) {
                const std::int32_t r = row[j];
                T& v = z[i * live + j];
                v = activate_one(seeds_[owner[r]].act, v + (bias ? bias[r] : T(0)));
            }
    bool finite = true;
    T* scaled = scratch<T>(1, static_cast<std::size_t>(n * live));
    std::vector<std::int32_t> group_rows;
    for (std::size_t g = 0; g < groups_.size(); ++g) {
        const T* line = table + g * (seeds_.size() + 1);
        const T host = line[seeds_.size()];
        // A seed that counts elsewhere but not here must not be read here.
        group_rows.clear();
        for (std::int64_t j = 0; j < live; ++j) {
            const std::int32_t r = row[j];
            const T c = line[owner[r]];
            if (c == T(0)) continue;
            const auto column = static_cast<std::int64_t>(group_rows.size());
            for (std::int64_t i = 0; i < n; ++i) scaled[i * live + column] = c * z[i * live + j];
            group_rows.push_back(r);
        }
        const auto used = static_cast<std::int64_t>(group_rows.size());
        const Span span = groups_[g];
        // A factor of 0 must not read h: 0 * inf is NaN.
        const T* start = host == T(0) ? nullptr : h;
        const std::int32_t* used_rows = used == rows_ ? nullptr : group_rows.data();
        finite &= nn(scaled, live, 1, up, d_out_, used_rows, n, used, span.begin, span.end, y, d_out_, start, host);
    }
    return finite;
}

template <typename T>
void Bank::backward(const T* x, const T* gy, const T* down, const T* up, const T* bias, const T* table, std::int64_t n,
                    T* gx, T* gh, T* gdown, T* gup, T* gbias) const {
    const std::vector<std::int32_t> rows = live_rows(table);
    const auto live = static_cast<std::int64_t>(rows.size());
    const std::int32_t* row = rows.data();
    const std::int32_t* listed = live == rows_ ? nullptr : row;
    const std::uint32_t* owner = row_seed_.data();
    const auto size = static_cast<std::size_t>(n * live);
    const std::size_t stride = seeds_.size() + 1;
    T* z = scratch<T>(0, size);
    T* gz = scratch<T>(1, size);
    T* part = scratch<T>(2, size);
    const T* none = nullptr;
    const bool nonlinear = bias || !linear_;
    if (gup || nonlinear) nt(x, d_in_, down, d_in_, listed, n, live, 0, d_in_, z, live);
    if (gup) std::fill(gup, gup + rows_ * d_out_, T(0));
    std::fill(gz, gz + size, T(0));
    std::vector<T> factors(static_cast<std::size_t>(live));
    for (std::size_t g = 0; g < groups_.size(); ++g) {
        const Span span = groups_[g];
        nt(gy, d_out_, up, d_out_, listed, n, live, span.begin, span.end, part, live);
        for (std::int64_t j = 0; j < live; ++j) factors[static_cast<std::size_t>(j)] = table[g * stride + owner[row[j]]];
        const T* factor = factors.data();
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t j = 0; j < live; ++j)
                gz[i * live + j] = factor[j] == T(0) ? gz[i * live + j] : gz[i * live + j] + factor[j] * part[i * live + j];
    }
    T* active = z;
    if (nonlinear) {
        active = scratch<T>(3, size);
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t j = 0; j < live; ++j) {
                const std::int32_t r = row[j];
                const Act act = seeds_[owner[r]].act;
                const T pre = z[i * live + j] + (bias ? bias[r] : T(0));
                active[i * live + j] = activate_one(act, pre);
                gz[i * live + j] *= slope(act, pre);
            }
    }
    if (gup) {
        for (std::size_t g = 0; g < groups_.size(); ++g) {
            const Span span = groups_[g];
            for (std::int64_t j = 0; j < live;) {
                // One product for each run of rows that belong to the same seed: its rows of gup are neighbours.
                const std::size_t s = owner[row[j]];
                const std::int64_t count = seeds_[s].row1 - seeds_[s].row0;
                const T c = table[g * stride + s];
                if (c != T(0)) {
                    for (std::int64_t i = 0; i < n; ++i)
                        for (std::int64_t r = 0; r < count; ++r) part[i * count + r] = c * active[i * live + j + r];
                    nn(part, 1, count, gy, d_out_, nullptr, count, n, span.begin, span.end,
                             gup + seeds_[s].row0 * d_out_, d_out_, none, T(0));
                }
                j += count;
            }
        }
    }
    if (gx) nn(gz, live, 1, down, d_in_, listed, n, live, 0, d_in_, gx, d_in_, none, T(0));
    if (gdown) {
        std::fill(gdown, gdown + rows_ * d_in_, T(0));
        for (std::int64_t j = 0; j < live;) {
            const std::int32_t first = row[j];
            std::int64_t count = 1;
            while (j + count < live && row[j + count] == first + count) ++count;
            nn(gz + j, 1, live, x, d_in_, nullptr, count, n, 0, d_in_, gdown + first * d_in_, d_in_, none, T(0));
            j += count;
        }
    }
    if (gbias) {
        std::fill(gbias, gbias + rows_, T(0));
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t j = 0; j < live; ++j) gbias[row[j]] += gz[i * live + j];
    }
    if (gh)
        for (std::size_t g = 0; g < groups_.size(); ++g) {
            const T host = table[g * stride + seeds_.size()];
            for (std::int64_t i = 0; i < n; ++i)
                for (std::int64_t c = groups_[g].begin; c < groups_[g].end; ++c) gh[i * d_out_ + c] = host * gy[i * d_out_ + c];
        }
}

template <typename T>
void Bank::activate(const T* pre, T* scaled, const T* bias, const T* table, std::int64_t n) const {
    for (std::int64_t i = 0; i < n; ++i)
        for (const BankSeed& seed : seeds_) {
            const T c = table[&seed - seeds_.data()];
            for (std::int64_t r = seed.row0; r < seed.row1; ++r) {
                const T v = activate_one(seed.act, pre[i * rows_ + r] + (bias ? bias[r] : T(0)));
                scaled[i * rows_ + r] = c == T(0) ? T(0) : c * v;
            }
        }
}

template <typename T>
void Bank::activate_backward(T* gz, const T* pre, const T* bias, const T* table, std::int64_t n) const {
    for (std::int64_t i = 0; i < n; ++i)
        for (const BankSeed& seed : seeds_) {
            const T c = table[&seed - seeds_.data()];
            for (std::int64_t r = seed.row0; r < seed.row1; ++r) {
                T& v = gz[i * rows_ + r];
                v = c == T(0) ? T(0) : c * v;  // a seed that is switched off may hold NaN
                if (c != T(0) && seed.act != Act::none) v *= slope(seed.act, pre[i * rows_ + r] + (bias ? bias[r] : T(0)));
            }
        }
}

#define ESPER_GRAFT_INSTANCE(T)                                                                                       \
    template bool all_finite<T>(const T*, std::int64_t);                                                              \
    template void Bank::coefficients<T>(const float*, T*) const;                                                      \
    template bool Bank::counts<T>(const T*, std::size_t) const;                                                       \
    template bool Bank::forward<T>(const T*, const T*, T*, const T*, const T*, const T*, const T*, std::int64_t) const; \
    template void Bank::backward<T>(const T*, const T*, const T*, const T*, const T*, const T*, std::int64_t, T*, T*, T*, \
                                    T*, T*) const;                                                                    \
    template void Bank::activate<T>(const T*, T*, const T*, const T*, std::int64_t) const;                                  \
    template void Bank::activate_backward<T>(T*, const T*, const T*, const T*, std::int64_t) const;
ESPER_GRAFT_INSTANCE(float)
ESPER_GRAFT_INSTANCE(double)
#undef ESPER_GRAFT_INSTANCE

}  // namespace esper::graft
