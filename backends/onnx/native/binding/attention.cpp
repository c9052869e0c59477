// Attention over the buffered cache, and what it shares with attention without one.
#include "attention.h"

#include <cstring>

namespace mqc_onnx {
namespace {

// The cache in its output: what is there already stays where both are the same memory (a host that
// binds one buffer to input and output), else it is copied; the rows of the result may be more.
template <class T>
T* renew(Call& call, size_t output, const Tensor& cache, int64_t rows) {
    std::vector<int64_t> shape = cache.shape;
    const int64_t heads = shape[0] * shape[1], old = shape[2];
    const int64_t width = cache.rank() == 4 ? shape[3] : 1;
    shape[2] = rows;
    T* to = call.output<T>(output, shape);
    if (to == cache.data || heads * rows * width == 0) return to;
    const size_t bytes = static_cast<size_t>(old * width) * sizeof(T);
    for (int64_t head = 0; head < heads; head++) {
        T* start = to + head * rows * width;
        if (bytes) std::memcpy(start, cache.as<T>() + head * old * width, bytes);
        std::memset(start + old * width, 0,
                    static_cast<size_t>((rows - old) * width) * sizeof(T));
    }
    return to;
}

class Attention : public Kernel {
  public:
    Attention(const Variant& variant, const Ort::ConstKernelInfo& info)
        : scale_(info.GetAttribute<float>("scale")),
          rotary_(rotary_of(variant)),
          narrow_(variant.name == "AttentionInt8") {}

    void compute(Call& call) const override {
        mqc_attention a = {};
        a.scale = scale_;
        a.rotary = rotary_;
        const Tensor keys = call.input("key_cache"), values = call.input("value_cache");
        heads(call, keys, values, a);
        const int64_t rows = mask_and_past(call, keys, a);
        read_angles(call, a);

        a.out = call.output<float>(0, {a.batch, a.tokens, a.heads * a.value_dim});
        a.capacity = rows;
        if (narrow_) {
            const Tensor key_scale = scales(call, "key_scale", keys);
            const Tensor value_scale = scales(call, "value_scale", keys);
            a.key_bytes = renew<int8_t>(call, 1, keys, rows);
            a.value_bytes = renew<int8_t>(call, 2, values, rows);
            a.key_scale = renew<float>(call, 3, key_scale, rows);
            a.value_scale = renew<float>(call, 4, value_scale, rows);
        } else {
            a.key_cache = renew<float>(call, 1, keys, rows);
            a.value_cache = renew<float>(call, 2, values, rows);
        }
        if (a.batch == 0 || a.tokens == 0) return;
        run_attention(call, a);
    }

  private:
    static void heads(const Call& call, const Tensor& keys, const Tensor& values,
                      mqc_attention& a) {
        const Tensor q = call.input("q");
        call.require(q.rank() == 4, "q", q, "[B, S, heads, dim]");
        call.require(keys.rank() == 4 && keys.shape[1] > 0 && keys.shape[3] > 0, "key_cache", keys,
                     "[B, heads, rows, dim]");
        call.require(values.rank() == 4 && values.shape[3] > 0 && values.shape[0] == keys.shape[0] &&
                         values.shape[1] == keys.shape[1] && values.shape[2] == keys.shape[2],
                     "value_cache", values, "the rows of key_cache");
        a.batch = q.shape[0];
        a.tokens = q.shape[1];
        a.heads = q.shape[2];
        a.dim = q.shape[3];
        a.kv_heads = keys.shape[1];
        a.value_dim = values.shape[3];
        a.q = q.as<float>();
        a.q_stride = a.heads * a.dim;
        if (call.variant().has("packed")) {
            call.require(a.value_dim == a.dim, "value_cache", values, "q's head size");
            a.heads -= 2 * a.kv_heads;
            a.k = a.q + a.heads * a.dim;
            a.v = a.k + a.kv_heads * a.dim;
            a.k_stride = a.v_stride = a.q_stride;
        } else {
            const Tensor k = call.input("k"), v = call.input("v");
            const std::vector<int64_t> key = {a.batch, a.tokens, a.kv_heads, a.dim};
            const std::vector<int64_t> value = {a.batch, a.tokens, a.kv_heads, a.value_dim};
            call.require(k.shape == key, "k", k, text_of(key).c_str());
            call.require(v.shape == value, "v", v, text_of(value).c_str());
            a.k = k.as<float>();
            a.v = v.as<float>();
            a.k_stride = a.kv_heads * a.dim;
            a.v_stride = a.kv_heads * a.value_dim;
        }
        call.require(a.heads > 0 && a.heads % a.kv_heads == 0, "q", q,
                     "heads that are a multiple of the cache's");
        call.require(keys.shape[0] == a.batch && keys.shape[3] == a.dim, "key_cache", keys,
                     "q's batch and head size");
    }

