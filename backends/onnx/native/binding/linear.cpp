// LinearW4A8 and LinearW8A8.
#include "weights.h"

namespace mqc_onnx {
namespace {

class Linear : public Kernel {
  public:
    Linear(const Variant& variant, const Ort::ConstKernelInfo& info, int threads)
        : weights_(variant, info, variant.name == "LinearW4A8" ? 4 : 8), threads_(threads) {}

    void compute(Call& call) const override {
        const Variant& variant = call.variant();
        const Tensor x = call.input("xq");
        mqc_linear_call linear = {};
        const std::vector<int64_t> result = weights_.read(call, "xq", x, linear);
        linear.xq = x.data;
        linear.x_unsigned = !variant.has("s8");
        const mqc_row_scales scales = call.row_scales("x_scale", x);
        linear.x_scale = scales.scale;
        linear.modality_form = scales.mask    ? MQC_MODALITY_MASK
                               : scales.count ? MQC_MODALITY_COUNT
                                              : MQC_MODALITY_NONE;
        linear.modality = scales.mask ? static_cast<const void*>(scales.mask) : scales.count;
        linear.sequence = scales.tokens;
        linear.y = call.output<float>(0, result);
        if (linear.m == 0) return;

        const mqc_threads threads = {Call::parallel_for, &call, threads_};
        const int64_t bytes = mqc_linear_workspace_bytes(&linear, threads_);
        if (bytes < 0) check(variant, static_cast<mqc_status>(bytes), "shapes");
        linear.workspace = scratch(bytes / static_cast<int64_t>(sizeof(float)) + 1);
        check(variant, mqc_linear(&linear, &threads), "linear");
    }

  private:
    Weights weights_;
    int threads_;
};

}  // namespace

Kernel* make_linear(const Variant& variant, const Ort::ConstKernelInfo& info, int threads) {
    const bool floats = variant.name == "LinearW4A16" || variant.name == "LinearW8A16";
    return floats ? make_float_linear(variant, info, threads) : new Linear(variant, info, threads);
}

}  // namespace mqc_onnx
