// The CUDA driver API found at run time: contexts, modules, functions.
#include "driver.h"

#include <dlfcn.h>

#include <cstring>

namespace esper::driver {

namespace {

// Numbers of the driver's interface.
constexpr int kComputeMajor = 75, kComputeMinor = 76;
constexpr int kMaxDynamicShared = 8;
constexpr int kInfoLog = 3, kInfoLogSize = 4, kErrorLog = 5, kErrorLogSize = 6;
// What a launch may use of dynamic shared memory without asking.
constexpr int kFreeShared = 48 * 1024;
constexpr std::size_t kLogBytes = 8192;

template <typename Pointer>
void find(void* library, const char* name, Pointer& target) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr) throw Error(std::string("the CUDA driver has no function ") + name + "; it is too old");
    static_assert(sizeof symbol == sizeof target, "function pointers are as large as data pointers");
    std::memcpy(&target, &symbol, sizeof symbol);
}

template <typename T>
T read(const std::string& image, std::size_t at) {
    T value;
    std::memcpy(&value, image.data() + at, sizeof value);
    return value;
}

// The driver is given an address and no length, so that the image's own tables say how far it reads: those must lie inside. Text
// would be taken for PTX and compiled, which is not what was signed.
void check_image(const std::string& image) {
    constexpr std::size_t kHeader = 64;
    constexpr unsigned char kStart[] = {0x7f, 'E', 'L', 'F', 2, 1};
    constexpr std::uint16_t kCudaMachine = 190;
    if (image.size() < kHeader || std::memcmp(image.data(), kStart, sizeof kStart) != 0 ||
        read<std::uint16_t>(image, 18) != kCudaMachine)
        throw Error("not a GPU binary (a 64-bit ELF file for CUDA)");
    const auto inside = [&](std::uint64_t start, std::uint64_t size) {
        return start <= image.size() && size <= image.size() - start;
    };
    const auto segments = read<std::uint64_t>(image, 32), sections = read<std::uint64_t>(image, 40);
    const std::uint64_t segment_size = read<std::uint16_t>(image, 54), segment_count = read<std::uint16_t>(image, 56);
    const std::uint64_t section_size = read<std::uint16_t>(image, 58), section_count = read<std::uint16_t>(image, 60);
    bool good = inside(segments, segment_size * segment_count) && inside(sections, section_size * section_count) &&
                section_size == 64 && (segment_count == 0 || segment_size == 56);
    constexpr std::uint32_t kNoBits = 8;
    for (std::uint64_t i = 0; good && i < section_count; ++i) {
        const std::size_t at = sections + i * section_size;
        const bool empty = read<std::uint32_t>(image, at + 4) == kNoBits;
        good = empty || inside(read<std::uint64_t>(image, at + 24), read<std::uint64_t>(image, at + 32));
    }
    for (std::uint64_t i = 0; good && i < segment_count; ++i) {
        const std::size_t at = segments + i * segment_size;
        good = inside(read<std::uint64_t>(image, at + 8), read<std::uint64_t>(image, at + 32));
    }
    if (!good) throw Error("the GPU binary is cut short or damaged: its tables point outside of it");
}

}  // namespace

Driver::Driver(const std::string& path) {
    library_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) {
        const char* why = dlerror();
        throw Error(std::string("the CUDA driver does not load: ") + (why != nullptr ? why : path.c_str()));
    }
    try {
        find(library_, "cuInit", api_.init);
        find(library_, "cuGetErrorName", api_.error_name);
        find(library_, "cuGetErrorString", api_.error_string);
        find(library_, "cuDriverGetVersion", api_.driver_version);
        find(library_, "cuDeviceGetCount", api_.device_count);
        find(library_, "cuDeviceGet", api_.device_get);
        find(library_, "cuDeviceGetAttribute", api_.device_attribute);
        find(library_, "cuDevicePrimaryCtxRetain", api_.primary_retain);
        find(library_, "cuDevicePrimaryCtxRelease_v2", api_.primary_release);
        find(library_, "cuCtxGetCurrent", api_.context_current);
        find(library_, "cuCtxPushCurrent_v2", api_.context_push);
        find(library_, "cuCtxPopCurrent_v2", api_.context_pop);
        find(library_, "cuThreadExchangeStreamCaptureMode", api_.capture_mode);
        find(library_, "cuModuleLoadDataEx", api_.module_load);
        find(library_, "cuModuleUnload", api_.module_unload);
        find(library_, "cuModuleGetFunction", api_.module_function);
        find(library_, "cuFuncGetAttribute", api_.function_get);
        find(library_, "cuFuncSetAttribute", api_.function_set);
        find(library_, "cuLaunchKernel", api_.launch);
        check(api_.init(0), "cuInit");
    } catch (...) {
        dlclose(library_);
        throw;
    }
}

