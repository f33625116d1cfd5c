// What the two halves of a bank's call in C share: graft_call.cpp goes forward, graft_grad.cpp back.
#pragma once

#include <Python.h>

#include <vector>

#include "graft_bank.h"

namespace esper::graft {

struct Entry {
    PyObject *dict, *key, *parameter;  // borrowed from the tuples of the call
    void* address;
};

struct Call {
    PyObject_HEAD
    PyObject* owner;   // what holds the native bank
    PyObject* bank;    // the Python object that the backward works on
    PyObject* apply;   // puts a result into autograd's graph
    PyObject* buffer;  // the tensor that the weights lie in
    PyObject *dicts, *keys, *parameters;
    std::vector<Entry>* entries;
    const Bank* native;
    void* weights;
    long long limit;
    int bits;
    bool biased, reads_input;

    // Whether so many rows are few enough for the native products.
    bool small(std::int64_t rows) const { return rows * native->rows() * (native->d_in() + native->d_out()) <= limit; }
};

// Where in a buffer the parts of a bank begin; bias is null where there is none.
template <typename T>
struct Parts {
    Parts(const Call* call, void* buffer)
        : down(static_cast<T*>(buffer)),
          up(down + call->native->rows() * call->native->d_in()),
          bias(call->biased ? up + call->native->rows() * call->native->d_out() : nullptr) {}
    T *down, *up, *bias;
};

// BankCall, once it is bound.
inline PyTypeObject* call_type = nullptr;

// The parameters' version counters, as GraftGuard has them; null with an error set.
PyObject* versions(const Call* call);

}  // namespace esper::graft

