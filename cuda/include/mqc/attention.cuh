// Attention of a few query tokens over the cache, split along the keys (flash decoding).
//
// The query heads that share a key head, times the query tokens, are the rows of one product: 16 a
// block. A block walks its range of keys, 64 at a time; each of its four warps takes 16 of them and
// keeps its own running maximum, sum and output, so that warps meet only at the end. The blocks of a
// row tile leave their parts in the workspace, and the last to arrive merges them.
#pragma once

#include "mqc/rows.cuh"
#include "mqc/vectors.cuh"

namespace mqc {

struct AttentionParams {
  const void* q;
  const void* key_cache;
  const void* value_cache;
  const float* key_scale;  // int8 caches
  const float* value_scale;
  const uint8_t* mask;     // or null: causal
  const int64_t* past;
  void* out;
  float* partial;          // [tile][split][16 maxima, 16 sums, 16 x head_dim outputs]
  uint32_t* counters;      // [tile]
  int64_t capacity, q_stride, out_stride, mask_stride;
  float scale;             // times log2(e): exponentials are powers of two
  int32_t tokens, q_heads, kv_heads, head_dim;
  int32_t splits;
};

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
constexpr int kAttentionRows = 16;
constexpr int kAttentionKeys = 64;  // of a step
constexpr float kMinusInfinity = -3.4e38f;  // below every score; differences of it stay finite

// Row of the product -> query token and head. Rows of one token follow each other.
struct AttentionRow {
  int token, head;
  bool inside;
};
MQC_HD AttentionRow attention_row(int row, int tokens, int q_heads, int kv_heads, int kv_head) {
  const int group = q_heads / kv_heads;
  return AttentionRow{row / group, kv_head * group + row % group, row < tokens * group};
}

// Keys [begin, end) of a split: whole steps, as even as they go.
MQC_HD void attention_range(int keys, int split, int splits, int& begin, int& end) {
  const int steps = static_cast<int>(ceil_div(keys, kAttentionKeys));
  begin = static_cast<int>(static_cast<int64_t>(steps) * split / splits) * kAttentionKeys;
  end = static_cast<int>(static_cast<int64_t>(steps) * (split + 1) / splits) * kAttentionKeys;
  if (end > keys) end = keys;
}

MQC_HD bool may_attend(const AttentionParams& p, int sequence, int token, int key, int past) {
  if (p.mask == nullptr) return key <= past + token;
  return p.mask[(static_cast<int64_t>(sequence) * p.tokens + token) * p.mask_stride + key] != 0;
}

// Factor that brings a sum taken under maximum `from` to maximum `to` >= from.
MQC_HD float rescale(float from, float to) { return from == kMinusInfinity ? 0.0f : exp2f(from - to); }

template <class T, class Cache, int kDim> struct AttentionShape {
  static constexpr bool kWide = sizeof(Cache) == sizeof(T);  // the cache can be multiplied as it is
  static constexpr int kPitch = kDim + 8;                    // values a row in shared memory: no bank conflicts
  static constexpr int kTileBytes = kAttentionKeys * kPitch * 2;
  static constexpr int kRawBytes = kAttentionKeys * kDim * static_cast<int>(sizeof(Cache));
  // Half caches: two stages of keys and values. int8: one converted pair, two raw stages.
  static constexpr int kStageBytes = kWide ? 2 * kTileBytes : 2 * kRawBytes;
  static constexpr int kRaw = kWide ? 0 : 2 * kTileBytes;  // offset of the stages
  static constexpr int kMergeBytes = kAttentionWarps * kAttentionRows * (kDim + 2) * 4;
  static constexpr int kLoadBytes = kRaw + 2 * kStageBytes;
  static constexpr int kSharedBytes = (kLoadBytes > kMergeBytes ? kLoadBytes : kMergeBytes) + 16;
};

// Starts the copies of keys `first`.. and their values to a stage; rows from `end` on are zeros.
template <class T, class Cache, int kDim>
MQC_D void attention_load(const Cache* keys, const Cache* values, uint32_t stage, int first, int end, int thread) {
  using Shape = AttentionShape<T, Cache, kDim>;
  constexpr int kChunks = kDim * static_cast<int>(sizeof(Cache)) / 16;  // of a row
  constexpr int kRowBytes = Shape::kWide ? Shape::kPitch * 2 : kDim;
  for (int index = thread; index < kAttentionKeys * kChunks; index += kAttentionThreads) {
    const int key = index / kChunks, chunk = index % kChunks;
    const bool valid = first + key < end;
    const int64_t from = valid ? static_cast<int64_t>(first + key) * kDim + chunk * (16 / static_cast<int>(sizeof(Cache))) : 0;
    const uint32_t to = stage + key * kRowBytes + chunk * 16;
    gpu::copy_async16(to, keys + from, valid);
    gpu::copy_async16(to + Shape::kStageBytes / 2, values + from, valid);
  }
}

// int8 rows of a raw stage -> T rows; integers up to 127 are exact in T.
template <class T, int kDim> MQC_D void attention_convert(const int8_t* raw, T* tile, int thread) {
  constexpr int kPitch = AttentionShape<T, int8_t, kDim>::kPitch;
  for (int index = thread; index < 2 * kAttentionKeys * kDim / 16; index += kAttentionThreads) {
    const int row = index / (kDim / 16), column = index % (kDim / 16) * 16;  // rows: keys, then values
    union {
      gpu::Vector16 vector;
      int8_t value[16];
    } in;
    in.vector = *reinterpret_cast<const gpu::Vector16*>(raw + row * kDim + column);
    T* to = tile + row * kPitch + column;
    MQC_UNROLL
    for (int half = 0; half < 2; ++half) {
      union {
        gpu::Vector16 vector;
        T value[8];
      } out;
      MQC_UNROLL
      for (int i = 0; i < 8; ++i) out.value[i] = from_float<T>(static_cast<float>(in.value[8 * half + i]));
      *reinterpret_cast<gpu::Vector16*>(to + 8 * half) = out.vector;
    }
  }
}

template <class T> MQC_D uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

// Running softmax of a warp: rows lane / 4 and lane / 4 + 8. `sum` is this lane's share.
template <int kDim> struct AttentionState {
  float largest[2] = {kMinusInfinity, kMinusInfinity};
  float sum[2] = {0.0f, 0.0f};
  float out[kDim / 8][4] = {};
};

// One step of a warp: its 16 keys of the tiles at `keys` and `values` (shared-memory addresses).
//   q: A fragments of the rows; key: index of the warp's first key in the cache
template <class T, class Cache, int kDim>
MQC_D void attention_step(const AttentionParams& p, AttentionState<kDim>& state, const uint32_t (&q)[kDim / 16][4],
                          uint32_t keys, uint32_t values, const AttentionRow (&rows)[2], int sequence, int key,
                          int end, int past, const float* key_scale, const float* value_scale, int lane) {
  using Shape = AttentionShape<T, Cache, kDim>;
  bool allowed[2][2][2];  // by block of 8 keys, row, column parity
  bool any = false;
  MQC_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int block = i / 4, half = i / 2 % 2, at = key + 8 * block + 2 * (lane % 4) + i % 2;
    const bool here = at < end && rows[half].inside && may_attend(p, sequence, rows[half].token, at, past);
    allowed[block][half][i % 2] = here;
    any = any || here;
  }
  if (!gpu::any_lane(any)) return;  // nothing to attend to: the state stays as it is
  float scores[2][4] = {};
  MQC_UNROLL
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t b[4];  // keys 0..7: two registers, keys 8..15: two
    const int row = lane % 8 + 8 * (lane / 16), column = 16 * step + 8 * (lane / 8 % 2);
    gpu::load_matrix4(b, keys + (row * Shape::kPitch + column) * 2);
    gpu::mma_half<T>(scores[0], q[step], b[0], b[1]);
    gpu::mma_half<T>(scores[1], q[step], b[2], b[3]);
  }
  float weight_of_value[2][2];  // by block of 8 keys and column parity
  MQC_UNROLL
  for (int block = 0; block < 2; ++block) {
    MQC_UNROLL
    for (int parity = 0; parity < 2; ++parity) {
      const int at = key + 8 * block + 2 * (lane % 4) + parity;
      const bool inside = at < end;
      float factor = p.scale;
      weight_of_value[block][parity] = 1.0f;
      if constexpr (!Shape::kWide) {
        factor *= inside ? key_scale[at] : 0.0f;
        weight_of_value[block][parity] = inside ? value_scale[at] : 0.0f;
      }
      MQC_UNROLL
      for (int half = 0; half < 2; ++half) {
        float& score = scores[block][2 * half + parity];
        score = allowed[block][half][parity] ? score * factor : kMinusInfinity;
      }
    }
  }
  MQC_UNROLL
  for (int half = 0; half < 2; ++half) {
    float largest = state.largest[half];
    MQC_UNROLL
    for (int block = 0; block < 2; ++block)
      largest = fmaxf(largest, fmaxf(scores[block][2 * half], scores[block][2 * half + 1]));
    largest = fmaxf(largest, gpu::shuffle_xor(largest, 1));
    largest = fmaxf(largest, gpu::shuffle_xor(largest, 2));
    const float factor = rescale(state.largest[half], largest);
    state.largest[half] = largest;
    state.sum[half] *= factor;
    MQC_UNROLL
    for (int block = 0; block < 2; ++block) {
      MQC_UNROLL
      for (int parity = 0; parity < 2; ++parity) {
        float& score = scores[block][2 * half + parity];
        const float weight = score == kMinusInfinity ? 0.0f : exp2f(score - largest);
        state.sum[half] += weight;
        score = weight * weight_of_value[block][parity];
      }
    }
    MQC_UNROLL
    for (int d = 0; d < kDim / 8; ++d) {
      state.out[d][2 * half] *= factor;
      state.out[d][2 * half + 1] *= factor;
    }
  }
  const uint32_t weights[4] = {pack_pair<T>(scores[0][0], scores[0][1]), pack_pair<T>(scores[0][2], scores[0][3]),
                               pack_pair<T>(scores[1][0], scores[1][1]), pack_pair<T>(scores[1][2], scores[1][3])};
  MQC_UNROLL
  for (int d = 0; d < kDim / 16; ++d) {
    uint32_t b[4];  // values of columns 16 d..: two registers, of 16 d + 8..: two
    const int row = lane % 8 + 8 * (lane / 8 % 2), column = 16 * d + 8 * (lane / 16);
    gpu::load_matrix4_transposed(b, values + (row * Shape::kPitch + column) * 2);
    gpu::mma_half<T>(state.out[2 * d], weights, b[0], b[1]);
    gpu::mma_half<T>(state.out[2 * d + 1], weights, b[2], b[3]);
  }
}

