// LinearW4A8 and LinearW8A8 of signed activations, LinearW4A16 and LinearW8A16 of float ones, which are
// multiplied as float16. The file's weights are packed for the kernels when the session is made; the
// file keeps the layout that the CPU library and the bodies read.
#include <string>

#include "call.h"
#include "pack.h"

namespace mqc_onnx_cuda {
namespace {

constexpr int64_t kMostInputs = 131072;  // products are exact in int32
constexpr int64_t kMostSplit = 64;
constexpr int64_t kAlign = 16;           // bytes, of rows of x
constexpr int64_t kHalf = 2;

bool has_float_rows(const Variant& variant) {
    return variant.name == "LinearW4A16" || variant.name == "LinearW8A16";
}

class Linear : public Kernel {
  public:
    Linear(const Variant& variant, const Ort::ConstKernelInfo& info) {
        const Constant weight(variant, info, "qweight"), scale(variant, info, "w_scale");
        const bool grouped = variant.has("group");
        scale.require(scale.shape.size() == (grouped ? 2u : 1u) && scale.shape[0] > 0,
                      grouped ? "[N, groups]" : "[N]");
        Weight w;
        w.bits = variant.name == "LinearW4A8" || variant.name == "LinearW4A16" ? 4 : 8;
        w.tiled = variant.has("c16k4");
        w.n = n_ = scale.shape[0];
        w.groups = grouped ? scale.shape[1] : 1;
        w.k = k_ = inputs_of(variant, weight, w);
        weight.require(k_ <= kMostInputs, "of at most 131072 input channels");
        scale.require(w.groups > 0 && k_ % w.groups == 0, "groups that divide the input channels");
        layout_ = layout_of(w);
        scale.require(layout_ != 0, "of groups of 32, 64 or a multiple of 128 inputs on a GPU");
        w.data = static_cast<const uint8_t*>(weight.data);
        w.scales = scale.as<float>();
        if (variant.has("split")) {
            const Constant split(variant, info, "w_split");
            split.require(split.shape.size() == 2 && split.shape[0] == n_, "[N, rank]");
            split.require(split.shape[1] <= kMostSplit, "of rank 64 at most on a GPU");
            rank_ = split.shape[1];
        }
        const auto packed = pack(w);
        weight_ = Memory(packed.data(), static_cast<int64_t>(packed.size()));
        if (grouped) {  // w_scale is on the host; scales of several groups are in the weight now
            const std::vector<float> ones(static_cast<size_t>(n_), 1.0f);
            channels_ = Memory(w.groups > 1 ? ones.data() : w.scales, n_ * kFloat);
        }
    }

    void compute(Call& call) const override {
        const Variant& variant = call.variant();
        const bool floats = has_float_rows(variant);
        const char* name = floats ? "x" : "xq";
        const Tensor x = call.input(name);
        call.require(x.rank() >= 1 && x.last() == k_, name, x,
                     ("[..., " + std::to_string(k_) + "]").c_str());
        std::vector<int64_t> result = x.shape;
        result.back() = n_;

        auto args = Call::arguments<mqc_linear_args>();
        args.layout = layout_;
        args.dtype = MQC_F32;
        args.rows = x.rows();
        args.n = n_;
        args.k = k_;
        args.w = weight_.data();
        args.w_scale = variant.has("group") ? static_cast<const float*>(channels_.data())
                                            : call.input("w_scale").as<float>();
        if (!floats) args.x_scale = call.set_scales(args, "x_scale", x);
        if (variant.has("bias")) {
            const Tensor bias = call.input("bias");
            call.require(bias.rank() == 1 && bias.count == n_, "bias", bias, "[N]");
            args.bias = bias.as<float>();
        }
        if (variant.has("split")) set_split(call, x, args);
        if (variant.has("residual")) {
            const Tensor residual = call.input("residual");
            call.require(residual.shape == result, "residual", residual, text_of(result).c_str());
            args.residual = residual.data;
            args.residual_stride = n_;
        }
        args.y = call.output<float>(0, result);
        args.y_stride = n_;
        if (args.rows == 0) return;
        floats ? set_float_rows(call, x, args) : set_rows(call, x, args);
        check_workspace(call, args);
        call.check(kernels().linear(&args, call.stream()));
    }

