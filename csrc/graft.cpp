// Bindings of the graft kernels: a Bank object per layer, scans, and the blend of stacked contributions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "common.h"
#include "graft_bank.h"
#include "graft_blend.h"
#include "graft_core.h"
#ifdef ESPER_WITH_CUDA
#include "graft_cuda.h"
#endif

namespace py = pybind11;
using esper::as;
using esper::graft::Act;
using esper::graft::Bank;
using esper::graft::BankSeed;
using esper::graft::Span;
using Address = std::uintptr_t;

namespace {

using SeedTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool, int>;

// Where one seed's reserved parameters lie: down [R, d_in], up [d_out, R] and bias [R], 0 for a kernel without one.
using Reserved = std::tuple<Address, Address, Address>;

// Multiply-adds, some half a millisecond of them.
constexpr std::int64_t kReleaseAbove = 1 << 23;

// A bank whose weights lie in one buffer, down [rows, d_in] | up [rows, d_out] | bias [rows], given at every call.
template <typename T>
class BoundBank {
public:
    BoundBank(const std::vector<SeedTuple>& seeds, std::int64_t d_in, std::int64_t d_out, std::int64_t rows, bool biased)
        : bank_(unpack(seeds), d_in, d_out, rows), biased_(biased) {}

    // The coefficients as bytes, or None when some result is not finite.
    py::object forward(Address weights, Address x, Address h, Address y, std::int64_t n, Address alpha) const {
        py::bytes table = coefficients(alpha);
        bool finite = false;
        without_python(outlasts(n), [&, line = view(table)] {
            finite = bank_.forward(as<const T>(x), as<const T>(h), as<T>(y), down(weights), up(weights), bias(weights), line, n);
        });
        if (!finite) return py::none();
        return std::move(table);
    }

    py::bytes coefficients(Address alpha) const {
        PyObject* raw = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(bank_.table_size() * sizeof(T)));
        if (raw == nullptr) throw py::error_already_set();
        bank_.coefficients(as<const float>(alpha), reinterpret_cast<T*>(PyBytes_AS_STRING(raw)));
        return py::reinterpret_steal<py::bytes>(raw);
    }

    // gweights is a buffer like weights, or 0.
    void backward(Address weights, const py::bytes& table, Address x, Address gy, std::int64_t n, Address gx, Address gh,
                  Address gweights) const {
        T* none = nullptr;
        without_python(outlasts(n), [&, line = view(table)] {
            bank_.backward(as<const T>(x), as<const T>(gy), down(weights), up(weights), bias(weights), line, n, as<T>(gx),
                           as<T>(gh), gweights ? down(gweights) : none, gweights ? up(gweights) : none,
                           gweights ? bias(gweights) : none);
        });
    }

    void activate(Address weights, const py::bytes& table, Address pre, Address scaled, std::int64_t n) const {
        bank_.activate(as<const T>(pre), as<T>(scaled), bias(weights), view(table), n);
    }

    void activate_backward(Address weights, const py::bytes& table, Address gz, Address pre, std::int64_t n) const {
        bank_.activate_backward(as<T>(gz), as<const T>(pre), bias(weights), view(table), n);
    }

    // Tell where the seeds' reserved parameters lie, each with room for `rank` rows.
    void reserve(std::int64_t rank, std::vector<Reserved> sources) {
        check_reserved(sources);
        for (const BankSeed& seed : bank_.seeds())
            if (seed.row1 - seed.row0 > rank) throw std::invalid_argument("a kernel has more rows than are reserved for it");
        reserved_rank_ = rank;
        sources_ = std::move(sources);
    }

    // Copy what the kernels occupy of the reserved parameters into the buffer.
    void gather(Address weights) const {
        for (std::size_t s = 0; s < sources_.size(); ++s) {
            const BankSeed& seed = bank_.seeds()[s];
            const auto& [from_down, from_up, from_bias] = sources_[s];
            const std::int64_t rank = seed.row1 - seed.row0, d_out = bank_.d_out();
            const T* source = as<const T>(from_down);
            std::copy(source, source + rank * bank_.d_in(), down(weights) + seed.row0 * bank_.d_in());
            source = as<const T>(from_up);
            for (std::int64_t k = 0; k < rank; ++k) {
                T* line = up(weights) + (seed.row0 + k) * d_out;
                std::fill(line, line + seed.col0, T(0));
                for (std::int64_t j = seed.col0; j < seed.col1; ++j) line[j] = source[j * reserved_rank_ + k];
                std::fill(line + seed.col1, line + d_out, T(0));
            }
            if (!biased_) continue;
            T* bias_row = bias(weights) + seed.row0;
            if (from_bias)
                std::copy(as<const T>(from_bias), as<const T>(from_bias) + rank, bias_row);
            else
                std::fill(bias_row, bias_row + rank, T(0));
        }
    }