// A part of a row tile: 16 maxima, 16 sums, 16 x kDim outputs that are not yet divided by the sums.
template <int kDim> constexpr int kPartFloats = kAttentionRows * (kDim + 2);

// Leaves a warp's state as a part in shared memory.
template <int kDim> MQC_D void attention_leave(AttentionState<kDim>& state, float* part, int lane) {
  MQC_UNROLL
  for (int half = 0; half < 2; ++half) {
    float sum = state.sum[half];
    sum += gpu::shuffle_xor(sum, 1);
    sum += gpu::shuffle_xor(sum, 2);
    const int row = lane / 4 + 8 * half;
    if (lane % 4 == 0) {
      part[row] = state.largest[half];
      part[kAttentionRows + row] = sum;
    }
    float* out = part + 2 * kAttentionRows + row * kDim;
    MQC_UNROLL
    for (int d = 0; d < kDim / 8; ++d) {
      out[8 * d + 2 * (lane % 4)] = state.out[d][2 * half];
      out[8 * d + 2 * (lane % 4) + 1] = state.out[d][2 * half + 1];
    }
  }
}

// Merges `count` parts, `pitch` floats apart; `write(row, column, output, largest, sum)` gets each value.
template <int kDim, class Load, class Write>
MQC_D void attention_merge(const float* parts, int count, int64_t pitch, int rows, int thread, Load load, Write write) {
  for (int index = thread; index < rows * kDim; index += kAttentionThreads) {
    const int row = index / kDim, column = index % kDim;
    float largest = kMinusInfinity;
    for (int part = 0; part < count; ++part) largest = fmaxf(largest, load(parts + part * pitch + row));
    float sum = 0.0f, out = 0.0f;
    for (int part = 0; part < count; ++part) {
      const float* at = parts + part * pitch;
      const float factor = rescale(load(at + row), largest);
      sum = fma_rn(factor, load(at + kAttentionRows + row), sum);
      out = fma_rn(factor, load(at + 2 * kAttentionRows + row * kDim + column), out);
    }
    write(row, column, out, largest, sum);
  }
}

