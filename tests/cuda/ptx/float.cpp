// Float32, and conversions between number formats. Compiled with -frounding-math: one operation rounds down.
#include "operations.h"

#include <cfenv>
#include <cmath>

namespace ptx {
namespace {

float as_float(uint32_t bits) { return from_bits<float>(bits); }
uint32_t float_bits(float value) { return static_cast<uint32_t>(to_bits(value)); }

constexpr uint32_t kNaN = 0x7FFFFFFF;  // what PTX arithmetic gives

float canonical(float value) { return std::isnan(value) ? as_float(kNaN) : value; }
float flushed(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }

float fma_down(float a, float b, float c) {
  const int before = fegetround();
  fesetround(FE_DOWNWARD);
  const volatile float x = a, y = b, z = c;
  const volatile float result = std::fma(x, y, z);
  fesetround(before);
  return result;
}

// The approximations, rounded as well as they can be: a kernel must bear 2 ulp more.
float power_of_two(float a) { return static_cast<float>(std::exp2(static_cast<double>(a))); }

uint16_t to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if (std::isnan(value)) return 0x7FFF;
  const uint32_t rest = bits & 0xFFFF, kept = bits >> 16;
  const bool up = rest > 0x8000 || (rest == 0x8000 && (kept & 1));
  return static_cast<uint16_t>(kept + up);
}

uint16_t to_half(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7FFF;
  const double magnitude = std::fabs(value);
  if (magnitude == 0.0) return sign;
  if (magnitude >= 65520.0) return sign | 0x7C00;
  int exponent = 0;
  std::frexp(magnitude, &exponent);                          // magnitude = m 2^exponent, m in [0.5, 1)
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;  // log2 of the last place
  const double steps = std::nearbyint(std::ldexp(magnitude, -unit));
  if (unit == -24) return static_cast<uint16_t>(sign | static_cast<uint32_t>(steps));  // subnormal, or just not
  // steps in [1024, 2048]
  return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(unit + 24) << 10) + static_cast<uint32_t>(steps)));
}

float from_half(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? as_float(kNaN) : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

// a b + c, to odd: what is rounded once more to a format of half as many bits is then rounded as if once.
double fma_to_odd(float a, float b, float c) {
  const double product = static_cast<double>(a) * b;  // exact
  const double sum = product + c;
  if (!std::isfinite(sum)) return sum;
  const double back = sum - product, error = (product - (sum - back)) + (c - back);
  if (error == 0.0 || to_bits(sum) & 1) return sum;
  return std::nextafter(sum, error > 0.0 ? INFINITY : -INFINITY);
}

// A double, odd in its last place where it is not exact, as bf16: float32 to odd first.
uint16_t odd_to_bf16(double value) {
  float narrow = static_cast<float>(value);
  if (std::isfinite(narrow) && narrow != value && !(float_bits(narrow) & 1))
    narrow = std::nextafter(narrow, value > narrow ? INFINITY : -INFINITY);
  return to_bf16(narrow);
}

template <bool kBf16> uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto part = [shift](uint32_t word) {
      const auto bits = static_cast<uint16_t>(word >> shift);
      return kBf16 ? as_float(uint32_t{bits} << 16) : from_half(bits);
    };
    const double exact = fma_to_odd(part(a), part(b), part(c));
    result |= uint32_t{kBf16 ? odd_to_bf16(exact) : to_half(exact)} << shift;
  }
  return result;
}

int32_t to_integer(float value) {  // towards zero; NaN gives 0, what is too large the nearest
  if (std::isnan(value)) return 0;
  if (value >= 2147483648.0f) return INT32_MAX;
  if (value < -2147483648.0f) return INT32_MIN;
  return static_cast<int32_t>(value);
}

void compare_all(Table& t) {
  const auto add = [&](const char* name, Handler run) { t["setp." + std::string(name) + ".f32"] = {"p:ff", run}; };
  const auto unordered = [](float a, float b) { return std::isnan(a) || std::isnan(b); };
  static_assert(sizeof(unordered) == 1);
  add("eq", binary<float, bool>([](float a, float b) { return a == b; }));
  add("lt", binary<float, bool>([](float a, float b) { return a < b; }));
  add("le", binary<float, bool>([](float a, float b) { return a <= b; }));
  add("gt", binary<float, bool>([](float a, float b) { return a > b; }));
  add("ge", binary<float, bool>([](float a, float b) { return a >= b; }));
  // "ne" is false for NaN: the ordered one; those that end with u are true.
  add("ne", binary<float, bool>([](float a, float b) { return a < b || a > b; }));
  add("equ", binary<float, bool>([](float a, float b) { return !(a < b || a > b); }));
  add("neu", binary<float, bool>([](float a, float b) { return !(a == b); }));
  add("ltu", binary<float, bool>([](float a, float b) { return !(a >= b); }));
  add("leu", binary<float, bool>([](float a, float b) { return !(a > b); }));
  add("gtu", binary<float, bool>([](float a, float b) { return !(a <= b); }));
  add("geu", binary<float, bool>([](float a, float b) { return !(a < b); }));
  add("nan", binary<float, bool>([](float a, float b) { return std::isnan(a) || std::isnan(b); }));
}

}  // namespace

