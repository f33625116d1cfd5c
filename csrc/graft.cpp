#include "bindings.h"

void bind_graft(pybind11::module_&) {}
