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
    vi minus;
    for (int i = 0; i < kLanes; i++) minus[i] = i & D ? static_cast<int32_t>(0x80000000u) : 0;
    return swapped<D>(v) + reinterpret_cast<vf>(reinterpret_cast<vi>(v) ^ minus);
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
inline void fill(const float* r0, const float* r1, const float* r2, const float* r3, float* table) {
    for (int64_t c = 0; c < kTile; c += kLanes) {
        vf a = load(r0 + c), b = load(r1 + c), d = load(r2 + c), e = load(r3 + c);
        vf low[4] = {a + b, b - a, a - b, -(a + b)};
        vf high[4] = {d + e, e - d, d - e, -(d + e)};
        for (int s = 0; s < 16; s++) store(table + s * kTile + c, low[s & 3] + high[s >> 2]);
    }
}

// to[r] = from[r] + the sums of `count` tables that row r of the matrix looks up; from null: 0.
inline void look_up(const mqc_hadamard_plan* plan, int64_t first, int64_t count,
                    const float* tables, const float* from, float* to, int64_t stride) {
    const uint8_t* codes = plan->codes + first * plan->base;
    for (int64_t r = 0; r < plan->base; r++) {
        vf total[4];
        for (int c = 0; c < 4; c++) total[c] = from ? load(from + r * kTile + c * kLanes) : vf{};
        for (int64_t k = 0; k < count; k++) {
            const float* entry = tables + (k * 16 + codes[k * plan->base + r]) * kTile;
            for (int c = 0; c < 4; c++) total[c] += load(entry + c * kLanes);
        }
        for (int c = 0; c < 4; c++) store(to + r * stride + c * kLanes, total[c]);
    }
}

// The tile at y, its rows every `stride` values: M y in place. What the last tables need of y is
// read before they are used, so these write to y itself.
void mix_tile(const mqc_hadamard_plan* plan, float* y, int64_t stride, float* sums, float* tables,
              const float* zeros) {
    for (int64_t g = 0; g < plan->groups; g += kGroups) {
        const int64_t count = plan->groups - g < kGroups ? plan->groups - g : kGroups;
        for (int64_t k = 0; k < count; k++) {
            const float* rows[4];
            for (int64_t i = 0; i < 4; i++) {
                const int64_t r = 4 * (g + k) + i;
                rows[i] = r < plan->base ? y + r * stride : zeros;
            }
            fill(rows[0], rows[1], rows[2], rows[3], tables + k * 16 * kTile);
        }
        const bool last = g + count == plan->groups;
        look_up(plan, g, count, tables, g ? sums : nullptr, last ? y : sums,
                last ? stride : kTile);
    }
}

// y = M y over rows of `inner` values, M [base, base]; scratch: see mqc_hadamard_scratch.
void mix(const mqc_hadamard_plan* plan, float* y, float* scratch) {
    const int64_t base = plan->base, inner = plan->inner;
    float* tables = scratch;                        // [kGroups, 16, kTile]
    float* sums = tables + kGroups * 16 * kTile;    // [base, kTile]
    float* zeros = sums + base * kTile;             // [kTile]
    float* copy = zeros + kTile;                    // [base, kTile], of the last columns
    memset(zeros, 0, kTile * sizeof(float));
    int64_t column = 0;
    for (; column + kTile <= inner; column += kTile)
        mix_tile(plan, y + column, inner, sums, tables, zeros);
    if (column == inner) return;
    const size_t bytes = static_cast<size_t>(inner - column) * sizeof(float);
    memset(copy, 0, static_cast<size_t>(base * kTile) * sizeof(float));
    for (int64_t r = 0; r < base; r++) memcpy(copy + r * kTile, y + r * inner + column, bytes);
    mix_tile(plan, copy, kTile, sums, tables, zeros);
    for (int64_t r = 0; r < base; r++) memcpy(y + r * inner + column, copy + r * kTile, bytes);
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