    // The reverse for gradients: fills the targets whole, with 0 where no kernel is. A target may be 0: not wanted.
    void scatter(Address gweights, const std::vector<Reserved>& targets) const {
        check_reserved(targets);
        for (std::size_t s = 0; s < targets.size(); ++s) {
            const BankSeed& seed = bank_.seeds()[s];
            const auto& [to_down, to_up, to_bias] = targets[s];
            const std::int64_t rank = seed.row1 - seed.row0, d_in = bank_.d_in(), d_out = bank_.d_out();
            if (to_down) {
                T* target = as<T>(to_down);
                const T* source = down(gweights) + seed.row0 * d_in;
                std::fill(std::copy(source, source + rank * d_in, target), target + reserved_rank_ * d_in, T(0));
            }
            if (to_up) {
                T* target = as<T>(to_up);
                std::fill(target, target + d_out * reserved_rank_, T(0));
                for (std::int64_t k = 0; k < rank; ++k) {
                    const T* line = up(gweights) + (seed.row0 + k) * d_out;
                    for (std::int64_t j = seed.col0; j < seed.col1; ++j) target[j * reserved_rank_ + k] = line[j];
                }
            }
            if (to_bias) {
                T* target = as<T>(to_bias);
                const T* source = bias(gweights) + seed.row0;
                std::fill(std::copy(source, source + rank, target), target + reserved_rank_, T(0));
            }
        }
    }

    // (runs of neighbouring rows whose seeds count, host factor), for the products that the caller does.
    std::pair<std::vector<std::pair<std::int64_t, std::int64_t>>, double> plan(const py::bytes& table) const {
        std::vector<std::pair<std::int64_t, std::int64_t>> runs;
        const auto& seeds = bank_.seeds();
        for (std::size_t s = 0; s < seeds.size(); ++s) {
            if (!bank_.counts(view(table), s)) continue;
            if (!runs.empty() && runs.back().second == seeds[s].row0)
                runs.back().second = seeds[s].row1;
            else
                runs.emplace_back(seeds[s].row0, seeds[s].row1);
        }
        return {runs, static_cast<double>(view(table)[seeds.size()])};
    }

    // For BankCall, which keeps this object.
    Address address() const { return reinterpret_cast<Address>(&bank_); }

    std::size_t groups() const { return bank_.groups().size(); }

    std::vector<std::pair<std::int64_t, std::int64_t>> spans() const {
        std::vector<std::pair<std::int64_t, std::int64_t>> result;
        for (const Span& span : bank_.groups()) result.emplace_back(span.begin, span.end);
        return result;
    }

    std::vector<std::int64_t> owners() const {
        std::vector<std::int64_t> result;
        for (std::size_t s = 0; s < bank_.seeds().size(); ++s)
            result.insert(result.end(), static_cast<std::size_t>(bank_.seeds()[s].row1 - bank_.seeds()[s].row0),
                          static_cast<std::int64_t>(s));
        return result;
    }

private:
    static std::vector<BankSeed> unpack(const std::vector<SeedTuple>& tuples) {
        std::vector<BankSeed> seeds;
        for (const auto& [index, row0, row1, col0, col1, replace, act] : tuples)
            seeds.push_back({index, row0, row1, col0, col1, replace, static_cast<Act>(act)});
        return seeds;
    }
    static const T* view(const py::bytes& table) { return reinterpret_cast<const T*>(PyBytes_AS_STRING(table.ptr())); }

    T* down(Address weights) const { return as<T>(weights); }
    T* up(Address weights) const { return down(weights) + bank_.rows() * bank_.d_in(); }
    T* bias(Address weights) const { return biased_ ? up(weights) + bank_.rows() * bank_.d_out() : nullptr; }

    bool outlasts(std::int64_t n) const { return n * bank_.rows() * (bank_.d_in() + bank_.d_out()) > kReleaseAbove; }

    void check_reserved(const std::vector<Reserved>& seats) const {
        if (seats.size() != bank_.seeds().size())
            throw std::invalid_argument("this bank has " + std::to_string(bank_.seeds().size()) + " seeds, not " +
                                        std::to_string(seats.size()));
    }

    Bank bank_;
    bool biased_;
    std::int64_t reserved_rank_ = 0;
    std::vector<Reserved> sources_;
};

