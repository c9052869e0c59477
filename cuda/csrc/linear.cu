// mqc_linear: checks, choice of the kernel, launch.
#include "linear_launch.h"

namespace mqc {

namespace {

constexpr int kMaxInputs = 131072;  // 16 * 8 * 127 * k and 127 * 127 * k stay below 2^31
constexpr int kMaxSplitColumns = 64;

template <class Shape> KernelShape shape_of() {
  return {Shape::kChannels, Shape::kTokens, Shape::kWarpsK, Shape::kBlocks, Shape::kSharedBytes};
}

template <class Shape> KernelShape half_shape_of(int scale_bytes) {
  KernelShape shape = shape_of<Shape>();
  shape.shared_bytes += half_scale_bytes<Shape>(scale_bytes);
  return shape;
}

int tile_bytes(int layout) {
  return by_format(layout, [](auto format) { return decltype(format)::kTileBytes; });
}

int scale_bytes(int layout) {
  return by_format(layout, [](auto format) { return decltype(format)::kScaleBytes; });
}

bool takes_float_rows(int kernel) { return kernel != MQC_LINEAR_MMA_32 && kernel != MQC_LINEAR_WGMMA; }

// Few tokens: the shape that just holds them. Many: wgmma where it fills half of the device.
int choose_kernel(const mqc_linear_args& args, const Device& device) {
  if (args.rows <= 8) return MQC_LINEAR_MMA_8;
  if (args.rows <= 16) return MQC_LINEAR_MMA_16;
  if (args.rows <= 32 && !has_float_rows(args)) return MQC_LINEAR_MMA_32;
  if (args.rows <= 64) return MQC_LINEAR_MMA_64;
  if (has_float_rows(args))
    return kernel_shape(MQC_LINEAR_MMA_128, args).shared_bytes <= device.shared_bytes ? MQC_LINEAR_MMA_128
                                                                                     : MQC_LINEAR_MMA_64;
  const KernelShape wgmma = kernel_shape(MQC_LINEAR_WGMMA, args);
  const int64_t tiles = ceil_div(args.n, wgmma.channels) * ceil_div(args.rows, wgmma.tokens);
  if (device.arch == 90 && 2 * tiles >= device.multiprocessors) return MQC_LINEAR_WGMMA;
  return MQC_LINEAR_MMA_128;
}

// Enough blocks to fill the device once, but at least two steps of k a block, and no more bytes of
// partial sums than of weights.
int choose_split(const mqc_linear_args& args, const Device& device, const KernelShape& shape, int64_t blocks) {
  const int64_t target = static_cast<int64_t>(device.multiprocessors) * shape.blocks_per_multiprocessor;
  const int64_t by_steps = ceil_div(args.k, kTileInputs) / (2 * shape.warps_k);
  const int64_t by_bytes = args.k * tile_bytes(args.layout) / (kTileChannels * kTileInputs * 4 * shape.tokens);
  int64_t split = target / blocks;
  if (split > by_steps) split = by_steps;
  if (split > by_bytes) split = by_bytes;
  return split < 1 ? 1 : static_cast<int>(split);
}

int check_shape(const mqc_linear_args* args) {
  MQC_REQUIRE(args != nullptr, "mqc_linear: args is NULL");
  MQC_CHECK(check_size(args->size, sizeof(mqc_linear_args), "mqc_linear_args"));
  MQC_REQUIRE(args->layout >= MQC_LAYOUT_W4_64X128 && args->layout <= MQC_LAYOUT_W8_64X128_G128,
              "mqc_linear: layout %d is unknown", args->layout);
  MQC_REQUIRE(args->kernel >= MQC_LINEAR_AUTO && args->kernel <= MQC_LINEAR_WGMMA, "mqc_linear: kernel %d is unknown",
              args->kernel);
  MQC_REQUIRE(args->rows >= 0 && args->rows < (int64_t{1} << 31) - 128 && args->n > 0 &&
                  args->n < (int64_t{1} << 31) - 256,
              "mqc_linear: %lld rows, %lld channels", static_cast<long long>(args->rows),
              static_cast<long long>(args->n));
  MQC_REQUIRE(args->k > 0 && args->k <= kMaxInputs, "mqc_linear: k is %lld, 1..%d are exact in int32",
              static_cast<long long>(args->k), kMaxInputs);
  MQC_REQUIRE(args->split_k >= 0, "mqc_linear: split_k is %d", args->split_k);
  MQC_REQUIRE(args->x_dtype == 0 || args->x_dtype == MQC_I8 || has_float_rows(*args),
              "mqc_linear: x_dtype %d is not int8, bf16 or f16", args->x_dtype);
  return MQC_OK;
}

int fill_params(const mqc_linear_args& args, LinearParams& p) {
  MQC_REQUIRE(args.x != nullptr && args.w != nullptr && args.w_scale != nullptr && args.y != nullptr,
              "mqc_linear: x, w, w_scale or y is NULL");
  MQC_REQUIRE(aligned16(args.x) && aligned16(args.w), "mqc_linear: x and w are not 16-byte aligned");
  const bool floats = has_float_rows(args);
  const int in_chunk = floats ? 8 : 16;  // of 16 bytes
  MQC_REQUIRE(args.x_stride % in_chunk == 0 && args.x_stride >= args.k,
              "mqc_linear: x_stride %lld is not a multiple of %d of at least k = %lld",
              static_cast<long long>(args.x_stride), in_chunk, static_cast<long long>(args.k));
  MQC_REQUIRE(args.y_stride >= args.n, "mqc_linear: y_stride %lld is below n", static_cast<long long>(args.y_stride));
  MQC_REQUIRE(args.residual == nullptr || args.residual_stride >= args.n,
              "mqc_linear: residual_stride %lld is below n", static_cast<long long>(args.residual_stride));
  MQC_REQUIRE((args.x_split == nullptr) == (args.w_split == nullptr) &&
                  (args.x_split == nullptr) == (args.split_columns == 0),
              "mqc_linear: x_split, w_split and split_columns come together");
  MQC_REQUIRE(args.split_columns >= 0 && args.split_columns <= kMaxSplitColumns,
              "mqc_linear: %d split columns, at most %d", args.split_columns, kMaxSplitColumns);
  MQC_REQUIRE(args.x_split == nullptr || args.x_split_stride >= args.split_columns,
              "mqc_linear: x_split_stride %lld is below the columns", static_cast<long long>(args.x_split_stride));
  const int bytes = dtype_bytes(args.dtype);
  MQC_REQUIRE(bytes >= 2, "mqc_linear: dtype %d is not bf16, f16 or f32", args.dtype);
  p = LinearParams{};
  if (floats) {
    MQC_REQUIRE(args.dtype == args.x_dtype || args.dtype == MQC_F32,
                "mqc_linear: dtype %d for rows of dtype %d: it is the same or f32", args.dtype, args.x_dtype);
    MQC_REQUIRE(args.x_scale == nullptr && args.modality_kind == MQC_MODALITY_NONE,
                "mqc_linear: rows of floats have no activation scale");
    p.scale_bytes = scale_bytes(args.layout);
    p.group_log2 = p.scale_bytes == 1024 ? 0 : p.scale_bytes == 512 ? 1 : 2;
  } else {
    MQC_CHECK(check_modality(p.rows_scale, args.modality_kind, args.x_scale, args.modality, args.rows,
                             args.rows_per_sequence, "mqc_linear"));
  }
  p.x = static_cast<const int8_t*>(args.x);
  p.w = static_cast<const uint8_t*>(args.w);
  p.w_scale = args.w_scale;
  p.bias = args.bias;
  p.x_split = args.x_split;
  p.w_split = args.w_split;
  p.residual = args.residual;
  p.y = args.y;
  p.x_stride = args.x_stride * (floats ? 2 : 1);
  p.y_stride = args.y_stride;
  p.residual_stride = args.residual_stride;
  p.x_split_stride = args.x_split_stride;
  p.rows = static_cast<int32_t>(args.rows);
  p.n = static_cast<int32_t>(args.n);
  p.k = static_cast<int32_t>(args.k);
  p.channel_tiles = static_cast<int32_t>(ceil_div(args.n, kTileChannels));
  p.input_tiles = static_cast<int32_t>(ceil_div(args.k, kTileInputs));
  p.split_columns = args.split_columns;
  p.dtype = args.dtype;
  const int vector = 16 / bytes;
  const bool y_vectors = args.n % vector == 0 && args.y_stride % vector == 0 && aligned16(args.y);
  const bool add_vectors =
      args.residual == nullptr || (args.residual_stride % vector == 0 && aligned16(args.residual));
  p.vector_io = y_vectors && add_vectors ? 1 : 0;
  return MQC_OK;
}

}  // namespace

KernelShape kernel_shape(int kernel, const mqc_linear_args& args) {
  if (has_float_rows(args)) {
    const int scales = scale_bytes(args.layout);
    return by_half_format(args, [&](auto format) -> KernelShape {
      using Row = typename decltype(format)::Row;
      constexpr int kBits = decltype(format)::kBits;
      switch (kernel) {
        case MQC_LINEAR_MMA_8: return half_shape_of<Half8<Row, kBits>>(scales);
        case MQC_LINEAR_MMA_16: return half_shape_of<Half16<Row, kBits>>(scales);
        case MQC_LINEAR_MMA_64: return half_shape_of<Half64<Row, kBits>>(scales);
        default: return half_shape_of<Half128<Row, kBits>>(scales);
      }
    });
  }
  return by_format(args.layout, [&](auto format) -> KernelShape {
    using Format = decltype(format);
    switch (kernel) {
      case MQC_LINEAR_MMA_8: return shape_of<Mma8<Format>>();
      case MQC_LINEAR_MMA_16: return shape_of<Mma16<Format>>();
      case MQC_LINEAR_MMA_32: return shape_of<Mma32<Format>>();
      case MQC_LINEAR_MMA_64: return shape_of<Mma64<Format>>();
      case MQC_LINEAR_MMA_128: return shape_of<Mma128<Format>>();
      default: {
        using Shape = WgmmaShape<Format>;
        return {Shape::kChannels, Shape::kTokens, 1, 1, Shape::kSharedBytes};
      }
    }
  });
}

int plan_linear(const mqc_linear_args& args, const Device& device, LinearPlan& plan) {
  plan.kernel = args.kernel == MQC_LINEAR_AUTO ? choose_kernel(args, device) : args.kernel;
  if (plan.kernel == MQC_LINEAR_WGMMA && device.arch != 90)
    return fail(MQC_ERROR_UNSUPPORTED, "mqc_linear: wgmma needs compute capability 9.0, the device has %d.%d",
                device.arch / 10, device.arch % 10);
  if (has_float_rows(args) && !takes_float_rows(plan.kernel))
    return fail(MQC_ERROR_UNSUPPORTED, "mqc_linear: kernel %d takes rows of int8", plan.kernel);
  const KernelShape shape = kernel_shape(plan.kernel, args);
  if (shape.shared_bytes > device.shared_bytes)
    return fail(MQC_ERROR_UNSUPPORTED, "mqc_linear: kernel %d needs %lld bytes of shared memory, the device has %d",
                plan.kernel, static_cast<long long>(shape.shared_bytes), device.shared_bytes);
  plan.blocks = ceil_div(args.n, shape.channels) * ceil_div(args.rows, shape.tokens);
  plan.split_k = 1;
  plan.partial_bytes = 0;
  if (plan.kernel == MQC_LINEAR_WGMMA || args.rows == 0) return MQC_OK;
  const int64_t input_tiles = ceil_div(args.k, kTileInputs);
  plan.split_k = args.split_k > 0 ? args.split_k : choose_split(args, device, shape, plan.blocks);
  if (plan.split_k > input_tiles) plan.split_k = static_cast<int>(input_tiles);
  if (plan.split_k == 1) return MQC_OK;
  MQC_REQUIRE(plan.blocks <= kCounters, "mqc_linear: split_k of %lld blocks, at most %d can share",
              static_cast<long long>(plan.blocks), kCounters);
  plan.partial_bytes = plan.blocks * plan.split_k * shape.channels * shape.tokens * 4;
  return MQC_OK;
}

}  // namespace mqc

