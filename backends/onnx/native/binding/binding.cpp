// What onnxruntime sees: RegisterCustomOps adds domain ai.mqc with one operator a variant.
#include <sched.h>

#include <map>
#include <memory>
#include <mutex>

#include "call.h"

namespace mqc_onnx {
namespace {

OrtStatusPtr failed(const char* message) {
    return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, message);
}

// Runs f; an exception becomes a status of the session.
template <class F>
OrtStatusPtr guarded(const F& f) {
    try {
        f();
        return nullptr;
    } catch (const std::exception& error) {
        return failed(error.what());
    } catch (...) {
        return failed("unknown error in ai.mqc");
    }
}

struct State {
    const Variant& variant;
    std::unique_ptr<Kernel> kernel;

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return guarded([&] {
            Call call(variant, context);
            kernel->compute(call);
        });
    }
};

struct Op : Ort::CustomOpBase<Op, State, true> {
    Op(const Variant& v, int n) : variant(v), name(v.op_type()), threads(n) {}

    const char* GetName() const { return name.c_str(); }
    size_t GetInputTypeCount() const { return variant.inputs.size(); }
    ONNXTensorElementDataType GetInputType(size_t i) const { return variant.inputs[i].type; }
    size_t GetOutputTypeCount() const { return variant.outputs.size(); }
    ONNXTensorElementDataType GetOutputType(size_t i) const { return variant.outputs[i].type; }

    OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
        return guarded([&] {
            const Ort::ConstKernelInfo node(info);
            const bool linear = variant.name.rfind("Linear", 0) == 0;
            std::unique_ptr<Kernel> made(linear ? make_linear(variant, node, threads)
                                                : make_layer(variant, node));
            *kernel = new State{variant, std::move(made)};
        });
    }

    const Variant& variant;
    std::string name;
    int threads;
};

struct Domain {
    Ort::CustomOpDomain domain{"ai.mqc"};
    std::vector<std::unique_ptr<Op>> ops;

    explicit Domain(int threads) {
        for (const Variant& variant : variants()) {
            ops.push_back(std::make_unique<Op>(variant, threads));
            domain.Add(ops.back().get());
        }
    }
};

// Operators are shared by all sessions with one number of threads, and never freed: sessions keep
// pointers to them.
Domain& domain_for(int threads) {
    static std::mutex lock;
    static auto& domains = *new std::map<int, std::unique_ptr<Domain>>;
    const std::lock_guard<std::mutex> guard(lock);
    auto& domain = domains[threads];
    if (!domain) domain = std::make_unique<Domain>(threads);
    return *domain;
}

// The session's threads: its entry "mqc.threads", for a library is not told intra_op_num_threads.
// Without the entry, the processors this process may use.
int threads_of(Ort::UnownedSessionOptions& options) {
    const std::string entry = options.GetConfigEntryOrDefault("mqc.threads", "0");
    const int threads = std::atoi(entry.c_str());
    if (threads > 0) return std::min(threads, 1024);
    cpu_set_t set;
    const bool known = sched_getaffinity(0, sizeof set, &set) == 0;
    return known ? std::max(1, CPU_COUNT(&set)) : 1;
}

}  // namespace
}  // namespace mqc_onnx

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(ORT_API_VERSION);
    if (!api) {
        const OrtApi* old = base->GetApi(1);
        return old ? old->CreateStatus(ORT_FAIL, "libmqc_onnx.so needs a newer onnxruntime")
                   : nullptr;
    }
    Ort::InitApi(api);
    return mqc_onnx::guarded([&] {
        Ort::UnownedSessionOptions session(options);
        session.Add(mqc_onnx::domain_for(mqc_onnx::threads_of(session)).domain);
    });
}
