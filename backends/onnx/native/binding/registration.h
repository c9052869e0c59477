// What onnxruntime sees: domain ai.mqc with one operator a variant, computed by a provider's kernels.
//
// A Provider has types Call (a Node) and Kernel (with `void compute(Call&) const`), and functions
//   name()            the execution provider, null for the CPU
//   has(variant)      whether there is a kernel for it
//   on_host(variant, input)   whether kernels read the input of that name on the host
//   make(variant, info)   a new Kernel; throws where constants or attributes are wrong
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "variants.h"

namespace mqc_onnx {

// Runs f; an exception becomes a status of the session.
template <class F>
OrtStatusPtr guarded(const F& f) {
    const auto failed = [](const char* message) {
        return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, message);
    };
    try {
        f();
        return nullptr;
    } catch (const std::exception& error) {
        return failed(error.what());
    } catch (...) {
        return failed("unknown error in ai.mqc");
    }
}

template <class Provider>
struct State {
    const Variant& variant;
    std::unique_ptr<typename Provider::Kernel> kernel;

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return guarded([&] {
            typename Provider::Call call(variant, context);
            kernel->compute(call);
        });
    }
};

template <class Provider>
struct Op : Ort::CustomOpBase<Op<Provider>, State<Provider>, true> {
    Op(const Variant& v, const Provider& p) : variant(v), name(v.op_type()), provider(p) {}

    const char* GetName() const { return name.c_str(); }
    const char* GetExecutionProviderType() const { return provider.name(); }
    size_t GetInputTypeCount() const { return variant.inputs.size(); }
    ONNXTensorElementDataType GetInputType(size_t i) const { return variant.inputs[i].type; }
    OrtMemType GetInputMemoryType(size_t i) const {
        return provider.on_host(variant, variant.inputs[i].name) ? OrtMemTypeCPUInput : OrtMemTypeDefault;
    }
    size_t GetOutputTypeCount() const { return variant.outputs.size(); }
    ONNXTensorElementDataType GetOutputType(size_t i) const { return variant.outputs[i].type; }

    OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
        return guarded([&] {
            const Ort::ConstKernelInfo node(info);
            std::unique_ptr<typename Provider::Kernel> made(provider.make(variant, node));
            *kernel = new State<Provider>{variant, std::move(made)};
        });
    }

    const Variant& variant;
    std::string name;
    const Provider& provider;
};

template <class Provider>
struct Domain {
    Provider provider;
    Ort::CustomOpDomain domain{"ai.mqc"};
    std::vector<std::unique_ptr<Op<Provider>>> ops;

    explicit Domain(const Provider& p) : provider(p) {
        for (const Variant& variant : variants()) {
            if (!provider.has(variant)) continue;
            ops.push_back(std::make_unique<Op<Provider>>(variant, provider));
            domain.Add(ops.back().get());
        }
    }
};

// The body of RegisterCustomOps: f(session options).
template <class F>
OrtStatus* register_in(OrtSessionOptions* options, const OrtApiBase* base, const char* library,
                       const F& f) {
    const OrtApi* api = base->GetApi(ORT_API_VERSION);
    if (!api) {
        const OrtApi* old = base->GetApi(1);
        const std::string message = std::string(library) + " needs a newer onnxruntime";
        return old ? old->CreateStatus(ORT_FAIL, message.c_str()) : nullptr;
    }
    Ort::InitApi(api);
    return guarded([&] {
        Ort::UnownedSessionOptions session(options);
        f(session);
    });
}

}  // namespace mqc_onnx
