// Kernels of the token order of AIFS and of rotary angles.
#include "mqc_order.h"

#include "call.h"

namespace mqc_onnx {
namespace {

// order [batch, tokens] with places below `tokens`: it indexes memory.
Tensor order_of(const Call& call, int64_t batch, int64_t tokens) {
    const Tensor order = call.input("order");
    call.require(order.shape == std::vector<int64_t>{batch, tokens}, "order", order,
                 text_of({batch, tokens}).c_str());
    for (int64_t i = 0; i < order.count; i++)
        if (order.as<int64_t>()[i] < 0 || order.as<int64_t>()[i] >= tokens)
            call.fail("order names token " + std::to_string(order.as<int64_t>()[i]) + " of " +
                      std::to_string(tokens));
    return order;
}

class TokenOrder : public Kernel {
    void compute(Call& call) const override {
        const Tensor modality = call.input("modality");
        call.require(modality.rank() == 2, "modality", modality, "[batch, tokens]");
        const int64_t batch = modality.shape[0], tokens = modality.shape[1];
        int64_t* order = call.output<int64_t>(0, modality.shape);
        int64_t* place = call.output<int64_t>(1, modality.shape);
        int64_t* count = call.output<int64_t>(2, {batch});
        uint8_t* visual = call.output<uint8_t>(3, modality.shape);
        for (int64_t b = 0; b < batch; b++) {
            const int64_t at = b * tokens;
            count[b] = mqc_token_order(modality.as<uint8_t>() + at, tokens, order + at, place + at,
                                       visual + at);
        }
    }
};

class TakeTokens : public Kernel {
    void compute(Call& call) const override {
        const Tensor x = call.input("x");
        const bool last = call.variant().has("last");
        call.require(x.rank() >= (last ? 2 : 3), "x", x,
                     last ? "[.., batch, tokens]" : "[batch, tokens, ..]");
        const size_t first = last ? x.shape.size() - 2 : 0;  // the axis of sequences
        const int64_t batch = x.shape[first], tokens = x.shape[first + 1];
        const Tensor order = order_of(call, batch, tokens);
        char* y = call.output<char>(0, x.shape);
        if (x.count == 0) return;
        const int64_t bytes = x.count / rows_of(x, first) * (last ? 8 : 4);
        const int64_t sequences = rows_of(x, first) / tokens;
        call.rows(sequences * tokens, bytes / 4, [&](int64_t begin, int64_t end) {
            while (begin < end) {
                const int64_t sequence = begin / tokens, at = sequence * tokens;
                const int64_t stop = std::min(end, at + tokens);
                mqc_take_rows(x.as<char>() + at * bytes,
                              order.as<int64_t>() + sequence % batch * tokens, begin - at,
                              stop - at, bytes, y + at * bytes);
                begin = stop;
            }
            return true;
        });
    }

    // Elements of all axes up to that of tokens.
    static int64_t rows_of(const Tensor& x, size_t first) {
        int64_t product = 1;
        for (size_t i = 0; i <= first + 1; i++) product *= x.shape[i];
        return product;
    }
};

class TakeKeys : public Kernel {
    void compute(Call& call) const override {
        const Tensor mask = call.input("mask"), past = call.input("past");
        call.require(mask.rank() == 4, "mask", mask, "[batch, masks, tokens, keys]");
        call.require(past.count == 1, "past", past, "one number");
        const int64_t batch = mask.shape[0], kinds = mask.shape[1], tokens = mask.shape[2];
        const int64_t columns = mask.shape[3], rows = past.as<int64_t>()[0];
        if (rows < 0 || rows > columns - tokens)
            call.fail("past is " + std::to_string(rows) + " where the mask has " +
                      std::to_string(columns) + " columns for " + std::to_string(tokens) +
                      " new tokens");
        const Tensor order = order_of(call, batch, tokens);
        uint8_t* y = call.output<uint8_t>(0, mask.shape);
        if (mask.count == 0) return;
        call.rows(batch * kinds * tokens, columns + tokens, [&](int64_t begin, int64_t end) {
            while (begin < end) {
                const int64_t one = begin / tokens, at = one * tokens;
                const int64_t stop = std::min(end, at + tokens);
                mqc_take_keys(mask.as<uint8_t>() + at * columns,
                              order.as<int64_t>() + one / kinds * tokens, begin - at, stop - at,
                              tokens, columns, rows, y + at * columns);
                begin = stop;
            }
            return true;
        });
    }
};

class RotaryAngles : public Kernel {
    void compute(Call& call) const override {
        const Tensor positions = call.input("positions"), freq = call.input("freq");
        const bool several = call.variant().has("axes");
        call.require(positions.rank() == (several ? 3 : 2), "positions", positions,
                     several ? "[axes, batch, tokens]" : "[batch, tokens]");
        call.require(freq.rank() == 1, "freq", freq, "a list");
        const int64_t width = freq.count;
        const int64_t* axes = nullptr;
        if (several) {
            const Tensor given = call.input("axes");
            call.require(given.shape == freq.shape, "axes", given, text_of(freq.shape).c_str());
            axes = given.as<int64_t>();
            for (int64_t i = 0; i < width; i++)
                if (axes[i] < 0 || axes[i] >= positions.shape[0])
                    call.fail("axes names axis " + std::to_string(axes[i]) + " of " +
                              std::to_string(positions.shape[0]));
        }
        std::vector<int64_t> shape(positions.shape.end() - 2, positions.shape.end());
        const int64_t tokens = shape[0] * shape[1];
        shape.push_back(width);
        float* cosine = call.output<float>(0, shape);
        float* sine = call.output<float>(1, shape);
        if (tokens * width == 0) return;
        const int64_t distinct = period(freq.as<float>(), axes, width);
        call.rows(tokens, 64 * distinct, [&](int64_t begin, int64_t end) {
            mqc_rotary_angles(positions.as<int64_t>(), tokens, freq.as<float>(), axes, begin, end,
                              width, distinct, cosine, sine);
            return true;
        });
    }

    // width / 2 where the second half of the columns repeats the first, as most models have it.
    static int64_t period(const float* freq, const int64_t* axes, int64_t width) {
        const int64_t half = width / 2;
        if (width % 2) return width;
        for (int64_t i = 0; i < half; i++)
            if (freq[i] != freq[i + half] || (axes && axes[i] != axes[i + half])) return width;
        return half;
    }
};

}  // namespace

Kernel* make_order(const Variant& variant) {
    if (variant.name == "TokenOrder") return new TokenOrder;
    if (variant.name == "TakeTokens") return new TakeTokens;
    if (variant.name == "TakeKeys") return new TakeKeys;
    if (variant.name == "RotaryAngles") return new RotaryAngles;
    return nullptr;
}

}  // namespace mqc_onnx
