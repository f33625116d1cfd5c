// The lattice on the CPU: step, compaction and checksum over all seeds of a model, one thread, one pass over memory.
#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>

#include "bindings.h"
#include "lattice_core.h"
#ifdef ESPER_WITH_CUDA
#include "lattice_cuda.h"
#endif

namespace py = pybind11;
namespace lt = esper::lattice;

// One machine-code version per instruction set, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define ESPER_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define ESPER_HAS_SSE42_BUILTIN 1
#else
#define ESPER_CLONES
#endif

namespace {

// Rows handled together. Small enough that a block's inputs and outputs stay in the first-level cache, large enough that the
// decision to skip a block costs nothing per row.
constexpr int64_t kBlock = 512;

struct Block {
    int32_t state[kBlock];
    int32_t flag[kBlock];
    int32_t fallback[kBlock];
    int32_t errors[kBlock];
    int32_t timer[kBlock];
    int32_t touched[kBlock];
    float alpha[kBlock];
    float target[kBlock];
    float stride[kBlock];
};

ESPER_CLONES int64_t step(uint8_t* base, int64_t rows, int32_t epoch) {
    const lt::Fields field(base, rows);
    int64_t changed = 0;
    alignas(64) Block block;

    for (int64_t first = 0; first < rows; first += kBlock) {
        const int n = static_cast<int>(std::min(kBlock, rows - first));
        uint8_t* const states = field.lifecycle_states + first;
        uint8_t* const flags = field.fault_flags + first;
        float* const samples = field.health_sample + first;

        // Most blocks of most models have nothing to do, and three of the thirteen arrays tell.
        uint8_t busy = 0;
        for (int i = 0; i < n; ++i) {
            uint8_t hit = flags[i];
            for (int member = 0; member < lt::kStates; ++member) {
                if ((lt::kBusy >> member) & 1u) hit |= static_cast<uint8_t>(states[i] == member);
            }
            busy |= hit;
        }
        int32_t sampled = 0;
        for (int i = 0; i < n; ++i) sampled |= samples[i] == samples[i];
        if (!busy && !sampled) continue;

        int32_t any_touched = 0;
        if (busy) {
            uint8_t* const fallbacks = field.fallback_active + first;
            float* const alphas = field.alpha_blend + first;
            float* const targets = field.alpha_target + first;
            float* const strides = field.alpha_step + first;
            int32_t* const errors = field.error_count + first;
            int32_t* const timers = field.state_timer + first;

            for (int i = 0; i < n; ++i) block.state[i] = states[i];
            for (int i = 0; i < n; ++i) block.flag[i] = flags[i];
            for (int i = 0; i < n; ++i) block.fallback[i] = fallbacks[i];

            // Results go to the block first; a field goes back to memory only if a row of the block changed it, because
            // writing is what costs most at a million seeds.
            int32_t state_diff = 0, flag_diff = 0, fallback_diff = 0, error_diff = 0, timer_diff = 0;
            int32_t alpha_diff = 0, dead_diff = 0;
            for (int i = 0; i < n; ++i) {
                const lt::Row in{block.state[i], block.flag[i], timers[i],  errors[i], block.fallback[i],
                                 alphas[i],      targets[i],    strides[i], 0,         0};
                const lt::Row out = lt::step_row(in);
                state_diff |= out.state ^ in.state;
                flag_diff |= in.flag;
                fallback_diff |= out.fallback ^ in.fallback;
                error_diff |= out.errors ^ in.errors;
                timer_diff |= out.timer ^ in.timer;
                alpha_diff |= lt::bits(out.alpha) ^ lt::bits(in.alpha);
                dead_diff |= out.dead;
                any_touched |= out.touched;
                block.state[i] = out.state;
                block.fallback[i] = out.fallback;
                block.errors[i] = out.errors;
                block.timer[i] = out.timer;
                block.touched[i] = out.touched;
                block.alpha[i] = out.alpha;
                block.target[i] = out.target;
                block.stride[i] = out.stride;
            }

            const std::size_t words = static_cast<std::size_t>(n) * 4;
            if (alpha_diff) std::memcpy(alphas, block.alpha, words);
            if (timer_diff) std::memcpy(timers, block.timer, words);
            if (error_diff) std::memcpy(errors, block.errors, words);
            if (dead_diff) {
                std::memcpy(targets, block.target, words);
                std::memcpy(strides, block.stride, words);
            }
            if (flag_diff) std::memset(flags, 0, static_cast<std::size_t>(n));
            if (fallback_diff) {
                for (int i = 0; i < n; ++i) fallbacks[i] = static_cast<uint8_t>(block.fallback[i]);
            }
            if (state_diff) {
                int32_t count = 0;
                for (int i = 0; i < n; ++i) count += block.state[i] != states[i];
                for (int i = 0; i < n; ++i) states[i] = static_cast<uint8_t>(block.state[i]);
                changed += count;
            }
        } else {
            std::memset(block.touched, 0, sizeof block.touched);
        }

        if (sampled) {
            float* const healths = field.health_accumulator + first;
            for (int i = 0; i < n; ++i) {
                const float sample = samples[i];
                const int32_t present = lt::mask(sample == sample);
                healths[i] = lt::pick(present, lt::mix_health(healths[i], sample), healths[i]);
                block.touched[i] |= present;
            }
            for (int i = 0; i < n; ++i) samples[i] = __builtin_nanf("");
        }
        if (sampled | any_touched) {
            int32_t* const epochs = field.last_update_epoch + first;
            for (int i = 0; i < n; ++i) epochs[i] = lt::pick(block.touched[i], epoch, epochs[i]);
        }
    }
    return changed;
}

// Ascending rows of awake seeds, then -1 up to `rows`.
int64_t compact(const uint8_t* states, int64_t rows, int32_t* indices) {
    bool awake[256] = {};
    for (int state = 0; state < lt::kStates; ++state) awake[state] = (lt::kAwake >> state) & 1u;
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) {
        // Written always, kept only if the count moves on: no branch to mispredict. The slot is never past `row`.
        indices[count] = static_cast<int32_t>(row);
        count += awake[states[row]];
    }
    std::fill(indices + count, indices + rows, -1);
    return count;
}

