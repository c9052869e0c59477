// The op types of domain ai.mqc that the library has kernels for.
//
// An op type is a name and flags, e.g. LinearW4A8_mask_bias_split; the flags decide which inputs
// there are. The same tables in Python are in mqc/ops (OnnxForm.flags, .inputs, .outputs); a test
// compares the two.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "onnxruntime_cxx_api.h"

namespace mqc_onnx {

struct Slot {
    std::string name;
    ONNXTensorElementDataType type;
};

struct Variant {
    std::string name;  // without flags
    std::vector<std::string> flags;
    std::vector<Slot> inputs, outputs;

    std::string op_type() const {
        std::string text = name;
        for (const std::string& flag : flags) text += "_" + flag;
        return text;
    }
    bool has(const char* flag) const {
        return std::find(flags.begin(), flags.end(), flag) != flags.end();
    }
    // Position of an input, or -1.
    int find(const char* input) const {
        for (size_t i = 0; i < inputs.size(); i++)
            if (inputs[i].name == input) return static_cast<int>(i);
        return -1;
    }
};

// Every variant, once.
const std::vector<Variant>& variants();

}  // namespace mqc_onnx
