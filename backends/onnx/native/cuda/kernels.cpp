#include "kernels.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mqc_onnx_cuda {
namespace {

constexpr const char* kRemedy = "; build it with: python -m mqc.cuda.build";

std::string library_path() {
    const char* given = std::getenv("MQC_CUDA_LIBRARY");
    if (given && *given) return given;
    Dl_info self;
    if (dladdr(reinterpret_cast<const void*>(&library_path), &self) && self.dli_fname) {
        const std::string here = self.dli_fname;
        const std::string folder = here.substr(0, here.find_last_of('/') + 1);
        for (const char* place : {"../../cuda/libmqc_cuda.so", "libmqc_cuda.so"})
            if (access((folder + place).c_str(), R_OK) == 0) return folder + place;
    }
    return "libmqc_cuda.so";
}

template <class F>
void find(void* library, const std::string& path, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function)
        throw std::runtime_error("the kernel library " + path + " has no function " + name + kRemedy);
}

Kernels open() {
    const std::string path = library_path();
    // Never closed: sessions keep what it made. Local: its names are its own.
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char* reason = dlerror();
        throw std::runtime_error("the kernel library " + path + " cannot be loaded: " +
                                 (reason ? reason : "unknown reason") + kRemedy);
    }
    Kernels k;
    find(library, path, "mqc_abi_version", k.abi_version);
    if (k.abi_version() != MQC_ABI_VERSION)
        throw std::runtime_error("the kernel library " + path + " has ABI " +
                                 std::to_string(k.abi_version()) + ", wanted " +
                                 std::to_string(MQC_ABI_VERSION) + kRemedy);
    find(library, path, "mqc_last_error", k.last_error);
    find(library, path, "mqc_check_device", k.check_device);
    find(library, path, "mqc_memory_on_host", k.memory_on_host);
    find(library, path, "mqc_memory_allocate", k.allocate);
    find(library, path, "mqc_memory_free", k.free);
    find(library, path, "mqc_memory_upload", k.upload);
    find(library, path, "mqc_memory_copy_rows", k.copy_rows);
    find(library, path, "mqc_rows_to_f16", k.rows_to_f16);
    find(library, path, "mqc_rows_to_f32", k.rows_to_f32);
    find(library, path, "mqc_linear_workspace", k.linear_workspace);
    find(library, path, "mqc_linear", k.linear);
    find(library, path, "mqc_rms_norm_quantize", k.rms_norm_quantize);
    find(library, path, "mqc_activation_quantize", k.activation_quantize);
    find(library, path, "mqc_rotary_cache", k.rotary_cache);
    find(library, path, "mqc_attention_workspace", k.attention_workspace);
    find(library, path, "mqc_attention", k.attention);
    find(library, path, "mqc_embedding", k.embedding);
    return k;
}

}  // namespace

const Kernels& kernels() {
    static const Kernels opened = open();  // tried again by the next caller where it throws
    return opened;
}

}  // namespace mqc_onnx_cuda
