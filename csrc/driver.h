// Loading and launching GPU binaries through the CUDA driver API, which is looked for when it is first needed.
//
// No CUDA header and no library is needed to build this: the few types and numbers of the driver's interface that we use stand
// below. A machine without a driver gets a reason and goes on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace esper::driver {

using Result = int;
using Device = int;
using Context = struct ContextTag*;
using ModuleHandle = struct ModuleTag*;
using FunctionHandle = struct FunctionTag*;
using Stream = struct StreamTag*;

// The driver's entry points, under the names that their current binary interfaces have.
struct Api {
    Result (*init)(unsigned flags);
    Result (*error_name)(Result error, const char** text);
    Result (*error_string)(Result error, const char** text);
    Result (*driver_version)(int* version);
    Result (*device_count)(int* count);
    Result (*device_get)(Device* device, int ordinal);
    Result (*device_attribute)(int* value, int attribute, Device device);
    Result (*primary_retain)(Context* context, Device device);
    Result (*primary_release)(Device device);
    Result (*context_current)(Context* context);
    Result (*context_push)(Context context);
    Result (*context_pop)(Context* context);
    Result (*capture_mode)(int* mode);
    Result (*module_load)(ModuleHandle* module, const void* image, unsigned count, int* options, void** values);
    Result (*module_unload)(ModuleHandle module);
    Result (*module_function)(FunctionHandle* function, ModuleHandle module, const char* name);
    Result (*function_get)(int* value, int attribute, FunctionHandle function);
    Result (*function_set)(FunctionHandle function, int attribute, int value);
    Result (*launch)(FunctionHandle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                     unsigned block_z, unsigned shared, Stream stream, void** arguments, void** extra);
};

// A call to the driver failed; the message has the driver's name and words for it.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The driver library, opened and initialised. Usable from any thread.
class Driver {
public:
    // Throws Error if there is no such library, it lacks a function, or it does not start.
    explicit Driver(const std::string& path);
    ~Driver();
    Driver(const Driver&) = delete;
    Driver& operator=(const Driver&) = delete;

    const Api& api() const { return api_; }
    int version() const;
    int device_count() const;
    std::pair<int, int> capability(int ordinal) const;
    // The context that PyTorch and the CUDA runtime use on that device; kept until this object goes.
    Context primary(int ordinal);
    // The mode in which the calling thread looks at captures of graphs from here on; the one before.
    int exchange_capture_mode(int mode) const;
    // Throws Error with `what` and the driver's description unless the result is success.
    void check(Result result, const std::string& what) const;
    std::string describe(Result result) const;

private:
    Device device(int ordinal) const;

    void* library_ = nullptr;
    Api api_{};
    std::mutex mutex_;
    std::vector<std::pair<Device, Context>> contexts_;
};

// Makes a context current for a block, and puts back what was.
class Current {
public:
    Current(const Driver& driver, Context context);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

private:
    const Driver& driver_;
    bool pushed_ = false;
};

// One binary, loaded on one device; unloaded with the last function taken from it.
class Module {
public:
    Module(std::shared_ptr<Driver> driver, const std::string& image, int ordinal);
    ~Module();
    Module(const Module&) = delete;
    Module& operator=(const Module&) = delete;

    const std::shared_ptr<Driver>& driver() const { return driver_; }
    Context context() const { return context_; }
    FunctionHandle function(const std::string& name) const;

private:
    std::shared_ptr<Driver> driver_;
    Context context_ = nullptr;
    ModuleHandle handle_ = nullptr;
};

// A kernel of a loaded binary.
class Function {
public:
    Function(std::shared_ptr<Module> module, std::string name);

    const std::string& name() const { return name_; }
    const std::shared_ptr<Module>& module() const { return module_; }
    FunctionHandle handle() const { return handle_; }
    int attribute(int number) const;
    // Lets launches use this much dynamic shared memory; more than 48 KiB must be asked for.
    void allow_shared(int bytes) const;

private:
    std::shared_ptr<Module> module_;
    std::string name_;
    FunctionHandle handle_;
};

}  // namespace esper::driver
