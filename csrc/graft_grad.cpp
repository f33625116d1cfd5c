// The backward of a bank's call in C (graft_call.cpp): what autograd's engine calls, without Python in it.
//
// At a width of 64 the products of a backward take 4 us, and Python around them took 40 for four seeds: a node's method,
// its saved tensors, allocations, and a view for each parameter. These functions stand in for `apply` of the nodes of
// esper.execution.grafts.bank; whatever is not the plain case they hand to the method that was there.
#include <Python.h>
#include <pybind11/pybind11.h>

#include <new>
#include <vector>

#include "bindings.h"
#include "graft_bank.h"
#include "graft_call.h"
#include "torch_view.h"

namespace {

using esper::graft::Bank;
using esper::graft::Call;
using esper::graft::Parts;
using namespace esper::torch_view;

PyObject *name_call, *name_saved, *name_needs, *name_blocks, *name_parameters, *name_requires, *name_offset, *name_next, *zero, *minus_one;
PyObject* slowly;                  // BackwardCFunction.apply
constexpr Py_ssize_t kOthers = 3;  // arguments in front of a buffer's parameters

enum class Outcome { done, slow, failed };

template <typename T>
void backward(const Call* call, const View& x, const View& gy, const char* table, void* gx, void* gh, void* flat) {
    const Parts<const T> weights(call, call->weights);
    T *down = nullptr, *up = nullptr, *bias = nullptr;
    if (flat != nullptr) {
        const Parts<T> grads(call, flat);
        down = grads.down, up = grads.up, bias = grads.bias;
    }
    call->native->backward(static_cast<const T*>(x.data), static_cast<const T*>(gy.data), weights.down, weights.up,
                           weights.bias, reinterpret_cast<const T*>(table), gy.rows, static_cast<T*>(gx),
                           static_cast<T*>(gh), down, up, bias);
}

// Whether any seed counts, and the factor of h where all features share one.
template <typename T>
bool counts(const Bank& bank, const char* table, double* host) {
    const T* line = reinterpret_cast<const T*>(table);
    *host = static_cast<double>(line[bank.seeds().size()]);
    for (std::size_t s = 0; s < bank.seeds().size(); ++s)
        if (bank.counts(line, s)) return true;
    return false;
}

// An empty tensor like another, and where it lies; null with an error set. Not wanted: None, at null.
PyObject* room(bool wanted, PyObject* like, void** at) {
    *at = nullptr;
    if (!wanted) return Py_NewRef(Py_None);
    PyObject* made = PyObject_CallOneArg(torch_.empty_like, like);
    if (made != nullptr) *at = address(made);
    return made;
}

// What every backward of a bank begins with.
struct Backward {
    pybind11::object made, saved, needs;
    Call* call;
    const char* table;
    View gy, x;
    double host;
    bool alike;  // h's gradient is y's

