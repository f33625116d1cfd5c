// The lattice on CUDA: one launch per operation for all seeds of a model. Row logic is shared with the CPU (lattice_core.h).
#include <cuda_runtime.h>

#include "lattice_core.h"
#include "lattice_cuda.h"

namespace esper::lattice {
namespace {

constexpr int kThreads = 256;

// 16 words a thread: long enough to pay for the one product that moves a thread's remainder to its place.
constexpr int64_t kCrcWordsPerThread = 16;
constexpr int64_t kCrcWordsPerBlock = kThreads * kCrcWordsPerThread;

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

__global__ void step_kernel(uint8_t* base, int64_t rows, int32_t epoch) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= rows) return;
    const Fields field(base, rows);

    const int32_t state = field.lifecycle_states[row];
    const int32_t flag = field.fault_flags[row];
    const float sample = field.health_sample[row];
    const int32_t sampled = mask(sample == sample);
    int32_t touched = sampled;

    if (in_set<kBusy>(state) | flag) {
        const Row in{state,
                     flag,
                     field.state_timer[row],
                     field.error_count[row],
                     field.fallback_active[row],
                     field.alpha_blend[row],
                     field.alpha_target[row],
                     field.alpha_step[row],
                     0,
                     0};
        const Row out = step_row(in);
        if (bits(out.alpha) != bits(in.alpha)) field.alpha_blend[row] = out.alpha;
        if (out.timer != in.timer) field.state_timer[row] = out.timer;
        if (out.errors != in.errors) field.error_count[row] = out.errors;
        if (out.fallback != in.fallback) field.fallback_active[row] = static_cast<uint8_t>(out.fallback);
        if (out.state != in.state) field.lifecycle_states[row] = static_cast<uint8_t>(out.state);
        if (flag) field.fault_flags[row] = 0;
        if (out.dead) {
            field.alpha_target[row] = out.target;
            field.alpha_step[row] = out.stride;
        }
        touched |= out.touched;
    }
    if (sampled) {
        field.health_accumulator[row] = mix_health(field.health_accumulator[row], sample);
        field.health_sample[row] = from_bits(0x7FC00000);
    }
    if (touched) field.last_update_epoch[row] = epoch;
}

// Sum over the block; every thread gets it. `shared` has room for one number per warp.
__device__ int32_t block_sum(int32_t value, int32_t* shared) {
    for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = value;
    __syncthreads();
    int32_t sum = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += shared[warp];
    return sum;
}

// Every block counts the awake rows before its own and in all by itself: a state is one byte, so a million of them come out of
// the second-level cache in microseconds, and no block has to wait for another. A dormant row places one -1 behind the awake
// ones, so that the output is complete without a second launch.
__global__ void compact_kernel(uint8_t* base, int64_t rows, int64_t rows_per_block, int32_t* indices, int32_t* count) {
    __shared__ int32_t shared[kThreads / 32];
    __shared__ int32_t warp_start[kThreads / 32];
    const Fields field(base, rows);
    const uint8_t* const states = field.lifecycle_states;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block;

    int32_t before_here = 0, awake_here = 0;
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
        const int32_t awake = in_set<kAwake>(states[row]) & 1;
        awake_here += awake;
        before_here += row < first ? awake : 0;
    }
    const int32_t total = block_sum(awake_here, shared);
    int32_t before = block_sum(before_here, shared);
    if (blockIdx.x == 0 && threadIdx.x == 0) *count = total;

    const int64_t end = min(rows, first + rows_per_block);
    for (int64_t start = first; start < end; start += kThreads) {
        const int64_t row = start + threadIdx.x;
        const bool inside = row < end;
        const bool awake = inside && in_set<kAwake>(states[row]);
        const uint32_t votes = __ballot_sync(0xFFFFFFFFu, awake);
        const int lane = threadIdx.x & 31;
        __syncthreads();
        if (lane == 0) warp_start[threadIdx.x >> 5] = __popc(votes);
        __syncthreads();
        int32_t rank = before + __popc(votes & ((1u << lane) - 1u));
        int32_t added = 0;
        for (int warp = 0; warp < kThreads / 32; ++warp) {
            if (warp < static_cast<int>(threadIdx.x >> 5)) rank += warp_start[warp];
            added += warp_start[warp];
        }
        if (inside) {
            if (awake) {
                indices[rank] = static_cast<int32_t>(row);
            } else {
                indices[total + (row - rank)] = -1;
            }
        }
        before += added;
    }
}

__global__ void crc_kernel(const uint32_t* data, int64_t words, uint32_t* partials) {
    __shared__ uint32_t shared[kThreads / 32];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kCrcWordsPerBlock + threadIdx.x * kCrcWordsPerThread;
    const int64_t end = min(words, first + kCrcWordsPerThread);
    uint32_t remainder = 0;
    for (int64_t i = first; i < end; ++i) {
        remainder ^= data[i];
        for (int k = 0; k < 32; ++k) remainder = crc_times_x(remainder);
    }
    // Move the remainder to its place in the message: times x^(bits that follow).
    if (first < end) remainder = crc_multiply(remainder, crc_power(static_cast<uint64_t>(words - end) * 32u));
    for (int offset = 16; offset > 0; offset >>= 1) remainder ^= __shfl_xor_sync(0xFFFFFFFFu, remainder, offset);
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = remainder;
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t sum = 0;
        for (int warp = 0; warp < kThreads / 32; ++warp) sum ^= shared[warp];
        partials[blockIdx.x] = sum;
    }
}

}  // namespace

int step_cuda(uint8_t* base, int64_t rows, int32_t epoch, void* stream) {
    if (rows == 0) return 0;
    const auto blocks = static_cast<unsigned>(div_up(rows, kThreads));
    step_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(base, rows, epoch);
    return static_cast<int>(cudaGetLastError());
}

int compact_cuda(uint8_t* base, int64_t rows, int32_t* indices, int32_t* count, void* stream) {
    // At most 256 blocks, because each reads every state once.
    int64_t rows_per_block = 1024;
    while (rows_per_block * 256 < rows) rows_per_block *= 2;
    const auto blocks = static_cast<unsigned>(rows == 0 ? 1 : div_up(rows, rows_per_block));
    compact_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(base, rows, rows_per_block, indices, count);
    return static_cast<int>(cudaGetLastError());
}

int64_t crc_partials(int64_t words) { return div_up(words, kCrcWordsPerBlock); }

int crc_cuda(const uint32_t* data, int64_t words, uint32_t* partials, void* stream) {
    if (words == 0) return 0;
    const auto blocks = static_cast<unsigned>(crc_partials(words));
    crc_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(data, words, partials);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace esper::lattice
