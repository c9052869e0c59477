// What onnxruntime sees: RegisterCustomOps adds domain ai.mqc with one operator a variant.
#include <sched.h>

#include <map>
#include <mutex>

#include "call.h"
#include "registration.h"

namespace mqc_onnx {
namespace {

struct Provider {
    typedef mqc_onnx::Call Call;
    typedef mqc_onnx::Kernel Kernel;
    int threads;

    const char* name() const { return nullptr; }  // the CPU
    bool has(const Variant&) const { return true; }
    bool on_host(const Variant&, const std::string&) const { return false; }  // no other place
    Kernel* make(const Variant& variant, const Ort::ConstKernelInfo& info) const {
        const bool linear = variant.name.rfind("Linear", 0) == 0;
        return linear ? make_linear(variant, info, threads) : make_layer(variant, info);
    }
};

// Operators are shared by all sessions with one number of threads, and never freed: sessions keep
// pointers to them.
Domain<Provider>& domain_for(int threads) {
    static std::mutex lock;
    static auto& domains = *new std::map<int, std::unique_ptr<Domain<Provider>>>;
    const std::lock_guard<std::mutex> guard(lock);
    auto& domain = domains[threads];
    if (!domain) domain = std::make_unique<Domain<Provider>>(Provider{threads});
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
    return mqc_onnx::register_in(options, base, "libmqc_onnx.so", [](auto& session) {
        session.Add(mqc_onnx::domain_for(mqc_onnx::threads_of(session)).domain);
    });
}
