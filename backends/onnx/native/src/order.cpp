// Index arithmetic and angles: a few operations a token, the same on every instruction set.
#include "mqc_order.h"

#include <cmath>
#include <cstring>

int64_t mqc_token_order(const uint8_t* modality, int64_t tokens, int64_t* order, int64_t* place,
                        uint8_t* visual) {
    int64_t count = 0;
    for (int64_t token = 0; token < tokens; token++) count += modality[token] != 0;
    int64_t next[2] = {count, 0};  // the next row of a text token, of a visual one
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t row = next[modality[token] != 0]++;
        order[row] = token;
        place[token] = row;
        visual[token] = token < count;
    }
    return count;
}

void mqc_take_rows(const void* x, const int64_t* order, int64_t begin, int64_t end, int64_t bytes,
                   void* y) {
    const size_t size = static_cast<size_t>(bytes);
    for (int64_t row = begin; row < end; row++)
        std::memcpy(static_cast<char*>(y) + row * bytes,
                    static_cast<const char*>(x) + order[row] * bytes, size);
}

void mqc_take_keys(const uint8_t* mask, const int64_t* order, int64_t begin, int64_t end,
                   int64_t tokens, int64_t columns, int64_t past, uint8_t* y) {
    for (int64_t row = begin; row < end; row++) {
        const uint8_t* from = mask + order[row] * columns;
        uint8_t* to = y + row * columns;
        std::memcpy(to, from, static_cast<size_t>(columns));
        for (int64_t token = 0; token < tokens; token++) to[past + token] = from[past + order[token]];
    }
}

void mqc_rotary_angles(const int64_t* positions, int64_t axis_stride, const float* freq,
                       const int64_t* axes, int64_t begin, int64_t end, int64_t width,
                       int64_t distinct, float* cosine, float* sine) {
    for (int64_t token = begin; token < end; token++) {
        float* c = cosine + token * width;
        float* s = sine + token * width;
        for (int64_t i = 0; i < distinct; i++) {
            const int64_t at = axes ? axes[i] * axis_stride + token : token;
            const float angle = static_cast<float>(positions[at]) * freq[i];
            c[i] = std::cos(angle);
            s[i] = std::sin(angle);
        }
        for (int64_t i = distinct; i < width; i++) {
            c[i] = c[i - distinct];
            s[i] = s[i - distinct];
        }
    }
}
