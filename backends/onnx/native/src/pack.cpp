// Weights and per-channel parameters to and from the kernels' layout (C16K4, see mqc_kernels.h).
#include <string.h>

#include "linear.h"

namespace mqc {

mqc_status sizes_of(const mqc_linear_shape* shape, Sizes* out) {
    if (!shape) return MQC_BAD_POINTER;
    if (shape->layout != MQC_LAYOUT_C16K4 || (shape->bits != 4 && shape->bits != 8))
        return MQC_BAD_LAYOUT;
    if (shape->n < 1 || shape->n > kMaxSize || shape->k < 1 || shape->k > kMaxK ||
        shape->groups < 1 || shape->k % shape->groups)
        return MQC_BAD_SHAPE;
    Sizes s;
    s.n = shape->n;
    s.k = shape->k;
    s.groups = shape->groups;
    s.bits = shape->bits;
    s.group = s.k / s.groups;
    s.group_k = round_up(s.group, 8);
    s.blocks = round_up(s.n, kBlock) / kBlock;
    s.group_bytes = s.group_k * kBlock * s.bits / 8;
    s.block_bytes = s.group_bytes * s.groups;
    *out = s;
    return MQC_OK;
}

namespace {

// Byte of input i (of a group) and channel c (of a block) within the group's packed bytes.
inline int64_t place(int64_t bits, int64_t i, int64_t c) {
    const int64_t step = bits == 4 ? i / 8 : i / 4;
    return step * 64 + c * 4 + i % 4;
}

inline bool is_high(int64_t i) { return i % 8 >= 4; }

}  // namespace
}  // namespace mqc

using mqc::kBlock;
using mqc::Sizes;

int64_t mqc_linear_packed_bytes(const mqc_linear_shape* shape) {
    Sizes s;
    const mqc_status status = mqc::sizes_of(shape, &s);
    return status == MQC_OK ? s.blocks * s.block_bytes : status;
}

mqc_status mqc_linear_pack(const mqc_linear_shape* shape, const void* weight, void* packed) {
    Sizes s;
    const mqc_status status = mqc::sizes_of(shape, &s);
    if (status != MQC_OK) return status;
    if (!weight || !packed) return MQC_BAD_POINTER;
    const uint8_t* in = static_cast<const uint8_t*>(weight);
    uint8_t* out = static_cast<uint8_t*>(packed);
    memset(out, s.bits == 4 ? 0x88 : 0x80, static_cast<size_t>(s.blocks * s.block_bytes));
    const int64_t row_bytes = s.bits == 4 ? (s.k + 1) / 2 : s.k;
    for (int64_t n = 0; n < s.n; n++) {
        const uint8_t* row = in + n * row_bytes;
        uint8_t* block = out + n / kBlock * s.block_bytes;
        for (int64_t k = 0; k < s.k; k++) {
            const int64_t i = k % s.group;
            uint8_t* byte = block + k / s.group * s.group_bytes +
                            mqc::place(s.bits, i, n % kBlock);
            if (s.bits == 8) {
                *byte = row[k] ^ 0x80;
                continue;
            }
            const unsigned value = ((k % 2 ? row[k / 2] >> 4 : row[k / 2] & 15) ^ 8) & 15;
            *byte = static_cast<uint8_t>(mqc::is_high(i) ? (*byte & 0x0f) | (value << 4)
                                                         : (*byte & 0xf0) | value);
        }
    }
    return MQC_OK;
}

mqc_status mqc_linear_unpack(const mqc_linear_shape* shape, const void* packed, void* weight) {
    Sizes s;
    const mqc_status status = mqc::sizes_of(shape, &s);
    if (status != MQC_OK) return status;
    if (!weight || !packed) return MQC_BAD_POINTER;
    const uint8_t* in = static_cast<const uint8_t*>(packed);
    uint8_t* out = static_cast<uint8_t*>(weight);
    const int64_t row_bytes = s.bits == 4 ? (s.k + 1) / 2 : s.k;
    memset(out, 0, static_cast<size_t>(s.n * row_bytes));
    for (int64_t n = 0; n < s.n; n++) {
        uint8_t* row = out + n * row_bytes;
        const uint8_t* block = in + n / kBlock * s.block_bytes;
        for (int64_t k = 0; k < s.k; k++) {
            const int64_t i = k % s.group;
            const uint8_t byte =
                block[k / s.group * s.group_bytes + mqc::place(s.bits, i, n % kBlock)];
            if (s.bits == 8) {
                row[k] = byte ^ 0x80;
                continue;
            }
            const unsigned value = ((mqc::is_high(i) ? byte >> 4 : byte & 15) ^ 8) & 15;
            row[k / 2] = static_cast<uint8_t>(row[k / 2] | value << (k % 2 ? 4 : 0));
        }
    }
    return MQC_OK;
}

int64_t mqc_columns_count(int64_t n, int64_t width) {
    if (n < 1 || n > mqc::kMaxSize || width < 1 || width > mqc::kMaxK) return MQC_BAD_SHAPE;
    return mqc::round_up(n, kBlock) * width;
}

mqc_status mqc_columns_pack(int64_t n, int64_t width, const float* values, float* columns) {
    const int64_t count = mqc_columns_count(n, width);
    if (count < 0) return static_cast<mqc_status>(count);
    if (!values || !columns) return MQC_BAD_POINTER;
    memset(columns, 0, static_cast<size_t>(count) * sizeof(float));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < width; j++)
            columns[(i / kBlock * width + j) * kBlock + i % kBlock] = values[i * width + j];
    return MQC_OK;
}

const char* mqc_status_text(mqc_status status) {
    switch (status) {
        case MQC_OK: return "ok";
        case MQC_BAD_SHAPE: return "sizes are out of range or do not fit each other";
        case MQC_BAD_POINTER: return "a required pointer is null";
        case MQC_BAD_LAYOUT: return "unknown layout, bit width or instruction set";
        case MQC_NO_MEMORY: return "out of memory";
        default: return "unknown status";
    }
}
