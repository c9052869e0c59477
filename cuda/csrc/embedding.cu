// mqc_embedding.
#include "mqc/embedding.cuh"
#include "runtime.h"

using namespace mqc;

extern "C" int mqc_embedding(const mqc_embedding_args* args, void* stream) {
  MQC_REQUIRE(args != nullptr, "mqc_embedding: args is NULL");
  MQC_CHECK(check_size(args->size, sizeof(mqc_embedding_args), "mqc_embedding_args"));
  MQC_REQUIRE(args->rows >= 0 && args->rows < int64_t{1} << 31 && args->columns > 0 && args->vocabulary > 0,
              "mqc_embedding: %lld rows of a table [%lld, %lld]", static_cast<long long>(args->rows),
              static_cast<long long>(args->vocabulary), static_cast<long long>(args->columns));
  MQC_REQUIRE(args->table_dtype == args->dtype || args->table_dtype == MQC_I8,
              "mqc_embedding: the table has the dtype of y or int8");
  if (args->rows == 0) return MQC_OK;
  MQC_REQUIRE(args->ids != nullptr && args->table != nullptr && args->y != nullptr,
              "mqc_embedding: ids, table or y is NULL");
  MQC_REQUIRE(args->table_dtype != MQC_I8 || args->scale != nullptr, "mqc_embedding: an int8 table needs a scale");
  Device device;
  MQC_CHECK(current_device(device));
  const EmbeddingParams p{args->ids, args->table, args->scale, args->y, args->columns, args->vocabulary};
  return by_float_type(args->dtype, "mqc_embedding", [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto kernel) {
      return launch("embedding", kernel, Grid{args->rows}, kEmbeddingThreads, 0, stream, p);
    };
    return args->table_dtype == MQC_I8 ? run(embedding_kernel<T, int8_t>) : run(embedding_kernel<T, T>);
  });
}
