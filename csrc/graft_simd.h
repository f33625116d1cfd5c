// Two small matrix products and a scan, written with GCC's vector types for one width of register. Included only by
// graft_bank.cpp, which compiles them once for each instruction set, with everything inlined into its entry points.
//
// Sizes of tiles: 12 sums, so that the latency of a multiply-add (4 to 5 cycles, two a cycle) is covered, and no more,
// so that with what is loaded beside them they fit the 16 registers of AVX2. AVX-512 has 32: there a product of rows with rows
// takes 16, for a fourth more work on what is loaded.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

namespace esper::graft {

template <typename T, int Bytes>
struct Vec {
    static constexpr std::int64_t width = Bytes / static_cast<std::int64_t>(sizeof(T));
    typedef T type __attribute__((vector_size(Bytes)));
    // The same in memory, where it may begin anywhere. Through memcpy GCC 12 moves halves of a register, by way of the stack.
    typedef T unaligned __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
};

template <typename T, int Bytes>
ESPER_HD typename Vec<T, Bytes>::type load(const T* from) {
    return *reinterpret_cast<const typename Vec<T, Bytes>::unaligned*>(from);
}

template <typename T, int Bytes>
ESPER_HD void store(T* to, typename Vec<T, Bytes>::type value) {
    *reinterpret_cast<typename Vec<T, Bytes>::unaligned*>(to) = value;
}

// These lanes of two float vectors in a row.
template <int... Lanes, typename V>
ESPER_HD V shuffled(V v, V w) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(v, w, Lanes...);
#else
    typedef std::int32_t Mask __attribute__((vector_size(sizeof...(Lanes) * 4)));
    return __builtin_shuffle(v, w, Mask{Lanes...});
#endif
}

// Steps towards the sums of the lanes of several vectors of 16 floats: each makes one of two, with the sums of both, by adding
// neighbouring lanes, pairs of lanes, and quarters.
template <typename V>
ESPER_HD V add_lanes(V v, V w) {
    return shuffled<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(v, w) +
           shuffled<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(v, w);
}
template <typename V>
ESPER_HD V add_pairs(V v, V w) {
    return shuffled<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(v, w) +
           shuffled<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(v, w);
}
template <typename V>
ESPER_HD V add_quarters(V v, V w) {
    return shuffled<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(v, w) +
           shuffled<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(v, w);
}

// Of four vectors: in each quarter the sums of its lanes, one a vector.
template <typename V>
ESPER_HD V quarter_sums(const V* v) {
    return add_pairs(add_lanes(v[0], v[1]), add_lanes(v[2], v[3]));
}

// The sums of the lanes of four vectors.
template <typename T, int Bytes>
ESPER_HD void lane_sums(const typename Vec<T, Bytes>::type* v, T* out) {
    if constexpr (Bytes == 64 && sizeof(T) == 4) {
        const auto quarters = quarter_sums(v), whole = add_quarters(quarters, quarters), sums = add_quarters(whole, whole);
        std::memcpy(out, &sums, 4 * sizeof(T));
    } else if constexpr (Bytes > 16) {
        typedef typename Vec<T, Bytes / 2>::type Half;
        Half folded[4];
        for (int j = 0; j < 4; ++j) {
            Half halves[2];
            std::memcpy(halves, &v[j], sizeof(halves));
            folded[j] = halves[0] + halves[1];
        }
        lane_sums<T, Bytes / 2>(folded, out);
    } else if constexpr (sizeof(T) == 4) {
        // A transposition of 4 x 4 that adds as it goes: 9 instructions instead of 4 times 5.
        typedef typename Vec<T, 16>::type V;
        const V a = shuffled<0, 4, 2, 6>(v[0], v[1]) + shuffled<1, 5, 3, 7>(v[0], v[1]);
        const V b = shuffled<0, 4, 2, 6>(v[2], v[3]) + shuffled<1, 5, 3, 7>(v[2], v[3]);
        const V sums = shuffled<0, 1, 4, 5>(a, b) + shuffled<2, 3, 6, 7>(a, b);
        std::memcpy(out, &sums, sizeof(sums));
    } else {
        for (int j = 0; j < 4; ++j) out[j] = v[j][0] + v[j][1];
    }
}

