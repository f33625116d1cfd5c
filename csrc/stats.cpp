#include "bindings.h"

void bind_stats(pybind11::module_&) {}
