// The Python module esper._native: one binding function per family of operations.
#include <pybind11/pybind11.h>

#include "bindings.h"

PYBIND11_MODULE(_native, m) {
    m.doc() = "C++ and CUDA kernels of Esper. Arguments are raw addresses; esper.ops checks them first.";
#ifdef ESPER_WITH_CUDA
    m.attr("cuda_built") = true;
    m.attr("cuda_archs") = ESPER_CUDA_ARCHS;
#else
    m.attr("cuda_built") = false;
    m.attr("cuda_archs") = "";
#endif
    bind_lattice(m);
    bind_stats(m);
    bind_graft(m);
}
