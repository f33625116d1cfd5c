#include "bindings.h"

void bind_lattice(pybind11::module_&) {}
