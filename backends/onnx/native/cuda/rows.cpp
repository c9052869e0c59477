// Operators on rows: RMSNorm, activations, the Hadamard transform, quantizing; embedding.
#include <string>

#include "binding/transform.h"
#include "call.h"
#include "pack.h"

namespace mqc_onnx_cuda {
namespace {

using mqc_onnx::Transform;
using mqc_onnx::transform_of;

constexpr int64_t kMostBase = 352, kMostFloatBase = 160;
constexpr int64_t kHalf = 2;  // bytes

// Columns to return in float: checked on the host, on the device as the kernels take them.
class Split {
  public:
    Split(const Variant& variant, const Ort::ConstKernelInfo& info) {
        if (!variant.has("split")) return;
        const Constant split(variant, info, "split");
        split.require(split.shape.size() == 1, "a list");
        const auto* columns = split.as<int64_t>();
        columns_.assign(columns, columns + split.shape[0]);
        std::vector<int32_t> narrow;
        for (const int64_t column : columns_) narrow.push_back(static_cast<int32_t>(column));
        memory_ = Memory(narrow.data(), static_cast<int64_t>(narrow.size() * sizeof(int32_t)));
    }

    int64_t count() const { return static_cast<int64_t>(columns_.size()); }

    // The second output, for rows of the shape of x, in the arguments.
    void set(Call& call, const Tensor& x, mqc_activation_args& args) const {
        if (!call.variant().has("split")) return;
        for (const int64_t column : columns_)
            if (column < 0 || column >= x.last())
                call.fail("split names column " + std::to_string(column) + " of " +
                          std::to_string(x.last()));
        std::vector<int64_t> shape = x.shape;
        shape.back() = count();
        args.x_split = call.output<float>(1, shape);
        args.split_columns = static_cast<int32_t>(count());
        args.x_split_stride = count();
        args.split = static_cast<const int32_t*>(memory_.data());
    }

  private:
    std::vector<int64_t> columns_;
    Memory memory_;
};

// Arguments for y of the shape of `y`, made of rows of `columns` values.
mqc_activation_args arguments_for(const Tensor& y, const void* x, int64_t columns) {
    auto args = Call::arguments<mqc_activation_args>();
    args.dtype = MQC_F32;
    args.activation = MQC_ACT_IDENTITY;
    args.hadamard_base = 1;
    args.rows = y.rows();
    args.columns = y.last();
    args.x = x;
    args.x_stride = columns;
    return args;
}

class Blocks {
  public:
    Blocks(const Variant& variant, const Ort::ConstKernelInfo& info)
        : transform_(transform_of(variant, info)) {
        if (transform_.base > kMostBase)
            throw std::runtime_error(
                "ai.mqc::" + variant.op_type() + ": a transform with a dense factor of order " +
                std::to_string(transform_.base) + ", at most 352 on a GPU");
        if (transform_.base == 1) return;
        const auto words = pack_signs(transform_.signs, transform_.base);
        table_ = Memory(words.data(), static_cast<int64_t>(words.size() * sizeof(uint32_t)));
    }

    int64_t block() const { return transform_.block(); }

    void set(const Call& call, const Tensor& y, mqc_activation_args& args) const {
        call.require(y.last() % block() == 0, "x", y, "a multiple of the transform's block");
        args.hadamard_base = static_cast<int32_t>(transform_.base);
        args.hadamard_log2 = transform_.log2;
        args.hadamard = table_.data();
    }

  private:
    Transform transform_;
    Memory table_;
};

// Dense factors of large orders are taken in half precision alone: rows of x are narrowed to float16
// then, and float results widened.
void launch(const Call& call, mqc_activation_args args) {
    const Kernels& k = kernels();
    if (args.hadamard_base <= kMostFloatBase) {
        call.check(k.activation_quantize(&args, call.stream()));
        return;
    }
    const int64_t width = args.x_stride, rows = args.rows, columns = args.columns;
    const int64_t split = args.split_columns, of_x = (rows * width * kHalf + 255) / 256 * 256;
    auto* x = static_cast<uint8_t*>(
        call.workspace().scratch(of_x + rows * (args.y ? columns : 0) * kHalf + rows * split * kHalf));
    auto *y = static_cast<float*>(args.y), *x_split = static_cast<float*>(args.x_split);
    call.check(k.rows_to_f16(x, width, static_cast<const float*>(args.x), width, width, rows,
                             call.stream()));
    args.dtype = MQC_F16;
    args.x = x;
    if (y) args.y = x + of_x;
    if (split) args.x_split = x + of_x + (y ? rows * columns * kHalf : 0);
    call.check(k.activation_quantize(&args, call.stream()));
    if (y) call.check(k.rows_to_f32(y, columns, args.y, columns, columns, rows, call.stream()));
    if (split)
        call.check(k.rows_to_f32(x_split, split, args.x_split, split, split, rows, call.stream()));
}

class Quantize : public Kernel {
    void compute(Call& call) const override {
        const Tensor x = call.input("x");
        call.require(x.rank() >= 1, "x", x, "at least one axis");
        auto args = arguments_for(x, x.data, x.last());
        args.scale = call.set_scales(args, "scale", x);
        args.xq = call.output<int8_t>(0, x.shape);
        args.xq_stride = x.last();
        if (x.count) launch(call, args);
    }
};

// With split columns the normalised rows are made in float first: two launches.
class RmsNorm : public Kernel {
  public:
    RmsNorm(const Variant& variant, const Ort::ConstKernelInfo& info)
        : eps_(info.GetAttribute<float>("eps")), split_(variant, info) {}

