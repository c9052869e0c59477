// Errors, device facts and common checks.
#include "runtime.h"

#include <cstdarg>
#include <cstdio>

namespace mqc {

namespace {
thread_local char last_error[512] = "";
}

int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

int check_size(uint32_t given, size_t expected, const char* name) {
  if (given == expected) return MQC_OK;
  return fail(MQC_ERROR_ABI, "%s: size is %u, this library (ABI %d) expects %zu", name, given, MQC_ABI_VERSION,
              expected);
}

int check_workspace(const void* workspace, int64_t given, int64_t needed) {
  if (needed == 0) return MQC_OK;
  if (workspace != nullptr && given >= needed && aligned16(workspace)) return MQC_OK;
  return fail(MQC_ERROR_WORKSPACE, "a 16-byte aligned workspace of %lld bytes is needed, %lld at %p were given",
              static_cast<long long>(needed), static_cast<long long>(given), workspace);
}

int check_modality(RowScale& rows, int kind, const float* scale, const void* modality, int64_t count,
                   int64_t rows_per_sequence, const char* who) {
  MQC_REQUIRE(scale != nullptr, "%s: the activation scale is missing", who);
  MQC_REQUIRE(kind >= MQC_MODALITY_NONE && kind <= MQC_MODALITY_MASK, "%s: modality_kind %d is unknown", who, kind);
  MQC_REQUIRE(kind == MQC_MODALITY_NONE || modality != nullptr, "%s: modality_kind %d needs a modality", who, kind);
  MQC_REQUIRE(kind != MQC_MODALITY_COUNT || (rows_per_sequence > 0 && count % rows_per_sequence == 0),
              "%s: %lld rows are not sequences of %lld", who, static_cast<long long>(count),
              static_cast<long long>(rows_per_sequence));
  rows = RowScale{scale, modality, static_cast<int32_t>(rows_per_sequence), kind};
  return MQC_OK;
}

int dtype_bytes(int dtype) {
  switch (dtype) {
    case MQC_BF16:
    case MQC_F16: return 2;
    case MQC_F32: return 4;
    case MQC_I8: return 1;
    default: return 0;
  }
}

#if defined(MQC_EMULATE)

namespace {
Device emulated{90, 4, 232448};
}

int current_device(Device& device) {
  device = emulated;
  return MQC_OK;
}

#else

int check_launch(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return MQC_OK;
  return fail(MQC_ERROR_CUDA, "%s: %s (%s)", name, cudaGetErrorString(error), cudaGetErrorName(error));
}

namespace {
constexpr int kMaxDevices = 64;
Device known[kMaxDevices];
}  // namespace

int current_device(Device& device) {
  int index = 0;
  MQC_CHECK(check_launch("cudaGetDevice", cudaGetDevice(&index)));
  const bool cached = index < kMaxDevices;
  // Written once with equal values by whoever comes first; arch is written last.
  if (cached && __atomic_load_n(&known[index].arch, __ATOMIC_ACQUIRE) != 0) {
    device = known[index];
    return MQC_OK;
  }
  int major = 0, minor = 0;
  Device found;
  MQC_CHECK(check_launch("cudaDeviceGetAttribute",
                         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index)));
  MQC_CHECK(check_launch("cudaDeviceGetAttribute",
                         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index)));
  MQC_CHECK(check_launch("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&found.multiprocessors,
                                                                         cudaDevAttrMultiProcessorCount, index)));
  MQC_CHECK(check_launch("cudaDeviceGetAttribute",
                         cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index)));
  found.arch = 10 * major + minor;
  // Machine code is built for 8.0, 8.9 and 9.0a, without PTX: 8.x runs it, newer majors do not.
  if (major != 8 && found.arch != 90)
    return fail(MQC_ERROR_DEVICE, "the device has compute capability %d.%d; the kernels are built for 8.x and 9.0",
                major, minor);
  if (cached) {
    known[index].multiprocessors = found.multiprocessors;
    known[index].shared_bytes = found.shared_bytes;
    __atomic_store_n(&known[index].arch, found.arch, __ATOMIC_RELEASE);
  }
  device = found;
  return MQC_OK;
}

#endif

}  // namespace mqc

extern "C" {

int mqc_abi_version(void) { return MQC_ABI_VERSION; }

const char* mqc_status_text(int status) {
  switch (status) {
    case MQC_OK: return "ok";
    case MQC_ERROR_ARGUMENT: return "an argument is out of its range, misaligned or missing";
    case MQC_ERROR_UNSUPPORTED: return "the library has no kernel for this";
    case MQC_ERROR_DEVICE: return "the current device cannot run the kernels";
    case MQC_ERROR_WORKSPACE: return "the workspace is missing or too small";
    case MQC_ERROR_CUDA: return "the CUDA runtime refused";
    case MQC_ERROR_ABI: return "a struct has a size this library does not know";
    default: return "unknown status";
  }
}

const char* mqc_last_error(void) { return mqc::last_error; }

int mqc_check_device(void) {
  mqc::Device device;
  return mqc::current_device(device);
}

#if defined(MQC_EMULATE)
// The CPU tests choose a schedule and the device that plans are made for.
__attribute__((visibility("default"))) void mqc_emulator_configure(uint64_t seed, int asynchrony, int arch,
                                                                   int multiprocessors) {
  mqc::emulator::configure(seed, asynchrony);
  mqc::emulated.arch = arch;
  mqc::emulated.shared_bytes = arch == 80 ? 166912 : arch == 90 ? 232448 : 101376;
  mqc::emulated.multiprocessors = multiprocessors;
}
#endif

}  // extern "C"
