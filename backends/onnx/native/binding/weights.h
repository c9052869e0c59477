// The constant inputs of a linear, as its kernels read them.
#pragma once

#include "call.h"
#include "mqc_kernels.h"

namespace mqc_onnx {

// Throws where a kernel has refused.
void check(const Variant& variant, mqc_status status, const char* what);

// Inputs qweight, w_scale and, with flag "split", w_split. Weights in the kernels' layout are read
// where onnxruntime has them, which is the mapped file; those in the reference layout are packed when
// the session is made.
class Weights {
  public:
    Weights(const Variant& variant, const Ort::ConstKernelInfo& info, int bits);

    // The inputs that both kinds of linears have, checked, into a call of either; x is its input
    // [..., K]. Returns the shape of y.
    template <class Linear>
    std::vector<int64_t> read(const Call& call, const char* name, const Tensor& x,
                              Linear& linear) const;

  private:
    void set_tiled_shape(const Constant& weight, const Constant& scale);

    mqc_linear_shape shape_ = {};
    Block<uint8_t> weight_;
    Block<float> scale_, split_;
    int64_t rank_ = 0;
};

template <class Linear>
std::vector<int64_t> Weights::read(const Call& call, const char* name, const Tensor& x,
                                   Linear& linear) const {
    call.require(x.rank() >= 1 && x.last() == shape_.k, name, x,
                 ("[..., " + std::to_string(shape_.k) + "]").c_str());
    std::vector<int64_t> result = x.shape;
    result.back() = shape_.n;
    linear.shape = shape_;
    linear.m = x.rows();
    linear.packed = weight_ ? weight_.get() : call.input("qweight").data;
    linear.w_scale = scale_.get();
    const Variant& variant = call.variant();
    if (variant.has("bias")) {
        const Tensor bias = call.input("bias");
        call.require(bias.rank() == 1 && bias.count == shape_.n, "bias", bias, "[N]");
        linear.bias = bias.as<float>();
    }
    if (variant.has("split")) {
        const Tensor split = call.input("x_split");
        std::vector<int64_t> wanted = x.shape;
        wanted.back() = rank_;
        call.require(split.shape == wanted, "x_split", split, text_of(wanted).c_str());
        linear.split = rank_;
        linear.x_split = split.as<float>();
        linear.w_split = split_.get();
    }
    if (variant.has("residual")) {
        const Tensor residual = call.input("residual");
        call.require(residual.shape == result, "residual", residual, text_of(result).c_str());
        linear.residual = residual.as<float>();
    }
    return result;
}

}  // namespace mqc_onnx