// Eight tables for eight bytes at a time: table[k][b] is byte b followed by k zero bytes.
using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

constexpr CrcTables make_crc_tables() {
    CrcTables table{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t value = byte;
        for (int i = 0; i < 8; ++i) value = lt::crc_times_x(value);
        table[0][byte] = value;
    }
    for (std::size_t k = 1; k < 8; ++k) {
        for (std::size_t byte = 0; byte < 256; ++byte) {
            const uint32_t before = table[k - 1][byte];
            table[k][byte] = (before >> 8) ^ table[0][before & 0xFF];
        }
    }
    return table;
}

constexpr CrcTables kCrcTables = make_crc_tables();

uint32_t crc_portable(const uint8_t* data, int64_t size) {
    const auto& t = kCrcTables;
    uint32_t crc = 0xFFFFFFFFu;
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) {
        const uint8_t* p = data + i;
        crc = t[7][(crc ^ p[0]) & 0xFF] ^ t[6][((crc >> 8) ^ p[1]) & 0xFF] ^ t[5][((crc >> 16) ^ p[2]) & 0xFF] ^
              t[4][((crc >> 24) ^ p[3]) & 0xFF] ^ t[3][p[4]] ^ t[2][p[5]] ^ t[1][p[6]] ^ t[0][p[7]];
    }
    for (; i < size; ++i) crc = (crc >> 8) ^ t[0][(crc ^ data[i]) & 0xFF];
    return ~crc;
}

#ifdef ESPER_HAS_SSE42_BUILTIN
__attribute__((target("sse4.2"))) uint32_t crc_sse42(const uint8_t* data, int64_t size) {
    uint64_t crc = 0xFFFFFFFFu;
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) {
        uint64_t word;
        std::memcpy(&word, data + i, 8);
        crc = __builtin_ia32_crc32di(crc, word);
    }
    uint32_t tail = static_cast<uint32_t>(crc);
    for (; i < size; ++i) tail = __builtin_ia32_crc32qi(tail, data[i]);
    return ~tail;
}
#endif

