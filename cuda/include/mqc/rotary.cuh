// Rotary embedding: of queries (in place) and keys with the write of keys and values to the cache, and
// of rows of heads alone.
#pragma once

#include "mqc/rows.cuh"
#include "mqc/vectors.cuh"

namespace mqc {

struct RotaryParams {
  void* q;  // or null
  const void* k;
  const void* v;
  const void* cos;  // [batch * tokens, rotary_dim], or null
  const void* sin;
  const int64_t* past;
  void* key_cache;
  void* value_cache;
  float* key_scale;  // int8 caches
  float* value_scale;
  int64_t capacity, q_stride, k_stride, v_stride;
  int32_t tokens, q_heads, kv_heads, head_dim, rotary_dim;
  int32_t interleaved;
};

constexpr int kRotaryWarps = 8;
constexpr int kMaxHeadDim = 256;
constexpr int kHeadValues = kMaxHeadDim / 32;  // of a lane

// Index of the value that turns with value i, and whether it enters with a minus sign.
MQC_HD constexpr int rotary_partner(int i, int rotary_dim, bool interleaved) {
  if (interleaved) return i ^ 1;
  return i < rotary_dim / 2 ? i + rotary_dim / 2 : i - rotary_dim / 2;
}
MQC_HD constexpr bool rotary_negative(int i, int rotary_dim, bool interleaved) {
  return interleaved ? (i & 1) == 0 : i < rotary_dim / 2;
}

// x cos + partner sin. With a table of the values' own type the products are rounded, as the unfused
// operators do; with a wider table only the result is.
template <class T, class Table> MQC_HD float rotate(float x, float partner, float cos, float sin) {
  if (sizeof(Table) == sizeof(T))
    return round_to<T>(add_rn(round_to<T>(mul_rn(x, cos)), round_to<T>(mul_rn(partner, sin))));
  return round_to<T>(add_rn(mul_rn(x, cos), mul_rn(partner, sin)));
}

// A head in registers: a lane holds values 32 j + lane.
template <class T> MQC_D void load_head(float (&v)[kHeadValues], const T* from, int head_dim, int lane) {
  MQC_UNROLL
  for (int j = 0; j < kHeadValues; ++j) v[j] = 32 * j + lane < head_dim ? to_float(from[32 * j + lane]) : 0.0f;
}
template <class T> MQC_D void store_head(T* to, const float (&v)[kHeadValues], int head_dim, int lane) {
  MQC_UNROLL
  for (int j = 0; j < kHeadValues; ++j)
    if (32 * j + lane < head_dim) to[32 * j + lane] = from_float<T>(v[j]);
}

// Turns a head by a row of angles. `shared`: kMaxHeadDim floats of the warp.
template <class T, class Table>
MQC_D void turn_head(float (&v)[kHeadValues], float* shared, const Table* cos, const Table* sin, int rotary_dim,
                     bool interleaved, int lane) {
  MQC_UNROLL
  for (int j = 0; j < kHeadValues; ++j) shared[32 * j + lane] = v[j];
  gpu::sync_warp();
  MQC_UNROLL
  for (int j = 0; j < kHeadValues; ++j) {
    const int i = 32 * j + lane;
    if (i >= rotary_dim) continue;
    const float other = shared[rotary_partner(i, rotary_dim, interleaved)];
    v[j] = rotate<T, Table>(v[j], rotary_negative(i, rotary_dim, interleaved) ? -other : other, to_float(cos[i]),
                            to_float(sin[i]));
  }
  gpu::sync_warp();  // before the next head overwrites this one
}

// Writes a head's values to a row of a cache.
template <class T> MQC_D void write_cache_row(T* row, float*, const float (&v)[kHeadValues], int head_dim, int lane) {
  store_head(row, v, head_dim, lane);
}
// int8: one scale a row, its largest magnitude over 127 (1 for a row of zeros).
MQC_D void write_cache_row(int8_t* row, float* scale_of_row, const float (&v)[kHeadValues], int head_dim, int lane) {
  float largest = 0.0f;
  MQC_UNROLL
  for (int j = 0; j < kHeadValues; ++j)
    if (32 * j + lane < head_dim) largest = fmaxf(largest, fabsf(v[j]));
  MQC_UNROLL
  for (int mask = 16; mask > 0; mask >>= 1) largest = fmaxf(largest, gpu::shuffle_xor(largest, mask));
  const float scale = largest > 0.0f ? div_rn(largest, 127.0f) : 1.0f;
  MQC_UNROLL
  for (int j = 0; j < kHeadValues; ++j)
    if (32 * j + lane < head_dim) row[32 * j + lane] = static_cast<int8_t>(quantize_value(v[j], scale));
  if (lane == 0) *scale_of_row = scale;
}

// Grid: batch * tokens. A warp takes a head at a time: queries, then keys, then values. Shared
// memory: a head of floats a warp.
template <class T, class Cache, class Table>
MQC_KERNEL(kRotaryWarps * 32, 2) rotary_kernel(MQC_GRID_CONSTANT RotaryParams p) {
  const int warp = gpu::thread_index() / 32, lane = gpu::thread_index() % 32;
  const int64_t number = gpu::block_x();  // of the token in the batch
  const int64_t sequence = number / p.tokens, position = *p.past + number % p.tokens;
  float* head = reinterpret_cast<float*>(gpu::shared_memory()) + warp * kMaxHeadDim;
  const int first_key = p.q != nullptr ? p.q_heads : 0, first_value = first_key + p.kv_heads;
  const auto* cos = static_cast<const Table*>(p.cos) + number * p.rotary_dim;
  const auto* sin = static_cast<const Table*>(p.sin) + number * p.rotary_dim;
  for (int item = warp; item < first_value + p.kv_heads; item += kRotaryWarps) {
    const bool is_query = item < first_key, is_value = item >= first_value;
    const int index = is_query ? item : is_value ? item - first_value : item - first_key;
    const T* from = is_query   ? static_cast<const T*>(p.q) + number * p.q_stride
                    : is_value ? static_cast<const T*>(p.v) + number * p.v_stride
                               : static_cast<const T*>(p.k) + number * p.k_stride;
    from += index * p.head_dim;
    float v[kHeadValues];
    load_head(v, from, p.head_dim, lane);
    if (p.cos != nullptr && !is_value) turn_head<T>(v, head, cos, sin, p.rotary_dim, p.interleaved, lane);
    if (is_query) {
      store_head(static_cast<T*>(p.q) + number * p.q_stride + index * p.head_dim, v, p.head_dim, lane);
    } else if (position < p.capacity) {
      const int64_t row = (sequence * p.kv_heads + index) * p.capacity + position;
      auto* cache = static_cast<Cache*>(is_value ? p.value_cache : p.key_cache) + row * p.head_dim;
      float* scales = is_value ? p.value_scale : p.key_scale;
      write_cache_row(cache, scales == nullptr ? nullptr : scales + row, v, p.head_dim, lane);
    }
  }
}

struct RotateParams {
  const void* x;
  void* y;
  const void* cos;  // [angle_rows, rotary_dim]
  const void* sin;
  int64_t x_stride, y_stride;
  int64_t angle_rows;  // rows turn by these over and over
  int32_t heads, head_dim, rotary_dim;
  int32_t interleaved;
};

// Grid: rows; a warp takes a head at a time. Shared memory as above.
template <class T, class Table> MQC_KERNEL(kRotaryWarps * 32, 2) rotate_kernel(MQC_GRID_CONSTANT RotateParams p) {
  const int warp = gpu::thread_index() / 32, lane = gpu::thread_index() % 32;
  const int64_t row = gpu::block_x(), angles = row % p.angle_rows * p.rotary_dim;
  float* shared = reinterpret_cast<float*>(gpu::shared_memory()) + warp * kMaxHeadDim;
  for (int head = warp; head < p.heads; head += kRotaryWarps) {
    float v[kHeadValues];
    load_head(v, static_cast<const T*>(p.x) + row * p.x_stride + head * p.head_dim, p.head_dim, lane);
    turn_head<T>(v, shared, static_cast<const Table*>(p.cos) + angles, static_cast<const Table*>(p.sin) + angles,
                 p.rotary_dim, p.interleaved, lane);
    store_head(static_cast<T*>(p.y) + row * p.y_stride + head * p.head_dim, v, p.head_dim, lane);
  }
}

}  // namespace mqc
