// Every family of operations adds its functions to the module through one of these.
#pragma once

#include <pybind11/pybind11.h>

void bind_clock(pybind11::module_& m);
void bind_driver(pybind11::module_& m);
void bind_lattice(pybind11::module_& m);
void bind_stats(pybind11::module_& m);
void bind_graft(pybind11::module_& m);
void bind_graft_call(pybind11::module_& m);
void bind_graft_grad(pybind11::module_& m);
void bind_graft_host(pybind11::module_& m);
void bind_graft_seeds_call(pybind11::module_& m);
void bind_torch_shim(pybind11::module_& m);

// A new reference, null included, that lets go of itself.
inline pybind11::object steal(PyObject* made) { return pybind11::reinterpret_steal<pybind11::object>(made); }

// Work that outlasts a thread switch lets other threads have the interpreter: those that load and publish. For less,
// letting go of it would cost more.
template <typename F>
void without_python(bool outlasts, const F& work) {
    if (outlasts) {
        const pybind11::gil_scoped_release release;
        work();
    } else {
        work();
    }
}