    static Tensor scales(const Call& call, const char* name, const Tensor& keys) {
        const Tensor found = call.input(name);
        const std::vector<int64_t> rows(keys.shape.begin(), keys.shape.end() - 1);
        call.require(found.shape == rows, name, found, text_of(rows).c_str());
        return found;
    }

    // Returns the rows of the new caches: those of the cache, or of the mask where these are more.
    static int64_t mask_and_past(const Call& call, const Tensor& keys, mqc_attention& a) {
        const Tensor past = call.input("past"), mask = call.input("mask");
        call.require(past.count == 1, "past", past, "[1]");
        a.past = *past.as<int64_t>();
        call.require(mask.rank() == 4 && mask.shape[0] == a.batch && mask.shape[1] == 1 &&
                         mask.shape[2] == a.tokens,
                     "mask", mask, "[B, 1, S, past + S]");
        a.mask = mask.as<uint8_t>();
        a.mask_batch = a.batch;
        a.mask_columns = mask.shape[3];
        const int64_t capacity = keys.shape[2];
        if (a.past < 0 || a.past > capacity)
            call.fail("past is " + std::to_string(a.past) + ", the cache has " +
                      std::to_string(capacity) + " rows");
        call.require(a.tokens <= a.mask_columns && a.past <= a.mask_columns - a.tokens, "mask",
                     mask, ("past + S = " + std::to_string(a.past + a.tokens) + " columns").c_str());
        call.require(a.mask_columns <= capacity || a.mask_columns == a.past + a.tokens, "mask",
                     mask, "no more columns than the cache has rows, or past + S");
        return std::max(capacity, a.mask_columns);
    }

    float scale_;
    int rotary_;
    bool narrow_;
};

}  // namespace

int rotary_of(const Variant& variant) {
    if (variant.has("half")) return MQC_ROTARY_HALF;
    return variant.has("interleaved") ? MQC_ROTARY_INTERLEAVED : MQC_ROTARY_NONE;
}

void read_angles(const Call& call, mqc_attention& a) {
    if (a.rotary == MQC_ROTARY_NONE) return;
    const Tensor c = call.input("cos"), s = call.input("sin");
    call.require(c.rank() == 3 && (c.shape[0] == a.batch || c.shape[0] == 1) &&
                     c.shape[1] == a.tokens && c.shape[2] % 2 == 0 && c.shape[2] <= a.dim,
                 "cos", c, "[B or 1, S, R], R even and at most the head size");
    call.require(s.shape == c.shape, "sin", s, "the shape of cos");
    a.angle_batch = c.shape[0];
    a.rotary_dim = c.shape[2];
    a.cosine = c.as<float>();
    a.sine = s.as<float>();
}

void run_attention(Call& call, const mqc_attention& a) {
    mqc_attention_plan plan;
    mqc_attention_prepare(&a, &plan);
    const Block<float> memory = allocate<float>(plan.workspace);
    float* workspace = memory.get();
    const bool cached = a.key_cache || a.key_bytes;
    const int64_t keys = cached ? a.past + a.tokens : a.keys;
    const int64_t written = cached ? a.kv_heads * (a.dim + a.value_dim) : 0;
    call.rows(plan.appends, written + keys, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) mqc_attention_append(&a, &plan, workspace, i);
        return true;
    });
    call.rows(plan.packs, 64 * a.dim, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) mqc_attention_pack(&a, &plan, workspace, i);
        return true;
    });
    const int64_t work = 2 * a.dim * keys * a.heads * a.tokens * a.batch;
    call.rows(plan.tasks, work / plan.tasks / 8, [&](int64_t begin, int64_t end) {
        float* own = scratch(plan.scratch);
        if (!own) return false;
        for (int64_t i = begin; i < end; i++)
            mqc_attention_attend(&a, &plan, workspace, own, i);
        return true;
    });
    call.rows(plan.combines, plan.split * a.value_dim, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) mqc_attention_combine(&a, &plan, workspace, i);
        return true;
    });
}

Kernel* make_attention(const Variant& variant, const Ort::ConstKernelInfo& info) {
    return new Attention(variant, info);
}

}  // namespace mqc_onnx
