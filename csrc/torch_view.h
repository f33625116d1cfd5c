// Tensors seen from C without torch's headers: through DLPack's exchange table (DLPack 1.3, __dlpack_c_exchange_api__), a C
// interface that stays the same across versions of torch.
#pragma once

#include <Python.h>

#include <cstdint>

namespace esper::torch_view {

// -- DLPack's exchange table, as far as it is used (dlpack.h, version 1.3) --------------------------------------------

struct DlTensor {
    void* data;
    std::int32_t device_type, device_id;
    std::int32_t ndim;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};

struct ExchangeApi {
    std::uint32_t major, minor;
    void* previous;
    void* allocator;
    void* from_object;
    void* to_object;
    int (*borrow)(void* object, DlTensor* out);  // no reference is taken
    void* stream;
};

constexpr std::uint32_t kDlpackMajor = 1;
constexpr std::int32_t kDlpackCpu = 1;
constexpr std::uint8_t kDlpackInt = 0, kDlpackUnsigned = 1, kDlpackFloat = 2;

// What torch has, given once.
struct Torch {
    const ExchangeApi* api = nullptr;
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
    PyObject *forward_ad, *functional;  // the names of two modules: among them the level; linear, as anybody may have replaced it
    // Functions. First those that ask for the state of the thread.
    PyObject *functorch, *jit, *dispatch_modes, *function_modes, *any_autocast, *autocast, *profiling;
    bool (*grad_enabled)();
    void (*set_grad_enabled)(bool);
    PyObject *empty_like, *new_empty, *as_strided, *split, *reshape, *transposed, *linear, *mm, *matmul, *sum;
    PyObject* executes;  // whether autograd's engine will come to a node; None where torch cannot say
};

inline Torch torch_;

// torch's exchange table, or null where it has none of a version that is understood.
inline const ExchangeApi* exchange_api(PyObject* tensor_type) {
    PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
    const ExchangeApi* api = nullptr;
    if (capsule != nullptr && PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
        api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    PyErr_Clear();
    Py_XDECREF(capsule);
    return api == nullptr || api->major != kDlpackMajor || api->borrow == nullptr ? nullptr : api;
}

struct View {
    void* data;
    std::int64_t rows, last;
    int ndim;
    const std::int64_t* shape;
    bool exact;  // the strides are those of a new tensor, along dimensions of one element too
};

// A plain contiguous tensor of floating numbers of `bits` on the CPU, as rows; false for every other.
inline bool view(PyObject* object, int bits, View* out) {
    if (!Py_IS_TYPE(object, torch_.tensor)) return false;
    DlTensor t;
    if (torch_.api->borrow(object, &t) != 0) {
        PyErr_Clear();
        return false;
    }
    if (t.device_type != kDlpackCpu || t.code != kDlpackFloat || t.bits != bits || t.lanes != 1 || t.ndim < 1) return false;
    std::int64_t expected = 1;
    bool exact = true;
    for (int i = t.ndim - 1; i >= 0; --i) {
        const bool here = t.strides == nullptr || t.strides[i] == expected;
        if (t.shape[i] != 1 && !here) return false;
        exact = exact && here;
        expected *= t.shape[i];
    }
    if (expected == 0) return false;
    out->data = static_cast<char*>(t.data) + t.byte_offset;
    out->ndim = t.ndim;
    out->shape = t.shape;
    out->exact = exact;
    out->last = t.shape[t.ndim - 1];
    out->rows = expected / out->last;
    return true;
}

inline void* address(PyObject* tensor) {
    DlTensor t;
    if (torch_.api->borrow(tensor, &t) != 0) {
        PyErr_Clear();
        return nullptr;
    }
    return static_cast<char*>(t.data) + t.byte_offset;
}

// Whether the answer to a question without arguments is the one that is given: 1, 0, or -1 with an error set.
inline int answers(PyObject* question, PyObject* wanted) {
    PyObject* answer = PyObject_CallNoArgs(question);
    if (answer == nullptr) return -1;
    const int same = answer == wanted;
    Py_DECREF(answer);
    return same;
}

}  // namespace esper::torch_view
