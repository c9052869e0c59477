// Attention over the buffered cache: a kernel turns queries and keys and writes the cache, another
// reads it.
#include <algorithm>
#include <string>

#include "call.h"

namespace mqc_onnx_cuda {
namespace {

constexpr int64_t kMostDim = 256;
constexpr int64_t kFewTokens = 16;  // up to so many the cache is read once, by the float32 kernel
constexpr int64_t kMostInt = (int64_t{1} << 31) - 1;

struct Heads {
    int64_t batch, tokens, heads, kv_heads, dim;
    const float *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;  // floats from one token to the next
};

class Attention : public Kernel {
  public:
    Attention(const Variant& variant, const Ort::ConstKernelInfo& info)
        : scale_(info.GetAttribute<float>("scale")), int8_(variant.name == "AttentionInt8") {
        if (variant.has("half")) rotary_ = MQC_ROTARY_HALF;
        if (variant.has("interleaved")) rotary_ = MQC_ROTARY_INTERLEAVED;
    }

    void compute(Call& call) const override {
        const Tensor keys = call.input("key_cache"), values = call.input("value_cache");
        const Heads h = heads_of(call, keys, values);
        const Tensor mask = call.input("mask");
        const int64_t past = past_of(call, h, keys, mask);
        const int64_t rows = std::max(keys.shape[2], mask.shape[3]);
        auto rotary = rotary_of(call, h);
        auto attend = Call::arguments<mqc_attention_args>();

        attend.out = call.output<float>(0, {h.batch, h.tokens, h.heads * h.dim});
        rotary.key_cache = renew(call, 1, keys, rows, int8_ ? 1 : kFloat);
        rotary.value_cache = renew(call, 2, values, rows, int8_ ? 1 : kFloat);
        if (int8_) {
            rotary.key_scale = renew_scales(call, 3, "key_scale", keys, rows);
            rotary.value_scale = renew_scales(call, 4, "value_scale", keys, rows);
        }
        if (h.batch == 0 || h.tokens == 0) return;
        rotary.capacity = rows;
        rotary.past = call.workspace().number(past, call.stream());
        set_scratch(call, h, rotary);
        call.check(kernels().rotary_cache(&rotary, call.stream()));

        attend.dtype = MQC_F32;
        attend.cache_dtype = rotary.cache_dtype;
        attend.key_scale = rotary.key_scale;
        attend.value_scale = rotary.value_scale;
        attend.batch = rotary.batch;
        attend.tokens = rotary.tokens;
        attend.q_heads = rotary.q_heads;
        attend.kv_heads = rotary.kv_heads;
        attend.head_dim = rotary.head_dim;
        attend.scale = scale_;
        attend.capacity = rows;
        attend.q = rotary.q ? rotary.q : h.q;
        attend.q_stride = rotary.q ? rotary.q_stride : h.q_stride;
        attend.out_stride = h.heads * h.dim;
        attend.key_cache = rotary.key_cache;
        attend.value_cache = rotary.value_cache;
        attend.mask = mask.as<uint8_t>();
        attend.mask_stride = mask.shape[3];
        attend.past = rotary.past;
        const bool half = h.tokens > kFewTokens && (h.dim == 64 || h.dim == 96 || h.dim == 128);
        half ? run_half(call, h, past + h.tokens, attend) : run(call, attend);
    }

  private:
    static Heads heads_of(const Call& call, const Tensor& keys, const Tensor& values) {
        const Tensor q = call.input("q");
        call.require(q.rank() == 4, "q", q, "[B, S, heads, dim]");
        call.require(keys.rank() == 4 && keys.shape[1] > 0 && keys.shape[3] > 0, "key_cache", keys,
                     "[B, heads, rows, dim]");
        call.require(keys.shape[3] <= kMostDim, "key_cache", keys, "heads of 256 values at most");
        call.require(values.shape == keys.shape, "value_cache", values,
                     "the shape of key_cache, as the kernels for a GPU do");
        Heads h = {};
        h.batch = q.shape[0];
        h.tokens = q.shape[1];
        h.heads = q.shape[2];
        h.dim = q.shape[3];
        h.kv_heads = keys.shape[1];
        h.q = q.as<float>();
        h.q_stride = h.heads * h.dim;
        if (call.variant().has("packed")) {
            h.heads -= 2 * h.kv_heads;
            h.k = h.q + h.heads * h.dim;
            h.v = h.k + h.kv_heads * h.dim;
            h.k_stride = h.v_stride = h.q_stride;
        } else {
            const Tensor k = call.input("k"), v = call.input("v");
            const std::vector<int64_t> wanted = {h.batch, h.tokens, h.kv_heads, h.dim};
            call.require(k.shape == wanted, "k", k, text_of(wanted).c_str());
            call.require(v.shape == wanted, "v", v, text_of(wanted).c_str());
            h.k = k.as<float>();
            h.v = v.as<float>();
            h.k_stride = h.v_stride = h.kv_heads * h.dim;
        }
        call.require(h.heads > 0 && h.heads % h.kv_heads == 0, "q", q,
                     "heads that are a multiple of the cache's");
        call.require(keys.shape[0] == h.batch && keys.shape[3] == h.dim, "key_cache", keys,
                     "q's batch and head size");
        call.require(std::max({h.batch, h.tokens, h.heads}) <= kMostInt, "q", q, "32-bit sizes");
        return h;
    }

