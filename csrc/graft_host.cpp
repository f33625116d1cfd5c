// A Linear host and the seeds in it as one call and one node of autograd's graph.
//
// A node for each costs more than the seeds themselves at small widths: what creates, connects and destroys it is code that
// the caches have forgotten since the layer before. The product is torch's own, so h is what the host alone gives, bit for
// bit; the seeds are added where it lies. Whatever is not the plain case is answered with None, and Python goes the long way.
#include <Python.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstring>
#include <string>

#include "bindings.h"
#include "graft_call.h"
#include "torch_library.h"
#include "torch_view.h"

namespace {

using esper::find;
using esper::graft::Bank;
using esper::graft::Call;
using namespace esper::torch_view;

PyObject *key_weight, *key_bias, *key_parameters, *key_linear, *key_call, *key_save, *key_needs, *key_attach, *key_weights, *key_cpu;

// Products below torch's dispatcher, by its C interface: what is in front of a small product costs more than it does.
struct Low {
    int (*from_memory)(void* data, std::int64_t ndim, const std::int64_t* sizes, const std::int64_t* strides, std::int64_t offset,
                       std::int32_t dtype, std::int32_t device, std::int32_t index, void** tensor) = nullptr;
    int (*let_go)(void* tensor) = nullptr;
    int (*addmm_out)(void* out, void* self, void* mat1, void* mat2, double beta, double alpha) = nullptr;
    int (*mm_out)(void* out, void* self, void* mat2) = nullptr;
    std::int32_t dtypes[2];
    bool there = false;
} low;

// Multiply-adds up to which it is used: for a larger product it does not matter what is in front of it. And those above which
// other threads may have the interpreter meanwhile, as in torch's own call.
constexpr std::int64_t kLowLimit = 1 << 23, kBriefLimit = 1 << 18;

// A matrix in somebody's memory, as torch sees it.
class Matrix {
public:
    Matrix(int bits, void* data, std::int64_t rows, std::int64_t columns, std::int64_t stride0, std::int64_t stride1) {
        const std::int64_t sizes[] = {rows, columns}, strides[] = {stride0, stride1};
        if (low.from_memory(data, 2, sizes, strides, 0, low.dtypes[bits == 64], 0, 0, &tensor_) != 0) tensor_ = nullptr;
    }
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;
    ~Matrix() {
        if (tensor_ != nullptr) low.let_go(tensor_);
    }
    void* get() const { return tensor_; }
    explicit operator bool() const { return tensor_ != nullptr; }

private:
    void* tensor_ = nullptr;
};

// The host and what it reads.
struct Host {
    PyObject *x, *weight, *bias;
    View rows;
    DlTensor matrix, shift;  // without a bias there is no shift