using namespace mqc;

extern "C" {

int mqc_linear_workspace(const mqc_linear_args* args, int64_t* bytes) {
  MQC_REQUIRE(bytes != nullptr, "mqc_linear_workspace: bytes is NULL");
  MQC_CHECK(check_shape(args));
  Device device;
  MQC_CHECK(current_device(device));
  *bytes = 0;
  if (args->kernel != MQC_LINEAR_AUTO || args->split_k > 0) {
    LinearPlan plan;
    MQC_CHECK(plan_linear(*args, device, plan));
    if (plan.partial_bytes > 0) *bytes = kCounterBytes + plan.partial_bytes;
    return MQC_OK;
  }
  // A split is chosen only where all its blocks run at once: that bounds the sums of any rows.
  for (int kernel = MQC_LINEAR_MMA_8; kernel <= MQC_LINEAR_MMA_128; ++kernel) {
    if (has_float_rows(*args) && !takes_float_rows(kernel)) continue;
    const KernelShape shape = kernel_shape(kernel, *args);
    const int64_t blocks = static_cast<int64_t>(device.multiprocessors) * shape.blocks_per_multiprocessor;
    const int64_t needed = kCounterBytes + blocks * shape.channels * shape.tokens * 4;
    if (needed > *bytes) *bytes = needed;
    if (shape.tokens >= args->rows) break;
  }
  return MQC_OK;
}

int mqc_linear_choice(const mqc_linear_args* args, int32_t* kernel, int32_t* split_k) {
  MQC_REQUIRE(kernel != nullptr && split_k != nullptr, "mqc_linear_choice: kernel or split_k is NULL");
  MQC_CHECK(check_shape(args));
  Device device;
  MQC_CHECK(current_device(device));
  LinearPlan plan;
  MQC_CHECK(plan_linear(*args, device, plan));
  *kernel = plan.kernel;
  *split_k = plan.split_k;
  return MQC_OK;
}

int mqc_linear(const mqc_linear_args* args, void* stream) {
  MQC_CHECK(check_shape(args));
  if (args->rows == 0) return MQC_OK;
  LinearParams params;
  MQC_CHECK(fill_params(*args, params));
  Device device;
  MQC_CHECK(current_device(device));
  LinearPlan plan;
  MQC_CHECK(plan_linear(*args, device, plan));
  params.split_k = plan.split_k;
  if (plan.split_k > 1) {
    MQC_CHECK(check_workspace(args->workspace, args->workspace_bytes, kCounterBytes + plan.partial_bytes));
    params.counters = static_cast<uint32_t*>(args->workspace);
    params.partial = static_cast<uint8_t*>(args->workspace) + kCounterBytes;
  }
  if (has_float_rows(*args))
    return by_half_format(*args,
                          [&](auto format) { return launch_linear_half<decltype(format)>(params, plan, stream); });
  return by_format(args->layout, [&](auto format) {
    using Format = decltype(format);
    if (plan.kernel == MQC_LINEAR_WGMMA) return launch_linear_wgmma<Format>(params, device, stream);
    return launch_linear_mma<Format>(params, plan, stream);
  });
}

}  // extern "C"
