// Kernels of everything but the linears.
#include <cstring>

#include "attention.h"
#include "transform.h"

namespace mqc_onnx {
namespace {

// ---- pieces --------------------------------------------------------------------------------------

struct FreePlan {
    void operator()(mqc_hadamard_plan* plan) const { mqc_hadamard_free(plan); }
};
typedef std::unique_ptr<mqc_hadamard_plan, FreePlan> Plan;

Plan plan_of(const Variant& variant, const Ort::ConstKernelInfo& info) {
    const Transform t = transform_of(variant, info);
    if (t.block() == 1) return nullptr;
    Plan plan(mqc_hadamard_create(t.base, t.log2, t.base > 1 ? t.signs.data() : nullptr));
    if (!plan) throw std::runtime_error("ai.mqc::" + variant.op_type() + ": out of memory");
    return plan;
}

// Columns to return in float, each in [0, n).
Tensor split_of(const Call& call, int64_t n) {
    Tensor split;
    if (!call.variant().has("split")) return split;
    split = call.input("split");
    call.require(split.rank() == 1, "split", split, "a list");
    for (int64_t i = 0; i < split.count; i++)
        if (split.as<int64_t>()[i] < 0 || split.as<int64_t>()[i] >= n)
            call.fail("split names column " + std::to_string(split.as<int64_t>()[i]) + " of " +
                      std::to_string(n));
    return split;
}

float* split_output(Call& call, const Tensor& split, const Tensor& x) {
    if (!call.variant().has("split")) return nullptr;
    std::vector<int64_t> shape = x.shape;
    shape.back() = split.count;
    return call.output<float>(1, shape);
}

// ---- kernels -------------------------------------------------------------------------------------

class Quantize : public Kernel {
    void compute(Call& call) const override {
        const Tensor x = call.input("x");
        call.require(x.rank() >= 1, "x", x, "at least one axis");
        const mqc_row_scales scales = call.row_scales("scale", x);
        void* y = call.output<void>(0, x.shape);
        const int is_unsigned = call.variant().has("u8");
        if (x.count == 0) return;
        call.rows(x.rows(), x.last(), [&](int64_t begin, int64_t end) {
            mqc_quantize(x.as<float>(), begin, end, x.last(), &scales, is_unsigned, y);
            return true;
        });
    }
};

class RmsNorm : public Kernel {
  public:
    explicit RmsNorm(const Ort::ConstKernelInfo& info) : eps_(info.GetAttribute<float>("eps")) {}

    void compute(Call& call) const override {
        const Tensor x = call.input("x");
        call.require(x.rank() >= 1, "x", x, "at least one axis");
        const mqc_row_scales scales = call.row_scales("scale", x);
        const Tensor split = split_of(call, x.last());
        void* xq = call.output<void>(0, x.shape);
        float* x_split = split_output(call, split, x);
        const int is_unsigned = call.variant().has("u8");
        if (x.count == 0) return;
        call.rows(x.rows(), 2 * x.last(), [&](int64_t begin, int64_t end) {
            mqc_rms_norm_quantize(x.as<float>(), begin, end, x.last(), eps_, &scales, is_unsigned,
                                  xq, split.as<int64_t>(), split.count, x_split);
            return true;
        });
    }

  private:
    float eps_;
};

class Activation : public Kernel {
  public:
    Activation(const Variant& variant, const Ort::ConstKernelInfo& info)
        : plan_(plan_of(variant, info)) {
        static const char* const names[] = {"identity", "silu",      "gelu",
                                            "gelutanh", "quickgelu", "relu"};
        for (int i = 0; i < 6; i++)
            if (variant.flags[0] == names[i]) function_ = i;
    }

    void compute(Call& call) const override {
        const Variant& variant = call.variant();
        const bool gated = variant.has("gated");
        const Tensor x = call.input("x");
        call.require(x.rank() >= 1 && (!gated || x.last() % 2 == 0), "x", x,
                     gated ? "an even last axis" : "at least one axis");
        Tensor y = x;  // the shape of what is quantized
        if (gated) y.shape.back() /= 2;
        const int64_t n = y.last();
        call.require(!plan_ || n % mqc_hadamard_block(plan_.get()) == 0, "x", x,
                     "a multiple of the transform's block");
        const mqc_row_scales scales = call.row_scales("scale", y);
        const Tensor split = split_of(call, n);
        void* xq = call.output<void>(0, y.shape);
        float* x_split = split_output(call, split, y);
        if (x.count == 0) return;
        const mqc_activation a = {function_,           gated,       plan_.get(),
                                  split.as<int64_t>(), split.count, variant.has("u8")};
        call.rows(y.rows(), 8 * n, [&](int64_t begin, int64_t end) {
            float* memory = scratch(mqc_activation_scratch(&a, n));
            if (memory)
                mqc_activation_quantize(&a, x.as<float>(), begin, end, n, &scales, xq, x_split,
                                        memory);
            return memory != nullptr;
        });
    }

