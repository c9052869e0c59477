// Activation (gated), blockwise Hadamard transform, split and static quantization: a block a row.
//
// The row lives in shared memory as float32. A Hadamard block of order base * 2^log2 is the Kronecker
// product of a dense matrix over `base` parts and Sylvester's over 2^log2 neighbours. The dense part
// runs first, in place, on tensor cores: its inputs are values of the tensor's own type, exact as
// operands (float32 as three bf16 parts), its matrix is +-1, sums are float32.
#pragma once

#include "mqc/layout.cuh"
#include "mqc/rows.cuh"
#include "mqc/vectors.cuh"

namespace mqc {

struct ActivationParams {
  const void* x;
  const uint32_t* hadamard;  // sign table, or null
  const int32_t* split;      // or null
  int8_t* xq;                // or null
  void* y;                   // or null
  void* x_split;             // or null
  RowScale rows_scale;
  int64_t x_stride, xq_stride, y_stride, x_split_stride;
  float norm;                // 1 / sqrt(block)
  int32_t columns;
  int32_t base, log2;
  int32_t split_columns;
  int32_t activation;        // mqc_activation
  int32_t gated;
  int32_t vector_in, vector_out;  // 16-byte loads; 4 values a store
};

constexpr int kActivationThreads = 256;
constexpr int kActivationWarps = kActivationThreads / 32;
constexpr float kInverseSqrt2 = 0.70710678118654752440f;

MQC_HD float activate(int kind, float x) {
  switch (kind) {
    case 1: return div_rn(x, add_rn(1.0f, expf(-x)));
    case 2: return mul_rn(mul_rn(x, 0.5f), add_rn(1.0f, erff(mul_rn(x, kInverseSqrt2))));
    case 3: {
      const float inner = 0.79788456080286535588f * (x + 0.044715f * x * x * x);
      return mul_rn(mul_rn(0.5f, x), add_rn(1.0f, tanhf(inner)));
    }
    case 4: return x > 0.0f ? x : (x != x ? x : 0.0f);
    case 5: return mul_rn(x, div_rn(1.0f, add_rn(1.0f, expf(mul_rn(-1.702f, x)))));
    default: return x;
  }
}

// y before the transform, rounded where the unfused operators round.
template <class T> MQC_HD float gated_value(int kind, float gate, float up) {
  return round_to<T>(mul_rn(round_to<T>(activate(kind, gate)), up));
}

// Float index of value `index` of the row: with a dense factor, runs of 2^log2 values are 4 floats
// apart, so that the same place of neighbouring runs lies in other banks.
MQC_HD constexpr int row_address(int index, int base, int log2) {
  return base > 1 && log2 >= 3 ? index + 4 * (index >> log2) : index;
}
MQC_HD constexpr int row_floats(int columns, int base, int log2) {
  return base > 1 && log2 >= 3 ? columns + 4 * (columns >> log2) : columns;
}

// Operand registers from float32 values: exact for the half types, three parts for float32.
template <class T> constexpr int kParts = 1;
template <> constexpr int kParts<float> = 3;
template <class T> struct OperandOf {
  using type = T;
  static constexpr uint32_t kOnes = 0x3F803F80u;  // two times 1 in bf16
};
template <> struct OperandOf<float> {
  using type = bf16;
  static constexpr uint32_t kOnes = 0x3F803F80u;
};
template <> struct OperandOf<f16> {
  using type = f16;
  static constexpr uint32_t kOnes = 0x3C003C00u;
};

// Part `part` of a value: value = sum of parts, each a bf16 (24 bits of mantissa in three of 8).
template <class T> MQC_HD uint16_t operand_part(float value, int part) {
  if (kParts<T> == 1) return from_float<typename OperandOf<T>::type>(value).bits;
  float rest = value;
  bf16 now = from_float<bf16>(rest);
  for (int i = 0; i < part; ++i) {
    rest = add_rn(rest, -to_float(now));
    now = from_float<bf16>(rest);
  }
  return now.bits;
}

// Operand bits of +1 and the signs of two values from a word of the table.
template <class T> MQC_HD uint32_t sign_operand(uint32_t word, int number) {
  return ((word << number) & 0x80008000u) | OperandOf<T>::kOnes;
}

// The dense factor in place: out[i'] = sum_i H[i', i] in[i] for every column (block, place in run).
// A warp takes 16 columns at a time: they are the rows of A, [16, base], read before the first write.
template <class T, int kSteps> MQC_D void dense_hadamard(const ActivationParams& p, float* row, int warp, int lane) {
  using Operand = typename OperandOf<T>::type;
  const int run = 1 << p.log2, total = p.columns / p.base;
  const int pitch = row_address(run, p.base, p.log2);
  const int column_blocks = hadamard_columns(p.base), groups = hadamard_groups(p.base);
  for (int first = warp * 16; first < total; first += kActivationWarps * 16) {
    int start[2];  // of the columns lane / 4 and lane / 4 + 8
    bool inside[2];
    MQC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int column = first + lane / 4 + 8 * half;
      inside[half] = column < total;
      const int valid = inside[half] ? column : first;
      start[half] = (valid >> p.log2) * p.base * pitch + (valid & (run - 1));
    }
    uint32_t a[kParts<T>][kSteps][4];
    const float* from[2] = {row + start[0] + 2 * (lane % 4) * pitch, row + start[1] + 2 * (lane % 4) * pitch};
    int left = p.base - 2 * (lane % 4);  // of the inputs from here on
    MQC_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      MQC_UNROLL
      for (int reg = 0; reg < 4; ++reg) {
        const float low = left > 0 ? from[reg & 1][0] : 0.0f;
        const float high = left > 1 ? from[reg & 1][pitch] : 0.0f;
        MQC_UNROLL
        for (int part = 0; part < kParts<T>; ++part)
          a[part][step][reg] = operand_part<T>(low, part) | static_cast<uint32_t>(operand_part<T>(high, part)) << 16;
        from[reg & 1] += 8 * pitch;
        if (reg & 1) left -= 8;
      }
      gpu::fence_compiler();
    }
    gpu::sync_warp();  // all lanes have read their columns
    for (int block = 0; block < column_blocks; ++block) {
      float sums[2][4] = {};  // even and odd steps: two chains of instructions
      uint32_t word = 0;
      MQC_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        if (step % 8 == 0 && step / 8 < groups) word = p.hadamard[hadamard_word(block, step / 8, lane, p.base)];
        const uint32_t b0 = sign_operand<T>(word, 2 * step % 16), b1 = sign_operand<T>(word, (2 * step + 1) % 16);
        MQC_UNROLL
        for (int part = kParts<T> - 1; part >= 0; --part) gpu::mma_half<Operand>(sums[step % 2], a[part][step], b0, b1);
      }
      MQC_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int i = 8 * block + accumulator_column(lane, r), half = r >> 1;
        if (i < p.base && inside[half]) row[start[half] + i * pitch] = sums[0][r] + sums[1][r];
      }
    }
  }
}