    bool biased() const { return bias != Py_None; }
};

void* memory(const DlTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// A parameter of the host that torch multiplies with as it is. Under functional_call it may be any tensor.
bool usable(PyObject* tensor, const Call* call, int ndim, DlTensor* t) {
    if (tensor == nullptr || !(Py_IS_TYPE(tensor, torch_.parameter) || Py_IS_TYPE(tensor, torch_.tensor))) return false;
    if (torch_.api->borrow(tensor, t) != 0) {
        PyErr_Clear();
        return false;
    }
    return t->device_type == kDlpackCpu && t->code == kDlpackFloat && t->bits == call->bits && t->lanes == 1 &&
           t->ndim == ndim && t->shape[0] == call->native->d_out();
}

// Whether a weight is rows of so many numbers. For any other autograd has other products backward, with other bits.
bool rows_of(const DlTensor& t, std::int64_t width) {
    return t.shape[1] == width && (t.strides == nullptr || (t.strides[0] == width && t.strides[1] == 1));
}

// What `host.weight` finds, for two names that no class above it has: first in the host's own names, where FSDP puts what it has
// gathered, then among its parameters. Borrowed; null where it finds nothing, or would ask somebody else's kind of dictionary.
PyObject* attribute(PyObject* names, PyObject* key) {
    PyObject* found = PyDict_GetItemWithError(names, key);
    if (found != nullptr || PyErr_Occurred()) return found;
    PyObject* parameters = PyDict_GetItemWithError(names, key_parameters);
    return parameters == nullptr || !PyDict_CheckExact(parameters) ? nullptr : PyDict_GetItemWithError(parameters, key);
}

// Whether torch.nn.functional.linear does what it says: nothing takes it over, and no autocast is at work.
int undisturbed() {
    int so = esper::graft::plain();
    if (so != 1) return so;
    if (PyDict_GetItemWithError(torch_.functional, key_linear) != torch_.linear) return PyErr_Occurred() ? -1 : 0;
    const auto modes = steal(PyObject_CallNoArgs(torch_.function_modes));
    if (!modes) return -1;
    const long count = PyLong_AsLong(modes.ptr());
    if (count != 0) return PyErr_Occurred() ? -1 : 0;
    so = answers(torch_.any_autocast, Py_False);
    if (so != 0) return so;
    const auto cast = steal(PyObject_CallOneArg(torch_.autocast, key_cpu));
    return cast ? cast.ptr() == Py_False : -1;
}

// The host's output by torch's own call, without a place in the graph; null with an error set.
pybind11::object called_product(const Host& host, bool graph) {
    PyObject* arguments[] = {host.x, host.weight, host.bias};
    if (graph) torch_.set_grad_enabled(false);
    auto h = steal(PyObject_Vectorcall(torch_.linear, arguments, 3, nullptr));
    if (graph) torch_.set_grad_enabled(true);
    return h;
}

// An empty result; null with an error set.
pybind11::object new_result(const Host& host, std::int64_t d_out) {
    if (host.rows.last == d_out && host.rows.exact) return steal(PyObject_CallOneArg(torch_.empty_like, host.x));
    const auto shape = steal(PyTuple_New(host.rows.ndim));
    if (!shape) return {};
    for (int i = 0; i < host.rows.ndim; ++i) {
        PyObject* size = PyLong_FromLongLong(i + 1 < host.rows.ndim ? host.rows.shape[i] : d_out);
        if (size == nullptr) return {};
        PyTuple_SET_ITEM(shape.ptr(), i, size);
    }
    PyObject* arguments[] = {host.x, shape.ptr()};
    return steal(PyObject_Vectorcall(torch_.new_empty, arguments, 2, nullptr));
}

template <typename T>
void spread(const DlTensor& shift, T* rows, std::int64_t count, std::int64_t width) {
    const T* from = static_cast<const T*>(memory(shift));
    const std::int64_t step = shift.strides == nullptr ? 1 : shift.strides[0];
    for (std::int64_t c = 0; c < width; ++c) rows[c] = from[c * step];
    for (std::int64_t i = 1; i < count; ++i) std::memcpy(rows + i * width, rows, static_cast<std::size_t>(width) * sizeof(T));
}

// The same by the same product, torch's addmm or mm, in a result of its own and where it lies; null without an error where that
// cannot be.
pybind11::object low_product(const Call* call, const Host& host, View* at) {
    const std::int64_t d_in = host.rows.last, d_out = call->native->d_out(), rows = host.rows.rows;
    if (!low.there || rows * d_in * d_out > kLowLimit || answers(torch_.profiling, Py_False) != 1) return {};
    auto y = new_result(host, d_out);
    if (!y || !view(y.ptr(), call->bits, at) || at->rows != rows || at->last != d_out) return {};
    const View& out = *at;
    const Matrix left(call->bits, host.rows.data, rows, d_in, d_in, 1), result(call->bits, out.data, rows, d_out, d_out, 1);
    const Matrix right(call->bits, memory(host.matrix), d_in, d_out, 1, d_in);  // the weight as it stands in x @ weight.T
    if (!left || !result || !right) return {};
    if (host.biased() && call->bits == 32) spread(host.shift, static_cast<float*>(out.data), rows, d_out);
    if (host.biased() && call->bits == 64) spread(host.shift, static_cast<double*>(out.data), rows, d_out);
    int failed = 0;
    without_python(rows * d_in * d_out > kBriefLimit, [&] {
        failed = host.biased() ? low.addmm_out(result.get(), result.get(), left.get(), right.get(), 1.0, 1.0)
                               : low.mm_out(result.get(), left.get(), right.get());
    });
    return failed == 0 ? y : pybind11::object();
}

// y's place in the graph: apply(made, x, weight, bias, bank.weights).
PyObject* attach_host(Call* call, PyObject* y, PyObject* table, const Host& host) {
    const auto made = steal(esper::graft::made_by(call, y, table));
    const auto weights = made ? steal(PyObject_GetAttr(call->bank, key_weights)) : pybind11::object();
    if (!weights) return nullptr;
    PyObject* arguments[] = {made.ptr(), host.x, host.weight, host.bias, weights.ptr()};
    return PyObject_Vectorcall(call->apply_host, arguments, 5, nullptr);
}

// forward(ctx, made, x, weight, bias, buffer) of the node: y is there already.
PyObject* node_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != 6) {
        PyErr_SetString(PyExc_TypeError, "forward takes ctx, what a call made, x, weight, bias and the buffer");
        return nullptr;
    }
    PyObject *ctx = args[0], *made = args[1];
    const auto kept = steal(PyTuple_GetSlice(made, 1, PyTuple_GET_SIZE(made)));
    if (!kept || PyObject_SetAttr(ctx, key_call, kept.ptr()) < 0) return nullptr;
    const auto needs = steal(PyObject_GetAttr(ctx, key_needs));
    if (!needs) return nullptr;
    // As autograd does for a product: an optimizer may write to the weight before a backward that does not need it.
    PyObject* weight = PyTuple_GET_ITEM(needs.ptr(), 1) == Py_True ? args[3] : Py_None;
    PyObject* saved[] = {ctx, args[2], weight};
    if (!steal(PyObject_VectorcallMethod(key_save, saved, 3, nullptr))) return nullptr;
    return Py_NewRef(PyTuple_GET_ITEM(made, 0));
}

