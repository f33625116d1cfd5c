// Launchers of the lattice's CUDA kernels. Streams travel as opaque pointers, so that callers need no CUDA headers. Every
// launcher returns the cudaError_t of its launch as an int; none waits for the device.
#pragma once

#include <cstdint>

namespace esper::lattice {

// One step of every seed of the buffer at `base`.
int step_cuda(uint8_t* base, int64_t rows, int32_t epoch, void* stream);

// How many numbers compact_cuda wants to write down between its two launches.
int64_t compact_blocks(int64_t rows);

// indices[rows]: ascending awake rows, then -1; count[1]: how many are awake; counts[compact_blocks(rows)] is overwritten.
int compact_cuda(uint8_t* base, int64_t rows, int32_t* counts, int32_t* indices, int32_t* count, void* stream);

// How many partial checksums crc_cuda writes for a message of `words` 32-bit words.
int64_t crc_partials(int64_t words);

// partials[crc_partials(words)]: their exclusive or is the raw remainder of the message (no initial value, no final inversion).
int crc_cuda(const uint32_t* data, int64_t words, uint32_t* partials, void* stream);

}  // namespace esper::lattice