// Sums over k in [k0, k1), a number that the registers' width divides, of TI rows of a with four of b; row(j) is where one begins.
template <typename T, int Bytes, int TI, typename Row>
ESPER_HD void sums_nt(const T* a, std::int64_t lda, const Row& row, std::int64_t k0, std::int64_t k1,
                      typename Vec<T, Bytes>::type (&sum)[TI][4]) {
    typedef typename Vec<T, Bytes>::type V;
#pragma GCC unroll 4
    for (int i = 0; i < TI; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = V{};
    for (std::int64_t k = k0; k < k1; k += Vec<T, Bytes>::width) {
        V av[TI];
#pragma GCC unroll 4
        for (int i = 0; i < TI; ++i) av[i] = load<T, Bytes>(a + i * lda + k);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const V bv = load<T, Bytes>(row(j) + k);
#pragma GCC unroll 4
            for (int i = 0; i < TI; ++i) sum[i][j] += av[i] * bv;
        }
    }
}

// TI rows of a with the four of b from `b` on. Nothing to look at and nothing left over: twice as fast at a width of 64.
template <typename T, int Bytes, int TI>
ESPER_HD void tile_nt(const T* a, std::int64_t lda, const T* b, std::int64_t ldb, std::int64_t count, T* out, std::int64_t ldo) {
    typename Vec<T, Bytes>::type sum[TI][4];
    sums_nt<T, Bytes, TI>(a, lda, [&](int j) { return b + j * ldb; }, 0, count, sum);
    if constexpr (Bytes == 64 && sizeof(T) == 4 && TI == 4) {
        // All sixteen at once, each in the order in which lane_sums adds.
        const auto upper = add_quarters(quarter_sums(sum[0]), quarter_sums(sum[1]));
        const auto sums = add_quarters(upper, add_quarters(quarter_sums(sum[2]), quarter_sums(sum[3])));
        T each[16];
        std::memcpy(each, &sums, sizeof(each));
#pragma GCC unroll 4
        for (int i = 0; i < TI; ++i) std::memcpy(out + i * ldo, each + 4 * i, 4 * sizeof(T));
    } else {
#pragma GCC unroll 4
        for (int i = 0; i < TI; ++i) lane_sums<T, Bytes>(sum[i], out + i * ldo);
    }
}

// The same for any four rows of b and any k in [k0, k1); `used` of the four are stored.
template <typename T, int Bytes, int TI>
ESPER_HD void ragged_nt(const T* a, std::int64_t lda, const T* const* bp, std::int64_t k0, std::int64_t k1, T* out,
                        std::int64_t ldo, int used) {
    constexpr std::int64_t W = Vec<T, Bytes>::width;
    const std::int64_t kv = k0 + (k1 - k0) / W * W;
    typename Vec<T, Bytes>::type sum[TI][4];
    sums_nt<T, Bytes, TI>(a, lda, [&](int j) { return bp[j]; }, k0, kv, sum);
#pragma GCC unroll 4
    for (int i = 0; i < TI; ++i) {
        T totals[4];
        lane_sums<T, Bytes>(sum[i], totals);
        for (int j = 0; j < used; ++j) {
            for (std::int64_t k = kv; k < k1; ++k) totals[j] += a[i * lda + k] * bp[j][k];
            out[i * ldo + j] = totals[j];
        }
    }
}

