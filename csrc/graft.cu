// The blend on CUDA: one pass that blends and looks for faults, one that does nothing unless there was a fault.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

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

// Neighbours in memory that one access takes.
template <typename S, int N>
struct alignas(sizeof(S) * N) Pack {
    S value[N];
};

template <typename S, int N>
__device__ void load_pack(const void* base, std::int64_t at, typename Sum<S>::type (&values)[N]) {
    const auto pack = *reinterpret_cast<const Pack<S, N>*>(static_cast<const S*>(base) + at);
    for (int i = 0; i < N; ++i) values[i] = static_cast<typename Sum<S>::type>(pack.value[i]);
}

template <typename S, int N>
__device__ void store_pack(void* base, std::int64_t at, const typename Sum<S>::type (&values)[N]) {
    Pack<S, N> pack;
    for (int i = 0; i < N; ++i) pack.value[i] = static_cast<S>(values[i]);
    *reinterpret_cast<Pack<S, N>*>(static_cast<S*>(base) + at) = pack;
}

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

// The layer's output as a matrix whose rows lie in memory one behind the other: rows of features where the features are
// innermost, else planes of positions, one for each feature. Threads take columns, in packs; a loop takes rows.
struct Extents {
    std::int64_t outer, features, inner;

    ESPER_HD bool planes() const { return inner != 1; }
    ESPER_HD std::int64_t rows() const { return planes() ? outer * features : outer; }
    ESPER_HD std::int64_t columns() const { return planes() ? inner : features; }
};

// The rows of one thread. There is no division in the loop: a step is so many whole outers and so many features.
template <bool Planes>
struct Rows {
    std::int64_t row, rows, step, outer, feature, features, outers_a_step, features_a_step;

    __device__ Rows(const Extents& extents, std::int64_t column)
        : row(static_cast<std::int64_t>(blockIdx.y) * blockDim.y + threadIdx.y),
          rows(extents.rows()),
          step(static_cast<std::int64_t>(gridDim.y) * blockDim.y),
          outer(Planes ? row / extents.features : row),
          feature(Planes ? row % extents.features : column),
          features(extents.features),
          outers_a_step(Planes ? step / extents.features : step),
          features_a_step(Planes ? step % extents.features : 0) {}

    __device__ bool here() const { return row < rows; }
    __device__ void next() {
        row += step;
        outer += outers_a_step;
        if constexpr (Planes) {
            feature += features_a_step;
            if (feature >= features) {
                feature -= features;
                ++outer;
            }
        }
    }
};