    PyObject* tap() const { return PyTuple_GET_ITEM(saved.ptr(), 0); }
    bool wants(Py_ssize_t i) const { return PyTuple_GET_ITEM(needs.ptr(), i) == Py_True; }
};

Outcome begin(PyObject* ctx, PyObject* gy, Backward* out) {
    out->made = steal(PyObject_GetAttr(ctx, name_call));
    if (!out->made) return Outcome::failed;
    PyObject *bank = PyTuple_GET_ITEM(out->made.ptr(), 3), *seen = PyTuple_GET_ITEM(out->made.ptr(), 2);
    if (!Py_IS_TYPE(bank, esper::graft::call_type)) return Outcome::slow;
    Call* call = out->call = reinterpret_cast<Call*>(bank);
    // Saved tensors may be asked for once only, as under activation checkpointing: whatever is left to Python, which asks for
    // them, is found out before.
    if (torch_.grad_enabled() || call->native == nullptr || !view(gy, call->bits, &out->gy) || !call->small(out->gy.rows))
        return Outcome::slow;
    const int plain = answers(torch_.any_autocast, Py_False);
    if (plain != 1) return plain < 0 ? Outcome::failed : Outcome::slow;
    const auto now = steal(esper::graft::versions(call));
    if (!now) return Outcome::failed;
    const int same = PyObject_RichCompareBool(now.ptr(), seen, Py_EQ);
    if (same < 0) return Outcome::failed;
    const Bank& native = *call->native;
    out->table = PyBytes_AS_STRING(PyTuple_GET_ITEM(out->made.ptr(), 1));
    const bool awake = call->bits == 32 ? counts<float>(native, out->table, &out->host)
                                        : counts<double>(native, out->table, &out->host);
    if (same == 0 || !awake) return Outcome::slow;
    out->saved = steal(PyObject_GetAttr(ctx, name_saved));
    if (!out->saved) return Outcome::failed;
    if (!view(out->tap(), call->bits, &out->x) || out->x.rows != out->gy.rows) return Outcome::slow;
    out->alike = native.groups().size() == 1 && out->host == 1.0;
    out->needs = steal(PyObject_GetAttr(ctx, name_needs));
    return out->needs ? Outcome::done : Outcome::failed;
}

// The seeds' part of the gradients: for x at `gx`, for h and the buffer where there is room.
Outcome compute(const Backward& b, void* gx, void* gh, void* flat) {
    try {
        const auto run = b.call->bits == 32 ? backward<float> : backward<double>;
        run(b.call, b.x, b.gy, b.table, gx, gh, flat);
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
        return Outcome::failed;
    }
    return Outcome::done;
}

// The gradients of one call, as Bank.backward has them: (None, for x, for h, for the buffer).
Outcome gradients(PyObject* ctx, PyObject* gy, PyObject** found) {
    Backward b;
    const Outcome begun = begin(ctx, gy, &b);
    if (begun != Outcome::done) return begun;
    void *at_x, *at_h, *at_flat;
    const auto gx = steal(room(b.wants(1), b.tap(), &at_x));
    const auto other_h = steal(room(b.wants(2) && !b.alike, gy, &at_h));
    PyObject* gh = b.wants(2) && b.alike ? gy : other_h.ptr();
    const auto flat = steal(room(b.wants(3), b.call->buffer, &at_flat));
    if (!gx || !other_h || !flat || compute(b, at_x, at_h, at_flat) != Outcome::done) return Outcome::failed;
    *found = PyTuple_Pack(4, Py_None, gx.ptr(), gh, flat.ptr());
    return *found == nullptr ? Outcome::failed : Outcome::done;
}

pybind11::object called(PyObject* function, PyObject* first, PyObject* second) {
    PyObject* arguments[] = {first, second};
    return steal(PyObject_Vectorcall(function, arguments, 2, nullptr));
}

// A tensor as rows: itself, if it is that already.
pybind11::object as_rows(PyObject* tensor, const View& view) {
    if (view.ndim == 2) return pybind11::reinterpret_borrow<pybind11::object>(tensor);
    const auto last = steal(PyLong_FromLongLong(view.last));
    if (!last) return {};
    PyObject* arguments[] = {tensor, minus_one, last.ptr()};
    return steal(PyObject_Vectorcall(torch_.reshape, arguments, 3, nullptr));
}

// Multiply-adds of a host's product above which it pays to ask whether this backward wants its result at all.
constexpr std::int64_t kAskAbove = 1 << 20;

// Whether the engine goes on to what gave the node's input `i`: torch.autograd.grad may want another's gradient only. True in doubt,
// as where the input itself is what it wants, which torch refuses to say.
bool executed(PyObject* ctx, Py_ssize_t i) {
    if (torch_.executes == Py_None) return true;
    const auto edges = steal(PyObject_GetAttr(ctx, name_next));
    const auto answer = edges && PyTuple_Check(edges.ptr()) && i < PyTuple_GET_SIZE(edges.ptr())
                            ? steal(PyObject_CallOneArg(torch_.executes, PyTuple_GET_ITEM(PyTuple_GET_ITEM(edges.ptr(), i), 0)))
                            : pybind11::object();
    if (!answer) PyErr_Clear();
    return !answer || answer.ptr() != Py_False;
}

// Memory that a thread keeps for the seeds' part of x's gradient.
constexpr std::size_t kKeptBytes = 1 << 20;

// Adds what the seeds give for x to what the host gives; false where that is no plain tensor.
template <typename T>
bool add(PyObject* to, const char* from, const View& like) {
    View sum;
    if (!view(to, 8 * static_cast<int>(sizeof(T)), &sum) || sum.rows != like.rows || sum.last != like.last) return false;
    T* out = static_cast<T*>(sum.data);
    const T* in = reinterpret_cast<const T*>(from);
    for (std::int64_t i = 0; i < sum.rows * sum.last; ++i) out[i] += in[i];
    return true;
}

// The gradients of a Linear host with its seeds, by the same products that autograd has for the host:
// (None, for x, for the weight, for the bias, for the buffer).
Outcome host_gradients(PyObject* ctx, PyObject* gy, PyObject** found) {
    Backward b;
    const Outcome begun = begin(ctx, gy, &b);
    if (begun != Outcome::done) return begun;
    bool want_x = b.wants(1), want_weight = b.wants(2);
    const bool want_bias = b.wants(3);
    if (b.gy.rows * b.gy.last * b.x.last > kAskAbove) {
        want_x = want_x && executed(ctx, 0);
        want_weight = want_weight && executed(ctx, 1);
    }
    void *at_h, *at_flat;
    const auto other_h = steal(room((want_x || want_weight || want_bias) && !b.alike, gy, &at_h));
    const auto flat = steal(room(b.wants(4), b.call->buffer, &at_flat));
    if (!other_h || !flat) return Outcome::failed;
    PyObject* gh = b.alike ? gy : other_h.ptr();
    pybind11::object gx = pybind11::none(), gweight = pybind11::none(), gbias = pybind11::none();
    // Of the seeds alone: added in one rounding, as autograd adds the gradients of two nodes. The memory is kept, because what
    // goes back to the system comes again page by page; a backward that runs inside of this one has its own.
    thread_local std::vector<char> kept;
    std::vector<char> part = std::move(kept);
    try {
        if (want_x) part.resize(static_cast<std::size_t>(b.x.rows * b.x.last) * b.call->bits / 8);
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
        return Outcome::failed;
    }
    if (compute(b, want_x ? part.data() : nullptr, at_h, at_flat) != Outcome::done) return Outcome::failed;
    if (want_x) {
        gx = called(b.gy.ndim == 2 ? torch_.mm : torch_.matmul, gh, PyTuple_GET_ITEM(b.saved.ptr(), 1));
        if (!gx) return Outcome::failed;
        if (!(b.call->bits == 32 ? add<float> : add<double>)(gx.ptr(), part.data(), b.x)) return Outcome::slow;
    }
    if (part.size() <= kKeptBytes) kept = std::move(part);
    if (want_weight || want_bias) {
        const auto rows = as_rows(gh, b.gy);
        if (!rows) return Outcome::failed;
        if (want_weight) {
            const auto turned = steal(PyObject_CallOneArg(torch_.transposed, rows.ptr())), x = as_rows(b.tap(), b.x);
            if (!turned || !x) return Outcome::failed;
            gweight = called(torch_.mm, turned.ptr(), x.ptr());
            if (!gweight) return Outcome::failed;
        }
        if (want_bias) gbias = called(torch_.sum, rows.ptr(), zero);
        if (!gbias) return Outcome::failed;
    }
    *found = PyTuple_Pack(5, Py_None, gx.ptr(), gweight.ptr(), gbias.ptr(), flat.ptr());
    return *found == nullptr ? Outcome::failed : Outcome::done;
}

// The gradient of one parameter in its place, None if it is frozen. Gives false with an error set.
bool put(PyObject* part, PyObject* parameters, Py_ssize_t i, PyObject* result) {
    const auto flag = steal(PyObject_GetAttr(PyTuple_GET_ITEM(parameters, i), name_requires));
    if (!flag) return false;
    PyTuple_SET_ITEM(result, kOthers + i, Py_NewRef(flag.ptr() == Py_True ? part : Py_None));
    return true;
}

// One block of the buffer's gradient, cut into the parameters that lie in it. Gives false with an error set.
bool cut(PyObject* grad, PyObject* block, PyObject* parameters, PyObject* result) {
    // shape, stride, offset; how many of its lines each part has, along which dimension; which parameter is the first
    PyObject* arguments[] = {grad, PyTuple_GET_ITEM(block, 0), PyTuple_GET_ITEM(block, 1), PyTuple_GET_ITEM(block, 2)};
    const auto whole = steal(PyObject_Vectorcall(torch_.as_strided, arguments, 4, nullptr));
    if (!whole) return false;
    const Py_ssize_t first = PyLong_AsSsize_t(PyTuple_GET_ITEM(block, 5));
    if (PyTuple_GET_SIZE(PyTuple_GET_ITEM(block, 3)) == 1) return put(whole.ptr(), parameters, first, result);
    PyObject* division[] = {whole.ptr(), PyTuple_GET_ITEM(block, 3), PyTuple_GET_ITEM(block, 4)};
    const auto parts = steal(PyObject_Vectorcall(torch_.split, division, 3, nullptr));
    if (!parts) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parts.ptr()); ++i)
        if (!put(PyTuple_GET_ITEM(parts.ptr(), i), parameters, first + i, result)) return false;
    return true;
}

