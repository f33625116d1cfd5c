// Launchers: a kernel with its plan of arguments, called like a function; and the Python side of the driver.
//
// A launcher is a type of its own rather than a pybind11 function: a launch is worth a few hundred nanoseconds, and a general
// binding's argument handling would cost as much again.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <limits>
#include <new>
#include <string>

#include "bindings.h"
#include "driver.h"

namespace py = pybind11;

namespace esper::driver {
namespace {

constexpr std::size_t kMaxArguments = 64;
constexpr Py_ssize_t kBefore = 4;  // grid x, y, z and the stream stand before the kernel's own arguments
constexpr int kWarpSize = 32;

enum class Kind : std::uint8_t { pointer, i8, i16, i32, i64, u8, u16, u32, u64, fp32, fp64 };

struct Argument {
    std::string name;
    std::string type;
    Kind kind;
};

// What a launch needs, made once. Nothing in it changes afterwards, so any number of threads may launch at once.
struct Plan {
    Function function;
    std::vector<Argument> arguments;
    std::size_t hidden;  // pointers that the compiler adds behind the arguments; given as null
    unsigned threads;
    unsigned shared;
};

struct Launcher {
    PyObject_HEAD
    vectorcallfunc call;
    Plan* plan;
};

PyTypeObject launcher_type{};
PyObject* error_type = nullptr;
PyObject* data_ptr_name = nullptr;

Kind parse(const std::string& name, const std::string& type) {
    if (!type.empty() && type[0] == '*') return Kind::pointer;
    static const std::vector<std::pair<const char*, Kind>> kinds = {
        {"i1", Kind::u8},   {"i8", Kind::i8},   {"i16", Kind::i16}, {"i32", Kind::i32},   {"i64", Kind::i64},  {"u1", Kind::u8},
        {"u8", Kind::u8},   {"u16", Kind::u16}, {"u32", Kind::u32}, {"u64", Kind::u64},   {"fp32", Kind::fp32}, {"fp64", Kind::fp64},
    };
    for (const auto& [word, kind] : kinds) {
        if (type == word) return kind;
    }
    throw py::value_error("argument '" + name + "' has type '" + type +
                          "'; a launch passes pointers ('*bf16'), i1 to i64, u1 to u64, fp32 and fp64");
}

// What became of an argument. Unfit is no mistake: the kernel was compiled for other values, and a caller that can compile anew
// takes its own way.
enum class Put { done, unfit, error };

// The compiler was told that pointers are aligned so, and uses instructions that fault where they are not.
constexpr std::uint64_t kAlignment = 16;

template <typename T>
Put put_integer(PyObject* value, void* slot) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (number == -1 && overflow == 0 && PyErr_Occurred()) return Put::error;
    T stored = static_cast<T>(number);
    if (overflow != 0) {
        if (overflow < 0 || sizeof(T) < 8 || std::numeric_limits<T>::is_signed) return Put::unfit;
        stored = static_cast<T>(PyLong_AsUnsignedLongLong(value));
        if (PyErr_Occurred()) {
            PyErr_Clear();
            return Put::unfit;
        }
    } else if (static_cast<long long>(stored) != number || (!std::numeric_limits<T>::is_signed && number < 0)) {
        return Put::unfit;
    }
    std::memcpy(slot, &stored, sizeof stored);
    return Put::done;
}

Put put_pointer(PyObject* value, void* slot) {
    std::uint64_t address = 0;
    if (value != Py_None) {
        PyObject* number = value;
        if (PyLong_Check(value)) {
            Py_INCREF(number);
        } else {
            number = PyObject_VectorcallMethod(data_ptr_name, &value, 1, nullptr);
            if (number == nullptr) return Put::error;
        }
        address = PyLong_AsUnsignedLongLong(number);
        Py_DECREF(number);
        if (address == static_cast<std::uint64_t>(-1) && PyErr_Occurred()) return Put::error;
    }
    std::memcpy(slot, &address, sizeof address);
    return address % kAlignment == 0 ? Put::done : Put::unfit;
}

Put put(PyObject* value, void* slot, const Argument& argument) {
    switch (argument.kind) {
        case Kind::pointer: return put_pointer(value, slot);
        case Kind::i8: return put_integer<std::int8_t>(value, slot);
        case Kind::i16: return put_integer<std::int16_t>(value, slot);
        case Kind::i32: return put_integer<std::int32_t>(value, slot);
        case Kind::i64: return put_integer<std::int64_t>(value, slot);
        case Kind::u8: return put_integer<std::uint8_t>(value, slot);
        case Kind::u16: return put_integer<std::uint16_t>(value, slot);
        case Kind::u32: return put_integer<std::uint32_t>(value, slot);
        case Kind::u64: return put_integer<std::uint64_t>(value, slot);
        case Kind::fp32:
        case Kind::fp64: break;
    }
    const double number = PyFloat_AsDouble(value);
    if (number == -1.0 && PyErr_Occurred()) return Put::error;
    if (argument.kind == Kind::fp64) {
        std::memcpy(slot, &number, sizeof number);
    } else {
        const float narrow = static_cast<float>(number);
        std::memcpy(slot, &narrow, sizeof narrow);
    }
    return Put::done;
}

// Names the argument in what the conversion complained about.
void blame(const Plan& plan, const Argument& argument, PyObject* value) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s: argument '%s' is %.200s, which is no %s", plan.function.name().c_str(),
                 argument.name.c_str(), Py_TYPE(value)->tp_name,
                 argument.kind == Kind::pointer ? "tensor, address or None" : argument.type.c_str());
}

