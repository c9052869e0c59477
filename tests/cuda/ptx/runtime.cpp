// CUDA's runtime, as far as the library's host code calls it: launches run the PTX on the interpreter.
//
// The host code is nvcc's own, so that what it hands over (names of kernels, sizes and places of parameters,
// the tensor map) is what a GPU would get.
#include "machine.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <fstream>

namespace {

using namespace ptx;

struct Device {
  int arch, multiprocessors;
};

struct State {
  Module module;
  std::map<const void*, std::string> names;  // by the host's stub
  std::map<std::string, int> shared_limit;   // by kernel, where it was raised
  std::vector<Device> devices{{90, 4}};      // the host code remembers facts by device: one a configuration
  size_t device = 0;
  uint64_t seed = 1;
  int asynchrony = 2;
  std::vector<Launch::Extent> extents;
  std::map<uint64_t, size_t> allocations;
  std::string message;
  cudaError_t error = cudaSuccess;
  struct {
    dim3 grid, block;
    size_t shared = 0;
    cudaStream_t stream = nullptr;
  } pushed;
};
State& state() {
  static State* const all = new State;
  return *all;
}

int shared_most(int arch) { return arch == 90 ? 232448 : arch == 80 ? 166912 : 101376; }

cudaError_t failed(const std::string& what) {
  state().message = what;
  return state().error = cudaErrorLaunchFailure;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared) {
  State& s = state();
  const auto name = s.names.find(function);
  if (name == s.names.end()) return failed("a launch of a kernel that was not registered");
  const auto found = s.module.kernels.find(name->second);
  if (found == s.module.kernels.end()) return failed("no PTX of " + name->second);
  const Kernel& kernel = *found->second;
  if (s.asynchrony == 3) return cudaSuccess;
  if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    return failed("a grid that no device takes");
  if (block.x != static_cast<unsigned>(kernel.threads) || block.y != 1 || block.z != 1 || block.x % 32)
    return failed("a block of other threads than the kernel's " + std::to_string(kernel.threads));
  const auto limit = s.shared_limit.find(kernel.name);
  if (shared > static_cast<size_t>(limit == s.shared_limit.end() ? 48 * 1024 : limit->second))
    return failed("more shared memory than the kernel was given by cudaFuncSetAttribute");
  Launch l(kernel);
  l.grid = {grid.x, grid.y, grid.z};
  l.threads = {block.x, 1, 1};
  l.shared_bytes = static_cast<int64_t>(shared);
  l.parameters.assign(static_cast<size_t>(kernel.parameter_bytes), 0xEE);
  for (size_t p = 0; p < kernel.parameters.size(); ++p) {
    const Parameter& parameter = kernel.parameters[p];
    memcpy(l.parameters.data() + parameter.offset, arguments[p], static_cast<size_t>(parameter.bytes));
  }
  l.random.seed(s.seed);
  l.asynchrony = s.asynchrony;
  l.extents = s.extents;
  for (const auto& [address, bytes] : s.allocations) l.extents.push_back({address, address + bytes, true});
  try {
    run(l);
  } catch (const Fault& fault) {
    return failed(fault.what());
  }
  return cudaSuccess;
}

// Descriptions that a driver refuses are refused here; what our kernels do not use too.
CUresult encode(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  const auto address = reinterpret_cast<uint64_t>(base);
  if (reinterpret_cast<uint64_t>(to) % 64 || type != CU_TENSOR_MAP_DATA_TYPE_UINT8 || rank != 2 || address % 16)
    return CUDA_ERROR_INVALID_VALUE;
  if (sizes[0] < 1 || sizes[1] < 1 || sizes[0] > uint64_t{1} << 32 || sizes[1] > uint64_t{1} << 32)
    return CUDA_ERROR_INVALID_VALUE;
  if (strides[0] % 16 || strides[0] >= uint64_t{1} << 40 || strides[0] < sizes[0]) return CUDA_ERROR_INVALID_VALUE;
  if (box[0] < 1 || box[1] < 1 || box[0] > 256 || box[1] > 256 || box[0] % 16) return CUDA_ERROR_INVALID_VALUE;
  if (steps[0] != 1 || steps[1] != 1 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] != 128 || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return CUDA_ERROR_INVALID_VALUE;
  TensorMap map;
  map.magic = kTensorMapMagic;
  map.base = address;
  map.columns = sizes[0];
  map.rows = sizes[1];
  map.stride = strides[0];
  map.box_columns = box[0];
  map.box_rows = box[1];
  memcpy(to, &map, sizeof map);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

#define EXPORT __attribute__((visibility("default")))

// ---- for the tests -----------------------------------------------------------------------------
// Reads a file of PTX; "" or what is wrong with it.
EXPORT const char* ptx_load(const char* path) {
  static std::string error;
  try {
    parse(path, state().module);
    return "";
  } catch (const Fault& fault) {
    error = fault.what();
    return error.c_str();
  }
}
// Forgets all PTX that was read.
EXPORT void ptx_unload(void) { state().module.kernels.clear(); }
EXPORT void ptx_configure(uint64_t seed, int asynchrony, int arch, int multiprocessors) {
  State& s = state();
  s.seed = seed;
  s.asynchrony = asynchrony;
  for (s.device = 0; s.device < s.devices.size(); ++s.device)
    if (s.devices[s.device].arch == arch && s.devices[s.device].multiprocessors == multiprocessors) return;
  s.devices.push_back({arch, multiprocessors});
}
// Global memory of the next launches: begin, bytes, and 1 where it may be written.
EXPORT void ptx_extents(const uint64_t* rows, int count) {
  state().extents.clear();
  for (int i = 0; i < count; ++i)
    state().extents.push_back({rows[3 * i], rows[3 * i] + rows[3 * i + 1], rows[3 * i + 2] != 0});
}
// Writes "kernel line times" of every instruction to a file.
EXPORT void ptx_coverage(const char* path) {
  std::ofstream out(path);
  for (const auto& [name, kernel] : state().module.kernels)
    for (const Instruction& i : kernel->code) out << name << ' ' << i.line << ' ' << i.executed << '\n';
}

// ---- what nvcc's stubs call --------------------------------------------------------------------
EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                   int*) {
  state().names[host] = name;
}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  state().pushed = {grid, block, shared, stream};
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const auto& p = state().pushed;
  *grid = p.grid;
  *block = p.block;
  *shared = p.shared;
  memcpy(stream, &p.stream, sizeof p.stream);
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                      cudaStream_t) {
  return launch(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared);
}
EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                                    cudaStream_t) {
  return launch(function, grid, block, arguments, shared);
}

