// Three small matrix products and a scan, written with GCC's vector types: the compiler maps 64 bytes on one AVX-512
// register, two AVX2 or four SSE2 registers. Included only by graft_bank.cpp, whose entry points are cloned per
// instruction set; everything here is inlined into them.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

namespace esper::graft {

template <typename T>
struct Vec {
    static constexpr std::int64_t width = 64 / static_cast<std::int64_t>(sizeof(T));
    typedef T type __attribute__((vector_size(64)));
};

// The sum of the lanes, by halves.
template <typename T>
ESPER_HD T lane_sum(const typename Vec<T>::type& v) {
    typedef T Half __attribute__((vector_size(32)));
    typedef T Quarter __attribute__((vector_size(16)));
    Half halves[2];
    std::memcpy(halves, &v, sizeof(v));
    const Half half = halves[0] + halves[1];
    Quarter quarters[2];
    std::memcpy(quarters, &half, sizeof(half));
    const Quarter quarter = quarters[0] + quarters[1];
    if constexpr (sizeof(T) == 4) return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
    else return quarter[0] + quarter[1];
}

// out[i][j] = sum over k in [k0, k1) of a[i][k] * b[rows[j]][k]. Without rows, row j is j.
template <typename T>
ESPER_HD void product_nt(const T* a, std::int64_t lda, const T* b, std::int64_t ldb, const std::int32_t* rows,
                         std::int64_t ni, std::int64_t nj, std::int64_t k0, std::int64_t k1, T* out, std::int64_t ldo) {
    using V = typename Vec<T>::type;
    constexpr std::int64_t W = Vec<T>::width;
    constexpr int TI = 4, TJ = 2;
    const std::int64_t kv = k0 + (k1 - k0) / W * W;
    for (std::int64_t j0 = 0; j0 < nj; j0 += TJ) {
        const T* bp[TJ];
        for (int j = 0; j < TJ; ++j) {
            const std::int64_t row = j0 + j < nj ? j0 + j : j0;
            bp[j] = b + (rows ? rows[row] : row) * ldb;
        }
        for (std::int64_t i0 = 0; i0 < ni; i0 += TI) {
            const T* ap[TI];
            for (int i = 0; i < TI; ++i) ap[i] = a + (i0 + i < ni ? i0 + i : i0) * lda;
            V sum[TI][TJ] = {};
            for (std::int64_t k = k0; k < kv; k += W) {
                V bv[TJ];
                for (int j = 0; j < TJ; ++j) std::memcpy(&bv[j], bp[j] + k, sizeof(V));
                for (int i = 0; i < TI; ++i) {
                    V av;
                    std::memcpy(&av, ap[i] + k, sizeof(V));
                    for (int j = 0; j < TJ; ++j) sum[i][j] += av * bv[j];
                }
            }
            for (int i = 0; i < TI && i0 + i < ni; ++i) {
                for (int j = 0; j < TJ && j0 + j < nj; ++j) {
                    T total = lane_sum<T>(sum[i][j]);
                    for (std::int64_t k = kv; k < k1; ++k) total += ap[i][k] * bp[j][k];
                    out[(i0 + i) * ldo + j0 + j] = total;
                }
            }
        }
    }
}

// out[i][c] = factor * start[i][c] + sum over j of a[i * si + j * sj] * b[rows[j]][c], for c in [c0, c1). Without start the sum
// begins at -0, which added to any number gives that number; without rows, row j is j.
// Gives false when some out is not finite: v * 0 is 0 for a finite v and NaN for every other.
template <typename T>
ESPER_HD bool product_nn(const T* a, std::int64_t si, std::int64_t sj, const T* b, std::int64_t ldb,
                         const std::int32_t* rows, std::int64_t ni, std::int64_t nj, std::int64_t c0, std::int64_t c1,
                         T* out, std::int64_t ldo, const T* start, T factor) {
    using V = typename Vec<T>::type;
    constexpr std::int64_t W = Vec<T>::width;
    constexpr int TI = 4, TC = 2;
    const V zero = {};
    const V nothing = -zero;
    V check = zero;
    T tail_check = 0;
    for (std::int64_t i0 = 0; i0 < ni; i0 += TI) {
        const int ti = static_cast<int>(ni - i0 < TI ? ni - i0 : TI);
        std::int64_t c = c0;
        for (; c + TC * W <= c1 && ti == TI; c += TC * W) {
            V sum[TI][TC];
            for (int i = 0; i < TI; ++i)
                for (int v = 0; v < TC; ++v) {
                    sum[i][v] = nothing;
                    if (start) {
                        std::memcpy(&sum[i][v], start + (i0 + i) * ldo + c + v * W, sizeof(V));
                        sum[i][v] *= factor;
                    }
                }
            for (std::int64_t j = 0; j < nj; ++j) {
                const T* bp = b + (rows ? rows[j] : j) * ldb + c;
                V bv[TC];
                for (int v = 0; v < TC; ++v) std::memcpy(&bv[v], bp + v * W, sizeof(V));
                for (int i = 0; i < TI; ++i) {
                    const T w = a[(i0 + i) * si + j * sj];
                    for (int v = 0; v < TC; ++v) sum[i][v] += w * bv[v];
                }
            }
            for (int i = 0; i < TI; ++i)
                for (int v = 0; v < TC; ++v) {
                    check += sum[i][v] * T(0);
                    std::memcpy(out + (i0 + i) * ldo + c + v * W, &sum[i][v], sizeof(V));
                }
        }
        for (; c + W <= c1; c += W) {
            for (int i = 0; i < ti; ++i) {
                V sum = nothing;
                if (start) {
                    std::memcpy(&sum, start + (i0 + i) * ldo + c, sizeof(V));
                    sum *= factor;
                }
                for (std::int64_t j = 0; j < nj; ++j) {
                    V bv;
                    std::memcpy(&bv, b + (rows ? rows[j] : j) * ldb + c, sizeof(V));
                    sum += a[(i0 + i) * si + j * sj] * bv;
                }
                check += sum * T(0);
                std::memcpy(out + (i0 + i) * ldo + c, &sum, sizeof(V));
            }
        }
        for (; c < c1; ++c) {
            for (int i = 0; i < ti; ++i) {
                T sum = start ? factor * start[(i0 + i) * ldo + c] : T(-0.0);
                for (std::int64_t j = 0; j < nj; ++j)
                    sum += a[(i0 + i) * si + j * sj] * b[(rows ? rows[j] : j) * ldb + c];
                tail_check += sum * T(0);
                out[(i0 + i) * ldo + c] = sum;
            }
        }
    }
    for (std::int64_t l = 0; l < W; ++l) tail_check += check[l];
    return tail_check == T(0);
}

template <typename T>
ESPER_HD bool scan_finite(const T* values, std::int64_t count) {
    using V = typename Vec<T>::type;
    constexpr std::int64_t W = Vec<T>::width;
    V check[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
        for (int v = 0; v < 4; ++v) {
            V value;
            std::memcpy(&value, values + i + v * W, sizeof(V));
            check[v] += value * T(0);
        }
    T total = 0;
    for (; i < count; ++i) total += values[i] * T(0);
    for (int v = 0; v < 4; ++v)
        for (std::int64_t l = 0; l < W; ++l) total += check[v][l];
    return total == T(0);
}

}  // namespace esper::graft
