// The fast Hadamard transform of order base * 2^k: butterflies within each row of 2^k values, then
// the base matrix over the rows.
//
// The base matrix holds +1 and -1 alone. Four of its columns meet four rows of values in only 16
// sums; these are made once and looked up for every output row, so a value costs base / 4 additions
// rather than base ("method of the four Russians").
#include "mqc_layers.h"
#include "simd/table.h"
#include "simd/vec.h"

namespace mqc::MQC_ISA {
namespace {

constexpr int64_t kTile = 4 * kLanes;  // columns at a time, at most kMaxTile
static_assert(kTile <= kMaxTile);
constexpr int64_t kGroups = kTables;  // look-up tables in the first cache at a time

// One stage inside a vector: partners at distance D (1, 2, 4, 8).
template <int D>
inline vf stage(vf v) {
    vi index, minus;
    for (int i = 0; i < kLanes; i++) {
        index[i] = i ^ D;
        minus[i] = i & D ? static_cast<int32_t>(0x80000000u) : 0;
    }
    vf partner = __builtin_shuffle(v, index);
    return partner + reinterpret_cast<vf>(reinterpret_cast<vi>(v) ^ minus);
}

inline vf within(vf v) {
    v = stage<1>(v);
    v = stage<2>(v);
#if MQC_LANES >= 8
    v = stage<4>(v);
#endif
#if MQC_LANES >= 16
    v = stage<8>(v);
#endif
    return v;
}

void butterflies_short(float* y, int64_t n, float factor) {
    for (int64_t half = 1; half < n; half *= 2)
        for (int64_t i = 0; i < n; i += 2 * half)
            for (int64_t j = i; j < i + half; j++) {
                float a = y[j], b = y[j + half];
                y[j] = a + b;
                y[j + half] = a - b;
            }
    for (int64_t i = 0; i < n; i++) y[i] *= factor;
}

// Sylvester's transform of n = 2^k values times factor.
void butterflies(const float* x, float* y, int64_t n, float factor) {
    if (n < kLanes) {
        if (x != y) memmove(y, x, static_cast<size_t>(n) * sizeof(float));
        return butterflies_short(y, n, factor);
    }
    for (int64_t i = 0; i < n; i += kLanes) store(y + i, within(load(x + i) * factor));
    int64_t half = kLanes;
    for (; 4 * half <= n; half *= 4)  // two stages at once
        for (int64_t i = 0; i < n; i += 4 * half)
            for (int64_t j = i; j < i + half; j += kLanes) {
                vf a = load(y + j), b = load(y + j + half);
                vf c = load(y + j + 2 * half), d = load(y + j + 3 * half);
                vf ab = a + b, am = a - b, cd = c + d, cm = c - d;
                store(y + j, ab + cd);
                store(y + j + half, am + cm);
                store(y + j + 2 * half, ab - cd);
                store(y + j + 3 * half, am - cm);
            }
    for (; 2 * half <= n; half *= 2)
        for (int64_t i = 0; i < n; i += 2 * half)
            for (int64_t j = i; j < i + half; j += kLanes) {
                vf a = load(y + j), b = load(y + j + half);
                store(y + j, a + b);
                store(y + j + half, a - b);
            }
}

// table[s] = +-r0 +-r1 +-r2 +-r3 for the signs s (bit set = minus), a tile of columns each.
inline void fill(const float* rows, float* table) {
    for (int64_t c = 0; c < kTile; c += kLanes) {
        vf r0 = load(rows + c), r1 = load(rows + kTile + c);
        vf r2 = load(rows + 2 * kTile + c), r3 = load(rows + 3 * kTile + c);
        vf low[4] = {r0 + r1, r1 - r0, r0 - r1, -(r0 + r1)};
        vf high[4] = {r2 + r3, r3 - r2, r2 - r3, -(r2 + r3)};
        for (int s = 0; s < 16; s++) store(table + s * kTile + c, low[s & 3] + high[s >> 2]);
    }
}

// y = M y over rows of `inner` values, M [base, base]; scratch: see mqc_hadamard_scratch.
void mix(const mqc_hadamard_plan* plan, float* y, float* scratch) {
    const int64_t base = plan->base, inner = plan->inner;
    float* rows = scratch;                             // [4 * groups, kTile]
    float* sums = rows + 4 * plan->groups * kTile;     // [base, kTile]
    float* tables = sums + base * kTile;               // [kGroups, 16, kTile]
    memset(rows + base * kTile, 0,
           static_cast<size_t>((4 * plan->groups - base) * kTile) * sizeof(float));
    for (int64_t column = 0; column < inner; column += kTile) {
        const int64_t width = inner - column < kTile ? inner - column : kTile;
        const size_t bytes = static_cast<size_t>(width) * sizeof(float);
        for (int64_t r = 0; r < base; r++) {
            if (width < kTile) memset(rows + r * kTile, 0, kTile * sizeof(float));
            memcpy(rows + r * kTile, y + r * inner + column, bytes);
        }
        for (int64_t g = 0; g < plan->groups; g += kGroups) {
            const int64_t count = plan->groups - g < kGroups ? plan->groups - g : kGroups;
            for (int64_t k = 0; k < count; k++)
                fill(rows + 4 * (g + k) * kTile, tables + k * 16 * kTile);
            for (int64_t r = 0; r < base; r++) {
                float* to = sums + r * kTile;
                vf total[4];
                for (int c = 0; c < 4; c++) total[c] = g ? load(to + c * kLanes) : vf{};
                for (int64_t k = 0; k < count; k++) {
                    const float* from =
                        tables + (k * 16 + plan->codes[(g + k) * base + r]) * kTile;
                    for (int c = 0; c < 4; c++) total[c] += load(from + c * kLanes);
                }
                for (int c = 0; c < 4; c++) store(to + c * kLanes, total[c]);
            }
        }
        for (int64_t r = 0; r < base; r++) memcpy(y + r * inner + column, sums + r * kTile, bytes);
    }
}

}  // namespace

void hadamard(const mqc_hadamard_plan* plan, const float* x, int64_t blocks, float* y,
              float* scratch) {
    const int64_t block = plan->base * plan->inner;
    for (int64_t b = 0; b < blocks; b++, x += block, y += block) {
        for (int64_t r = 0; r < plan->base; r++)
            butterflies(x + r * plan->inner, y + r * plan->inner, plan->inner, plan->factor);
        if (plan->base > 1) mix(plan, y, scratch);
    }
}

}  // namespace mqc::MQC_ISA