    // Rows of the cache in use, with the mask checked. It is read on the host: kernels trust it.
    static int64_t past_of(const Call& call, const Heads& h, const Tensor& keys,
                           const Tensor& mask) {
        const Tensor past = call.input("past");
        call.require(past.count == 1, "past", past, "[1]");
        const int64_t used = *past.as<int64_t>(), capacity = keys.shape[2];
        call.require(mask.rank() == 4 && mask.shape[0] == h.batch && mask.shape[1] == 1 &&
                         mask.shape[2] == h.tokens,
                     "mask", mask, "[B, 1, S, past + S]");
        const int64_t columns = mask.shape[3];
        if (used < 0 || used > capacity)
            call.fail("past is " + std::to_string(used) + ", the cache has " +
                      std::to_string(capacity) + " rows");
        call.require(h.tokens <= columns && used <= columns - h.tokens, "mask", mask,
                     ("past + S = " + std::to_string(used + h.tokens) + " columns").c_str());
        call.require(columns <= capacity || columns == used + h.tokens, "mask", mask,
                     "no more columns than the cache has rows, or past + S");
        return used;
    }

    mqc_rotary_args rotary_of(const Call& call, const Heads& h) const {
        auto args = Call::arguments<mqc_rotary_args>();
        args.dtype = MQC_F32;
        args.cache_dtype = int8_ ? MQC_I8 : MQC_F32;
        args.rotary = rotary_;
        args.batch = static_cast<int32_t>(h.batch);
        args.tokens = static_cast<int32_t>(h.tokens);
        args.q_heads = static_cast<int32_t>(h.heads);
        args.kv_heads = static_cast<int32_t>(h.kv_heads);
        args.head_dim = static_cast<int32_t>(h.dim);
        args.k = h.k;
        args.v = h.v;
        args.k_stride = h.k_stride;
        args.v_stride = h.v_stride;
        if (rotary_ == MQC_ROTARY_NONE) return args;
        const Tensor c = call.input("cos"), s = call.input("sin");
        call.require(c.rank() == 3 && (c.shape[0] == h.batch || c.shape[0] == 1) &&
                         c.shape[1] == h.tokens && c.shape[2] > 0 && c.shape[2] % 2 == 0 &&
                         c.shape[2] <= h.dim,
                     "cos", c, "[B or 1, S, R], R even and at most the head size");
        call.require(s.shape == c.shape, "sin", s, "the shape of cos");
        args.table_dtype = MQC_F32;
        args.rotary_dim = static_cast<int32_t>(c.shape[2]);
        args.cos = c.data;
        args.sin = s.data;
        return args;
    }

    static void run(const Call& call, mqc_attention_args& args) {
        call.check(kernels().attention_workspace(&args, &args.workspace_bytes));
        if (args.workspace_bytes) args.workspace = call.workspace().counted(args.workspace_bytes);
        call.check(kernels().attention(&args, call.stream()));
    }