// The library stays open: closing the driver of a running process is not supported.
Driver::~Driver() {
    for (const auto& [device, context] : contexts_) {
        if (context != nullptr) api_.primary_release(device);
    }
}

std::string Driver::describe(Result result) const {
    const char* name = nullptr;
    const char* text = nullptr;
    api_.error_name(result, &name);
    api_.error_string(result, &text);
    std::string words = name != nullptr ? name : "unknown error";
    words += " (" + std::to_string(result) + ")";
    if (text != nullptr) words += std::string(": ") + text;
    return words;
}

void Driver::check(Result result, const std::string& what) const {
    if (result != 0) throw Error(what + ": " + describe(result));
}

int Driver::version() const {
    int version = 0;
    check(api_.driver_version(&version), "cuDriverGetVersion");
    return version;
}

int Driver::device_count() const {
    int count = 0;
    check(api_.device_count(&count), "cuDeviceGetCount");
    return count;
}

Device Driver::device(int ordinal) const {
    Device device = 0;
    check(api_.device_get(&device, ordinal), "cuDeviceGet(" + std::to_string(ordinal) + ")");
    return device;
}

std::pair<int, int> Driver::capability(int ordinal) const {
    const Device found = device(ordinal);
    int major = 0, minor = 0;
    check(api_.device_attribute(&major, kComputeMajor, found), "cuDeviceGetAttribute");
    check(api_.device_attribute(&minor, kComputeMinor, found), "cuDeviceGetAttribute");
    return {major, minor};
}

Context Driver::primary(int ordinal) {
    const Device found = device(ordinal);
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [known, context] : contexts_) {
        if (known == found) return context;
    }
    Context context = nullptr;
    check(api_.primary_retain(&context, found), "cuDevicePrimaryCtxRetain");
    contexts_.emplace_back(found, context);
    return context;
}

int Driver::exchange_capture_mode(int mode) const {
    check(api_.capture_mode(&mode), "cuThreadExchangeStreamCaptureMode");
    return mode;
}

Current::Current(const Driver& driver, Context context) : driver_(driver) {
    Context present = nullptr;
    driver.check(driver.api().context_current(&present), "cuCtxGetCurrent");
    if (present == context) return;
    driver.check(driver.api().context_push(context), "cuCtxPushCurrent");
    pushed_ = true;
}

Current::~Current() {
    Context popped = nullptr;
    if (pushed_) driver_.api().context_pop(&popped);
}

Module::Module(std::shared_ptr<Driver> driver, const std::string& image, int ordinal) : driver_(std::move(driver)) {
    check_image(image);
    context_ = driver_->primary(ordinal);
    const Current current(*driver_, context_);
    std::vector<char> info(kLogBytes), errors(kLogBytes);
    int options[] = {kInfoLog, kInfoLogSize, kErrorLog, kErrorLogSize};
    void* values[] = {info.data(), reinterpret_cast<void*>(kLogBytes), errors.data(), reinterpret_cast<void*>(kLogBytes)};
    const Result result = driver_->api().module_load(&handle_, image.data(), 4, options, values);
    if (result == 0) return;
    errors.back() = '\0';
    std::string words = "cuModuleLoadDataEx: " + driver_->describe(result);
    if (errors[0] != '\0') words += std::string("; the driver's log: ") + errors.data();
    throw Error(words);
}

// Errors are passed over: this may be the end of the process, when the driver has gone already.
Module::~Module() {
    try {
        const Current current(*driver_, context_);
        driver_->api().module_unload(handle_);
    } catch (const Error&) {
    }
}

FunctionHandle Module::function(const std::string& name) const {
    const Current current(*driver_, context_);
    FunctionHandle found = nullptr;
    driver_->check(driver_->api().module_function(&found, handle_, name.c_str()), "no kernel '" + name + "' in the GPU binary");
    return found;
}

Function::Function(std::shared_ptr<Module> module, std::string name)
    : module_(std::move(module)), name_(std::move(name)), handle_(module_->function(name_)) {}

int Function::attribute(int number) const {
    const Driver& driver = *module_->driver();
    const Current current(driver, module_->context());
    int value = 0;
    driver.check(driver.api().function_get(&value, number, handle_), "cuFuncGetAttribute of " + name_);
    return value;
}

void Function::allow_shared(int bytes) const {
    if (bytes <= kFreeShared) return;
    const Driver& driver = *module_->driver();
    const Current current(driver, module_->context());
    driver.check(driver.api().function_set(handle_, kMaxDynamicShared, bytes),
                 name_ + " needs " + std::to_string(bytes) + " bytes of shared memory");
}

}  // namespace esper::driver