// Sylvester's transform over the lowest min(log2, 7) bits of the places, by warps: a lane holds four
// neighbours of 128 values.
MQC_D void low_hadamard(const ActivationParams& p, float* row, int warp, int lane) {
  const int bits = p.log2 < 7 ? p.log2 : 7;
  for (int first = warp * 128; first < p.columns; first += kActivationWarps * 128) {
    const int index = first + lane * 4;
    float* mine = row + row_address(index, p.base, p.log2);
    const int count = p.columns - index;  // of values that exist
    float v[4] = {};
    if (count >= 4) {
      load_floats(mine, v);
    } else {
      MQC_UNROLL
      for (int i = 0; i < 3; ++i)
        if (i < count) v[i] = mine[i];
    }
    if (bits >= 1) {
      const float a = v[0], b = v[1], c = v[2], d = v[3];
      v[0] = a + b, v[1] = a - b, v[2] = c + d, v[3] = c - d;
    }
    if (bits >= 2) {
      const float a = v[0], b = v[1], c = v[2], d = v[3];
      v[0] = a + c, v[1] = b + d, v[2] = a - c, v[3] = b - d;
    }
    MQC_UNROLL
    for (int bit = 0; bit < 5; ++bit) {
      if (bits < bit + 3) break;
      MQC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float other = gpu::shuffle_xor(v[i], 1 << bit);
        v[i] = (lane >> bit & 1) ? other - v[i] : v[i] + other;
      }
    }
    if (count >= 4) {
      store_floats(mine, v);
    } else {
      MQC_UNROLL
      for (int i = 0; i < 3; ++i)
        if (i < count) mine[i] = v[i];
    }
  }
}

// kBits further bits of the places from bit `low` on: a thread holds 2^kBits values.
template <int kBits> MQC_D void high_hadamard(const ActivationParams& p, float* row, int low, int thread) {
  constexpr int kValues = 1 << kBits;
  for (int group = thread; group < p.columns >> kBits; group += kActivationThreads) {
    const int index = (group >> low << (low + kBits)) | (group & ((1 << low) - 1));
    float v[kValues];
    MQC_UNROLL
    for (int i = 0; i < kValues; ++i) v[i] = row[row_address(index + (i << low), p.base, p.log2)];
    MQC_UNROLL
    for (int step = 1; step < kValues; step *= 2) {
      MQC_UNROLL
      for (int i = 0; i < kValues; ++i) {
        if (i & step) continue;
        const float a = v[i], b = v[i + step];
        v[i] = a + b, v[i + step] = a - b;
      }
    }
    MQC_UNROLL
    for (int i = 0; i < kValues; ++i) row[row_address(index + (i << low), p.base, p.log2)] = v[i];
  }
}

