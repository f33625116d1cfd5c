// The whole call of a bank in C: whether it may run, the forward, and its place in autograd's graph.
//
// At a width of 64 the products of four seeds take 3 us, and what Python needs around them took 20: after a layer's own
// product the interpreter's code and data have left the caches. What a tensor is and where it lies is asked through
// DLPack's exchange table (torch_view.h). Whatever is not the plain case is answered with None, and Python goes the long way.
#include <Python.h>
#include <pybind11/pybind11.h>

#include <new>
#include <string>
#include <vector>

#include "bindings.h"
#include "graft_bank.h"
#include "graft_call.h"
#include "torch_library.h"
#include "torch_view.h"

namespace {

using esper::graft::Bank;
using esper::graft::Call;
using esper::graft::Entry;
using esper::graft::Parts;
using namespace esper::torch_view;

// What reads a tensor's version, without the look-up of an attribute; null where it is no plain accessor.
const PyGetSetDef* version_of = nullptr;

PyObject *name_level, *name_version, *name_requires_grad, *name_weights, *name_attached;

template <typename T>
bool forward(const Call* call, const View& x, const View& h, void* y, const float* alpha, char* table) {
    const Bank& bank = *call->native;
    const Parts<const T> weights(call, call->weights);
    T* numbers = reinterpret_cast<T*>(table);
    bank.coefficients(alpha, numbers);
    return bank.forward(static_cast<const T*>(x.data), static_cast<const T*>(h.data), static_cast<T*>(y), weights.down,
                        weights.up, weights.bias, numbers, h.rows);
}

Call* cast(PyObject* self) { return reinterpret_cast<Call*>(self); }

// y's place in the graph: apply((y, bank, table, versions, self), x, h, bank.weights).
PyObject* attach(Call* call, PyObject* y, PyObject* table, PyObject* x, PyObject* h) {
    PyObject* made = esper::graft::made_by(call, y, table);
    PyObject* weights = made == nullptr ? nullptr : PyObject_GetAttr(call->bank, name_weights);
    PyObject* result = nullptr;
    if (weights != nullptr) {
        PyObject* arguments[] = {made, x, h, weights};
        result = PyObject_Vectorcall(call->apply, arguments, 4, nullptr);
    }
    Py_XDECREF(weights);
    Py_XDECREF(made);
    return result;
}

// run(x, h, alpha): y, or None where Python must look closer: not the plain case, other parameters, or a fault.
PyObject* run(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Call* call = cast(self);
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "run takes x, h and alpha");
        return nullptr;
    }
    if (call->native == nullptr) Py_RETURN_NONE;
    PyObject *x = call->reads_input ? args[0] : args[1], *h = args[1];
    const Bank& bank = *call->native;
    int answer = esper::graft::plain();
    if (answer < 0) return nullptr;
    View tap, host, alpha, result;
    if (answer == 0 || !view(h, call->bits, &host) || host.last != bank.d_out() || !view(x, call->bits, &tap) ||
        tap.last != bank.d_in() || tap.rows != host.rows || !view(args[2], 32, &alpha) || !call->small(host.rows))
        Py_RETURN_NONE;
    const bool graph = torch_.grad_enabled();
    answer = esper::graft::whole(call);
    if (answer == 1 && graph) answer = esper::graft::ready(call);
    if (answer < 0) return nullptr;
    if (answer == 0) Py_RETURN_NONE;

    PyObject* y = PyObject_CallOneArg(torch_.empty_like, h);
    if (y == nullptr) return nullptr;
    PyObject* table = esper::graft::new_table(call);
    PyObject* found = nullptr;
    if (table != nullptr) {
        const bool fits = view(y, call->bits, &result);
        const int finite = fits ? esper::graft::blend(call, tap, host, result.data, alpha, table) : 0;
        if (finite >= 0) found = !finite ? Py_NewRef(Py_None) : graph ? attach(call, y, table, x, h) : Py_NewRef(y);
    }
    Py_XDECREF(table);
    Py_DECREF(y);
    return found;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
    Call* call = cast(self);
    Py_VISIT(Py_TYPE(self));
    for (PyObject* held : {call->owner, call->bank, call->apply, call->apply_host, call->buffer, call->dicts, call->keys,
                           call->parameters})
        Py_VISIT(held);
    return 0;
}

int clear(PyObject* self) {
    Call* call = cast(self);
    call->native = nullptr;  // what it needs goes now
    if (call->entries != nullptr) call->entries->clear();
    Py_CLEAR(call->owner);
    Py_CLEAR(call->bank);
    Py_CLEAR(call->apply);
    Py_CLEAR(call->apply_host);
    Py_CLEAR(call->buffer);
    Py_CLEAR(call->dicts);
    Py_CLEAR(call->keys);
    Py_CLEAR(call->parameters);
    return 0;
}