// Grid: (splits * row tiles, kv_heads, batch).
template <class T, class Cache, int kDim>
MQC_KERNEL(kAttentionThreads, 2) attention_kernel(MQC_GRID_CONSTANT AttentionParams p) {
  using Shape = AttentionShape<T, Cache, kDim>;
  const int thread = gpu::thread_index(), warp = thread / 32, lane = thread % 32;
  const int split = gpu::block_x() % p.splits, tile = gpu::block_x() / p.splits;
  const int kv_head = gpu::block_y(), sequence = gpu::block_z();
  const int past = static_cast<int>(*p.past), group = p.q_heads / p.kv_heads;
  int keys = past + p.tokens;
  if (keys > p.capacity) keys = static_cast<int>(p.capacity);
  if (p.mask == nullptr) {  // causal: no row of the tile attends past its last token
    const int last = (tile * kAttentionRows + kAttentionRows - 1) / group;
    if (last < p.tokens && keys > past + last + 1) keys = past + last + 1;
  }
  int begin, end;
  attention_range(keys, split, p.splits, begin, end);

  const int64_t head_row = (static_cast<int64_t>(sequence) * p.kv_heads + kv_head) * p.capacity;
  const auto* key_rows = static_cast<const Cache*>(p.key_cache) + head_row * kDim;
  const auto* value_rows = static_cast<const Cache*>(p.value_cache) + head_row * kDim;
  const float* key_scale = Shape::kWide ? nullptr : p.key_scale + head_row;
  const float* value_scale = Shape::kWide ? nullptr : p.value_scale + head_row;

  AttentionRow rows[2];
  uint32_t q[kDim / 16][4];
  MQC_UNROLL
  for (int half = 0; half < 2; ++half) {
    rows[half] = attention_row(tile * kAttentionRows + lane / 4 + 8 * half, p.tokens, p.q_heads, p.kv_heads, kv_head);
    const int64_t token = static_cast<int64_t>(sequence) * p.tokens + rows[half].token;
    const T* from = static_cast<const T*>(p.q) + token * p.q_stride + rows[half].head * kDim + 2 * (lane % 4);
    MQC_UNROLL
    for (int step = 0; step < kDim / 16; ++step) {
      MQC_UNROLL
      for (int right = 0; right < 2; ++right)
        q[step][2 * right + half] =
            rows[half].inside ? *reinterpret_cast<const uint32_t*>(from + 16 * step + 8 * right) : 0u;
    }
  }

  uint8_t* shared = gpu::shared_memory();
  const uint32_t base = gpu::shared_address(shared);
  AttentionState<kDim> state;
  const int steps = end > begin ? static_cast<int>(ceil_div(end - begin, kAttentionKeys)) : 0;
  if (steps > 0)
    attention_load<T, Cache, kDim>(key_rows, value_rows, base + Shape::kRaw, begin, end, thread);
  gpu::copy_async_commit();
  for (int step = 0; step < steps; ++step) {
    const int first = begin + step * kAttentionKeys;
    if (step + 1 < steps)
      attention_load<T, Cache, kDim>(key_rows, value_rows, base + Shape::kRaw + (step + 1) % 2 * Shape::kStageBytes,
                                     first + kAttentionKeys, end, thread);
    gpu::copy_async_commit();
    gpu::copy_async_wait<1>();
    gpu::sync_block();  // this step's rows are there for all
    uint32_t tiles = base + step % 2 * Shape::kStageBytes;
    if constexpr (!Shape::kWide) {
      attention_convert<T, kDim>(reinterpret_cast<const int8_t*>(shared + Shape::kRaw + step % 2 * Shape::kStageBytes),
                                 reinterpret_cast<T*>(shared), thread);
      gpu::sync_block();
      tiles = base;
    }
    const uint32_t mine = tiles + 16 * warp * Shape::kPitch * 2;
    attention_step<T, Cache, kDim>(p, state, q, mine, mine + Shape::kTileBytes, rows, sequence, first + 16 * warp, end,
                                   past, key_scale, value_scale, lane);
    gpu::sync_block();  // nobody reads what the next copies and conversions overwrite
  }
  gpu::copy_async_wait<0>();

  auto* parts = reinterpret_cast<float*>(shared);
  attention_leave<kDim>(state, parts + warp * kPartFloats<kDim>, lane);
  gpu::sync_block();
  const int left = p.tokens * group - tile * kAttentionRows;
  const int count = left < kAttentionRows ? left : kAttentionRows;
  const auto write_out = [&](int row, int column, float out, float, float sum) {
    const AttentionRow at = attention_row(tile * kAttentionRows + row, p.tokens, p.q_heads, p.kv_heads, kv_head);
    const int64_t token = static_cast<int64_t>(sequence) * p.tokens + at.token;
    static_cast<T*>(p.out)[token * p.out_stride + at.head * kDim + column] =
        from_float<T>(sum > 0.0f ? div_rn(out, sum) : 0.0f);
  };
  const auto plain = [](const float* from) { return *from; };
  if (p.splits == 1) {
    attention_merge<kDim>(parts, kAttentionWarps, kPartFloats<kDim>, count, thread, plain, write_out);
    return;
  }
  const int tiles = gpu::blocks_x() / p.splits;
  const int number = (sequence * p.kv_heads + kv_head) * tiles + tile;
  float* all = p.partial + static_cast<int64_t>(number) * p.splits * kPartFloats<kDim>;
  float* mine = all + split * kPartFloats<kDim>;
  const auto write_part = [&](int row, int column, float out, float largest, float sum) {
    if (column == 0) {
      gpu::store_l2(mine + row, largest);
      gpu::store_l2(mine + kAttentionRows + row, sum);
    }
    gpu::store_l2(mine + 2 * kAttentionRows + row * kDim + column, out);
  };
  attention_merge<kDim>(parts, kAttentionWarps, kPartFloats<kDim>, count, thread, plain, write_part);
  gpu::fence_device();  // the part before the count
  gpu::sync_block();
  auto* flag = reinterpret_cast<uint32_t*>(shared + Shape::kSharedBytes - 16);
  if (thread == 0) {
    const uint32_t before = gpu::atomic_add(p.counters + number, 1u);
    *flag = before + 1 == static_cast<uint32_t>(p.splits) ? 1u : 0u;
    if (*flag) p.counters[number] = 0;
  }
  gpu::sync_block();
  if (*flag == 0) return;
  gpu::fence_device();  // the count before the others' parts
  const auto through_l2 = [](const float* from) { return gpu::load_l2(from); };
  attention_merge<kDim>(all, p.splits, kPartFloats<kDim>, count, thread, through_l2, write_out);
}