// A value as it leaves: scaled, and rounded as the transform's result is.
template <class T> MQC_D float transformed(const ActivationParams& p, float value) {
  return p.base > 1 || p.log2 > 0 ? round_to<T>(mul_rn(value, p.norm)) : value;
}

// Grid: rows. Shared memory: row_floats. kSteps: of the dense factor, 0 for none.
template <class T, int kSteps>
MQC_KERNEL(kActivationThreads, (kParts<T> * kSteps > 20 ? 1 : 2)) activation_kernel(MQC_GRID_CONSTANT ActivationParams p) {
  constexpr int kVector = kVectorOf<T>;
  const int thread = gpu::thread_index(), warp = thread / 32, lane = thread % 32;
  const int64_t number = gpu::block_x();
  auto* row = reinterpret_cast<float*>(gpu::shared_memory());
  const T* x = static_cast<const T*>(p.x) + number * p.x_stride;

  if (p.vector_in) {
    // Loads of a few steps fly together: a block may be alone on its multiprocessor.
    constexpr int kBatch = 2, kStep = kActivationThreads * kVector;
    for (int first = thread * kVector; first < p.columns; first += kBatch * kStep) {
      gpu::Vector16 gates[kBatch], ups[kBatch];
      MQC_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int c = first + b * kStep;
        if (c >= p.columns) break;
        gates[b] = gpu::load16(x + c);
        ups[b] = p.gated ? gpu::load16(x + p.columns + c) : gates[b];
      }
      MQC_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int c = first + b * kStep;
        if (c >= p.columns) break;
        float v[kVector], up[kVector];
        unpack_vector<T>(gates[b], v);
        unpack_vector<T>(ups[b], up);
        MQC_UNROLL
        for (int i = 0; i < kVector; ++i) v[i] = gated_value<T>(p.activation, v[i], p.gated ? up[i] : 1.0f);
        store_floats(row + row_address(c, p.base, p.log2), v);  // a run holds whole vectors, or has no gap
      }
    }
  } else {
    for (int c = thread; c < p.columns; c += kActivationThreads) {
      const float v = to_float(x[c]);
      const float up = p.gated ? to_float(x[p.columns + c]) : 1.0f;  // times 1 is exact
      row[row_address(c, p.base, p.log2)] = gated_value<T>(p.activation, v, up);
    }
  }
  gpu::sync_block();
  if constexpr (kSteps > 0) {
    dense_hadamard<T, kSteps>(p, row, warp, lane);
    gpu::sync_block();
  }
  if (p.log2 > 0) {
    low_hadamard(p, row, warp, lane);
    gpu::sync_block();
    for (int low = 7; low < p.log2;) {
      const int left = p.log2 - low;
      if (left >= 4) {
        high_hadamard<4>(p, row, low, thread);
        low += 4;
      } else if (left >= 2) {
        high_hadamard<2>(p, row, low, thread);
        low += 2;
      } else {
        high_hadamard<1>(p, row, low, thread);
        low += 1;
      }
      gpu::sync_block();
    }
  }

  for (int s = thread; s < p.split_columns; s += kActivationThreads)
    static_cast<T*>(p.x_split)[number * p.x_split_stride + s] =
        from_float<T>(transformed<T>(p, row[row_address(p.split[s], p.base, p.log2)]));
  const float scale = p.xq != nullptr ? row_scale(p.rows_scale, static_cast<int32_t>(number)) : 1.0f;
  int8_t* xq = p.xq + number * p.xq_stride;
  T* y = static_cast<T*>(p.y) + number * p.y_stride;
  if (p.vector_out) {
    for (int c = thread * 4; c < p.columns; c += kActivationThreads * 4) {
      float v[4];
      load_floats(row + row_address(c, p.base, p.log2), v);
      MQC_UNROLL
      for (int i = 0; i < 4; ++i) v[i] = transformed<T>(p, v[i]);
      if (p.xq != nullptr)
        *reinterpret_cast<uint32_t*>(xq + c) = pack_bytes(quantize_value(v[0], scale), quantize_value(v[1], scale),
                                                          quantize_value(v[2], scale), quantize_value(v[3], scale));
      if (p.y != nullptr) {
        MQC_UNROLL
        for (int i = 0; i < 4; ++i) y[c + i] = from_float<T>(v[i]);
      }
    }
  } else {
    for (int c = thread; c < p.columns; c += kActivationThreads) {
      const float v = transformed<T>(p, row[row_address(c, p.base, p.log2)]);
      if (p.xq != nullptr) xq[c] = static_cast<int8_t>(quantize_value(v, scale));
      if (p.y != nullptr) y[c] = from_float<T>(v);
    }
  }
}

}  // namespace mqc
