// What attention with and without a cache share.
#pragma once

#include "call.h"

namespace mqc_onnx {

// MQC_ROTARY_... by a variant's flags.
int rotary_of(const Variant& variant);
// Inputs cos and sin, checked, where `a.rotary` wants them. Batch, tokens and dim are known.
void read_angles(const Call& call, mqc_attention& a);
// All phases on the session's threads. There is at least one task.
void run_attention(Call& call, const mqc_attention& a);

Kernel* make_attention(const Variant& variant, const Ort::ConstKernelInfo& info);
Kernel* make_attention_full(const Variant& variant, const Ort::ConstKernelInfo& info);

}  // namespace mqc_onnx