// out[i][j] = sum over k in [k0, k1) of a[i][k] * b[rows[j]][k]. Without rows, row j is j.
template <typename T, int Bytes>
ESPER_HD void product_nt(const T* a, std::int64_t lda, const T* b, std::int64_t ldb, const std::int32_t* rows,
                         std::int64_t ni, std::int64_t nj, std::int64_t k0, std::int64_t k1, T* out, std::int64_t ldo) {
    constexpr int kMost = Bytes == 64 ? 4 : 3;
    std::int64_t j = 0;
    if (rows == nullptr && (k1 - k0) % Vec<T, Bytes>::width == 0)
        for (; j + 4 <= nj; j += 4) {
            const T *left = a + k0, *four = b + j * ldb + k0;
            T* to = out + j;
            std::int64_t i = 0;
            for (; i + kMost <= ni; i += kMost) tile_nt<T, Bytes, kMost>(left + i * lda, lda, four, ldb, k1 - k0, to + i * ldo, ldo);
            for (; i + 2 <= ni; i += 2) tile_nt<T, Bytes, 2>(left + i * lda, lda, four, ldb, k1 - k0, to + i * ldo, ldo);
            if (i < ni) tile_nt<T, Bytes, 1>(left + i * lda, lda, four, ldb, k1 - k0, to + i * ldo, ldo);
        }
    for (; j < nj; j += 4) {
        const int used = static_cast<int>(nj - j < 4 ? nj - j : 4);
        const T* bp[4];
        for (int t = 0; t < 4; ++t) {
            const std::int64_t row = j + (t < used ? t : 0);
            bp[t] = b + (rows ? rows[row] : row) * ldb;
        }
        T* to = out + j;
        std::int64_t i = 0;
        for (; i + kMost <= ni; i += kMost) ragged_nt<T, Bytes, kMost>(a + i * lda, lda, bp, k0, k1, to + i * ldo, ldo, used);
        for (; i + 2 <= ni; i += 2) ragged_nt<T, Bytes, 2>(a + i * lda, lda, bp, k0, k1, to + i * ldo, ldo, used);
        if (i < ni) ragged_nt<T, Bytes, 1>(a + i * lda, lda, bp, k0, k1, to + i * ldo, ldo, used);
    }
}

// What product_nn works on; see there.
template <typename T>
struct Nn {
    const T* a;
    std::int64_t si, sj;
    const T* b;
    std::int64_t ldb;
    const std::int32_t* rows;
    std::int64_t nj;
    T* out;
    std::int64_t ldo;
    const T* start;
    T factor;
};

