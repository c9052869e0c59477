// Linear tiles in plain C++: every processor.
#include "linear_tile.h"

namespace {

struct Plain {
    static constexpr int lanes = 16;
    static constexpr int latency = 0;
    struct Int {
        int32_t at[lanes];
    };
    struct Float {
        float at[lanes];
    };
    struct Bytes {
        uint8_t at[4 * lanes];
    };
    struct Input {
        int8_t at[4];
    };

    template <class T, class P>
    static T copy(const P* p) {
        T v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    template <class T, class F>
    static T each(F f) {
        T v;
        for (int i = 0; i < static_cast<int>(sizeof v.at / sizeof v.at[0]); i++) v.at[i] = f(i);
        return v;
    }
    static Bytes load(const uint8_t* p) { return copy<Bytes>(p); }
    static void store(uint8_t* p, const Bytes& v) { memcpy(p, &v, sizeof v); }
    static Bytes low(const Bytes& v) {
        return each<Bytes>([&](int i) { return static_cast<uint8_t>(v.at[i] & 15); });
    }
    static Bytes high(const Bytes& v) {
        return each<Bytes>([&](int i) { return static_cast<uint8_t>(v.at[i] >> 4); });
    }
    static Input spread(const int8_t* p) { return copy<Input>(p); }
    template <Form>
    static Int dot(const Int& sum, const Bytes& w, const Input& x) {
        return each<Int>([&](int i) {
            const uint8_t* four = w.at + 4 * i;
            return sum.at[i] + four[0] * x.at[0] + four[1] * x.at[1] + four[2] * x.at[2] +
                   four[3] * x.at[3];
        });
    }
    static Int spread_int(int32_t value) {
        return each<Int>([&](int) { return value; });
    }
    static Int add(const Int& a, const Int& b) {
        return each<Int>([&](int i) { return a.at[i] + b.at[i]; });
    }
    static Float to_float(const Int& v) {
        return each<Float>([&](int i) { return static_cast<float>(v.at[i]); });
    }
    static Float load_float(const float* p) { return copy<Float>(p); }
    static void store_float(float* p, const Float& v) { memcpy(p, &v, sizeof v); }
    static Float spread_float(float value) {
        return each<Float>([&](int) { return value; });
    }
    static Float mul(const Float& a, const Float& b) {
        return each<Float>([&](int i) { return a.at[i] * b.at[i]; });
    }
    static Float add(const Float& a, const Float& b) {
        return each<Float>([&](int i) { return a.at[i] + b.at[i]; });
    }
};

constexpr int kRows = 4, kPanel = 1;

void tile(Form form, const Tile& t) {
    if (form == kNibbles && t.keep)
        tile(kSmall, unpack<Plain, kPanel>(t));
    else if (form == kNibbles)
        tile_rows<Plain, kPanel, kNibbles, kRows>(t);
    else
        tile_rows<Plain, kPanel, kBytes, kRows>(t);
}

}  // namespace

namespace mqc {
const LinearIsa linear_portable = {"portable", kRows, kPanel, 8, false, pack_rows_interleaved,
                                   tile, nullptr, 0, nullptr, nullptr};
}