PyObject* launch(PyObject* self, PyObject* const* values, std::size_t flags, PyObject* keywords) {
    const Plan& plan = *reinterpret_cast<Launcher*>(self)->plan;
    const Py_ssize_t given = PyVectorcall_NARGS(flags), wanted = static_cast<Py_ssize_t>(plan.arguments.size());
    if (keywords != nullptr && PyTuple_GET_SIZE(keywords) != 0) {
        PyErr_Format(PyExc_TypeError, "%s: arguments of a launch are given by position", plan.function.name().c_str());
        return nullptr;
    }
    if (given != kBefore + wanted) {
        PyErr_Format(PyExc_TypeError, "%s takes grid x, y, z, stream and %zd arguments, not %zd values in all",
                     plan.function.name().c_str(), wanted, given);
        return nullptr;
    }
    unsigned grid[3];
    for (int axis = 0; axis < 3; ++axis) {
        const unsigned long size = PyLong_AsUnsignedLong(values[axis]);
        if (size == static_cast<unsigned long>(-1) && PyErr_Occurred()) return nullptr;
        if (size == 0) Py_RETURN_TRUE;  // an empty grid is no launch; the driver would refuse it
        if (size > 0x7fffffffUL) {
            PyErr_Format(PyExc_OverflowError, "%s: a grid of %R is too large", plan.function.name().c_str(), values[axis]);
            return nullptr;
        }
        grid[axis] = static_cast<unsigned>(size);
    }
    Stream stream = static_cast<Stream>(PyLong_AsVoidPtr(values[3]));
    if (stream == nullptr && PyErr_Occurred()) return nullptr;

    // Each argument has a slot of eight bytes; the driver is given the slots' addresses and knows the sizes itself.
    std::array<std::uint64_t, kMaxArguments> slots;
    std::array<void*, kMaxArguments> addresses;
    std::size_t slot = 0;
    for (const Argument& argument : plan.arguments) {
        PyObject* value = values[kBefore + slot];
        addresses[slot] = &slots[slot];
        const Put outcome = put(value, &slots[slot], argument);
        if (outcome == Put::unfit) Py_RETURN_FALSE;
        if (outcome == Put::error) {
            blame(plan, argument, value);
            return nullptr;
        }
        ++slot;
    }
    for (const std::size_t end = slot + plan.hidden; slot < end; ++slot) {
        slots[slot] = 0;
        addresses[slot] = &slots[slot];
    }

    // A full queue makes the driver wait for the device, and other threads should not wait with it. The caller holds the
    // arguments meanwhile.
    const Module& module = *plan.function.module();
    const Driver& driver = *module.driver();
    Result result = 0;
    std::string broken;
    Py_BEGIN_ALLOW_THREADS;
    try {
        const Current current(driver, module.context());
        result = driver.api().launch(plan.function.handle(), grid[0], grid[1], grid[2], plan.threads, 1, 1, plan.shared, stream,
                                     addresses.data(), nullptr);
    } catch (const Error& error) {
        broken = error.what();
    }
    Py_END_ALLOW_THREADS;
    if (result != 0) broken = "cuLaunchKernel: " + driver.describe(result);
    if (!broken.empty()) {
        PyErr_Format(error_type, "%s: %s", plan.function.name().c_str(), broken.c_str());
        return nullptr;
    }
    Py_RETURN_TRUE;
}

PyObject* represent(PyObject* self) {
    const Plan& plan = *reinterpret_cast<Launcher*>(self)->plan;
    std::string text = "<Launcher of " + plan.function.name() + "(";
    const char* separator = "";
    for (const Argument& argument : plan.arguments) {
        text += separator + argument.name + ": " + argument.type;
        separator = ", ";
    }
    text += "), " + std::to_string(plan.threads) + " threads, " + std::to_string(plan.shared) + " bytes of shared memory>";
    return PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size()));
}

void destroy(PyObject* self) {
    delete reinterpret_cast<Launcher*>(self)->plan;
    Py_TYPE(self)->tp_free(self);
}

