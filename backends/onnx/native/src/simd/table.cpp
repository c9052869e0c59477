#include "simd/table.h"

namespace mqc::MQC_ISA {

const Table table = {
    quantize_row,     rms_norm_quantize, quantize,       hadamard,         activation_quantize,
    embedding,        rank_update,       attention_append, attention_pack, attention_attend,
    attention_combine, &float_kernel,
};

}  // namespace mqc::MQC_ISA
