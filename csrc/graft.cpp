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

// A bank together with where its weights lie. The Python side owns the memory and drops this object when it moves.
template <typename T>
class BoundBank {
public:
    BoundBank(const std::vector<SeedTuple>& seeds, std::int64_t d_in, std::int64_t d_out, std::int64_t rows, Address down,
              Address up, Address bias)
        : bank_(unpack(seeds), d_in, d_out, rows), down_(as<T>(down)), up_(as<T>(up)), bias_(as<T>(bias)) {}

    // The coefficients as bytes, or None when some result is not finite.
    py::object forward(Address x, Address h, Address y, std::int64_t n, Address alpha) const {
        py::bytes table = coefficients(alpha);
        if (!bank_.forward(as<const T>(x), as<const T>(h), as<T>(y), down_, up_, bias_, view(table), n)) return py::none();
        return std::move(table);
    }

    py::bytes coefficients(Address alpha) const {
        PyObject* raw = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(bank_.table_size() * sizeof(T)));
        if (raw == nullptr) throw py::error_already_set();
        bank_.coefficients(as<const float>(alpha), reinterpret_cast<T*>(PyBytes_AS_STRING(raw)));
        return py::reinterpret_steal<py::bytes>(raw);
    }

    void backward(const py::bytes& table, Address x, Address gy, std::int64_t n, Address gx, Address gh, Address gdown,
                  Address gup, Address gbias) const {
        bank_.backward(as<const T>(x), as<const T>(gy), down_, up_, bias_, view(table), n, as<T>(gx), as<T>(gh),
                       as<T>(gdown), as<T>(gup), as<T>(gbias));
    }

    void activate(const py::bytes& table, Address pre, Address scaled, std::int64_t n) const {
        bank_.activate(as<const T>(pre), as<T>(scaled), bias_, view(table), n);
    }

    void activate_backward(const py::bytes& table, Address gz, Address pre, std::int64_t n) const {
        bank_.activate_backward(as<T>(gz), as<const T>(pre), bias_, view(table), n);
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

    Bank bank_;
    T *down_, *up_, *bias_;
};

// Whether the parameters of a bank are still the ones that were packed, where they were packed. Asked at every forward, so it is
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
    py::class_<B>(m, name, "The low-rank seeds of one layer at fixed addresses; see esper.execution.grafts.bank.")
        .def(py::init<const std::vector<SeedTuple>&, std::int64_t, std::int64_t, std::int64_t, Address, Address, Address>())
        .def("forward", &B::forward)
        .def("coefficients", &B::coefficients)
        .def("backward", &B::backward)
        .def("activate", &B::activate)
        .def("activate_backward", &B::activate_backward)
        .def("plan", &B::plan)
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
