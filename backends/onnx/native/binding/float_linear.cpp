// LinearW4A16 and LinearW8A16: float activations.
#include "mqc_float_linear.h"

#include "weights.h"

namespace mqc_onnx {
namespace {

class FloatLinear : public Kernel {
  public:
    FloatLinear(const Variant& variant, const Ort::ConstKernelInfo& info, int threads)
        : weights_(variant, info, variant.name == "LinearW4A16" ? 4 : 8), threads_(threads) {}

    void compute(Call& call) const override {
        const Variant& variant = call.variant();
        const Tensor x = call.input("x");
        mqc_float_linear_call linear = {};
        const std::vector<int64_t> result = weights_.read(call, "x", x, linear);
        linear.x = x.as<float>();
        linear.y = call.output<float>(0, result);
        if (linear.m == 0) return;

        const mqc_threads threads = {Call::parallel_for, &call, threads_};
        const int64_t bytes = mqc_float_linear_workspace_bytes(&linear, threads_);
        if (bytes < 0) check(variant, static_cast<mqc_status>(bytes), "shapes");
        linear.workspace = scratch(bytes / static_cast<int64_t>(sizeof(float)) + 1);
        check(variant, mqc_float_linear(&linear, &threads), "linear");
    }

  private:
    Weights weights_;
    int threads_;
};

}  // namespace

Kernel* make_float_linear(const Variant& variant, const Ort::ConstKernelInfo& info, int threads) {
    return new FloatLinear(variant, info, threads);
}

}  // namespace mqc_onnx
