// The instruction set of the linear kernels, chosen once from what the processor and the operating
// system can do.
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "linear.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace mqc {
namespace {

#if defined(__x86_64__) || defined(__i386__)

struct Leaf {
    unsigned a = 0, b = 0, c = 0, d = 0;
    Leaf(unsigned leaf, unsigned sub) { __get_cpuid_count(leaf, sub, &a, &b, &c, &d); }
};

inline bool bit(unsigned word, int index) { return word >> index & 1; }

// Register state that the operating system saves (XCR0).
unsigned saved_state() {
    if (!bit(Leaf(1, 0).c, 27)) return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

// The sets that the build's flags for AVX2 name: AVX2, FMA, F16C, BMI 1 and 2, LZCNT.
bool has_avx2() {
    const Leaf one(1, 0), seven(7, 0), extended(0x80000001u, 0);
    return (saved_state() & 6) == 6 && bit(one.c, 12) && bit(one.c, 28) && bit(one.c, 29) &&
           bit(seven.b, 3) && bit(seven.b, 5) && bit(seven.b, 8) && bit(extended.c, 5);
}

bool has_avxvnni() { return has_avx2() && bit(Leaf(7, 1).a, 4); }

// AVX512 F, DQ, CD, BW, VL and VNNI.
bool has_avx512vnni() {
    const Leaf seven(7, 0);
    return has_avx2() && (saved_state() & 0xe6) == 0xe6 && bit(seven.b, 16) && bit(seven.b, 17) &&
           bit(seven.b, 28) && bit(seven.b, 30) && bit(seven.b, 31) && bit(seven.c, 11);
}

#ifdef MQC_BUILT_AMX
// Tiles and their int8 products; Linux gives their registers to a process that asks.
bool has_amx() {
#if defined(__linux__) && defined(__x86_64__)
    const Leaf seven(7, 0);
    if (!has_avx512vnni() || !bit(seven.d, 24) || !bit(seven.d, 25)) return false;
    if ((saved_state() & 0x60000u) != 0x60000u) return false;
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

#endif

#if defined(__aarch64__)

#if defined(__APPLE__)
bool has(const char* feature) {
    int32_t value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value;
}
#endif

#ifdef MQC_BUILT_DOTPROD
bool has_dotprod() {
#if defined(__APPLE__)
    return has("hw.optional.arm.FEAT_DotProd");
#else
    return getauxval(AT_HWCAP) >> 20 & 1;
#endif
}
#endif

#ifdef MQC_BUILT_I8MM
bool has_i8mm() {
#if defined(__APPLE__)
    return has("hw.optional.arm.FEAT_I8MM");
#else
    return getauxval(AT_HWCAP2) >> 13 & 1;
#endif
}
#endif

#endif

struct Choice {
    const LinearIsa* isa;
    bool (*usable)();
};

// Best first.
const Choice kChoices[] = {
#ifdef MQC_BUILT_AMX
    {&linear_amx, has_amx},
#endif
#ifdef MQC_BUILT_AVX512VNNI
    {&linear_avx512vnni, has_avx512vnni},
#endif
#ifdef MQC_BUILT_AVXVNNI
    {&linear_avxvnni, has_avxvnni},
#endif
#ifdef MQC_BUILT_AVX2
    {&linear_avx2, has_avx2},
#endif
#ifdef MQC_BUILT_I8MM
    {&linear_i8mm, has_i8mm},
#endif
#ifdef MQC_BUILT_DOTPROD
    {&linear_dotprod, has_dotprod},
#endif
    {&linear_portable, [] { return true; }},
};

const LinearIsa* find(const char* name) {
    for (const Choice& choice : kChoices)
        if ((!name || strcmp(name, choice.isa->name) == 0) && choice.usable()) return choice.isa;
    return nullptr;
}

std::atomic<const LinearIsa*> chosen{nullptr};

}  // namespace

const LinearIsa& linear_isa() {
    const LinearIsa* isa = chosen.load(std::memory_order_acquire);
    if (!isa) {
        const char* name = getenv("MQC_ISA");
        isa = name && *name ? find(name) : nullptr;
        if (!isa) isa = find(nullptr);
        chosen.store(isa, std::memory_order_release);
    }
    return *isa;
}

}  // namespace mqc

const char* mqc_isa(void) { return mqc::linear_isa().name; }

int32_t mqc_isa_supported(const char* name) { return name && mqc::find(name) ? 1 : 0; }

mqc_status mqc_set_isa(const char* name) {
    const mqc::LinearIsa* isa = name ? mqc::find(name) : nullptr;
    if (!isa) return MQC_BAD_LAYOUT;
    mqc::chosen.store(isa, std::memory_order_release);
    return MQC_OK;
}
