// All seeds of a layer as one operation of PyTorch's dispatcher; see esper/ops/graft/seeds.py.
#pragma once

#include "torch_shim.h"

namespace esper::graft {

// What the kernels take and give: another schema than this would be read as other arguments.
extern const char* const kForwardSchema;
extern const char* const kBackwardSchema;

void seeds_forward(shim::Value* stack, std::uint64_t inputs, std::uint64_t outputs);
void seeds_backward(shim::Value* stack, std::uint64_t inputs, std::uint64_t outputs);

}  // namespace esper::graft
