// The clock of a wrapped model: it counts forwards and training steps, and calls Python only when something is due.
//
// After a forward the interpreter's own code and data have left the caches, so every Python instruction that a
// dormant model adds to a step costs some twenty times what a tight loop shows. Both paths that run on every step are
// therefore C, and touch little memory. Plain CPython API: pybind11's dispatch would cost as much as what it replaces.
#include <Python.h>
#include <pybind11/pybind11.h>
#include <structmember.h>

#include "bindings.h"

namespace {

struct Clock {
    PyObject_HEAD
    long long calls;
    long long steps;
    long long due;
    long long seen_calls;
    PyObject* on_due;     // called with the clock when a step is due
    PyObject* host;       // the module that a call of the clock calls
    PyObject* host_call;  // its full call, for everything that is not plain
    PyObject* tracing;    // whether torch.jit is tracing: a callable that gives None when it is not
    PyObject* watched;    // dictionaries of global hooks
    char plain;           // whether the host may be called without nn.Module's own __call__
};

Clock* cast(PyObject* self) { return reinterpret_cast<Clock*>(self); }

// Names of the host's own hook tables, in its __dict__.
PyObject* hook_names[4];

// 1: some hook is registered; 0: none; -1: an error is set.
int hooked(const Clock* clock) {
    PyObject** place = _PyObject_GetDictPtr(clock->host);
    if (place == nullptr || *place == nullptr) return 1;
    for (PyObject* name : hook_names) {
        PyObject* hooks = PyDict_GetItemWithError(*place, name);
        if (hooks == nullptr) return PyErr_Occurred() ? -1 : 1;
        if (!PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != 0) return 1;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(clock->watched); ++i)
        if (PyDict_GET_SIZE(PyTuple_GET_ITEM(clock->watched, i)) != 0) return 1;
    return 0;
}

// nn.Module.__call__ runs hooks and calls forward. Without hooks it is forward, and that saves its two frames.
PyObject* call(PyObject* self, PyObject* args, PyObject* kwargs) {
    Clock* clock = cast(self);
    if (clock->host == nullptr || clock->host_call == nullptr || clock->tracing == nullptr ||
        clock->watched == nullptr) {
        PyErr_SetString(PyExc_RuntimeError, "the clock has no host to call");
        return nullptr;
    }
    clock->calls += 1;
    bool plain = clock->plain;
    if (plain) {
        const int found = hooked(clock);
        if (found < 0) return nullptr;
        plain = found == 0;
    }
    if (plain) {
        PyObject* state = PyObject_CallNoArgs(clock->tracing);
        if (state == nullptr) return nullptr;
        plain = state == Py_None;
        Py_DECREF(state);
    }
    if (!plain) return PyObject_Call(clock->host_call, args, kwargs);
    static PyObject* const name = PyUnicode_InternFromString("forward");
    PyObject* forward = PyObject_GetAttr(clock->host, name);
    if (forward == nullptr) return nullptr;
    PyObject* result = PyObject_Call(forward, args, kwargs);
    Py_DECREF(forward);
    return result;
}

PyObject* tick(PyObject* self, PyObject*) {
    Clock* clock = cast(self);
    if (++clock->steps < clock->due) Py_RETURN_NONE;
    if (clock->on_due == nullptr) Py_RETURN_NONE;
    PyObject* done = PyObject_CallOneArg(clock->on_due, self);
    if (done == nullptr) return nullptr;
    Py_DECREF(done);
    Py_RETURN_NONE;
}

// Where a module keeps its clock: the same in every instance, since it is a slot.
Py_ssize_t clock_offset = 0;
PyTypeObject* clock_type = nullptr;

// A call of a module that has a clock, without the frame of the __call__ that the class has in Python.
PyObject* call_module(PyObject* self, PyObject* args, PyObject* kwargs) {
    PyObject* clock = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(self) + clock_offset);
    if (clock == nullptr) {
        PyErr_SetString(PyExc_AttributeError, "the module has no clock: its __init__ did not run");
        return nullptr;
    }
    Py_INCREF(clock);  // the call may replace it
    PyObject* result = Py_IS_TYPE(clock, clock_type) ? call(clock, args, kwargs) : PyObject_Call(clock, args, kwargs);
    Py_DECREF(clock);
    return result;
}

