// Attention of a few tokens over a cache.
#pragma once

#include "mqc_layers.h"

namespace mqc::MQC_ISA {

void attend_few(const mqc_attention* a, const mqc_attention_plan* plan, float* workspace,
                float* scratch, int64_t task);

}  // namespace mqc::MQC_ISA
