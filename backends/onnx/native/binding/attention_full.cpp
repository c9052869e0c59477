// Attention without a cache: towers of vision models, resamplers.
#include "attention.h"

namespace mqc_onnx {
namespace {

class AttentionFull : public Kernel {
  public:
    AttentionFull(const Variant& variant, const Ort::ConstKernelInfo& info)
        : scale_(info.GetAttribute<float>("scale")),
          kv_heads_(info.GetAttribute<int64_t>("kv_heads")),
          rotary_(rotary_of(variant)) {
        if (kv_heads_ < 1)
            throw std::runtime_error("ai.mqc::" + variant.op_type() + ": kv_heads is " +
                                     std::to_string(kv_heads_));
    }

    void compute(Call& call) const override {
        mqc_attention a = {};
        a.scale = scale_;
        a.rotary = rotary_;
        a.kv_heads = kv_heads_;
        rows(call, a);
        if (call.variant().has("mask")) {
            const Tensor mask = call.input("mask");
            call.require(mask.rank() == 4 && (mask.shape[0] == a.batch || mask.shape[0] == 1) &&
                             mask.shape[1] == 1 && mask.shape[2] == a.tokens &&
                             mask.shape[3] == a.keys,
                         "mask", mask, "[B or 1, 1, S, T]");
            a.mask = mask.as<uint8_t>();
            a.mask_batch = mask.shape[0];
            a.mask_columns = a.keys;
        }
        read_angles(call, a);
        a.out = call.output<float>(0, {a.batch, a.tokens, a.heads * a.value_dim});
        if (a.batch == 0 || a.tokens == 0) return;
        run_attention(call, a);
    }

  private:
    static void rows(const Call& call, mqc_attention& a) {
        const Tensor q = call.input("q");
        call.require(q.rank() == 4 && q.shape[3] > 0, "q", q, "[B, S, heads, dim]");
        a.batch = q.shape[0];
        a.tokens = a.keys = q.shape[1];
        a.heads = q.shape[2];
        a.dim = a.value_dim = q.shape[3];
        a.q = q.as<float>();
        a.q_stride = a.heads * a.dim;
        if (call.variant().has("packed")) {
            a.heads -= 2 * a.kv_heads;
            call.require(a.heads > 0 && a.heads % a.kv_heads == 0, "q", q,
                         ("heads for " + std::to_string(a.kv_heads) + " of keys").c_str());
            a.k = a.q + a.heads * a.dim;
            a.v = a.k + a.kv_heads * a.dim;
            a.k_stride = a.v_stride = a.q_stride;
            return;
        }
        call.require(a.heads > 0 && a.heads % a.kv_heads == 0, "q", q,
                     ("heads that are a multiple of " + std::to_string(a.kv_heads)).c_str());
        const Tensor k = call.input("k"), v = call.input("v");
        call.require(k.rank() == 4 && k.shape[0] == a.batch && k.shape[2] == a.kv_heads &&
                         k.shape[3] == a.dim,
                     "k", k, "[B, T, kv_heads, dim]");
        call.require(a.rotary == MQC_ROTARY_NONE || k.shape[1] == a.tokens, "k", k,
                     "as many rows as q, which turn by the same angles");
        call.require(v.rank() == 4 && v.shape[0] == a.batch && v.shape[1] == k.shape[1] &&
                         v.shape[2] == a.kv_heads && v.shape[3] > 0,
                     "v", v, "[B, T, kv_heads, value dim]");
        a.keys = k.shape[1];
        a.value_dim = v.shape[3];
        a.k = k.as<float>();
        a.v = v.as<float>();
        a.k_stride = a.kv_heads * a.dim;
        a.v_stride = a.kv_heads * a.value_dim;
    }

    float scale_;
    int64_t kv_heads_;
    int rotary_;
};

}  // namespace

Kernel* make_attention_full(const Variant& variant, const Ort::ConstKernelInfo& info) {
    return new AttentionFull(variant, info);
}

}  // namespace mqc_onnx