// Whether the parameters of a bank are still the ones that it was made for, where they were. Asked at every forward, so it is
// asked here: a Python loop over eight parameters costs as much as the product of a small layer.
class Guard {
public:
    Guard(const py::list& dicts, const py::list& keys, const py::list& parameters)
        : data_ptr_(py::str("data_ptr")), version_(py::str("_version")) {
        for (std::size_t i = 0; i < parameters.size(); ++i)
            entries_.push_back({dicts[i], keys[i], parameters[i], 0});
        for (Entry& entry : entries_) entry.address = address(entry);
    }

    bool whole() const {
        for (const Entry& entry : entries_) {
            PyObject* now = PyDict_GetItemWithError(entry.dict.ptr(), entry.key.ptr());
            if (now == nullptr && PyErr_Occurred()) throw py::error_already_set();
            if (now != entry.parameter.ptr() || address(entry) != entry.address) return false;
        }
        return true;
    }

    // The version counters, to be compared with those of another time.
    py::bytes versions() const {
        std::string result(entries_.size() * sizeof(long long), '\0');
        long long* out = reinterpret_cast<long long*>(result.data());
        for (const Entry& entry : entries_) {
            const py::object value = py::reinterpret_steal<py::object>(PyObject_GetAttr(entry.parameter.ptr(), version_.ptr()));
            if (!value) throw py::error_already_set();
            *out++ = PyLong_AsLongLong(value.ptr());
        }
        return py::bytes(result);
    }

private:
    struct Entry {
        py::object dict, key, parameter;
        unsigned long long address;
    };

    unsigned long long address(const Entry& entry) const {
        const py::object value = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(entry.parameter.ptr(), data_ptr_.ptr()));
        if (!value) throw py::error_already_set();
        return PyLong_AsUnsignedLongLong(value.ptr());
    }

    std::vector<Entry> entries_;
    py::str data_ptr_, version_;
};

template <typename T>
void bind_bank(py::module_& m, const char* name) {
    using B = BoundBank<T>;
    py::class_<B>(m, name, "The low-rank seeds of one layer; see esper.execution.grafts.bank_kernel.")
        .def(py::init<const std::vector<SeedTuple>&, std::int64_t, std::int64_t, std::int64_t, bool>())
        .def("forward", &B::forward)
        .def("coefficients", &B::coefficients)
        .def("backward", &B::backward)
        .def("activate", &B::activate)
        .def("activate_backward", &B::activate_backward)
        .def("reserve", &B::reserve)
        .def("gather", &B::gather)
        .def("scatter", &B::scatter)
        .def("plan", &B::plan)
        .def_property_readonly("address", &B::address)
        .def_property_readonly("groups", &B::groups)
        .def_property_readonly("spans", &B::spans)
        .def_property_readonly("owners", &B::owners);
}

using esper::graft::Seat;
using esper::graft::Seats;

Seats seats_of(const std::vector<Address>& parts, const std::vector<Address>& trusted, const std::vector<std::int64_t>& places) {
    if (parts.size() > esper::graft::kMaxSeeds || places.size() != 4 * parts.size() ||
        (!trusted.empty() && trusted.size() != parts.size()))
        throw std::invalid_argument("graft_blend: " + std::to_string(parts.size()) + " parts, " +
                                    std::to_string(trusted.size()) + " masks and " + std::to_string(places.size()) +
                                    " numbers in places do not belong together");
    Seats seats{};
    seats.count = static_cast<int>(parts.size());
    for (std::size_t s = 0; s < parts.size(); ++s)
        seats.seat[s] = {as<const void>(parts[s]),
                         trusted.empty() ? nullptr : as<const std::uint8_t>(trusted[s]),
                         static_cast<std::int32_t>(places[4 * s]),
                         static_cast<std::int32_t>(places[4 * s + 1]),
                         static_cast<std::int32_t>(places[4 * s + 2]),
                         static_cast<std::int32_t>(places[4 * s + 3])};
    return seats;
}