// The buffer's gradient as views, one a parameter, behind None for the other arguments; None for a frozen parameter.
Outcome parted(PyObject* ctx, PyObject* grad, PyObject** found) {
    if (!Py_IS_TYPE(grad, torch_.tensor)) return Outcome::slow;
    const auto offset = steal(PyObject_CallMethodNoArgs(grad, name_offset));
    if (!offset) return Outcome::failed;
    if (PyLong_AsLong(offset.ptr()) != 0) return PyErr_Occurred() ? Outcome::failed : Outcome::slow;
    const auto blocks = steal(PyObject_GetAttr(ctx, name_blocks)), parameters = steal(PyObject_GetAttr(ctx, name_parameters));
    if (!blocks || !parameters) return Outcome::failed;
    PyObject* result = PyTuple_New(kOthers + PyTuple_GET_SIZE(parameters.ptr()));
    if (result == nullptr) return Outcome::failed;
    for (Py_ssize_t i = 0; i < kOthers; ++i) PyTuple_SET_ITEM(result, i, Py_NewRef(Py_None));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(blocks.ptr()); ++i)
        if (!cut(grad, PyTuple_GET_ITEM(blocks.ptr(), i), parameters.ptr(), result)) {
            Py_DECREF(result);
            return Outcome::failed;
        }
    *found = result;
    return Outcome::done;
}