template <int N>
__device__ std::int64_t first_column() {
    return (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
}

template <typename S, int N, bool Planes>
__global__ void blend_kernel(Extents extents, const S* h, S* y, Seats seats, const float* alpha, std::uint8_t* faults) {
    using T = typename Sum<S>::type;
    const std::int64_t column = first_column<N>(), columns = extents.columns();
    if (column >= columns) return;
    const std::int64_t at = Planes ? column : 0;
    T replaced = Planes ? T(0) : replace_sum<T>(seats, alpha, column);
    for (Rows<Planes> rows(extents, column); rows.here(); rows.next()) {
        if (Planes) replaced = replace_sum<T>(seats, alpha, rows.feature);
        const std::int64_t from = rows.row * columns + column;
        T values[N];
        load_pack<S, N>(h, from, values);
        blend_neighbours<N>(seats, alpha, replaced, rows.outer, rows.feature, extents.inner, at, values,
                            [](const void* part, std::int64_t begin, T (&k)[N]) { load_pack<S, N>(part, begin, k); },
                            Round<S>{});
        store_pack<S, N>(y, from, values);
        bool finite = true;
        for (int i = 0; i < N; ++i) finite = finite && is_finite(values[i]);
        if (finite) continue;
        // From memory again: an array that a loop like this one reads has to lie in memory all the time.
        for (int i = 0; i < N; ++i) {
            const T value = Load<S>{}(y, from + i);
            if (is_finite(value)) continue;
            // Every thread that blames a seed writes the same 1, so the order does not matter.
            blame_element(seats, alpha, Load<S>{}(h, from + i), value, rows.outer, rows.feature + (Planes ? 0 : i),
                          extents.inner, at + (Planes ? i : 0), Load<S>{}, Round<S>{}, [&](int s) { faults[s] = 1; });
        }
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

template <typename S, int N, bool Planes>
__global__ void backward_kernel(Extents extents, const S* gy, S* gh, Seats seats, const float* alpha,
                                const std::uint8_t* faults) {
    using T = typename Sum<S>::type;
    const std::int64_t column = first_column<N>(), columns = extents.columns();
    if (column >= columns) return;
    const bool fault = any_fault(faults, seats.count);
    const std::int64_t at = Planes ? column : 0;
    T replaced = Planes ? T(0) : replace_sum<T>(seats, alpha, column);
    for (Rows<Planes> rows(extents, column); rows.here(); rows.next()) {
        if (Planes) replaced = replace_sum<T>(seats, alpha, rows.feature);
        const T kept = fault ? T(1) : host_factor(replaced);
        const std::int64_t from = rows.row * columns + column;
        T g[N], product[N];
        load_pack<S, N>(gy, from, g);
        for (int i = 0; i < N; ++i) product[i] = kept * g[i];
        store_pack<S, N>(gh, from, product);
        for (int s = 0; s < seats.count; ++s) {
            const Seat& seat = seats.seat[s];
            if (rows.feature < seat.begin || rows.feature >= seat.end) continue;
            const T factor = fault ? T(0) : coefficient(seat, alpha, replaced);
            for (int i = 0; i < N; ++i) product[i] = factor == T(0) ? T(0) : factor * g[i];
            const std::int64_t to = part_offset(seat, rows.outer, rows.feature, extents.inner, at);
            store_pack<S, N>(const_cast<void*>(seat.part), to, product);
        }
    }
}

int blocks(std::int64_t count) {
    return static_cast<int>(std::min(kMaxBlocks, std::max<std::int64_t>(1, (count + kThreads - 1) / kThreads)));
}

struct Grid {
    dim3 blocks, threads;

    Grid(const Extents& extents, int pack) {
        const std::int64_t packs = extents.columns() / pack;
        threads.x = 1;
        while (threads.x < kThreads && threads.x < packs) threads.x *= 2;
        threads.y = kThreads / threads.x;
        const std::int64_t across = (packs + threads.x - 1) / threads.x, down = (extents.rows() + threads.y - 1) / threads.y;
        blocks.x = static_cast<unsigned>(across);
        blocks.y = static_cast<unsigned>(std::min(down, std::max<std::int64_t>(1, kMaxBlocks / across)));
    }
};

bool aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

// Whether packs of `pack` columns begin where 16 bytes may be read at once, in every tensor, and cross no seed's border.
bool packs_fit(const Extents& extents, int pack, const void* in, const void* out, const Seats& seats) {
    bool fit = extents.columns() % pack == 0 && aligned(in) && aligned(out);
    for (int s = 0; s < seats.count; ++s) {
        const Seat& seat = seats.seat[s];
        fit = fit && aligned(seat.part) && (extents.planes() || (seat.begin % pack == 0 && seat.end % pack == 0));
    }
    return fit;
}

// launch(N, Planes), both as types that hold them.
template <typename S, typename Launch>
void choose(const Extents& extents, const void* in, const void* out, const Seats& seats, Launch launch) {
    constexpr int kPack = 16 / sizeof(S);
    using Wide = std::integral_constant<int, kPack>;
    using Narrow = std::integral_constant<int, 1>;
    const bool wide = packs_fit(extents, kPack, in, out, seats);
    if (extents.planes()) {
        wide ? launch(Wide{}, std::true_type{}) : launch(Narrow{}, std::true_type{});
    } else {
        wide ? launch(Wide{}, std::false_type{}) : launch(Narrow{}, std::false_type{});
    }
}

template <typename S>
int blend(const Extents& extents, const void* h, void* y, const Seats& seats, const float* alpha, std::uint8_t* faults,
          cudaStream_t stream) {
    const std::int64_t count = extents.rows() * extents.columns();
    cudaError_t error = cudaMemsetAsync(faults, 0, static_cast<std::size_t>(seats.count), stream);
    if (error != cudaSuccess || count == 0) return error;
    choose<S>(extents, h, y, seats, [&](auto pack, auto planes) {
        const Grid grid(extents, pack);
        blend_kernel<S, pack(), planes()><<<grid.blocks, grid.threads, 0, stream>>>(
            extents, static_cast<const S*>(h), static_cast<S*>(y), seats, alpha, faults);
    });
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    contain_kernel<S><<<blocks(count), kThreads, 0, stream>>>(count, static_cast<const S*>(h), static_cast<S*>(y), faults,
                                                              seats.count);
    return cudaGetLastError();
}

template <typename S>
int backward(const Extents& extents, const void* gy, void* gh, const Seats& seats, const float* alpha,
             const std::uint8_t* faults, cudaStream_t stream) {
    if (extents.rows() * extents.columns() == 0) return cudaSuccess;
    choose<S>(extents, gy, gh, seats, [&](auto pack, auto planes) {
        const Grid grid(extents, pack);
        backward_kernel<S, pack(), planes()><<<grid.blocks, grid.threads, 0, stream>>>(
            extents, static_cast<const S*>(gy), static_cast<S*>(gh), seats, alpha, faults);
    });
    return cudaGetLastError();
}

}  // namespace

int blend_cuda(int dtype, std::int64_t outer, std::int64_t features, std::int64_t inner, const void* h, void* y,
               const Seats& seats, const float* alpha, std::uint8_t* faults, void* stream) {
    const Extents extents{outer, features, inner};
    const auto s = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case 0: return blend<float>(extents, h, y, seats, alpha, faults, s);
        case 1: return blend<double>(extents, h, y, seats, alpha, faults, s);
        case 2: return blend<__half>(extents, h, y, seats, alpha, faults, s);
        case 3: return blend<__nv_bfloat16>(extents, h, y, seats, alpha, faults, s);
        default: return cudaErrorInvalidValue;
    }
}

int blend_backward_cuda(int dtype, std::int64_t outer, std::int64_t features, std::int64_t inner, const void* gy, void* gh,
                        const Seats& seats, const float* alpha, const std::uint8_t* faults, void* stream) {
    const Extents extents{outer, features, inner};
    const auto s = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case 0: return backward<float>(extents, gy, gh, seats, alpha, faults, s);
        case 1: return backward<double>(extents, gy, gh, seats, alpha, faults, s);
        case 2: return backward<__half>(extents, gy, gh, seats, alpha, faults, s);
        case 3: return backward<__nv_bfloat16>(extents, gy, gh, seats, alpha, faults, s);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace esper::graft