    void compute(Call& call) const override {
        const Tensor x = call.input("x");
        call.require(x.rank() >= 1, "x", x, "at least one axis");
        auto norm = Call::arguments<mqc_norm_args>();
        norm.scale = call.set_scales(norm, "scale", x);
        norm.dtype = MQC_F32;
        norm.eps = eps_;
        norm.rows = x.rows();
        norm.columns = norm.x_stride = norm.xq_stride = norm.h_stride = x.last();
        norm.x = x.data;
        norm.xq = call.output<int8_t>(0, x.shape);
        auto rest = arguments_for(x, nullptr, x.last());
        split_.set(call, x, rest);
        if (x.count == 0) return;
        if (rest.split_columns == 0) {
            call.check(kernels().rms_norm_quantize(&norm, call.stream()));
            return;
        }
        rest.scale = call.set_scales(rest, "scale", x);
        rest.xq = norm.xq;
        rest.xq_stride = x.last();
        norm.h = call.workspace().scratch(x.count * kFloat);
        norm.xq = nullptr;
        norm.scale = nullptr;
        rest.x = norm.h;
        call.check(kernels().rms_norm_quantize(&norm, call.stream()));
        launch(call, rest);
    }

  private:
    float eps_;
    Split split_;
};

class Activation : public Kernel {
  public:
    Activation(const Variant& variant, const Ort::ConstKernelInfo& info)
        : blocks_(variant, info), split_(variant, info) {
        static const struct {
            const char* name;
            int32_t function;
        } known[] = {{"identity", MQC_ACT_IDENTITY},   {"silu", MQC_ACT_SILU},
                     {"gelu", MQC_ACT_GELU},           {"gelutanh", MQC_ACT_GELU_TANH},
                     {"quickgelu", MQC_ACT_QUICK_GELU}, {"relu", MQC_ACT_RELU}};
        for (const auto& entry : known)
            if (variant.flags[0] == entry.name) function_ = entry.function;
    }

    void compute(Call& call) const override {
        const bool gated = call.variant().has("gated");
        const Tensor x = call.input("x");
        call.require(x.rank() >= 1 && (!gated || x.last() % 2 == 0), "x", x,
                     gated ? "an even last axis" : "at least one axis");
        Tensor y = x;  // the shape of what is quantized
        if (gated) y.shape.back() /= 2;
        auto args = arguments_for(y, x.data, x.last());
        args.activation = function_;
        args.gated = gated;
        blocks_.set(call, y, args);
        args.scale = call.set_scales(args, "scale", y);
        args.xq = call.output<int8_t>(0, y.shape);
        args.xq_stride = y.last();
        split_.set(call, y, args);
        if (x.count) launch(call, args);
    }

  private:
    Blocks blocks_;
    Split split_;
    int32_t function_ = MQC_ACT_IDENTITY;
};

class Hadamard : public Kernel {
  public:
    Hadamard(const Variant& variant, const Ort::ConstKernelInfo& info) : blocks_(variant, info) {}

    void compute(Call& call) const override {
        const Tensor x = call.input("x");
        float* y = call.output<float>(0, x.shape);
        if (x.count == 0) return;
        if (blocks_.block() == 1) {
            const int64_t bytes = x.count * kFloat;
            call.check(kernels().copy_rows(y, bytes, x.data, bytes, bytes, 1, call.stream()));
            return;
        }
        call.require(x.rank() >= 1, "x", x, "at least one axis");
        auto args = arguments_for(x, x.data, x.last());
        blocks_.set(call, x, args);
        args.y = y;
        args.y_stride = x.last();
        launch(call, args);
    }

  private:
    Blocks blocks_;
};

// Ids are on the device: one outside of the table gives a row of NaN, and no error.
class Embedding : public Kernel {
    void compute(Call& call) const override {
        const Tensor ids = call.input("ids"), weight = call.input("qweight");
        const Tensor scale = call.input("scale");
        call.require(weight.rank() == 2, "qweight", weight, "a matrix");
        const int64_t vocabulary = weight.shape[0], n = weight.shape[1];
        call.require(scale.rank() == 1 && scale.count == vocabulary, "scale", scale,
                     "one value for every row of qweight");
        std::vector<int64_t> shape = ids.shape;
        shape.push_back(n);
        auto args = Call::arguments<mqc_embedding_args>();
        args.dtype = MQC_F32;
        args.table_dtype = MQC_I8;
        args.rows = ids.count;
        args.columns = n;
        args.vocabulary = vocabulary;
        args.ids = ids.as<int64_t>();
        args.table = weight.data;
        args.scale = scale.as<float>();
        args.y = call.output<float>(0, shape);
        if (ids.count == 0 || n == 0) return;
        if (vocabulary == 0) call.fail("qweight has no rows");
        call.check(kernels().embedding(&args, call.stream()));
    }
};

}  // namespace

bool has_rows(const Variant& variant) {
    static const char* const names[] = {"QuantizeStatic", "RmsNormQuantize", "ActivationQuantize",
                                        "Hadamard", "EmbeddingW8"};
    for (const char* name : names)
        if (variant.name == name) return !variant.has("u8");
    return false;
}

Kernel* make_rows(const Variant& variant, const Ort::ConstKernelInfo& info) {
    if (variant.name == "QuantizeStatic") return new Quantize;
    if (variant.name == "RmsNormQuantize") return new RmsNorm(variant, info);
    if (variant.name == "ActivationQuantize") return new Activation(variant, info);
    if (variant.name == "Hadamard") return new Hadamard(variant, info);
    return new Embedding;
}

}  // namespace mqc_onnx_cuda