    // In float16, on tensor cores: the rows of a prompt. Its 11 bits are those of TF32, in which
    // onnxruntime's own products are by default. `args` is in float32; `keys` rows are in use.
    static void run_half(const Call& call, const Heads& h, int64_t keys, mqc_attention_args& args) {
        const bool int8 = args.cache_dtype == MQC_I8;  // read as it is
        const int64_t width = h.heads * h.dim, rows = h.batch * h.tokens;
        const int64_t groups = h.batch * h.kv_heads, used = keys * h.dim;
        const int64_t of_rows = pieces(rows * width), of_cache = int8 ? 0 : pieces(groups * used);
        auto* q = static_cast<uint8_t*>(call.workspace().more(2 * of_rows + 2 * of_cache));
        uint8_t *out = q + of_rows, *k = out + of_rows, *v = k + of_cache;
        const auto narrow = [&](uint8_t* to, const void* from, int64_t stride, int64_t values,
                                int64_t count) {
            call.check(kernels().rows_to_f16(to, values, static_cast<const float*>(from), stride,
                                             values, count, call.stream()));
        };
        narrow(q, args.q, args.q_stride, width, rows);
        if (!int8) {
            narrow(k, args.key_cache, args.capacity * h.dim, used, groups);
            narrow(v, args.value_cache, args.capacity * h.dim, used, groups);
            args.cache_dtype = MQC_F16;
            args.capacity = keys;
            args.key_cache = k;
            args.value_cache = v;
        }
        auto* result = static_cast<float*>(args.out);
        args.dtype = MQC_F16;
        args.q = q;
        args.q_stride = width;
        args.out = out;
        run(call, args);
        call.check(kernels().rows_to_f32(result, width, out, width, width, rows, call.stream()));
    }

    // Bytes of values in float16, in whole pieces of what the kernels want aligned.
    static int64_t pieces(int64_t values) { return (2 * values + 255) / 256 * 256; }

    // Queries turn in a copy, for the node's input stays what it is; and angles that all sequences
    // share are given to each.
    void set_scratch(const Call& call, const Heads& h, mqc_rotary_args& args) const {
        if (rotary_ == MQC_ROTARY_NONE) return;
        const int64_t width = h.heads * h.dim * kFloat, rows = h.batch * h.tokens;
        const bool shared = h.batch > 1 && call.input("cos").shape[0] == 1;
        const int64_t table = h.tokens * args.rotary_dim * kFloat;
        const int64_t tables = shared ? 2 * h.batch * table : 0;
        auto* scratch = static_cast<uint8_t*>(call.workspace().scratch(rows * width + tables));
        args.q = scratch;
        args.q_stride = h.heads * h.dim;
        call.check(kernels().copy_rows(scratch, width, h.q, h.q_stride * kFloat, width, rows,
                                       call.stream()));
        if (!shared) return;
        uint8_t* to = scratch + rows * width;
        for (const void** angles : {&args.cos, &args.sin}) {
            const void* from = *angles;
            *angles = to;
            for (int64_t b = 0; b < h.batch; b++, to += table)
                call.check(kernels().copy_rows(to, table, from, table, table, 1, call.stream()));
        }
    }

    // The cache in its output: what is there already stays where both are the same memory (a host
    // that binds one buffer to input and output), else it is copied. More rows than the cache has
    // are all new ones: the mask has past + S columns then.
    static void* renew(Call& call, size_t output, const Tensor& cache, int64_t rows, int64_t bytes) {
        std::vector<int64_t> shape = cache.shape;
        const int64_t heads = shape[0] * shape[1];
        const int64_t row = shape.size() > 3 ? shape[3] * bytes : bytes, old = shape[2] * row;
        shape[2] = rows;
        void* to = call.output<void>(output, shape);
        if (to != cache.data)
            call.check(
                kernels().copy_rows(to, rows * row, cache.data, old, old, heads, call.stream()));
        return to;
    }

    static float* renew_scales(Call& call, size_t output, const char* name, const Tensor& keys,
                               int64_t rows) {
        const Tensor scale = call.input(name);
        const std::vector<int64_t> wanted(keys.shape.begin(), keys.shape.end() - 1);
        call.require(scale.shape == wanted, name, scale, text_of(wanted).c_str());
        return static_cast<float*>(renew(call, output, scale, rows, kFloat));
    }

    float scale_;
    bool int8_;
    int32_t rotary_ = MQC_ROTARY_NONE;
};

}  // namespace

bool has_attention(const Variant& variant) {
    return (variant.name == "Attention" || variant.name == "AttentionInt8") &&
           has_only(variant, {"packed", "half", "interleaved", "partial"});
}

Kernel* make_attention(const Variant& variant, const Ort::ConstKernelInfo& info) {
    return new Attention(variant, info);
}

}  // namespace mqc_onnx_cuda

// Says to hosts that new rows are written into the cache where one buffer is bound to both ends.
extern "C" __attribute__((visibility("default"))) int mqc_attention_in_place(void) { return 1; }