py::object make_launcher(const std::shared_ptr<Function>& function, const std::vector<std::pair<std::string, std::string>>& types,
                         std::size_t hidden, int num_warps, int shared) {
    if (num_warps < 1 || num_warps > kWarpSize) throw py::value_error("num_warps must be 1 to 32, not " + std::to_string(num_warps));
    if (shared < 0) throw py::value_error("shared must not be negative, and is " + std::to_string(shared));
    if (hidden > kMaxArguments || types.size() + hidden > kMaxArguments)
        throw py::value_error(std::to_string(types.size() + hidden) + " arguments are more than " + std::to_string(kMaxArguments));
    std::vector<Argument> arguments;
    for (const auto& [name, type] : types) arguments.push_back({name, type, parse(name, type)});
    function->allow_shared(shared);
    auto plan = std::make_unique<Plan>(Plan{*function, std::move(arguments), hidden, static_cast<unsigned>(num_warps * kWarpSize),
                                            static_cast<unsigned>(shared)});
    auto* self = PyObject_New(Launcher, &launcher_type);
    if (self == nullptr) throw py::error_already_set();
    self->call = launch;
    self->plan = plan.release();
    return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(self));
}

void make_type() {
    Py_SET_REFCNT(reinterpret_cast<PyObject*>(&launcher_type), 1);
    launcher_type.tp_name = "esper._native.Launcher";
    launcher_type.tp_doc = "Launches one kernel: launcher(grid_x, grid_y, grid_z, stream, *arguments) -> bool. False: the "
                           "kernel was not compiled for these values, and nothing was launched.";
    launcher_type.tp_basicsize = sizeof(Launcher);
    launcher_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION;
    launcher_type.tp_vectorcall_offset = offsetof(Launcher, call);
    launcher_type.tp_call = PyVectorcall_Call;
    launcher_type.tp_repr = represent;
    launcher_type.tp_dealloc = destroy;
    if (PyType_Ready(&launcher_type) < 0) throw py::error_already_set();
}

}  // namespace
}  // namespace esper::driver

void bind_driver(py::module_& m) {
    namespace dr = esper::driver;
    using release = py::call_guard<py::gil_scoped_release>;
    dr::make_type();
    dr::data_ptr_name = PyUnicode_InternFromString("data_ptr");
    if (dr::data_ptr_name == nullptr) throw py::error_already_set();
    dr::error_type = py::register_exception<dr::Error>(m, "DriverError", PyExc_RuntimeError).ptr();
    m.add_object("Launcher", py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(&dr::launcher_type)));

    py::class_<dr::Driver, std::shared_ptr<dr::Driver>>(m, "Driver", "The CUDA driver of this machine.")
        .def(py::init<const std::string&>(), py::arg("path") = "libcuda.so.1", release())
        .def_property_readonly("version", &dr::Driver::version, "Such as 13000 for CUDA 13.0.")
        .def("device_count", &dr::Driver::device_count)
        .def("capability", &dr::Driver::capability, py::arg("device"), "(major, minor).")
        .def("exchange_capture_mode", &dr::Driver::exchange_capture_mode, py::arg("mode"),
             "How this thread looks at captures of graphs: 0 global, 1 its own alone, 2 none. Returns the mode before.")
        .def(
            "load",
            [](std::shared_ptr<dr::Driver> driver, const py::buffer& image, int device) {
                std::string bytes;
                {
                    const py::buffer_info view = image.request();
                    if (view.ndim != 1 || view.strides[0] != view.itemsize) throw py::value_error("a GPU binary is a run of bytes");
                    bytes.assign(static_cast<const char*>(view.ptr), static_cast<std::size_t>(view.size * view.itemsize));
                }
                const py::gil_scoped_release unlocked;
                return std::make_shared<dr::Module>(std::move(driver), bytes, device);
            },
            py::arg("image"), py::arg("device"), "A binary, loaded in the device's primary context.");
    py::class_<dr::Module, std::shared_ptr<dr::Module>>(m, "Module", "A GPU binary on one device.")
        .def(
            "function",
            [](std::shared_ptr<dr::Module> module, std::string name) {
                return std::make_shared<dr::Function>(std::move(module), std::move(name));
            },
            py::arg("name"), release());
    py::class_<dr::Function, std::shared_ptr<dr::Function>>(m, "Function", "A kernel of a loaded binary.")
        .def_property_readonly("name", &dr::Function::name)
        .def("attribute", &dr::Function::attribute, py::arg("number"), "By the driver's number: 3 local bytes, 4 registers.")
        .def("launcher", &dr::make_launcher, py::arg("arguments"), py::arg("hidden"), py::arg("num_warps"), py::arg("shared"),
             "A callable that launches the kernel; arguments are (name, Triton type), hidden counts the pointers after them.");
}
