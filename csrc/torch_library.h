// Functions of torch's shared library, looked up at run time: its C interface stays the same across versions, its headers do not.
#pragma once

#include <dlfcn.h>

#include <string>

namespace esper {

// torch's library at a path, which Python has loaded; null where it lies elsewhere, and then whatever is loaded is looked through.
inline void* torch_library(const std::string& path) { return dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD); }

template <typename F>
bool find(void* library, const char* name, F* function) {
    *reinterpret_cast<void**>(function) = dlsym(library, name);
    return *function != nullptr;
}

}  // namespace esper