template <Outcome (*quickly)(PyObject*, PyObject*, PyObject**)>
PyObject* applied(PyObject*, PyObject* const* args, Py_ssize_t count) {
    PyObject* found = nullptr;
    const Outcome outcome = count == 2 && args[1] != Py_None ? quickly(args[0], args[1], &found) : Outcome::slow;
    if (outcome == Outcome::slow) return PyObject_Vectorcall(slowly, args, static_cast<std::size_t>(count), nullptr);
    return found;
}

PyMethodDef run_method = {"apply", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(applied<gradients>)), METH_FASTCALL,
                          "apply(ctx, gy): the gradients of a bank's call."};
PyMethodDef host_method = {"apply", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(applied<host_gradients>)), METH_FASTCALL,
                           "apply(ctx, gy): the gradients of a host's call with its seeds."};
PyMethodDef gather_method = {"apply", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(applied<parted>)), METH_FASTCALL,
                             "apply(ctx, grad): a buffer's gradient as its parameters'."};

// Let the engine call these functions for the nodes of the three classes.
void install(const pybind11::object& run_class, const pybind11::object& host_class, const pybind11::object& gather_class,
             const pybind11::object& otherwise) {
    for (const auto& [node, method] :
         {std::pair{run_class, &run_method}, std::pair{host_class, &host_method}, std::pair{gather_class, &gather_method}}) {
        const auto function = steal(PyCFunction_New(method, nullptr));
        if (!function) throw pybind11::error_already_set();
        const auto bound = steal(PyInstanceMethod_New(function.ptr()));
        if (!bound) throw pybind11::error_already_set();
        pybind11::setattr(node, "apply", bound);
    }
    slowly = otherwise.inc_ref().ptr();
}

}  // namespace

void bind_graft_grad(pybind11::module_& m) {
    name_call = PyUnicode_InternFromString("call");
    name_saved = PyUnicode_InternFromString("saved_tensors");
    name_needs = PyUnicode_InternFromString("needs_input_grad");
    name_blocks = PyUnicode_InternFromString("blocks");
    name_parameters = PyUnicode_InternFromString("parameters");
    name_requires = PyUnicode_InternFromString("requires_grad");
    name_offset = PyUnicode_InternFromString("storage_offset");
    name_next = PyUnicode_InternFromString("next_functions");
    zero = PyLong_FromLong(0);
    minus_one = PyLong_FromLong(-1);
    m.def("bank_grad_setup", &install, "Give three classes of nodes their `apply`, and the one to fall back to.");
}