PyMethodDef forward_method = {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(node_forward)), METH_FASTCALL,
                              "forward(ctx, made, x, weight, bias, buffer): y, which is there already."};

void install_host(const std::string& library, const pybind11::object& node) {
    const auto function = steal(PyCFunction_New(&forward_method, nullptr));
    if (!function) throw pybind11::error_already_set();
    pybind11::setattr(node, "forward", function);
    void* loaded = esper::torch_library(library);
    std::int32_t (*float32)() = nullptr, (*float64)() = nullptr;
    low.there = find(loaded, "aoti_torch_create_tensor_from_blob", &low.from_memory) &&
                find(loaded, "aoti_torch_delete_tensor_object", &low.let_go) &&
                find(loaded, "aoti_torch_cpu_addmm_out", &low.addmm_out) && find(loaded, "aoti_torch_cpu_mm_out", &low.mm_out) &&
                find(loaded, "aoti_torch_dtype_float32", &float32) && find(loaded, "aoti_torch_dtype_float64", &float64);
    if (low.there) low.dtypes[0] = float32(), low.dtypes[1] = float64();
}

}  // namespace

PyObject* esper::graft::run_host(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Call* call = reinterpret_cast<Call*>(self);
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "run_host takes x, the host, alpha and whether to take the time");
        return nullptr;
    }
    if (call->native == nullptr || !call->reads_input) Py_RETURN_NONE;
    const auto names = steal(PyObject_GenericGetDict(args[1], nullptr));
    if (!names) return nullptr;
    Host host{args[0], attribute(names.ptr(), key_weight), attribute(names.ptr(), key_bias), {}, {}, {}};
    if (PyErr_Occurred()) return nullptr;
    // Other threads may have the interpreter meanwhile, and put others in their places.
    const auto weight = steal(Py_XNewRef(host.weight)), bias = steal(Py_XNewRef(host.bias));
    const Bank& bank = *call->native;
    View alpha, before, after;
    // A single number lies like a column as well, and then autograd has another product backward, with other bits.
    if (!view(host.x, call->bits, &host.rows) || host.rows.ndim < 2 || host.rows.last != bank.d_in() ||
        host.rows.rows * host.rows.last == 1 || !call->small(host.rows.rows) || !view(args[2], 32, &alpha) || !usable(host.weight, call, 2, &host.matrix) ||
        !rows_of(host.matrix, bank.d_in()) || !(host.bias == Py_None || usable(host.bias, call, 1, &host.shift)))
        Py_RETURN_NONE;
    int answer = undisturbed();
    if (answer == 1) answer = whole(call);
    if (answer < 0) return nullptr;
    if (answer == 0) Py_RETURN_NONE;
    const bool graph = torch_.grad_enabled();
    const int attached = graph ? ready(call) : 1;
    if (attached < 0) return nullptr;
    if (!attached && !steal(PyObject_CallMethodNoArgs(call->bank, key_attach))) return nullptr;

    auto h = low_product(call, host, &before);
    const bool own = static_cast<bool>(h);
    if (!own) {
        if (PyErr_Occurred()) return nullptr;
        h = called_product(host, graph);
        if (!h) return nullptr;
        if (!view(h.ptr(), call->bits, &before) || before.last != bank.d_out() || before.rows != host.rows.rows) Py_RETURN_NONE;
    }
    const auto start = std::chrono::steady_clock::now();
    // torch's call may give a view of rows, and a view that is made here would refuse to be changed in place by the user.
    const bool in_place = own || before.ndim == 2;
    const auto y = in_place ? h : steal(PyObject_CallOneArg(torch_.empty_like, h.ptr()));
    const auto table = steal(y ? new_table(call) : nullptr);
    if (!table) return nullptr;
    if (in_place)
        after = before;
    else if (!view(y.ptr(), call->bits, &after))
        Py_RETURN_NONE;
    const int finite = blend(call, host.rows, before, after.data, alpha, table.ptr());
    if (finite < 0) return nullptr;
    if (finite == 0) Py_RETURN_NONE;
    PyObject* found = graph ? attach_host(call, y.ptr(), table.ptr(), host) : Py_NewRef(y.ptr());
    if (args[3] == Py_True)
        call->nanoseconds = std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
    return found;
}

void bind_graft_host(pybind11::module_& m) {
    key_weight = PyUnicode_InternFromString("weight");
    key_bias = PyUnicode_InternFromString("bias");
    key_parameters = PyUnicode_InternFromString("_parameters");
    key_linear = PyUnicode_InternFromString("linear");
    key_call = PyUnicode_InternFromString("call");
    key_save = PyUnicode_InternFromString("save_for_backward");
    key_needs = PyUnicode_InternFromString("needs_input_grad");
    key_attach = PyUnicode_InternFromString("attach");
    key_weights = PyUnicode_InternFromString("weights");
    key_cpu = PyUnicode_InternFromString("cpu");
    m.def("bank_host_setup", &install_host, "Give a class of nodes its `forward`.");
}