template <class Cache> MQC_D float cache_value(Cache value) {
  if constexpr (sizeof(Cache) == 1) return static_cast<float>(value);
  else return to_float(value);
}

// Any head size up to 256 and any type, without tensor cores: a block a query row and head.
// Each warp takes every fourth key. Grid: (q_heads, tokens, batch).
template <class T, class Cache>
MQC_KERNEL(kAttentionThreads, 2) attention_plain_kernel(MQC_GRID_CONSTANT AttentionParams p) {
  constexpr int kMaxValues = 8;  // of a lane: head sizes up to 256
  const int thread = gpu::thread_index(), warp = thread / 32, lane = thread % 32;
  const int head = gpu::block_x(), token = gpu::block_y(), sequence = gpu::block_z();
  const int past = static_cast<int>(*p.past), kv_head = head / (p.q_heads / p.kv_heads);
  int keys = past + p.tokens;
  if (keys > p.capacity) keys = static_cast<int>(p.capacity);
  const int64_t head_row = (static_cast<int64_t>(sequence) * p.kv_heads + kv_head) * p.capacity;
  const auto* key_rows = static_cast<const Cache*>(p.key_cache) + head_row * p.head_dim;
  const auto* value_rows = static_cast<const Cache*>(p.value_cache) + head_row * p.head_dim;
  const int64_t row = static_cast<int64_t>(sequence) * p.tokens + token;
  const T* from = static_cast<const T*>(p.q) + row * p.q_stride + static_cast<int64_t>(head) * p.head_dim;
  float q[kMaxValues] = {}, out[kMaxValues] = {};
  MQC_UNROLL
  for (int j = 0; j < kMaxValues; ++j)
    if (32 * j + lane < p.head_dim) q[j] = to_float(from[32 * j + lane]);
  float largest = kMinusInfinity, sum = 0.0f;
  for (int key = warp; key < keys; key += kAttentionWarps) {
    if (!may_attend(p, sequence, token, key, past)) continue;  // the same for all lanes
    const int64_t at = static_cast<int64_t>(key) * p.head_dim;
    float score = 0.0f;
    MQC_UNROLL
    for (int j = 0; j < kMaxValues; ++j)
      if (32 * j + lane < p.head_dim) score = fma_rn(q[j], cache_value(key_rows[at + 32 * j + lane]), score);
    score = warp_sum(score) * p.scale;
    if (sizeof(Cache) == 1) score *= p.key_scale[head_row + key];
    const float now = fmaxf(largest, score), factor = rescale(largest, now);
    const float weight = exp2f(score - now);
    largest = now;
    sum = fma_rn(sum, factor, weight);
    const float of_value = sizeof(Cache) == 1 ? weight * p.value_scale[head_row + key] : weight;
    MQC_UNROLL
    for (int j = 0; j < kMaxValues; ++j)
      if (32 * j + lane < p.head_dim)
        out[j] = fma_rn(of_value, cache_value(value_rows[at + 32 * j + lane]), out[j] * factor);
  }
  // Parts of the warps in shared memory: maximum, sum, outputs.
  auto* parts = reinterpret_cast<float*>(gpu::shared_memory());
  const int pitch = p.head_dim + 2;
  float* mine = parts + warp * pitch;
  if (lane == 0) {
    mine[0] = largest;
    mine[1] = sum;
  }
  MQC_UNROLL
  for (int j = 0; j < kMaxValues; ++j)
    if (32 * j + lane < p.head_dim) mine[2 + 32 * j + lane] = out[j];
  gpu::sync_block();
  T* to = static_cast<T*>(p.out) + row * p.out_stride + static_cast<int64_t>(head) * p.head_dim;
  for (int column = thread; column < p.head_dim; column += kAttentionThreads) {
    float top = kMinusInfinity, total = 0.0f, value = 0.0f;
    for (int part = 0; part < kAttentionWarps; ++part) top = fmaxf(top, parts[part * pitch]);
    for (int part = 0; part < kAttentionWarps; ++part) {
      const float factor = rescale(parts[part * pitch], top);
      total = fma_rn(factor, parts[part * pitch + 1], total);
      value = fma_rn(factor, parts[part * pitch + 2 + column], value);
    }
    to[column] = from_float<T>(total > 0.0f ? div_rn(value, total) : 0.0f);
  }
}

}  // namespace mqc