// Stretch by stretch: between two borders the factors are constant, and the features of one outer index lie side by side.
template <typename T>
void blend_cpu(std::int64_t outer, std::int64_t features, std::int64_t inner, const T* h, T* y, const Seats& seats,
               const float* alpha, std::uint8_t* faults) {
    std::set<std::int64_t> borders{0, features};
    for (int s = 0; s < seats.count; ++s) {
        borders.insert(seats.seat[s].begin);
        borders.insert(seats.seat[s].end);
    }
    for (auto border = borders.begin(); std::next(border) != borders.end(); ++border) {
        const std::int64_t begin = *border, run = (*std::next(border) - begin) * inner;
        const T replaced = esper::graft::replace_sum<T>(seats, alpha, begin);
        const T host = esper::graft::host_factor(replaced);
        for (std::int64_t o = 0; o < outer; ++o) {
            const std::int64_t at = (o * features + begin) * inner;
            for (std::int64_t i = 0; i < run; ++i) y[at + i] = esper::graft::host_part(host, h[at + i]);
            for (int s = 0; s < seats.count; ++s) {
                const Seat& seat = seats.seat[s];
                if (begin < seat.begin || begin >= seat.end) continue;
                const T factor = esper::graft::coefficient(seat, alpha, replaced);
                if (factor == T(0)) continue;
                const T* k = static_cast<const T*>(seat.part) + esper::graft::part_offset(seat, o, begin, inner, 0);
                for (std::int64_t i = 0; i < run; ++i) y[at + i] += factor * k[i];
            }
        }
    }
    const std::int64_t count = outer * features * inner;
    if (esper::graft::all_finite(y, count)) return;
    const auto load = [](const void* base, std::int64_t i) { return static_cast<const T*>(base)[i]; };
    const auto round = [](T value) { return value; };
    for (std::int64_t i = 0; i < count; ++i)
        if (!esper::graft::is_finite(y[i]))
            esper::graft::blame_element(seats, alpha, h[i], y[i], i / inner / features, i / inner % features, inner, i % inner,
                                        load, round, [faults](int s) { faults[s] = 1; });
    if (std::any_of(faults, faults + seats.count, [](std::uint8_t fault) { return fault != 0; })) std::copy(h, h + count, y);
}

void graft_blend(int dtype, std::int64_t outer, std::int64_t features, std::int64_t inner, Address h, Address y,
                 const std::vector<Address>& parts, const std::vector<Address>& trusted, Address alpha,
                 const std::vector<std::int64_t>& places, Address faults) {
    const Seats seats = seats_of(parts, trusted, places);
    if (dtype == 0)
        blend_cpu(outer, features, inner, as<const float>(h), as<float>(y), seats, as<const float>(alpha), as<std::uint8_t>(faults));
    else if (dtype == 1)
        blend_cpu(outer, features, inner, as<const double>(h), as<double>(y), seats, as<const float>(alpha), as<std::uint8_t>(faults));
    else
        throw std::invalid_argument("graft_blend on the CPU takes dtype 0 (float32) or 1 (float64), got " + std::to_string(dtype));
}

#ifdef ESPER_WITH_CUDA
void check(int error, const char* what) {
    if (error != 0) throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(error));
}
#endif

}  // namespace

void bind_graft(py::module_& m) {
    py::class_<Guard>(m, "GraftGuard", "Watches the parameters of a bank; see esper.execution.grafts.bank.")
        .def(py::init<const py::list&, const py::list&, const py::list&>())
        .def("whole", &Guard::whole)
        .def("versions", &Guard::versions);
    bind_bank<float>(m, "GraftBankF32");
    bind_bank<double>(m, "GraftBankF64");
    m.def("graft_all_finite_f32", [](Address p, std::int64_t n) { return esper::graft::all_finite(as<const float>(p), n); });
    m.def("graft_all_finite_f64", [](Address p, std::int64_t n) { return esper::graft::all_finite(as<const double>(p), n); });
    m.def("graft_instruction_sets", &esper::graft::instruction_sets, "What this processor has of what the products are compiled for.");
    m.def("graft_use_instruction_set", &esper::graft::use_instruction_set, "For tests: compile-time variants of the products.");
    m.def("graft_blend", &graft_blend);
#ifdef ESPER_WITH_CUDA
    m.def("graft_blend_cuda", [](int dtype, std::int64_t outer, std::int64_t features, std::int64_t inner, Address h, Address y,
                                 const std::vector<Address>& parts, const std::vector<Address>& trusted, Address alpha,
                                 const std::vector<std::int64_t>& places, Address faults, Address stream) {
        check(esper::graft::blend_cuda(dtype, outer, features, inner, as<const void>(h), as<void>(y),
                                       seats_of(parts, trusted, places), as<const float>(alpha), as<std::uint8_t>(faults),
                                       as<void>(stream)),
              "graft_blend");
    });
    m.def("graft_blend_backward_cuda",
          [](int dtype, std::int64_t outer, std::int64_t features, std::int64_t inner, Address gy, Address gh,
             const std::vector<Address>& gparts, Address alpha, Address faults, const std::vector<std::int64_t>& places,
             Address stream) {
              check(esper::graft::blend_backward_cuda(dtype, outer, features, inner, as<const void>(gy), as<void>(gh),
                                                      seats_of(gparts, {}, places), as<const float>(alpha),
                                                      as<const std::uint8_t>(faults), as<void>(stream)),
                    "graft_blend_backward");
          });
#endif
}
