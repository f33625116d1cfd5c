// The lattice on CUDA: one launch per operation for all seeds of a model, two where many are asked which of them are awake. Row
// logic is shared with the CPU (lattice_core.h).
#include <cuda_runtime.h>

#include "lattice_core.h"
#include "lattice_cuda.h"

namespace esper::lattice {
namespace {

constexpr int kThreads = 256;

// 16 words a thread: long enough to pay for the one product that moves a thread's remainder to its place.
constexpr int64_t kCrcWordsPerThread = 16;
constexpr int64_t kCrcWordsPerBlock = kThreads * kCrcWordsPerThread;

// A thread takes 16 states, which is one load: fields begin at multiples of 64 bytes and are padded to such.
constexpr int kCompactRowsPerThread = 16;
constexpr int kCompactRowsPerBlock = kThreads * kCompactRowsPerThread;

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

// Bit k: whether row `first + k` is awake.
__device__ uint32_t awake_bits(const uint8_t* states, int64_t rows, int64_t first) {
    if (first >= rows) return 0;
    const uint4 loaded = *reinterpret_cast<const uint4*>(states + first);
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    uint32_t bits = 0;
    for (int k = 0; k < kCompactRowsPerThread; ++k) {
        const int32_t state = (words[k / 4] >> (8 * (k % 4))) & 0xFFu;
        bits |= static_cast<uint32_t>(in_set<kAwake>(state)) & (1u << k);
    }
    // Behind the last row lies padding.
    const int64_t left = rows - first;
    return left < kCompactRowsPerThread ? bits & ((1u << left) - 1u) : bits;
}

__device__ int64_t first_of_thread() {
    return static_cast<int64_t>(blockIdx.x) * kCompactRowsPerBlock + threadIdx.x * kCompactRowsPerThread;
}

// counts[blocks]: how many rows of each block are awake.
__global__ void count_kernel(uint8_t* base, int64_t rows, int32_t* counts) {
    __shared__ int32_t shared[kThreads / 32];
    const Fields field(base, rows);
    const int32_t sum = block_sum(__popc(awake_bits(field.lifecycle_states, rows, first_of_thread())), shared);
    if (threadIdx.x == 0) counts[blockIdx.x] = sum;
}

// Every block adds up the counts of the others, so that none waits for another; a single one reads none. A dormant row places
// one -1 behind the awake ones.
__global__ void compact_kernel(uint8_t* base, int64_t rows, const int32_t* counts, int32_t* indices, int32_t* count) {
    __shared__ int32_t shared[kThreads / 32];
    __shared__ uint32_t bits_of[kThreads];
    __shared__ int32_t start_of[kThreads];
    const Fields field(base, rows);
    const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);

    int32_t before_here = 0, after_here = 0;
    for (int other = thread; other < static_cast<int>(gridDim.x); other += kThreads) {
        if (other < block) before_here += counts[other];
        if (other > block) after_here += counts[other];
    }
    const uint32_t bits = awake_bits(field.lifecycle_states, rows, first_of_thread());
    const int32_t here = __popc(bits);
    const int32_t before = block_sum(before_here, shared);
    const int32_t total = before + block_sum(after_here + here, shared);
    if (block == 0 && thread == 0) *count = total;

    // Awake rows of this block before each thread's: within the warp, then the warps before.
    int32_t up_to = here;
    for (int offset = 1; offset < 32; offset <<= 1) {
        const int32_t lower = __shfl_up_sync(0xFFFFFFFFu, up_to, offset);
        if ((thread & 31) >= offset) up_to += lower;
    }
    __syncthreads();
    if ((thread & 31) == 31) shared[thread >> 5] = up_to;
    __syncthreads();
    int32_t start = before + up_to - here;
    for (int warp = 0; warp < thread >> 5; ++warp) start += shared[warp];
    bits_of[thread] = bits;
    start_of[thread] = start;
    __syncthreads();

    // Neighbouring threads write neighbouring places, for which they take neighbouring rows.
    const int64_t first = static_cast<int64_t>(block) * kCompactRowsPerBlock;
    const int rows_here = static_cast<int>(min(rows - first, static_cast<int64_t>(kCompactRowsPerBlock)));
    for (int i = thread; i < rows_here; i += kThreads) {
        const int owner = i / kCompactRowsPerThread, k = i % kCompactRowsPerThread;
        const int32_t rank = start_of[owner] + __popc(bits_of[owner] & ((1u << k) - 1u));
        const auto row = static_cast<int32_t>(first + i);
        if ((bits_of[owner] >> k) & 1u) {
            indices[rank] = row;
        } else {
            indices[total + (row - rank)] = -1;
        }
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

int64_t compact_blocks(int64_t rows) { return rows == 0 ? 1 : div_up(rows, kCompactRowsPerBlock); }

int compact_cuda(uint8_t* base, int64_t rows, int32_t* counts, int32_t* indices, int32_t* count, void* stream) {
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto blocks = static_cast<unsigned>(compact_blocks(rows));
    if (blocks > 1) count_kernel<<<blocks, kThreads, 0, queue>>>(base, rows, counts);
    compact_kernel<<<blocks, kThreads, 0, queue>>>(base, rows, counts, indices, count);
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