void deallocate(PyObject* self) {
    PyObject_GC_UnTrack(self);
    clear(self);
    delete cast(self)->entries;
    PyTypeObject* type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

// BankCall(owner, address, bank, apply, apply_host, dicts, keys, parameters, buffer, limit, bits, biased, reads_input)
PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *owner, *bank, *apply, *apply_host, *dicts, *keys, *parameters, *buffer;
    unsigned long long native;
    long long limit;
    int bits, biased, reads_input;
    if (!PyArg_ParseTuple(args, "OKOOOO!O!O!OLipp", &owner, &native, &bank, &apply, &apply_host, &PyTuple_Type, &dicts,
                          &PyTuple_Type, &keys, &PyTuple_Type, &parameters, &buffer, &limit, &bits, &biased, &reads_input))
        return nullptr;
    if (torch_.api == nullptr) {
        PyErr_SetString(PyExc_RuntimeError, "bank_call_setup has not been called, or torch has no exchange table");
        return nullptr;
    }
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) return nullptr;
    Call* call = cast(self);
    call->owner = Py_NewRef(owner);
    call->bank = Py_NewRef(bank);
    call->apply = Py_NewRef(apply);
    call->apply_host = Py_NewRef(apply_host);
    call->dicts = Py_NewRef(dicts);
    call->keys = Py_NewRef(keys);
    call->parameters = Py_NewRef(parameters);
    call->native = reinterpret_cast<const Bank*>(native);
    call->buffer = Py_NewRef(buffer);
    View whole;
    if (!view(buffer, bits, &whole)) {
        Py_DECREF(self);
        PyErr_SetString(PyExc_TypeError, "the buffer must be a contiguous tensor of the bank's dtype on the CPU");
        return nullptr;
    }
    call->weights = whole.data;
    call->limit = limit;
    call->bits = bits;
    call->biased = biased != 0;
    call->reads_input = reads_input != 0;
    try {
        call->entries = new std::vector<Entry>;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parameters); ++i) {
            PyObject *dict = PyTuple_GET_ITEM(dicts, i), *parameter = PyTuple_GET_ITEM(parameters, i);
            call->entries->push_back({dict, PyTuple_GET_ITEM(keys, i), parameter, address(parameter)});
        }
    } catch (const std::bad_alloc&) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return self;
}

PyObject* elapsed(PyObject* self, PyObject*) { return PyLong_FromLongLong(cast(self)->nanoseconds / 1000); }

PyMethodDef methods[] = {
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run)), METH_FASTCALL,
     "run(x, h, alpha): y, or None where Python has to look closer."},
    {"run_host", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(esper::graft::run_host)), METH_FASTCALL,
     "run_host(x, host, alpha, timed): y of a Linear host and the seeds, or None where Python has to look closer."},
    {"elapsed", reinterpret_cast<PyCFunction>(elapsed), METH_NOARGS,
     "elapsed(): microseconds that the seeds of the last timed run_host took."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>("The call of a bank without Python in it; see esper.execution.grafts.bank.")},
    {Py_tp_new, reinterpret_cast<void*>(create)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec spec = {"esper._native.BankCall", sizeof(Call), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};

// Whether BankCall can be used: torch's tensors have an exchange table of a version that is understood.
bool setup(const std::string& library, const pybind11::type& tensor, const pybind11::type& parameter,
           const pybind11::dict& forward_ad, const pybind11::dict& functional, const pybind11::dict& functions) {
    const ExchangeApi* api = exchange_api(tensor.ptr());
    if (api == nullptr) return false;
    void* loaded = esper::torch_library(library);
    if (!esper::find(loaded, "aoti_torch_grad_mode_is_enabled", &torch_.grad_enabled) ||
        !esper::find(loaded, "aoti_torch_grad_mode_set_enabled", &torch_.set_grad_enabled))
        return false;
    const auto version = steal(PyObject_GetAttr(tensor.ptr(), name_version));
    if (!version) throw pybind11::error_already_set();
    if (Py_IS_TYPE(version.ptr(), &PyGetSetDescr_Type))
        version_of = reinterpret_cast<PyGetSetDescrObject*>(version.ptr())->d_getset;
    // Kept for the life of the process, as the module is.
    torch_.tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
    torch_.parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
    torch_.forward_ad = forward_ad.inc_ref().ptr();
    torch_.functional = functional.inc_ref().ptr();
    const std::pair<const char*, PyObject**> names[] = {
        {"functorch", &torch_.functorch}, {"jit", &torch_.jit},
        {"dispatch_modes", &torch_.dispatch_modes}, {"function_modes", &torch_.function_modes},
        {"any_autocast", &torch_.any_autocast}, {"autocast", &torch_.autocast},
        {"profiling", &torch_.profiling}, {"empty_like", &torch_.empty_like}, {"new_empty", &torch_.new_empty},
        {"as_strided", &torch_.as_strided}, {"split", &torch_.split},
        {"reshape", &torch_.reshape}, {"transposed", &torch_.transposed},
        {"linear", &torch_.linear}, {"mm", &torch_.mm},
        {"matmul", &torch_.matmul}, {"sum", &torch_.sum},
        {"executes", &torch_.executes},
    };
    for (const auto& [name, function] : names) *function = pybind11::object(functions[name]).inc_ref().ptr();
    torch_.api = api;
    return true;
}

}  // namespace

