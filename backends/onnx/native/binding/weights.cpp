#include "weights.h"

#include <sys/mman.h>
#include <unistd.h>

namespace mqc_onnx {
namespace {

// Gives the memory of a weight that has been packed back to the system. onnxruntime maps weights from
// their file and keeps the mapping; its pages, once read, would count beside the packed copy. Nothing
// is lost: a page that is read again comes from the file (MADV_PAGEOUT, unlike MADV_DONTNEED, is safe
// for memory of any kind).
void page_out(const void* data, int64_t bytes) {
#ifdef MADV_PAGEOUT
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t start = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t last = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
    const uintptr_t end = last / page * page;
    if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_PAGEOUT);
#endif
}

// Starts to read a mapped weight from its file, if it is not in memory.
void will_need(const void* data, int64_t bytes) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t start = reinterpret_cast<uintptr_t>(data) / page * page;
    const uintptr_t end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes);
    madvise(reinterpret_cast<void*>(start), end - start, MADV_WILLNEED);
}

Block<float> columns(const Variant& variant, const Constant& values, int64_t width) {
    const int64_t n = values.shape[0], count = mqc_columns_count(n, width);
    if (count < 0) check(variant, static_cast<mqc_status>(count), values.name);
    Block<float> made = allocate<float>(count);
    check(variant, mqc_columns_pack(n, width, values.as<float>(), made.get()), values.name);
    return made;
}

}  // namespace

void check(const Variant& variant, mqc_status status, const char* what) {
    if (status != MQC_OK)
        throw std::runtime_error("ai.mqc::" + variant.op_type() + ": " + what + ": " +
                                 mqc_status_text(status));
}

Weights::Weights(const Variant& variant, const Ort::ConstKernelInfo& info, int bits) {
    const Constant weight(variant, info, "qweight"), scale(variant, info, "w_scale");
    const bool packed = bits == 4, group = variant.has("group");
    const bool ready = variant.has("c16k4");
    shape_.bits = bits;
    shape_.layout = MQC_LAYOUT_C16K4;
    if (ready) {
        set_tiled_shape(weight, scale);
    } else {
        weight.require(weight.shape.size() == 2, "a matrix");
        shape_.n = weight.shape[0];
        shape_.k = packed ? 2 * weight.shape[1] - variant.has("odd") : weight.shape[1];
    }
    scale.require(scale.shape.size() == (group ? 2u : 1u) && scale.shape[0] == shape_.n,
                  group ? "[N, groups]" : "[N]");
    shape_.groups = group ? scale.shape[1] : 1;
    scale.require(shape_.groups > 0 && shape_.k % shape_.groups == 0,
                  "groups that divide the input channels");
    const int64_t bytes = mqc_linear_packed_bytes(&shape_);
    if (bytes < 0) check(variant, static_cast<mqc_status>(bytes), "qweight");
    if (ready) {
        weight.require(weight.shape[1] == shape_.groups &&
                           bytes == weight.shape[0] * weight.shape[1] * weight.shape[2] * 64,
                       "[ceil(N / 16), groups, K / groups / (8 or 4), 16, 4] of w_scale's N");
        will_need(weight.data, bytes);
    } else {
        weight_ = allocate<uint8_t>(bytes);
        check(variant, mqc_linear_pack(&shape_, weight.data, weight_.get()), "qweight");
        page_out(weight.data, weight.shape[0] * weight.shape[1]);
    }
    scale_ = columns(variant, scale, shape_.groups);
    if (variant.has("split")) {
        const Constant split(variant, info, "w_split");
        split.require(split.shape.size() == 2 && split.shape[0] == shape_.n, "[N, rank]");
        rank_ = split.shape[1];
        if (rank_ > 0) split_ = columns(variant, split, rank_);
    }
}

// N and K of a weight in layout C16K4; the sizes of its axes are compared with these later.
void Weights::set_tiled_shape(const Constant& weight, const Constant& scale) {
    const std::vector<int64_t>& s = weight.shape;
    const int64_t step = 32 / shape_.bits, most = int64_t{1} << 20;
    weight.require(s.size() == 5 && s[3] == 16 && s[4] == 4, "[blocks, groups, steps, 16, 4]");
    weight.require(s[1] > 0 && s[1] < most && s[2] > 0 && s[2] < most && s[2] * step % 8 == 0,
                   "groups of a multiple of 8 input channels");
    shape_.k = s[1] * s[2] * step;
    shape_.n = scale.shape.empty() ? 0 : scale.shape[0];
}

}  // namespace mqc_onnx
