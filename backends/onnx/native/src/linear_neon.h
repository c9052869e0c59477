// The vector type of Arm: 128 bits, with sdot.
#pragma once

#include <arm_neon.h>

#include "linear_tile.h"

namespace {

// sdot multiplies signed bytes alone. Nibbles (0..15) are that already; 8-bit weights have their
// sign put back, so that nothing remains to be corrected for them.
struct Neon {
    using Int = int32x4_t;
    using Float = float32x4_t;
    using Bytes = uint8x16_t;
    using Input = int8x16_t;
    static constexpr int lanes = 4;
    static constexpr int latency = 8;  // 4 cycles, 2 a cycle

    static Bytes load(const uint8_t* p) { return vld1q_u8(p); }
    static void store(uint8_t* p, Bytes v) { vst1q_u8(p, v); }
    static Bytes low(Bytes v) { return vandq_u8(v, vdupq_n_u8(15)); }
    static Bytes high(Bytes v) { return vshrq_n_u8(v, 4); }
    static Input spread(const int8_t* p) {
        int32_t four;
        memcpy(&four, p, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(four));
    }
    template <Form form>
    static Int dot(Int sum, Bytes w, Input x) {
        const Bytes weights = form == kBytes ? veorq_u8(w, vdupq_n_u8(0x80)) : w;
        return vdotq_s32(sum, vreinterpretq_s8_u8(weights), x);
    }
    static Int spread_int(int32_t v) { return vdupq_n_s32(v); }
    static Int add(Int a, Int b) { return vaddq_s32(a, b); }
    static Float to_float(Int v) { return vcvtq_f32_s32(v); }
    static Float load_float(const float* p) { return vld1q_f32(p); }
    static void store_float(float* p, Float v) { vst1q_f32(p, v); }
    static Float spread_float(float v) { return vdupq_n_f32(v); }
    static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
    static Float add(Float a, Float b) { return vaddq_f32(a, b); }
};

}  // namespace