uint32_t crc(const uint8_t* data, int64_t size, bool portable) {
#ifdef ESPER_HAS_SSE42_BUILTIN
    if (!portable && __builtin_cpu_supports("sse4.2")) return crc_sse42(data, size);
#endif
    (void)portable;
    return crc_portable(data, size);
}

py::tuple transition_table() {
    py::tuple rows(lt::kStates);
    for (int state = 0; state < lt::kStates; ++state) rows[state] = lt::kTransitions[state];
    return rows;
}

#ifdef ESPER_WITH_CUDA
void check(int error, const char* what) {
    if (error != 0) throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(error));
}
#endif

}  // namespace

void bind_lattice(py::module_& m) {
    m.attr("lattice_transitions") = transition_table();
    m.attr("lattice_awake") = lt::kAwake;
    m.attr("lattice_timed") = lt::kTimed;
    m.attr("lattice_align") = lt::kAlign;
    m.attr("lattice_max_faults") = lt::kMaxFaults;

    m.def(
        "lattice_step_cpu",
        [](std::uintptr_t base, int64_t rows, int32_t epoch) { return step(esper::as<uint8_t>(base), rows, epoch); },
        py::arg("base"), py::arg("rows"), py::arg("epoch"), "One step of every seed; returns how many changed state.");
    m.def(
        "lattice_compact_cpu",
        [](std::uintptr_t base, int64_t rows, std::uintptr_t indices) {
            const lt::Fields field(esper::as<uint8_t>(base), rows);
            return compact(field.lifecycle_states, rows, esper::as<int32_t>(indices));
        },
        py::arg("base"), py::arg("rows"), py::arg("indices"), "Ascending awake rows, then -1; returns their number.");
    m.def(
        "lattice_crc_cpu",
        [](std::uintptr_t data, int64_t size, bool portable) { return crc(esper::as<uint8_t>(data), size, portable); },
        py::arg("data"), py::arg("size"), py::arg("portable") = false, "CRC-32C of a range of memory.");

#ifdef ESPER_WITH_CUDA
    m.def(
        "lattice_step_cuda",
        [](std::uintptr_t base, int64_t rows, int32_t epoch, std::uintptr_t stream) {
            check(lt::step_cuda(esper::as<uint8_t>(base), rows, epoch, esper::as<void>(stream)), "lattice_step");
        },
        py::arg("base"), py::arg("rows"), py::arg("epoch"), py::arg("stream"));
    m.def("lattice_compact_blocks", &lt::compact_blocks, py::arg("rows"), "How many counts lattice_compact_cuda writes down.");
    m.def(
        "lattice_compact_cuda",
        [](std::uintptr_t base, int64_t rows, std::uintptr_t counts, std::uintptr_t indices, std::uintptr_t count,
           std::uintptr_t stream) {
            check(lt::compact_cuda(esper::as<uint8_t>(base), rows, esper::as<int32_t>(counts), esper::as<int32_t>(indices),
                                   esper::as<int32_t>(count), esper::as<void>(stream)),
                  "lattice_compact");
        },
        py::arg("base"), py::arg("rows"), py::arg("counts"), py::arg("indices"), py::arg("count"), py::arg("stream"));
    m.def("lattice_crc_partials", &lt::crc_partials, py::arg("words"), "How many partial checksums lattice_crc_cuda writes.");
    m.def(
        "lattice_crc_cuda",
        [](std::uintptr_t data, int64_t words, std::uintptr_t partials, std::uintptr_t stream) {
            check(lt::crc_cuda(esper::as<uint32_t>(data), words, esper::as<uint32_t>(partials), esper::as<void>(stream)),
                  "lattice_crc");
        },
        py::arg("data"), py::arg("words"), py::arg("partials"), py::arg("stream"),
        "Partial checksums whose exclusive or is the raw remainder of the message.");
#endif
}
