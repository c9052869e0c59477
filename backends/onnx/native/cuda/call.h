// One call of a CUDA kernel: the node's values, and onnxruntime's stream.
#pragma once

#include <initializer_list>
#include <string>

#include "binding/node.h"
#include "kernels.h"
#include "memory.h"

namespace mqc_onnx_cuda {

using mqc_onnx::Constant;
using mqc_onnx::Node;
using mqc_onnx::Tensor;
using mqc_onnx::text_of;
using mqc_onnx::Variant;

constexpr int64_t kFloat = sizeof(float);

class Call : public Node {
  public:
    Call(const Variant& variant, OrtKernelContext* context)
        : Node(variant, context), stream_(ort_.GetGPUComputeStream()) {}

    void* stream() const { return stream_; }
    Workspace& workspace() const { return workspace_of(stream_); }

    // Of a call of the kernel library.
    void check(int status) const {
        if (status != MQC_OK) fail(kernels().last_error());
    }

    // Argument structs start with their size.
    template <class Args>
    static Args arguments() {
        Args args = {};
        args.size = sizeof args;
        return args;
    }

    // Fills in how rows of x [..., n] find their activation scale, and returns the scale.
    template <class Args>
    const float* set_scales(Args& args, const char* scale, const Tensor& x) const {
        const Scales found = scales(scale, x);
        args.modality_kind = found.mask    ? MQC_MODALITY_MASK
                             : found.count ? MQC_MODALITY_COUNT
                                           : MQC_MODALITY_NONE;
        args.modality = found.modality.data;
        if (found.count) args.rows_per_sequence = x.shape[1];
        return found.scale.as<float>();
    }

  private:
    void* stream_;
};

class Kernel {
  public:
    virtual ~Kernel() = default;
    virtual void compute(Call& call) const = 0;

  private:
    Registered registered_;
};

// Whether every flag of a variant is among these: flags that are new to the CPU's library are not
// taken for what they are not.
inline bool has_only(const Variant& variant, std::initializer_list<const char*> known) {
    for (const std::string& flag : variant.flags) {
        bool found = false;
        for (const char* name : known) found = found || flag == name;
        if (!found) return false;
    }
    return true;
}

// Whether there is a kernel; others run by their bodies, on onnxruntime's own kernels.
bool has_linear(const Variant& variant);
bool has_rows(const Variant& variant);
bool has_attention(const Variant& variant);

Kernel* make_linear(const Variant& variant, const Ort::ConstKernelInfo& info);
Kernel* make_rows(const Variant& variant, const Ort::ConstKernelInfo& info);
Kernel* make_attention(const Variant& variant, const Ort::ConstKernelInfo& info);

}  // namespace mqc_onnx_cuda
