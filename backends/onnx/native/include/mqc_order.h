/* The order of tokens under AIFS (visual tokens first), and rotary angles.
 *
 * Plain C, no framework, no threads; tensors are dense and row-major. Nothing is checked here.
 */
#ifndef MQC_ORDER_H
#define MQC_ORDER_H

#include <stdint.h>

#if defined(__GNUC__)
#define MQC_ORDER_API __attribute__((visibility("default")))
#else
#define MQC_ORDER_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* One sequence of `tokens` bools (1 = visual). order[row] = old place of a new row, place its
 * inverse, visual[row] = modality of a new row. Returns the number of visual tokens. */
MQC_ORDER_API int64_t mqc_token_order(const uint8_t* modality, int64_t tokens, int64_t* order,
                                      int64_t* place, uint8_t* visual);

/* Rows [begin, end) of y: y[r] = x[order[r]], rows of `bytes` bytes. */
MQC_ORDER_API void mqc_take_rows(const void* x, const int64_t* order, int64_t begin, int64_t end,
                                 int64_t bytes, void* y);

/* Rows [begin, end) of one mask [tokens, columns] in the new order: row r is row order[r], its
 * column past + t is column past + order[t], the others stay. */
MQC_ORDER_API void mqc_take_keys(const uint8_t* mask, const int64_t* order, int64_t begin,
                                 int64_t end, int64_t tokens, int64_t columns, int64_t past,
                                 uint8_t* y);

/* Tokens [begin, end): cosine[t, c] = cos(position * freq[c]) for c < width, sine alike. The
 * position is positions[axes[c] * axis_stride + t], or positions[t] where axes is null. `distinct`
 * columns are computed and repeated: freq and axes have that period. */
MQC_ORDER_API void mqc_rotary_angles(const int64_t* positions, int64_t axis_stride,
                                     const float* freq, const int64_t* axes, int64_t begin,
                                     int64_t end, int64_t width, int64_t distinct, float* cosine,
                                     float* sine);

#ifdef __cplusplus
}
#endif
#endif
