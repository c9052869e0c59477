// Launch of the persistent Hopper kernel: the tensor map of the activations, one block a
// multiprocessor.
#include "linear_launch.h"

namespace mqc {

namespace {

constexpr int kBand = 8;  // token tiles that share the weights in the second-level cache

#if defined(MQC_EMULATE)

int encode_rows(gpu::TensorMap& map, const LinearParams& p, int box_rows) {
  map = gpu::TensorMap{reinterpret_cast<const uint8_t*>(p.x), static_cast<uint64_t>(p.k),
                       static_cast<uint64_t>(p.rows), static_cast<uint64_t>(p.x_stride), kTileInputs,
                       static_cast<uint32_t>(box_rows)};
  return MQC_OK;
}

#else

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time: the library does not link libcuda.
int find_encode(Encode& encode) {
  static Encode found = nullptr;
  if (__atomic_load_n(&found, __ATOMIC_ACQUIRE) == nullptr) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) return check_launch("cudaGetDriverEntryPointByVersion", error);
    if (result != cudaDriverEntryPointSuccess || entry == nullptr)
      return fail(MQC_ERROR_CUDA, "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
    __atomic_store_n(&found, reinterpret_cast<Encode>(entry), __ATOMIC_RELEASE);
  }
  encode = found;
  return MQC_OK;
}

// int8 [rows, k] with row stride x_stride in boxes of box_rows x 128, zeros outside.
int encode_rows(gpu::TensorMap& map, const LinearParams& p, int box_rows) {
  Encode encode = nullptr;
  MQC_CHECK(find_encode(encode));
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(p.k), static_cast<cuuint64_t>(p.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(p.x_stride)};
  const cuuint32_t box[2] = {kTileInputs, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(p.x), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return MQC_OK;
  return fail(MQC_ERROR_CUDA, "cuTensorMapEncodeTiled refused rows [%d, %d] of stride %lld: CUresult %d", p.rows, p.k,
              static_cast<long long>(p.x_stride), static_cast<int>(result));
}

#endif

}  // namespace

template <class Format> int launch_linear_wgmma(const LinearParams& params, const Device& device, void* stream) {
  using Shape = WgmmaShape<Format>;
  gpu::TensorMap map;
  MQC_CHECK(encode_rows(map, params, Shape::kTokens));
  LinearParams banded = params;
  banded.band = kBand;
  const int64_t tiles = ceil_div(params.n, Shape::kChannels) * ceil_div(params.rows, Shape::kTokens);
  const Grid grid{tiles < device.multiprocessors ? tiles : device.multiprocessors};
  return launch("linear_wgmma", linear_wgmma_kernel<Format>, grid, Shape::kThreads, Shape::kSharedBytes, stream, banded,
                map);
}

template int launch_linear_wgmma<W4>(const LinearParams&, const Device&, void*);
template int launch_linear_wgmma<W8>(const LinearParams&, const Device&, void*);
template int launch_linear_wgmma<W4Grouped<32>>(const LinearParams&, const Device&, void*);
template int launch_linear_wgmma<W4Grouped<64>>(const LinearParams&, const Device&, void*);
template int launch_linear_wgmma<W4Grouped<128>>(const LinearParams&, const Device&, void*);
template int launch_linear_wgmma<W8Grouped<32>>(const LinearParams&, const Device&, void*);
template int launch_linear_wgmma<W8Grouped<128>>(const LinearParams&, const Device&, void*);

}  // namespace mqc
