// Linear tiles in 256-bit vectors without a dot product instruction: any processor with AVX2.
#include "linear_ymm.h"

namespace mqc {
const LinearIsa linear_avx2 = {"avx2", kRows, kPanel, 8, false, pack_rows_interleaved,
                               tile, nullptr, 0, nullptr, nullptr};
}
