// What a bank's calls in C share: graft_call.cpp goes forward, graft_host.cpp with the host, graft_grad.cpp back.
#pragma once

#include <Python.h>

#include <vector>

#include "graft_bank.h"
#include "torch_view.h"

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
    PyObject* apply_host;  // the same for the host's result with the seeds in it
    PyObject* buffer;  // the tensor that the weights lie in
    PyObject *dicts, *keys, *parameters;
    std::vector<Entry>* entries;
    const Bank* native;
    void* weights;
    long long limit, nanoseconds;
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

using torch_view::View;

// In what follows 1 is yes, 0 no, and -1 an error that is set; a null result is one too.

// Whether nothing transforms or records what happens.
int plain();

// Whether the parameters are those of the bank, where they were.
int whole(const Call* call);

// Whether a result can go into the graph as things are: the parameters are attached to the buffer, or none has a gradient.
int ready(const Call* call);

// Room for the coefficients.
PyObject* new_table(const Call* call);

// The seeds in h, and the coefficients. 0 where y is not finite. y may be h.
int blend(const Call* call, const View& x, const View& h, void* y, const View& alpha, PyObject* table);

// What the backward needs: (y, bank, table, versions, call).
PyObject* made_by(Call* call, PyObject* y, PyObject* table);

// The parameters' version counters, as GraftGuard has them.
PyObject* versions(const Call* call);

// BankCall.run_host.
PyObject* run_host(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace esper::graft
