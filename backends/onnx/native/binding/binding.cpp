// What onnxruntime sees: RegisterCustomOps adds domain ai.mqc with one operator a variant.
#include <sched.h>

#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <set>

#include "call.h"
#include "registration.h"

namespace mqc_onnx {
namespace {

struct Provider {
    typedef mqc_onnx::Call Call;
    typedef mqc_onnx::Kernel Kernel;
    int threads;
    std::set<std::string> wanted;  // op types to register; empty for all

    const char* name() const { return nullptr; }  // the CPU
    bool has(const Variant& v) const { return wanted.empty() || wanted.count(v.op_type()); }
    bool on_host(const Variant&, const std::string&) const { return false; }  // no other place
    Kernel* make(const Variant& variant, const Ort::ConstKernelInfo& info) const {
        const bool linear = variant.name.rfind("Linear", 0) == 0;
        return linear ? make_linear(variant, info, threads) : make_layer(variant, info);
    }
};

// Operators are shared by all sessions with one number of threads and the same operators, and never
// freed: sessions keep pointers to them.
Domain<Provider>& domain_for(int threads, const std::set<std::string>& wanted) {
    static std::mutex lock;
    static auto& domains =
        *new std::map<std::pair<int, std::set<std::string>>, std::unique_ptr<Domain<Provider>>>;
    const std::lock_guard<std::mutex> guard(lock);
    auto& domain = domains[{threads, wanted}];
    if (!domain) domain = std::make_unique<Domain<Provider>>(Provider{threads, wanted});
    return *domain;
}

// Op types that the session's model may hold, where its entry "mqc.model" names the model's file:
// onnxruntime keeps a schema of every operator registered, 16 MB a session for all. Names are looked
// for in the file's bytes, so one that is part of another may be there for nothing.
std::set<std::string> wanted_of(Ort::UnownedSessionOptions& options) {
    std::set<std::string> wanted;
    std::ifstream file(options.GetConfigEntryOrDefault("mqc.model", ""), std::ios::binary);
    if (!file) return wanted;
    const std::string bytes((std::istreambuf_iterator<char>(file)), {});
    for (const Variant& variant : variants()) {
        const std::string type = variant.op_type();
        if (bytes.find(type) != std::string::npos) wanted.insert(type);
    }
    if (wanted.empty()) wanted.insert(variants()[0].op_type());  // a domain without operators is none
    return wanted;
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
        const auto wanted = mqc_onnx::wanted_of(session);
        session.Add(mqc_onnx::domain_for(mqc_onnx::threads_of(session), wanted).domain);
    });
}