// Rows i to i + TI, columns c to c + TC registers; in b they begin at `at`.
template <typename T, int Bytes, int TI, int TC>
ESPER_HD void tile_nn(const Nn<T>& p, std::int64_t i0, std::int64_t c, std::int64_t at, typename Vec<T, Bytes>::type& check) {
    typedef typename Vec<T, Bytes>::type V;
    constexpr std::int64_t W = Vec<T, Bytes>::width;
    const V zero = {};
    V sum[TI][TC];
#pragma GCC unroll 4
    for (int i = 0; i < TI; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < TC; ++v)
            sum[i][v] = p.start ? load<T, Bytes>(p.start + (i0 + i) * p.ldo + c + v * W) * p.factor : -zero;
    for (std::int64_t j = 0; j < p.nj; ++j) {
        const T* bp = p.b + (p.rows ? p.rows[j] : j) * p.ldb + at;
        V bv[TC];
#pragma GCC unroll 4
        for (int v = 0; v < TC; ++v) bv[v] = load<T, Bytes>(bp + v * W);
#pragma GCC unroll 4
        for (int i = 0; i < TI; ++i) {
            const T w = p.a[(i0 + i) * p.si + j * p.sj];
#pragma GCC unroll 4
            for (int v = 0; v < TC; ++v) sum[i][v] += w * bv[v];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < TI; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < TC; ++v) {
            check += sum[i][v] * T(0);
            store<T, Bytes>(p.out + (i0 + i) * p.ldo + c + v * W, sum[i][v]);
        }
}

constexpr std::int64_t kPageBytes = 4096;  // lines of memory so far apart, or a multiple, share eight places of a first cache
constexpr std::int64_t kPackedBytes = 24 << 10;
constexpr std::int64_t kPackedRows = 24;  // so many rows of the result that to lay b out anew pays

// All rows of TC registers' columns: what b has there stays in the first cache. Where its rows would drive each other out of it,
// they are laid side by side first.
template <typename T, int Bytes, int TC>
ESPER_HD void panel_nn(const Nn<T>& given, std::int64_t ni, std::int64_t c, typename Vec<T, Bytes>::type& check) {
    constexpr std::int64_t size = sizeof(T), W = Vec<T, Bytes>::width, width = TC * W, room = kPackedBytes / size;
    Nn<T> p = given;
    alignas(64) T packed[room];
    std::int64_t at = c;
    if (ni >= kPackedRows && p.ldb * size % kPageBytes == 0 && p.nj * width <= room) {
        for (std::int64_t j = 0; j < p.nj; ++j) {
            const T* from = p.b + (p.rows ? p.rows[j] : j) * p.ldb + c;
#pragma GCC unroll 4
            for (int v = 0; v < TC; ++v) store<T, Bytes>(packed + j * width + v * W, load<T, Bytes>(from + v * W));
        }
        p.b = packed, p.ldb = width, p.rows = nullptr, at = 0;
    }
    std::int64_t i = 0;
    for (; i + 4 <= ni; i += 4) tile_nn<T, Bytes, 4, TC>(p, i, c, at, check);
    if (ni - i >= 2) {
        tile_nn<T, Bytes, 2, TC>(p, i, c, at, check);
        i += 2;
    }
    if (ni - i == 1) tile_nn<T, Bytes, 1, TC>(p, i, c, at, check);
}

// out[i][c] = factor * start[i][c] + sum over j of a[i * si + j * sj] * b[rows[j]][c], for c in [c0, c1). Without start the sum
// begins at -0, which added to any number gives that number; without rows, row j is j.
// Gives false when some out is not finite: v * 0 is 0 for a finite v and NaN for every other.
template <typename T, int Bytes>
ESPER_HD bool product_nn(const Nn<T>& p, std::int64_t ni, std::int64_t c0, std::int64_t c1) {
    constexpr std::int64_t W = Vec<T, Bytes>::width;
    typename Vec<T, Bytes>::type check = {};
    std::int64_t c = c0;
    for (; c + 3 * W <= c1; c += 3 * W) panel_nn<T, Bytes, 3>(p, ni, c, check);
    if (c + 2 * W <= c1) {
        panel_nn<T, Bytes, 2>(p, ni, c, check);
        c += 2 * W;
    }
    if (c + W <= c1) {
        panel_nn<T, Bytes, 1>(p, ni, c, check);
        c += W;
    }
    T sum_check = 0;
    for (; c < c1; ++c)
        for (std::int64_t i = 0; i < ni; ++i) {
            T sum = p.start ? p.factor * p.start[i * p.ldo + c] : T(-0.0);
            for (std::int64_t j = 0; j < p.nj; ++j)
                sum += p.a[i * p.si + j * p.sj] * p.b[(p.rows ? p.rows[j] : j) * p.ldb + c];
            sum_check += sum * T(0);
            p.out[i * p.ldo + c] = sum;
        }
    for (std::int64_t l = 0; l < W; ++l) sum_check += check[l];
    return sum_check == T(0);
}

template <typename T, int Bytes>
ESPER_HD bool scan_finite(const T* values, std::int64_t count) {
    typedef typename Vec<T, Bytes>::type V;
    constexpr std::int64_t W = Vec<T, Bytes>::width;
    V check[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
        for (int v = 0; v < 4; ++v) check[v] += load<T, Bytes>(values + i + v * W) * T(0);
    T total = 0;
    for (; i < count; ++i) total += values[i] * T(0);
    for (int v = 0; v < 4; ++v)
        for (std::int64_t l = 0; l < W; ++l) total += check[v][l];
    return total == T(0);
}

}  // namespace esper::graft
