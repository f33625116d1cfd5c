// Finding torch's C interface, and putting kernels under it into the dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "bindings.h"
#include "graft_seeds.h"
#include "torch_library.h"
#include "torch_shim.h"

namespace {

using esper::Array;
using esper::find;
using esper::shim::Arguments;
using esper::shim::from_value;
using esper::shim::Handle;
using esper::shim::Kernel;
using esper::shim::Value;

// Of the interface that these kernels are written for: 2.10, (major << 56) | (minor << 48).
constexpr std::uint64_t kVersion = (2ULL << 56) | (10ULL << 48);

bool number(void* library, const char* name, std::int32_t* value) {
    std::int32_t (*function)() = nullptr;
    if (!find(library, name, &function)) return false;
    *value = function();
    return true;
}

// What the kernels take: under another schema they would read other arguments.
const char* const kForwardSchema =
    "(Tensor x, Tensor h, Tensor alpha, Tensor(a!) flags, Tensor plan, Tensor[] weights, int first_row, Tensor(b!) y, "
    "Tensor(c!) effect) -> ()";
const char* const kBackwardSchema =
    "(Tensor gy, Tensor x, Tensor effect, Tensor[] weights, bool want_x, bool want_h, bool want_weights, Tensor(a!)[] grads) -> ()";

void seeds_forward(Value* stack, std::uint64_t, std::uint64_t) {
    Arguments given;
    const Array x = given.tensor(stack[0]), h = given.tensor(stack[1]), alpha = given.tensor(stack[2]), flags = given.tensor(stack[3]),
                plan = given.tensor(stack[4]), y = given.tensor(stack[7]), effect = given.tensor(stack[8]);
    const std::vector<Array> weights = given.tensors(stack[5]);
    esper::graft::seeds_forward(x, h, alpha, flags, plan, weights, from_value<std::int64_t>(stack[6]), y, effect);
}

void seeds_backward(Value* stack, std::uint64_t, std::uint64_t) {
    Arguments given;
    const Array gy = given.tensor(stack[0]), x = given.tensor(stack[1]), effect = given.tensor(stack[2]);
    const std::vector<Array> weights = given.tensors(stack[3]), grads = given.tensors(stack[7]);
    esper::graft::seeds_backward(gy, x, effect, weights, from_value<bool>(stack[4]), from_value<bool>(stack[5]),
                                 from_value<bool>(stack[6]), grads);
}

struct Entry {
    const char *name, *schema;
    Kernel kernel;
};

// "" once the kernels are in, else why they are not. The operations must have been defined, with these schemas.
std::string install(const std::string& path, const std::map<std::string, std::string>& schemas) {
    const Entry entries[] = {{"graft_seeds", kForwardSchema, &seeds_forward}, {"graft_seeds_backward", kBackwardSchema, &seeds_backward}};
    for (const Entry& entry : entries) {
        const auto declared = schemas.find(entry.name);
        if (declared == schemas.end() || declared->second != entry.schema)
            return std::string("esper._native was built for another ") + entry.name + " than this package's; build it again";
    }
    void* library = esper::torch_library(path);
    if (library == nullptr) return "torch's shared library is not at " + path;
    auto& api = esper::shim::api;
    const bool found = find(library, "aoti_torch_delete_tensor_object", &api.delete_tensor) &&
                       find(library, "aoti_torch_get_data_ptr", &api.data) && find(library, "aoti_torch_get_dim", &api.dim) &&
                       find(library, "aoti_torch_get_sizes", &api.sizes) && find(library, "aoti_torch_get_strides", &api.strides) &&
                       find(library, "aoti_torch_get_dtype", &api.dtype) &&
                       find(library, "torch_list_size", &api.list_size) && find(library, "torch_list_get_item", &api.list_get) &&
                       find(library, "torch_delete_list", &api.delete_list) &&
                       find(library, "torch_parallel_for", &api.parallel_for) && find(library, "torch_get_num_threads", &api.num_threads) &&
                       find(library, "aoti_torch_library_init_impl", &api.library) &&
                       find(library, "torch_library_impl", &api.implement) &&
                       number(library, "aoti_torch_dtype_float32", &api.float32) &&
                       number(library, "aoti_torch_dtype_float64", &api.float64) &&
                       number(library, "aoti_torch_dtype_uint8", &api.uint8) && number(library, "aoti_torch_dtype_int32", &api.int32);
    if (!found) return "this torch is older than 2.10";
    Handle registered = nullptr;  // for the life of the process, like the operations
    if (api.library("esper", "CPU", __FILE__, __LINE__, &registered) != 0) return "torch would not take a library of kernels";
    for (const Entry& entry : entries)
        if (api.implement(registered, entry.name, entry.kernel, kVersion) != 0)
            return std::string("torch would not take a kernel for ") + entry.name;
    return "";
}

}  // namespace

void bind_torch_shim(pybind11::module_& m) {
    m.def("install_torch_kernels", &install, "Put kernels into torch's dispatcher; why not, or an empty string.");
}