// ---- the runtime's own functions ---------------------------------------------------------------
EXPORT cudaError_t cudaGetLastError(void) {
  const cudaError_t error = state().error;
  state().error = cudaSuccess;
  return error;
}
EXPORT const char* cudaGetErrorString(cudaError_t) { return state().message.c_str(); }
EXPORT const char* cudaGetErrorName(cudaError_t) { return "PTX"; }
EXPORT cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  State& s = state();
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > shared_most(s.devices[s.device].arch) ||
      !s.names.count(function)) {
    s.message = "cudaFuncSetAttribute: a value that is not allowed";
    return cudaErrorInvalidValue;
  }
  s.shared_limit[s.names[function]] = value;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int* device) {
  *device = static_cast<int>(state().device);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const Device& d = state().devices[static_cast<size_t>(device)];
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.arch / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.arch % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = d.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_most(d.arch);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** entry, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  if (strcmp(symbol, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
  *entry = reinterpret_cast<void*>(encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  state().allocations[reinterpret_cast<uint64_t>(*memory)] = bytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void* memory) {
  state().allocations.erase(reinterpret_cast<uint64_t>(memory));
  std::free(memory);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  memset(memory, value, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                     size_t rows, cudaMemcpyKind, cudaStream_t) {
  if (width > to_pitch || width > from_pitch) return cudaErrorInvalidPitchValue;
  for (size_t row = 0; row < rows; ++row)
    memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

}  // extern "C"