// Let instances of a class be called through the clock in their slot. The class's __call__ stays for those who look it
// up to read it, as torch.compile does, and for subclasses, whose own table Python fills from it.
void call_through_clock(pybind11::type type, pybind11::object slot) {
    auto* cls = reinterpret_cast<PyTypeObject*>(type.ptr());
    if (!Py_IS_TYPE(slot.ptr(), &PyMemberDescr_Type) || !PyType_HasFeature(cls, Py_TPFLAGS_HEAPTYPE))
        throw pybind11::type_error("needs a class in Python and one of its slots");
    const auto* descriptor = reinterpret_cast<PyMemberDescrObject*>(slot.ptr());
    if (!PyType_IsSubtype(cls, PyDescr_TYPE(descriptor))) throw pybind11::type_error("the slot is not the class's");
    clock_offset = descriptor->d_member->offset;
    cls->tp_call = call_module;
    PyType_Modified(cls);
}

int set_watched(PyObject* self, PyObject* value, void*) {
    if (value == nullptr || !PyTuple_Check(value)) {
        PyErr_SetString(PyExc_TypeError, "watched must be a tuple of dictionaries");
        return -1;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
        if (PyDict_Check(PyTuple_GET_ITEM(value, i))) continue;
        PyErr_SetString(PyExc_TypeError, "watched must be a tuple of dictionaries");
        return -1;
    }
    Py_INCREF(value);
    Py_XSETREF(cast(self)->watched, value);
    return 0;
}

PyObject* get_watched(PyObject* self, void*) {
    PyObject* value = cast(self)->watched;
    return value == nullptr ? PyTuple_New(0) : Py_NewRef(value);
}

int traverse(PyObject* self, visitproc visit, void* arg) {
    Clock* clock = cast(self);
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(clock->on_due);
    Py_VISIT(clock->host);
    Py_VISIT(clock->host_call);
    Py_VISIT(clock->tracing);
    Py_VISIT(clock->watched);
    return 0;
}

int clear(PyObject* self) {
    Clock* clock = cast(self);
    Py_CLEAR(clock->on_due);
    Py_CLEAR(clock->host);
    Py_CLEAR(clock->host_call);
    Py_CLEAR(clock->tracing);
    Py_CLEAR(clock->watched);
    return 0;
}

void deallocate(PyObject* self) {
    PyObject_GC_UnTrack(self);
    clear(self);
    PyTypeObject* type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"tick", tick, METH_NOARGS, "Count a training step; call on_due(clock) if it is due."},
    {nullptr, nullptr, 0, nullptr},
};

PyMemberDef members[] = {
    {"calls", T_LONGLONG, offsetof(Clock, calls), 0, "Forwards so far."},
    {"steps", T_LONGLONG, offsetof(Clock, steps), 0, "Training steps so far."},
    {"due", T_LONGLONG, offsetof(Clock, due), 0, "The step at which on_due is called next."},
    {"seen_calls", T_LONGLONG, offsetof(Clock, seen_calls), 0, "calls when somebody last looked."},
    {"on_due", T_OBJECT, offsetof(Clock, on_due), 0, "Called with the clock when a step is due."},
    {"host", T_OBJECT, offsetof(Clock, host), 0, "The module that a call goes to."},
    {"host_call", T_OBJECT, offsetof(Clock, host_call), 0, "Its full call, used when it is not plain."},
    {"tracing", T_OBJECT, offsetof(Clock, tracing), 0, "Gives None unless torch.jit is tracing."},
    {"plain", T_BOOL, offsetof(Clock, plain), 0, "Whether forward may be called directly when no hook is there."},
    {nullptr, 0, 0, 0, nullptr},
};

PyGetSetDef properties[] = {
    {"watched", get_watched, set_watched, "Tables of global hooks, as a tuple of dictionaries.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>("Counts the forwards and training steps of a model; calling it calls the host.")},
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_call, reinterpret_cast<void*>(call)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, properties},
    {0, nullptr},
};

PyType_Spec spec = {"esper._native.Clock", sizeof(Clock), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};

}  // namespace

void bind_clock(pybind11::module_& m) {
    const char* names[] = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"};
    for (int i = 0; i < 4; ++i) hook_names[i] = PyUnicode_InternFromString(names[i]);
    PyObject* type = PyType_FromSpec(&spec);
    if (type == nullptr) throw pybind11::error_already_set();
    clock_type = reinterpret_cast<PyTypeObject*>(type);
    m.attr("Clock") = pybind11::reinterpret_steal<pybind11::object>(type);
    m.def("call_through_clock", &call_through_clock, pybind11::arg("type"), pybind11::arg("slot"),
          "Let instances of a class be called through the Clock in a slot of theirs, without a Python frame.");
}
