// One call of a node of onnxruntime's graph: its inputs by name, checked, and its outputs. Shared by
// the libraries of all execution providers; knows no kernels.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "variants.h"

namespace mqc_onnx {

struct Tensor {
    const void* data = nullptr;
    std::vector<int64_t> shape;
    int64_t count = 0;  // elements

    int64_t rank() const { return static_cast<int64_t>(shape.size()); }
    int64_t last() const { return shape.empty() ? 1 : shape.back(); }
    // Rows of a tensor [..., last]; 0 where it has no elements in them.
    int64_t rows() const {
        int64_t product = 1;
        for (size_t i = 0; i + 1 < shape.size(); i++) product *= shape[i];
        return product;
    }
    template <class T>
    const T* as() const {
        return static_cast<const T*>(data);
    }
};

std::string text_of(const std::vector<int64_t>& shape);

// An input that has to be an initializer, read when the session is made.
struct Constant {
    const char* name;
    std::vector<int64_t> shape;
    const void* data = nullptr;

    Constant(const Variant& variant, const Ort::ConstKernelInfo& info, const char* input);
    void require(bool good, const char* wanted) const;
    template <class T>
    const T* as() const {
        return static_cast<const T*>(data);
    }

  private:
    std::string op_;
};

class Node {
  public:
    Node(const Variant& variant, OrtKernelContext* context) : variant_(variant), ort_(context) {}

    const Variant& variant() const { return variant_; }
    Tensor input(const char* name) const;

    // An output of this shape; its position is that of its name in the variant.
    template <class T>
    T* output(size_t index, const std::vector<int64_t>& shape) {
        return static_cast<T*>(
            ort_.GetOutput(index, shape.data(), shape.size()).GetTensorMutableRawData());
    }

    [[noreturn]] void fail(const std::string& message) const {
        throw std::runtime_error("ai.mqc::" + variant_.op_type() + ": " + message);
    }
    void require(bool good, const char* name, const Tensor& tensor, const char* wanted) const {
        if (!good)
            fail(std::string(name) + " has shape " + text_of(tensor.shape) + ", wanted " + wanted);
    }

    // Input `scale` and, by the variant's flags, `modality` (else null), whose shapes are checked
    // for x [..., n]: one scale, or two with a mask [...] or counts [batch] of x [batch, tokens, n].
    struct Scales {
        Tensor scale, modality;
        bool mask = false, count = false;
    };
    Scales scales(const char* scale, const Tensor& x) const;

  protected:
    const Variant& variant_;
    Ort::KernelContext ort_;
};

}  // namespace mqc_onnx
