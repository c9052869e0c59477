// LinearW4A8 and LinearW8A8. Weights in the kernels' layout are read where onnxruntime has them, which
// is the mapped file; those in the reference layout are packed when the session is made.
#include <sys/mman.h>
#include <unistd.h>

#include "call.h"
#include "mqc_kernels.h"

namespace mqc_onnx {
namespace {

void check(const Variant& variant, mqc_status status, const char* what) {
    if (status != MQC_OK)
        throw std::runtime_error("ai.mqc::" + variant.op_type() + ": " + what + ": " +
                                 mqc_status_text(status));
}

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

class Linear : public Kernel {
  public:
    Linear(const Variant& variant, const Ort::ConstKernelInfo& info, int threads)
        : threads_(threads) {
        const Constant weight(variant, info, "qweight"), scale(variant, info, "w_scale");
        const bool packed = variant.name == "LinearW4A8", group = variant.has("group");
        const bool ready = variant.has("c16k4");
        shape_.bits = packed ? 4 : 8;
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

    void compute(Call& call) const override {
        const Variant& variant = call.variant();
        const Tensor x = call.input("xq");
        call.require(x.rank() >= 1 && x.last() == shape_.k, "xq", x,
                     ("[..., " + std::to_string(shape_.k) + "]").c_str());
        std::vector<int64_t> result = x.shape;
        result.back() = shape_.n;

        mqc_linear_call linear = {};
        linear.shape = shape_;
        linear.m = x.rows();
        linear.packed = weight_ ? weight_.get() : call.input("qweight").data;
        linear.w_scale = scale_.get();
        linear.xq = x.data;
        linear.x_unsigned = !variant.has("s8");
        const mqc_row_scales scales = call.row_scales("x_scale", x);
        linear.x_scale = scales.scale;
        linear.modality_form = scales.mask    ? MQC_MODALITY_MASK
                               : scales.count ? MQC_MODALITY_COUNT
                                              : MQC_MODALITY_NONE;
        linear.modality = scales.mask ? static_cast<const void*>(scales.mask) : scales.count;
        linear.sequence = scales.tokens;
        if (variant.has("bias")) {
            const Tensor bias = call.input("bias");
            call.require(bias.rank() == 1 && bias.count == shape_.n, "bias", bias, "[N]");
            linear.bias = bias.as<float>();
        }
        if (variant.has("split")) {
            const Tensor split = call.input("x_split");
            std::vector<int64_t> wanted = x.shape;
            wanted.back() = rank_;
            call.require(split.shape == wanted, "x_split", split, text_of(wanted).c_str());
            linear.split = rank_;
            linear.x_split = split.as<float>();
            linear.w_split = split_.get();
        }
        if (variant.has("residual")) {
            const Tensor residual = call.input("residual");
            call.require(residual.shape == result, "residual", residual, text_of(result).c_str());
            linear.residual = residual.as<float>();
        }
        linear.y = call.output<float>(0, result);
        if (linear.m == 0) return;

        const mqc_threads threads = {Call::parallel_for, &call, threads_};
        const int64_t bytes = mqc_linear_workspace_bytes(&linear, threads_);
        if (bytes < 0) check(variant, static_cast<mqc_status>(bytes), "shapes");
        linear.workspace = scratch(bytes / static_cast<int64_t>(sizeof(float)) + 1);
        check(variant, mqc_linear(&linear, &threads), "linear");
    }

  private:
    // N and K of a weight in layout C16K4; the sizes of its axes are compared with these later.
    void set_tiled_shape(const Constant& weight, const Constant& scale) {
        const std::vector<int64_t>& s = weight.shape;
        const int64_t step = 32 / shape_.bits, most = int64_t{1} << 20;
        weight.require(s.size() == 5 && s[3] == 16 && s[4] == 4, "[blocks, groups, steps, 16, 4]");
        weight.require(s[1] > 0 && s[1] < most && s[2] > 0 && s[2] < most && s[2] * step % 8 == 0,
                       "groups of a multiple of 8 input channels");
        shape_.k = s[1] * s[2] * step;
        shape_.n = scale.shape.empty() ? 0 : scale.shape[0];
    }

    static Block<float> columns(const Variant& variant, const Constant& values, int64_t width) {
        const int64_t n = values.shape[0], count = mqc_columns_count(n, width);
        if (count < 0) check(variant, static_cast<mqc_status>(count), values.name);
        Block<float> made = allocate<float>(count);
        check(variant, mqc_columns_pack(n, width, values.as<float>(), made.get()), values.name);
        return made;
    }

    mqc_linear_shape shape_ = {};
    Block<uint8_t> weight_;
    Block<float> scale_, split_;
    int64_t rank_ = 0;
    int threads_;
};

}  // namespace

Kernel* make_linear(const Variant& variant, const Ort::ConstKernelInfo& info, int threads) {
    return new Linear(variant, info, threads);
}

}  // namespace mqc_onnx