  private:
    Plan plan_;
    int function_ = MQC_IDENTITY;
};

class Hadamard : public Kernel {
  public:
    Hadamard(const Variant& variant, const Ort::ConstKernelInfo& info)
        : plan_(plan_of(variant, info)) {}

    void compute(Call& call) const override {
        const Tensor x = call.input("x");
        float* y = call.output<float>(0, x.shape);
        if (x.count == 0) return;
        if (!plan_) {
            std::memcpy(y, x.data, static_cast<size_t>(x.count) * sizeof(float));
            return;
        }
        const int64_t block = mqc_hadamard_block(plan_.get());
        call.require(x.last() % block == 0, "x", x, "a multiple of the transform's block");
        call.rows(x.count / block, 8 * block, [&](int64_t begin, int64_t end) {
            float* memory = scratch(std::max<int64_t>(1, mqc_hadamard_scratch(plan_.get())));
            if (memory)
                mqc_hadamard(plan_.get(), x.as<float>() + begin * block, end - begin,
                             y + begin * block, memory);
            return memory != nullptr;
        });
    }

  private:
    Plan plan_;
};

class Embedding : public Kernel {
    void compute(Call& call) const override {
        const Tensor ids = call.input("ids"), weight = call.input("qweight");
        const Tensor scale = call.input("scale");
        call.require(weight.rank() == 2, "qweight", weight, "a matrix");
        const int64_t vocabulary = weight.shape[0], n = weight.shape[1];
        call.require(scale.rank() == 1 && scale.count == vocabulary, "scale", scale,
                     "one value for every row of qweight");
        std::vector<int64_t> known(static_cast<size_t>(ids.count)), shape = ids.shape;
        for (int64_t i = 0; i < ids.count; i++) {
            int64_t id = ids.as<int64_t>()[i];
            if (id < -vocabulary || id >= vocabulary)
                call.fail("id " + std::to_string(id) + " is not one of " +
                          std::to_string(vocabulary));
            known[static_cast<size_t>(i)] = id < 0 ? id + vocabulary : id;
        }
        shape.push_back(n);
        float* y = call.output<float>(0, shape);
        call.rows(ids.count, n, [&](int64_t begin, int64_t end) {
            mqc_embedding_w8(known.data(), begin, end, n, weight.as<int8_t>(), scale.as<float>(),
                             y);
            return true;
        });
    }
};

class RankUpdate : public Kernel {
    void compute(Call& call) const override {
        const Tensor y = call.input("y_in"), x = call.input("x_split"), w = call.input("w_split");
        call.require(w.rank() == 2 && w.shape[0] == y.last(), "w_split", w, "[N, rank]");
        std::vector<int64_t> wanted = y.shape;
        call.require(y.rank() >= 1, "y", y, "at least one axis");
        wanted.back() = w.shape[1];
        call.require(x.shape == wanted, "x_split", x, text_of(wanted).c_str());
        float* out = call.output<float>(0, y.shape);
        if (y.count == 0) return;
        call.rows(y.rows(), y.last() * (1 + w.shape[1]), [&](int64_t begin, int64_t end) {
            mqc_rank_update(y.as<float>(), x.as<float>(), w.as<float>(), begin, end, y.last(),
                            w.shape[1], out);
            return true;
        });
    }
};

}  // namespace

Kernel* make_layer(const Variant& variant, const Ort::ConstKernelInfo& info) {
    const std::string& name = variant.name;
    if (name == "QuantizeStatic") return new Quantize;
    if (name == "RmsNormQuantize") return new RmsNorm(info);
    if (name == "ActivationQuantize") return new Activation(variant, info);
    if (name == "Hadamard") return new Hadamard(variant, info);
    if (name == "EmbeddingW8") return new Embedding;
    if (name == "RankUpdate") return new RankUpdate;
    if (name == "AttentionFull") return make_attention_full(variant, info);
    if (Kernel* kernel = make_order(variant)) return kernel;
    return make_attention(variant, info);
}

}  // namespace mqc_onnx
