// Rows of an embedding table by token id.
#pragma once

#include "mqc/gpu.cuh"

namespace mqc {

struct EmbeddingParams {
  const int64_t* ids;
  const void* table;
  const float* scale;  // int8 tables, by row
  void* y;
  int64_t columns, vocabulary;
};

constexpr int kEmbeddingThreads = 128;

// Grid: rows. Ids outside the table give NaN: a device has no other way to say so.
template <class T, class Table> MQC_KERNEL(kEmbeddingThreads, 4) embedding_kernel(MQC_GRID_CONSTANT EmbeddingParams p) {
  const int64_t row = gpu::block_x(), id = p.ids[row];
  T* y = static_cast<T*>(p.y) + row * p.columns;
  const bool inside = id >= 0 && id < p.vocabulary;
  const auto* from = static_cast<const Table*>(p.table) + (inside ? id * p.columns : 0);
  for (int64_t c = gpu::thread_index(); c < p.columns; c += kEmbeddingThreads) {
    if (!inside) {
      y[c] = from_float<T>(bit_cast<float>(0x7FC00000u));
    } else if constexpr (sizeof(Table) == 1) {
      y[c] = from_float<T>(mul_rn(static_cast<float>(from[c]), p.scale[id]));
    } else {
      y[c] = from[c];
    }
  }
}

}  // namespace mqc
