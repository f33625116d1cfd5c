// All low-rank seeds of a layer at once, from their own parameters: what compiled graphs run. See esper/ops/graft/seeds.py.
#pragma once

#include <cstdint>
#include <vector>

#include "array.h"

namespace esper::graft {

// Both throw std::runtime_error for what does not fit.
void seeds_forward(const Array& x, const Array& h, const Array& alpha, const Array& flags, const Array& plan,
                   const std::vector<Array>& weights, std::int64_t first_row, const Array& y, const Array& effect);
void seeds_backward(const Array& gy, const Array& x, const Array& effect, const std::vector<Array>& weights, bool want_x, bool want_h,
                    bool want_weights, const std::vector<Array>& grads);

}  // namespace esper::graft
