#include "variants.h"

#include <functional>

namespace mqc_onnx {
namespace {

constexpr auto F32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto I64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
constexpr auto BOOL = ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
constexpr auto U8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr auto I8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;

constexpr int kMostFactors = 3;  // orders up to base * 2^21

typedef std::vector<std::string> Choices;  // flags of which one is there; "" for none

// All combinations, in the order of the choices.
std::vector<std::vector<std::string>> combinations(const std::vector<Choices>& choices) {
    std::vector<std::vector<std::string>> all = {{}};
    for (const Choices& choice : choices) {
        std::vector<std::vector<std::string>> longer;
        for (const auto& flags : all)
            for (const std::string& flag : choice) {
                longer.push_back(flags);
                if (!flag.empty()) longer.back().push_back(flag);
            }
        all = longer;
    }
    return all;
}

Choices factor_flags() {
    Choices flags;
    for (int i = 0; i <= kMostFactors; i++) flags.push_back("f" + std::to_string(i));
    return flags;
}

void add_modality(Variant& v) {
    if (v.has("mask")) v.inputs.push_back({"modality", BOOL});
    if (v.has("count")) v.inputs.push_back({"modality", I64});
}

void add_factors(Variant& v) {
    for (int count = 0; count <= kMostFactors; count++)
        if (v.has(("f" + std::to_string(count)).c_str()))
            for (int i = 0; i < count; i++)
                v.inputs.push_back({"factor" + std::to_string(i), F32});
}

void quantized(Variant& v) {  // outputs of the quantizing operators
    v.outputs.push_back({"xq", v.has("u8") ? U8 : I8});
    if (v.has("split")) v.outputs.push_back({"x_split", F32});
}

void add(std::vector<Variant>& all, const char* name, const std::vector<Choices>& choices,
         const std::function<void(Variant&)>& fill) {
    for (auto& flags : combinations(choices)) {
        Variant v{name, flags, {}, {}};
        fill(v);
        all.push_back(std::move(v));
    }
}

void add_linear(std::vector<Variant>& all, bool packed, bool floats) {
    // The reference layout of older files (odd: with a padding nibble), or the kernels' own.
    const Choices odd = packed ? Choices{"", "odd"} : Choices{""};
    const Choices modality = floats ? Choices{""} : Choices{"", "mask", "count"};
    const Choices sign = floats ? Choices{""} : Choices{"", "s8"};
    const std::vector<Choices> terms = {
        modality, {"", "bias"}, {"", "split"}, {"", "residual"}, {"", "group"}};
    std::vector<Choices> reference = terms, own = terms;
    reference.insert(reference.end(), {odd, sign});
    own.insert(own.end(), {sign, {"c16k4"}});
    const std::string name = std::string(packed ? "LinearW4" : "LinearW8") + (floats ? "A16" : "A8");
    for (const std::vector<Choices>& choices : {reference, own})
        add(all, name.c_str(), choices, [packed, floats](Variant& v) {
            if (floats)
                v.inputs = {{"x", F32}};
            else
                v.inputs = {{"xq", v.has("s8") ? I8 : U8}};
            v.inputs.push_back({"qweight", packed || v.has("c16k4") ? U8 : I8});
            v.inputs.push_back({"w_scale", F32});
            if (!floats) v.inputs.push_back({"x_scale", F32});
            add_modality(v);
            if (v.has("bias")) v.inputs.push_back({"bias", F32});
            if (v.has("split")) {
                v.inputs.push_back({"x_split", F32});
                v.inputs.push_back({"w_split", F32});
            }
            if (v.has("residual")) v.inputs.push_back({"residual", F32});
            v.outputs = {{"y", F32}};
        });
}

std::vector<Variant> make() {
    std::vector<Variant> all;
    const Choices modality = {"", "mask", "count"}, form = {"", "u8"}, split = {"", "split"};
    for (const bool packed : {true, false})
        for (const bool floats : {false, true}) add_linear(all, packed, floats);
    add(all, "QuantizeStatic", {modality, form}, [](Variant& v) {
        v.inputs = {{"x", F32}, {"scale", F32}};
        add_modality(v);
        v.outputs = {{"y", v.has("u8") ? U8 : I8}};
    });
    add(all, "RmsNormQuantize", {modality, form, split}, [](Variant& v) {
        v.inputs = {{"x", F32}, {"scale", F32}};
        add_modality(v);
        if (v.has("split")) v.inputs.push_back({"split", I64});
        quantized(v);
    });
    add(all, "ActivationQuantize",
        {{"identity", "silu", "gelu", "gelutanh", "quickgelu", "relu"}, {"", "gated"},
         factor_flags(), modality, form, split},
        [](Variant& v) {
            v.inputs = {{"x", F32}, {"scale", F32}};
            add_modality(v);
            if (v.has("split")) v.inputs.push_back({"split", I64});
            add_factors(v);
            quantized(v);
        });
    add(all, "Hadamard", {factor_flags()}, [](Variant& v) {
        v.inputs = {{"x", F32}};
        add_factors(v);
        v.outputs = {{"y", F32}};
    });
    add(all, "EmbeddingW8", {}, [](Variant& v) {
        v.inputs = {{"ids", I64}, {"qweight", I8}, {"scale", F32}};
        v.outputs = {{"y", F32}};
    });
    add(all, "RankUpdate", {}, [](Variant& v) {
        v.inputs = {{"y_in", F32}, {"x_split", F32}, {"w_split", F32}};
        v.outputs = {{"y", F32}};
    });
    const auto attention = [](Variant& v) {
        const bool narrow = v.name == "AttentionInt8";
        const auto cache = narrow ? I8 : F32;
        v.inputs = {{"q", F32}};
        if (!v.has("packed")) v.inputs.insert(v.inputs.end(), {{"k", F32}, {"v", F32}});
        v.inputs.insert(v.inputs.end(), {{"key_cache", cache}, {"value_cache", cache}});
        if (narrow) v.inputs.insert(v.inputs.end(), {{"key_scale", F32}, {"value_scale", F32}});
        v.inputs.insert(v.inputs.end(), {{"past", I64}, {"mask", BOOL}});
        if (v.has("half") || v.has("interleaved"))
            v.inputs.insert(v.inputs.end(), {{"cos", F32}, {"sin", F32}});
        v.outputs = {{"out", F32}, {"new_key_cache", cache}, {"new_value_cache", cache}};
        if (narrow)
            v.outputs.insert(v.outputs.end(), {{"new_key_scale", F32}, {"new_value_scale", F32}});
    };
    const Choices packed = {"", "packed"};
    for (const char* name : {"Attention", "AttentionInt8"}) {
        add(all, name, {packed}, attention);
        add(all, name, {packed, {"half", "interleaved"}, {"", "partial"}}, attention);
    }
    const auto full = [](Variant& v) {
        v.inputs = {{"q", F32}};
        if (!v.has("packed")) v.inputs.insert(v.inputs.end(), {{"k", F32}, {"v", F32}});
        if (v.has("mask")) v.inputs.push_back({"mask", BOOL});
        if (v.has("half") || v.has("interleaved"))
            v.inputs.insert(v.inputs.end(), {{"cos", F32}, {"sin", F32}});
        v.outputs = {{"out", F32}};
    };
    const Choices masked = {"", "mask"};
    add(all, "AttentionFull", {packed, masked}, full);
    add(all, "AttentionFull", {packed, masked, {"half", "interleaved"}, {"", "partial"}}, full);
    add(all, "TokenOrder", {}, [](Variant& v) {
        v.inputs = {{"modality", BOOL}};
        v.outputs = {{"order", I64}, {"place", I64}, {"count", I64}, {"visual", BOOL}};
    });
    add(all, "TakeTokens", {{"", "last"}}, [](Variant& v) {
        const auto kind = v.has("last") ? I64 : F32;
        v.inputs = {{"x", kind}, {"order", I64}};
        v.outputs = {{"y", kind}};
    });
    add(all, "TakeKeys", {}, [](Variant& v) {
        v.inputs = {{"mask", BOOL}, {"order", I64}, {"past", I64}};
        v.outputs = {{"y", BOOL}};
    });
    add(all, "RotaryAngles", {{"", "axes"}}, [](Variant& v) {
        v.inputs = {{"positions", I64}, {"freq", F32}};
        if (v.has("axes")) v.inputs.push_back({"axes", I64});
        v.outputs = {{"cos", F32}, {"sin", F32}};
    });
    return all;
}

}  // namespace

const std::vector<Variant>& variants() {
    static const std::vector<Variant> all = make();
    return all;
}

}  // namespace mqc_onnx
