// The seeds of a layer called straight from the code that a compiler writes.
//
// The dispatcher has an operation's arguments matched against its schema, boxed, and boxed again for the stable interface: 4 us
// of the 5 that one seed takes at a width of 64. Code that is compiled for a CPU has plain tensors, which are read here where
// they are (torch_view.h). Whatever cannot be read so goes to the operation.
#include <Python.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <vector>

#include "array.h"
#include "bindings.h"
#include "graft_seeds.h"
#include "torch_view.h"

namespace {

using esper::Array;
using esper::Kind;
using esper::Numbers;
using namespace esper::torch_view;

// Given once, and kept for the life of the process.
PyObject *forward_operation = nullptr, *backward_operation = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
const ExchangeApi* exchange = nullptr;

// Not a tensor that can be read: the operation shall say what is wrong with it, or serve it.
struct Unreadable {};

Kind kind_of_dlpack(const DlTensor& t) {
    if (t.lanes != 1) return Kind::other;
    if (t.code == kDlpackFloat) return t.bits == 32 ? Kind::float32 : t.bits == 64 ? Kind::float64 : Kind::other;
    if (t.code == kDlpackUnsigned && t.bits == 8) return Kind::uint8;
    return t.code == kDlpackInt && t.bits == 32 ? Kind::int32 : Kind::other;
}

Array read(PyObject* object) {
    DlTensor t;
    // Of other types nobody knows what they are: a fake tensor has no memory.
    if (!Py_IS_TYPE(object, tensor_type) && !Py_IS_TYPE(object, parameter_type)) throw Unreadable();
    if (exchange->borrow(object, &t) != 0) {
        PyErr_Clear();
        throw Unreadable();
    }
    if (t.device_type != kDlpackCpu || (t.strides == nullptr && t.ndim != 0)) throw Unreadable();
    return Array(static_cast<char*>(t.data) + t.byte_offset, kind_of_dlpack(t), Numbers(t.shape, t.ndim), Numbers(t.strides, t.ndim));
}

std::vector<Array> read_list(PyObject* object) {
    if (!PyList_Check(object)) throw Unreadable();
    std::vector<Array> result;
    result.reserve(static_cast<std::size_t>(PyList_GET_SIZE(object)));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(object); ++i) result.push_back(read(PyList_GET_ITEM(object, i)));
    return result;
}

// Multiply-adds above which other threads may have the interpreter meanwhile.
constexpr std::int64_t kLong = 1 << 20;

bool outlasts(const Array& x, const Array& h, const std::vector<Array>& weights) {
    std::int64_t numbers = 0;
    for (const Array& weight : weights) numbers += weight.count();
    return x.dim() > 0 && h.dim() > 0 && numbers * (h.count() / std::max<std::int64_t>(1, h.last())) > kLong;
}

template <typename F>
PyObject* answer(PyObject* operation, PyObject* const* args, Py_ssize_t count, Py_ssize_t expected, const F& work) {
    if (count == expected) {
        try {
            work();
            Py_RETURN_NONE;
        } catch (const Unreadable&) {
            // below
        } catch (const std::bad_alloc&) {
            return PyErr_NoMemory();
        } catch (const std::exception& error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
            return nullptr;
        }
    }
    return PyObject_Vectorcall(operation, args, static_cast<std::size_t>(count), nullptr);
}

PyObject* seeds_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return answer(forward_operation, args, count, 9, [&] {
        const Array x = read(args[0]), h = read(args[1]), alpha = read(args[2]), flags = read(args[3]), plan = read(args[4]),
                    y = read(args[7]), effect = read(args[8]);
        const std::vector<Array> weights = read_list(args[5]);
        const long long first_row = PyLong_AsLongLong(args[6]);
        if (first_row == -1 && PyErr_Occurred()) {
            PyErr_Clear();
            throw Unreadable();
        }
        without_python(outlasts(x, h, weights),
                       [&] { esper::graft::seeds_forward(x, h, alpha, flags, plan, weights, first_row, y, effect); });
    });
}

PyObject* seeds_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return answer(backward_operation, args, count, 8, [&] {
        const Array gy = read(args[0]), x = read(args[1]), effect = read(args[2]);
        const std::vector<Array> weights = read_list(args[3]), grads = read_list(args[7]);
        const bool want_x = args[4] == Py_True, want_h = args[5] == Py_True, want_weights = args[6] == Py_True;
        without_python(outlasts(x, gy, weights), [&] {
            esper::graft::seeds_backward(gy, x, effect, weights, want_x, want_h, want_weights, grads);
        });
    });
}

PyMethodDef functions[] = {
    {"seeds_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&seeds_forward)), METH_FASTCALL,
     "graft_seeds, past the dispatcher."},
    {"seeds_backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&seeds_backward)), METH_FASTCALL,
     "graft_seeds_backward, past the dispatcher."},
};

// The two functions; `forward` and `backward` are the operations for whatever they cannot read, and what is given back where
// torch has no exchange table.
pybind11::tuple direct(const pybind11::type& tensor, const pybind11::type& parameter, const pybind11::object& forward,
                       const pybind11::object& backward) {
    exchange = exchange_api(tensor.ptr());
    if (exchange == nullptr) return pybind11::make_tuple(forward, backward);
    tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
    parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
    forward_operation = forward.inc_ref().ptr();
    backward_operation = backward.inc_ref().ptr();
    const auto make = [](PyMethodDef* def) { return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(def, nullptr)); };
    return pybind11::make_tuple(make(&functions[0]), make(&functions[1]));
}

}  // namespace

void bind_graft_seeds_call(pybind11::module_& m) {
    m.def("direct_seeds", &direct, "Functions that do what two operations do, without the dispatcher.");
}
