// Arguments of cuTensorMapEncodeTiled: the launcher's own code, and CuTe's for the same tile. Both ask
// CUDA for the driver's function; here they get one that writes the arguments down.
#include <cuda.h>
#include <cuda_runtime_api.h>

#define __CUDACC_VER_MAJOR__ 13  // CuTe describes tensors from CUDA 12 on
#include <cute/tensor.hpp>

#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "linear_launch.h"
#include "witness.h"

#include <sstream>

// The launcher as nvcc sees it, its tensor map aside; kernels stay the emulator's.
#undef MQC_EMULATE
namespace mqc {
int check_launch(const char* name, cudaError_t error);
}
#define CUtensorMap mqc::gpu::TensorMap
#include "linear_wgmma.cu"
#undef CUtensorMap

namespace {

struct Recorded {
  int calls = 0, version = 0;
  std::string name, format, text;  // text: everything but the promotion, which is a choice of speed
} recorded;

CUresult record(void* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  std::ostringstream out;
  out << "type " << type << " address " << address << " interleave " << interleave << " swizzle " << swizzle << " fill "
      << fill;
  for (cuuint32_t i = 0; i < rank; ++i) {
    out << " | size " << sizes[i] << " box " << box[i] << " step " << steps[i];
    if (i + 1 < rank) out << " stride " << strides[i];
  }
  recorded.text = out.str();
  ++recorded.calls;
  return map != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

std::string take() {
  SAME(recorded.calls, 1, "calls of cuTensorMapEncodeTiled");
  const std::string text = recorded.name + " " + recorded.text;
  recorded.calls = 0;
  return text;
}

}  // namespace

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                                         unsigned long long, cudaDriverEntryPointQueryResult* result) {
  recorded.name = symbol;
  SAME(version >= 12000, true, "version of the driver's function");
  *function = reinterpret_cast<void*>(&record);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

namespace mqc {
int fail(int status, const char*, ...) { return status; }
int check_launch(const char*, cudaError_t error) { return error == cudaSuccess ? MQC_OK : MQC_ERROR_CUDA; }
}  // namespace mqc

CASE(tensor_map) {
  using namespace cute;
  using Kernel = mqc::WgmmaShape<mqc::W4>;
  alignas(16) static int8_t x[16];
  for (const auto& [rows, k, stride] : {std::array<int, 3>{300, 1024, 1024}, {1, 48, 64}, {129, 3584, 18944},
                                         {128, 130, 144}, {100000, 18944, 18944}}) {
    mqc::LinearParams params{};
    params.x = x;
    params.rows = rows;
    params.k = k;
    params.x_stride = stride;
    mqc::gpu::TensorMap map;
    SAME(mqc::encode_rows(map, params, Kernel::kTokens), MQC_OK, "status");
    const std::string ours = take();
    Tensor tensor = make_tensor(make_gmem_ptr(static_cast<const int8_t*>(x)), make_shape(rows, k),
                                make_stride(static_cast<int64_t>(stride), _1{}));
    auto stage = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<int8_t>{},
                               Shape<Int<Kernel::kTokens>, Int<mqc::kTileInputs>>{});
    auto copy = make_tma_copy(SM90_TMA_LOAD{}, tensor, stage);
    SAME_TEXT(ours, take(), "arguments of the tensor map");
    // The coordinates of a box: the kernel passes (input, token) of its first element.
    auto coordinates = copy.get_tma_tensor(make_shape(rows, k));
    auto at = local_tile(coordinates, Shape<Int<Kernel::kTokens>, Int<mqc::kTileInputs>>{}, make_coord(2, 3));
    const auto first = at(0, 0);
    SAME(3 * mqc::kTileInputs, get<0>(first), "coordinate of the inputs");
    SAME(2 * Kernel::kTokens, get<1>(first), "coordinate of the tokens");
    SAME(Kernel::kTokenBytes, size(stage) * sizeof(int8_t), "bytes of a box");
  }
}
