// The Python module esper._native: one binding function per family of operations.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "build_config.h"

PYBIND11_MODULE(_native, m) {
    m.doc() = "C++ and CUDA kernels of Esper. Arguments are raw addresses; esper.ops checks them first.";
#ifdef ESPER_WITH_CUDA
    m.attr("cuda_built") = true;
#else
    m.attr("cuda_built") = false;
#endif
    // Empty where they do not apply: architectures and toolkit without CUDA, the reason for its absence with it.
    m.attr("cuda_archs") = ESPER_CUDA_ARCHS;
    m.attr("cuda_toolkit") = ESPER_CUDA_TOOLKIT;
    m.attr("cuda_reason") = ESPER_CUDA_REASON;
    bind_clock(m);
    bind_driver(m);
    bind_lattice(m);
    bind_stats(m);
    bind_graft(m);
    bind_graft_call(m);
    bind_graft_grad(m);
    bind_graft_host(m);
    bind_graft_seeds_call(m);
    bind_torch_shim(m);
}