  private:
    static int64_t inputs_of(const Variant& variant, const Constant& weight, const Weight& w) {
        const std::vector<int64_t>& s = weight.shape;
        if (!w.tiled) {
            weight.require(s.size() == 2 && s[0] == w.n && s[1] > 0 && s[1] <= kMostInputs,
                           "a matrix of w_scale's N rows");
            return w.bits == 4 ? 2 * s[1] - variant.has("odd") : s[1];
        }
        const int64_t step = 32 / w.bits;
        weight.require(s.size() == 5 && s[0] == (w.n + 15) / 16 && s[1] == w.groups && s[2] > 0 &&
                           s[2] <= kMostInputs && s[3] == 16 && s[4] == 4 && s[2] * step % 8 == 0,
                       "[ceil(N / 16), groups, K / groups / (8 or 4), 16, 4] of w_scale's N");
        return w.groups * s[2] * step;
    }

    void set_split(const Call& call, const Tensor& x, mqc_linear_args& args) const {
        const Tensor split = call.input("x_split");
        std::vector<int64_t> wanted = x.shape;
        wanted.back() = rank_;
        call.require(split.shape == wanted, "x_split", split, text_of(wanted).c_str());
        if (rank_ == 0) return;
        args.split_columns = static_cast<int32_t>(rank_);
        args.x_split = split.data;
        args.x_split_stride = rank_;
        args.w_split = call.input("w_split").as<float>();
    }

    // Rows that start at multiples of 16 bytes: those of x, or a copy with gaps.
    void set_rows(const Call& call, const Tensor& x, mqc_linear_args& args) const {
        args.x = x.data;
        args.x_stride = k_;
        if (k_ % kAlign == 0 && reinterpret_cast<uintptr_t>(x.data) % kAlign == 0) return;
        args.x_stride = (k_ + kAlign - 1) / kAlign * kAlign;
        void* rows = call.workspace().scratch(args.rows * args.x_stride);
        call.check(kernels().copy_rows(rows, args.x_stride, x.data, k_, k_, args.rows,
                                       call.stream()));
        args.x = rows;
    }

    // Rows as float16, as far apart as the kernel wants them.
    void set_float_rows(const Call& call, const Tensor& x, mqc_linear_args& args) const {
        args.x_dtype = MQC_F16;
        args.x_stride = (k_ + kAlign / kHalf - 1) / (kAlign / kHalf) * (kAlign / kHalf);
        void* rows = call.workspace().scratch(args.rows * args.x_stride * kHalf);
        call.check(kernels().rows_to_f16(rows, args.x_stride, x.as<float>(), k_, k_, args.rows,
                                         call.stream()));
        args.x = rows;
    }

    static void check_workspace(const Call& call, mqc_linear_args& args) {
        call.check(kernels().linear_workspace(&args, &args.workspace_bytes));
        if (args.workspace_bytes) args.workspace = call.workspace().counted(args.workspace_bytes);
    }

    int32_t layout_ = 0;
    int64_t n_ = 0, k_ = 0, rank_ = 0;
    Memory weight_, channels_;
};

}  // namespace

bool has_linear(const Variant& variant) {
    const bool known = has_only(variant, {"mask", "count", "bias", "split", "residual", "group", "odd",
                                          "s8", "c16k4"});
    if (!known) return false;
    if (has_float_rows(variant)) return true;
    return variant.has("s8") && (variant.name == "LinearW4A8" || variant.name == "LinearW8A8");
}

Kernel* make_linear(const Variant& variant, const Ort::ConstKernelInfo& info) {
    return new Linear(variant, info);
}

}  // namespace mqc_onnx_cuda