void add_float(Table& t) {
  t["add.rn.f32"] = {"f:ff", binary<float>([](float a, float b) { return canonical(a + b); })};
  t["mul.rn.f32"] = {"f:ff", binary<float>([](float a, float b) { return canonical(a * b); })};
  // Without .rn ptxas may fuse a product into a sum; nvcc has done so where it can (a test looks).
  t["add.f32"] = t["add.rn.f32"];
  t["sub.f32"] = {"f:ff", binary<float>([](float a, float b) { return canonical(a - b); })};
  t["mul.f32"] = t["mul.rn.f32"];
  t["fma.rn.f32"] = {"f:fff", ternary<float>([](float a, float b, float c) { return canonical(std::fma(a, b, c)); })};
  t["fma.rm.f32"] = {"f:fff", ternary<float>([](float a, float b, float c) { return canonical(fma_down(a, b, c)); })};
  t["fma.rn.f16x2"] = {
      "w:www", ternary<uint32_t>([](uint32_t a, uint32_t b, uint32_t c) { return fma_pair<false>(a, b, c); })};
  t["fma.rn.bf16x2"] = {
      "w:www", ternary<uint32_t>([](uint32_t a, uint32_t b, uint32_t c) { return fma_pair<true>(a, b, c); })};
  t["div.rn.f32"] = {"f:ff", binary<float>([](float a, float b) { return canonical(a / b); })};
  t["rcp.rn.f32"] = {"f:f", unary<float>([](float a) { return canonical(1.0f / a); })};
  t["sqrt.rn.f32"] = {"f:f", unary<float>([](float a) { return canonical(std::sqrt(a)); })};
  t["rcp.approx.ftz.f32"] = {"f:f", unary<float>([](float a) { return canonical(flushed(1.0f / flushed(a))); })};
  t["ex2.approx.f32"] = {"f:f", unary<float>([](float a) { return canonical(power_of_two(a)); })};
  t["ex2.approx.ftz.f32"] = {"f:f", unary<float>([](float a) { return canonical(flushed(power_of_two(flushed(a)))); })};
  t["neg.f32"] = {"f:f", unary<uint32_t>([](uint32_t a) { return a ^ 0x80000000u; })};
  t["abs.f32"] = {"f:f", unary<uint32_t>([](uint32_t a) { return a & 0x7FFFFFFFu; })};
  // The sign of the first, the magnitude of the second.
  t["copysign.f32"] = {"f:ff",
                       binary<uint32_t>([](uint32_t a, uint32_t b) { return (a & 0x80000000u) | (b & 0x7FFFFFFFu); })};
  t["max.f32"] = {"f:ff", binary<float>([](float a, float b) {  // a number wins over NaN, +0 over -0
                    if (std::isnan(a)) return canonical(b);
                    if (std::isnan(b)) return a;
                    if (a == b) return std::signbit(a) ? b : a;
                    return a > b ? a : b;
                  })};

  t["cvt.rni.f32.f32"] = {"f:f", unary<float>([](float a) { return canonical(std::nearbyint(a)); })};
  t["cvt.sat.f32.f32"] = {"f:f", unary<float>([](float a) { return !(a > 0.0f) ? 0.0f : a > 1.0f ? 1.0f : a; })};
  t["cvt.rzi.s32.f32"] = {"w:f", convert<float, int32_t>([](float a) { return to_integer(a); })};
  t["cvt.rn.f32.s32"] = {"f:w", convert<int32_t, float>([](int32_t a) { return static_cast<float>(a); })};
  t["cvt.rn.f32.s16"] = {"f:h", convert<int16_t, float>([](int16_t a) { return static_cast<float>(a); })};
  t["cvt.rn.bf16.f32"] = {"h:f", convert<float, uint16_t>([](float a) { return to_bf16(a); })};
  t["cvt.rn.f16.f32"] = {"h:f", convert<float, uint16_t>([](float a) { return to_half(a); })};
  t["cvt.f32.f16"] = {"f:h", convert<uint16_t, float>([](uint16_t a) { return from_half(a); })};
  compare_all(t);
}

}  // namespace ptx
