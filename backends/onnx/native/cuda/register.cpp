// libmqc_onnx_cuda.so: the operators of domain ai.mqc for onnxruntime's CUDA execution provider.
#include "binding/registration.h"

#include "call.h"

namespace mqc_onnx_cuda {
namespace {

struct Provider {
    typedef mqc_onnx_cuda::Call Call;
    typedef mqc_onnx_cuda::Kernel Kernel;

    // Where the kernels read their memory: the tests' emulated ones are the CPU's.
    const char* name() const {
        return kernels().memory_on_host() ? nullptr : "CUDAExecutionProvider";
    }
    bool has(const Variant& variant) const {
        return has_linear(variant) || has_rows(variant) || has_attention(variant);
    }
    // What is packed when the session is made, or checked before a kernel runs.
    bool on_host(const Variant& variant, const std::string& input) const {
        if (input == "qweight") return has_linear(variant);
        if (input == "w_scale") return variant.has("group");  // packed with the weight
        return input == "past" || input == "split" || input.rfind("factor", 0) == 0;
    }
    Kernel* make(const Variant& variant, const Ort::ConstKernelInfo& info) const {
        mqc_onnx_cuda::check(kernels().check_device());
        if (has_linear(variant)) return make_linear(variant, info);
        return has_rows(variant) ? make_rows(variant, info) : make_attention(variant, info);
    }
};

}  // namespace
}  // namespace mqc_onnx_cuda

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    return mqc_onnx::register_in(options, base, "libmqc_onnx_cuda.so", [](auto& session) {
        mqc_onnx_cuda::kernels();  // a missing library is an error here, and not later
        // Never freed: sessions keep pointers to its operators.
        static auto& domain = *new mqc_onnx::Domain<mqc_onnx_cuda::Provider>({});
        session.Add(domain.domain);
    });
}