int esper::graft::plain() {
    int so = answers(torch_.functorch, Py_False);
    if (so == 1) so = answers(torch_.jit, Py_None);
    if (so != 1) return so;
    PyObject* modes = PyObject_CallNoArgs(torch_.dispatch_modes);
    if (modes == nullptr) return -1;
    const long count = PyLong_AsLong(modes);
    Py_DECREF(modes);
    if (count != 0) return PyErr_Occurred() ? -1 : 0;
    PyObject* level = PyDict_GetItemWithError(torch_.forward_ad, name_level);
    if (level == nullptr) return PyErr_Occurred() ? -1 : 0;
    const long depth = PyLong_AsLong(level);
    if (depth == -1 && PyErr_Occurred()) return -1;
    return depth < 0;
}

int esper::graft::whole(const Call* call) {
    for (const Entry& entry : *call->entries) {
        PyObject* now = PyDict_GetItemWithError(entry.dict, entry.key);
        if (now == nullptr && PyErr_Occurred()) return -1;
        if (now != entry.parameter || address(now) != entry.address) return 0;
    }
    return 1;
}

int esper::graft::ready(const Call* call) {
    PyObject* attached = PyObject_GetAttr(call->bank, name_attached);
    if (attached == nullptr) return -1;
    const bool done = attached == Py_True;
    Py_DECREF(attached);
    if (done) return 1;
    for (const Entry& entry : *call->entries) {
        PyObject* flag = PyObject_GetAttr(entry.parameter, name_requires_grad);
        if (flag == nullptr) return -1;
        const bool set = flag == Py_True;
        Py_DECREF(flag);
        if (set) return 0;
    }
    return 1;
}

PyObject* esper::graft::new_table(const Call* call) {
    return PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(call->native->table_size()) * call->bits / 8);
}

int esper::graft::blend(const Call* call, const View& x, const View& h, void* y, const View& alpha, PyObject* table) {
    try {
        const auto run = call->bits == 32 ? forward<float> : forward<double>;
        return run(call, x, h, y, static_cast<const float*>(alpha.data), PyBytes_AS_STRING(table));
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
        return -1;
    }
}

PyObject* esper::graft::made_by(Call* call, PyObject* y, PyObject* table) {
    PyObject* seen = versions(call);
    if (seen == nullptr) return nullptr;
    PyObject* made = PyTuple_Pack(5, y, call->bank, table, seen, reinterpret_cast<PyObject*>(call));
    Py_DECREF(seen);
    return made;
}

PyObject* esper::graft::versions(const Call* call) {
    PyObject* result = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(call->entries->size() * sizeof(long long)));
    if (result == nullptr) return nullptr;
    auto* out = reinterpret_cast<long long*>(PyBytes_AS_STRING(result));
    for (const Entry& entry : *call->entries) {
        PyObject* value = version_of ? version_of->get(entry.parameter, version_of->closure)
                                     : PyObject_GetAttr(entry.parameter, name_version);
        if (value == nullptr) {
            Py_DECREF(result);
            return nullptr;
        }
        *out++ = PyLong_AsLongLong(value);
        Py_DECREF(value);
    }
    return result;
}

void bind_graft_call(pybind11::module_& m) {
    name_level = PyUnicode_InternFromString("_current_level");
    name_version = PyUnicode_InternFromString("_version");
    name_requires_grad = PyUnicode_InternFromString("requires_grad");
    name_weights = PyUnicode_InternFromString("weights");
    name_attached = PyUnicode_InternFromString("attached");
    PyObject* type = PyType_FromSpec(&spec);
    if (type == nullptr) throw pybind11::error_already_set();
    esper::graft::call_type = reinterpret_cast<PyTypeObject*>(type);  // the module keeps it
    m.attr("BankCall") = pybind11::reinterpret_steal<pybind11::object>(type);
    m.def("bank_call_setup", &setup, "Tell BankCall about torch; false where it cannot be used.");
}
